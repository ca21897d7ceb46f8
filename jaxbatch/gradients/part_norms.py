r"""Signal and noise of a gradient from the parts that a training step works through anyway: only their squared norms are needed.

The formulas are those of :mod:`jaxbatch.gradients.signal_and_trace`.

Axes: P parts, K groups, L layers (1 if they are not told apart), V = 1 + L values with layers, else 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PyTree

from jaxbatch.gradients.accumulators import Accumulator, Measured
from jaxbatch.gradients.signal_and_trace import pairs_of, signal_and_trace
from jaxbatch.kinds import check_fields
from jaxbatch.sums import Losses, Weighted, totals, weight_of, widen, zero_sum

_FADED = 1e-4  # of a moment: what is left of it tells nothing


class NoiseMonitor(NamedTuple):
    """How :class:`jaxbatch.FitConfig` measures the noise of gradients while it trains.

    ``every`` is the number of batches between measurements. Batches are counted as updates / K, with the K that a run has now: if K
    changes when a run goes on, batches are measured as often as before, but not those that the earlier K would have measured.
    ``halflife``, in batches, is that of the running averages.
    ``parts`` is the least number of parts of a batch: a step that has fewer works in smaller microbatches. ``per_layer`` measures
    each layer too. ``preconditioned`` divides gradients by :math:`\\sqrt{\\hat v} + \\epsilon`, with the second moments v that the
    optimizer had before the batch; ``b2`` and ``eps`` are then those of the optimizer, whose state does not hold them. Parameters whose
    moments tell nothing, as those of a token that has not come yet, are left out, and records say what share they are.
    """

    every: int = 1
    halflife: float = 100.0
    parts: int = 2
    per_layer: bool = False
    preconditioned: bool = False
    b2: float = 0.999
    eps: float = 1e-8


class Spread(NamedTuple):
    """What the parts of a batch add to the noise: of one part, or summed over several."""

    squares: Float[Array, "*P L"]  # |g_k|^2 / m_k; with weights |g_k|^2
    parts: Float[Array, "*P"]  # 1, or 0 for a part of fillers alone; with weights w_k^2
    weight: Float[Array, "*P"] | None = None  # w_k


class Metric(NamedTuple):
    """How the gradients of a batch are measured, and whether they are."""

    weights: PyTree  # of the squares; None: all 1
    wanted: Bool[Array, ""]
    left_out: Float[Array, ""] | None = None  # the share of the parameters whose weight is 0


class BatchNoise(NamedTuple):
    """The statistics of a batch, or of S batches, stacked: those of the whole gradient, then of each layer."""

    signal: Float[Array, "*S V"]
    trace: Float[Array, "*S V"]
    measured: Bool[Array, "*S"]  # where False, the others mean nothing
    left_out: Float[Array, "*S"] | None = None  # with a metric: the share of the parameters that have none


class WithNoise(NamedTuple):
    """What a monitored step returns in place of its losses."""

    losses: Losses
    noise: BatchNoise


def metric_of(monitor: NoiseMonitor, params: PyTree, opt_state: PyTree, batches: Int32[Array, ""] | int) -> Metric:
    """The metric of a batch, ``batches`` batches after the start of training."""
    wanted = jnp.asarray(batches % monitor.every == 0)
    if not monitor.preconditioned:
        return Metric(None, wanted)
    weights, known = inverse_moments(monitor, opt_state, params)
    leaves = jax.tree.leaves(weights)
    left_out = sum((leaf == 0).sum(dtype=jnp.float32) for leaf in leaves) / float(sum(leaf.size for leaf in leaves))
    return Metric(weights, wanted & known, left_out)


def spread_sum(monitor: NoiseMonitor, metric: Metric, params: PyTree, weighted: bool) -> Accumulator:
    """What measures each part of a batch.

    Example:
        >>> spreads = spread_sum(NoiseMonitor(), Metric(None, jnp.array(True)), jnp.zeros(2), False)
        >>> [float(leaf.sum()) for leaf in spreads.of_part(Measured(jnp.array([3.0, 1.0]), jnp.zeros(5), None))[:2]]
        [2.0, 1.0]
    """

    def spread(part: Measured) -> Spread:
        squares, weight = squared_norms(part.gradient, metric.weights, monitor.per_layer), weight_of(part.losses)
        if weight is not None:
            weight = weight.astype(squares.dtype)
            return Spread(squares, weight**2, weight)
        count = jnp.asarray(totals(part.losses).size if part.number is None else part.number).astype(squares.dtype)
        return Spread(squares / jnp.maximum(count, 1), jnp.minimum(count, 1))

    def none() -> Spread:
        losses = Weighted(jnp.zeros(1), jnp.zeros(1)) if weighted else jnp.zeros(1)
        shapes = jax.eval_shape(spread, Measured(zero_sum(params), losses, None))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    return Accumulator(none, spread, wanted=metric.wanted)


def statistics_of_parts(monitor: NoiseMonitor, metric: Metric, spread: Spread, gradient: PyTree, batch_size: int) -> BatchNoise:
    """Signal and trace of a batch from the spread of all parts and their summed gradient; not measured if it has a single part."""
    squares, parts, weight = spread
    square = squared_norms(gradient, metric.weights, monitor.per_layer)
    if weight is None:
        several, mean = parts > 1, square / float(batch_size) ** 2
        signal, trace = signal_and_trace(mean, squares - batch_size * mean, jnp.maximum(parts - 1, 1), batch_size)
    else:  # where nothing can be told, both are 0
        pairs, several = pairs_of(weight, parts)
        mean = jnp.where(several, square / jnp.where(several, weight**2, 1), 0)
        signal, trace = signal_and_trace(mean, batch_size * jnp.where(several, squares - parts * mean, 0), pairs, batch_size)
    if monitor.per_layer:  # the sum over layers is the value of the whole gradient
        signal, trace = (jnp.concatenate([value.sum(keepdims=True), value]) for value in (signal, trace))
    return BatchNoise(signal, trace, metric.wanted & several, metric.left_out)


def squared_norms(gradient: PyTree, metric: PyTree, per_layer: bool) -> Float[Array, "L"]:
    """The squared norms of a gradient's layers, or of all of it, with weights if there is a ``metric``.

    Example:
        >>> squared_norms({"a": jnp.ones(2), "b": {"w": jnp.ones(3), "c": jnp.ones(1)}}, None, True).tolist()
        [2.0, 4.0]
    """
    gradient = widen(gradient)
    squares = jax.tree.map(jnp.square, gradient) if metric is None else jax.tree.map(lambda g, w: g * g * w, gradient, metric)
    of_leaves = [jnp.sum(leaf) for leaf in jax.tree.leaves(squares)]
    layers = layers_of(gradient) if per_layer else [""] * len(of_leaves)
    return jnp.stack([sum(norm for norm, own in zip(of_leaves, layers, strict=True) if own == layer) for layer in dict.fromkeys(layers)])


def layers_of(params: PyTree) -> list[str]:
    """The layer of each leaf: where the tree first has several branches, a branch is a layer.

    Example:
        >>> layers_of({"params": {"Conv_0": {"bias": 0.0, "kernel": 0.0}, "Dense_0": 0.0}}), layers_of(0.0)
        (['Conv_0', 'Conv_0', 'Dense_0'], ['params'])
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    depth = 0
    while all(len(path) > depth + 1 for path in paths) and len({path[depth] for path in paths}) == 1:
        depth += 1
    return [jax.tree_util.keystr(path[depth : depth + 1], simple=True) or "params" for path in paths]


def inverse_moments(monitor: NoiseMonitor, opt_state: PyTree, params: PyTree) -> tuple[PyTree, Bool[Array, ""]]:
    r""":math:`(\sqrt{\hat v} + \epsilon)^{-2}` from an optimizer's state, and whether it has seen a gradient yet.

    They come from before the batch. If they held the batch's own gradient, its norm would no longer be unbiased.

    Where the last gradient of a parameter is long ago, as for the row of a rare token, its second moment has faded, or is 0 still, and the
    next gradient divided by it would be larger than all others together: up to 1e16 with an epsilon of 1e-8, where the optimizer, which
    adds the new gradient to the moment first, makes an ordinary step. So such parameters get the weight 0. The first moment m, which fades
    sooner, shows them: they have :math:`|m| \le 10^{-4} \sqrt v`, which comes after about 100 updates without a gradient (with the usual
    decays), and by chance to one in 3,000 others. An optimizer without first moments: :math:`v \le 10^{-4}` times the leaf's mean.

    Raises:
        ValueError: the state does not hold exactly one tree of second moments (``nu``) of all parameters.
    """
    with_moments = lambda node: hasattr(node, "nu")
    states = [node for node in jax.tree.leaves(opt_state, is_leaf=with_moments) if with_moments(node)]
    layout: Callable[[PyTree], object] = jax.tree.structure
    if len(states) != 1 or layout(states[0].nu) != layout(params):
        raise ValueError(
            f"monitor.preconditioned=True: the optimizer's state has {len(states)} trees of second moments (nu), and exactly one of all "
            "parameters is needed, as optax.adam has. Take preconditioned=False."
        )
    moments, count = widen(states[0].nu), getattr(states[0], "count", None)
    first = getattr(states[0], "mu", None)
    if layout(first) == layout(moments):
        fresh = jax.tree.map(lambda m, v: jnp.abs(m) > _FADED * jnp.sqrt(v), widen(first), moments)
    else:
        fresh = jax.tree.map(lambda v: v > _FADED * v.mean(), moments)
    if isinstance(count, jax.Array):
        seen = count > 0
        correction = jnp.where(seen, 1 - jnp.power(monitor.b2, count.astype(jnp.float32)), 1)
    else:  # then it is a tuple's method, as for optax.rmsprop, which does not correct the bias of its start
        seen, correction = jnp.array(True), jnp.ones(())
    weight = lambda v, fresh: jnp.where(fresh, (jnp.sqrt(v / correction.astype(v.dtype)) + monitor.eps) ** -2, 0)
    return jax.tree.map(weight, moments, fresh), seen


def check_monitor(monitor: Any, opt_state: PyTree, params: PyTree) -> None:
    """Raises a ValueError for settings that cannot be measured; only shapes are used.

    Example:
        >>> check_monitor(NoiseMonitor(parts=1), (), jnp.ones(2))
        Traceback (most recent call last):
        ValueError: monitor.parts=1 must be at least 2: noise shows in how parts differ.
    """
    if not isinstance(monitor, NoiseMonitor):
        raise ValueError(f"monitor={monitor!r} must be a jaxbatch.NoiseMonitor, or None for no measurement.")
    check_fields(monitor, "monitor.")
    if monitor.preconditioned:
        jax.eval_shape(lambda state, params: inverse_moments(monitor, state, params), opt_state, params)
