r"""Signal and noise of a gradient from the parts that a training step works through anyway.

The formulas are those of :mod:`jaxbatch.gradients.signal_and_trace`, of what :mod:`jaxbatch.gradients.spreads` sums.

Axes: P parts, K groups, L layers (1 if they are not told apart), V = 1 + L values with layers, else 1.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PyTree

from jaxbatch.gradients.accumulators import Accumulator, Measured
from jaxbatch.gradients.signal_and_trace import pairs_of, signal_and_trace
from jaxbatch.gradients.spreads import Spread, layer_products, merged, spread_of, spread_over_devices
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
        >>> spreads = spread_sum(NoiseMonitor(), Metric(None, jnp.array(True)), jnp.zeros(()), False)
        >>> one, other = (spreads.of_part(Measured(jnp.array(total), jnp.zeros(5), None)) for total in (10.0, 20.0))
        >>> [float(number.sum()) for number in spreads.add(one, other)[:4]]  # 5 times the squares of -1 and 1
        [3.0, 10.0, 2.0, 10.0]
    """
    products = functools.partial(layer_products, metric=metric.weights, per_layer=monitor.per_layer)

    def of_part(part: Measured) -> Spread:
        weight = weight_of(part.losses)
        if weight is None:
            weight = jnp.asarray(totals(part.losses).size if part.number is None else part.number)
        return spread_of(part.gradient, weight, products, weighted)

    def none() -> Spread:
        losses = Weighted(jnp.zeros(1), jnp.zeros(1)) if weighted else jnp.zeros(1)
        shapes = jax.eval_shape(of_part, Measured(zero_sum(params), losses, None))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    over_devices = lambda axis, own: spread_over_devices(axis, own, products)
    return Accumulator(none, of_part, lambda one, other: merged(one, other, products), over_devices=over_devices, wanted=metric.wanted)


def statistics_of_parts(monitor: NoiseMonitor, metric: Metric, spread: Spread, gradient: PyTree, batch_size: int) -> BatchNoise:
    """Signal and trace of a batch from the spread of all parts and their summed gradient; not measured if it has a single part."""
    products = functools.partial(layer_products, metric=metric.weights, per_layer=monitor.per_layer)
    square, weight, parts = products(gradient, gradient), spread.weight, spread.parts
    if spread.along is None:
        several, of_mean = parts > 1, square / float(batch_size) ** 2
        signal, trace = signal_and_trace(of_mean, spread.squares, jnp.maximum(parts - 1, 1), batch_size)
    else:  # where nothing can be told, both are 0
        pairs, several = pairs_of(weight, parts)
        of_mean = jnp.where(several, square / jnp.where(several, weight**2, 1), 0)
        noise = spread.squares + 2 * products(spread.mean, spread.along)
        signal, trace = signal_and_trace(of_mean, batch_size * jnp.where(several, noise, 0), pairs, batch_size)
    if monitor.per_layer:  # the sum over layers is the value of the whole gradient
        signal, trace = (jnp.concatenate([value.sum(keepdims=True), value]) for value in (signal, trace))
    return BatchNoise(signal, trace, metric.wanted & several, metric.left_out)


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
