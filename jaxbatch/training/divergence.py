"""The losses of batches: their mean; and divergence: the first loss that is not finite, or a state that is no longer finite.

With weights there may be batches in which nothing counts, as one of masked texts alone. They have no loss: no 0, which would lower a
mean, and no NaN, which would look as if the run had diverged.

A loss may be finite while its gradient is not, for example for a square root at 0. Then the parameters are lost although
every loss still looks right. So each record checks both.

Some optimizers are there to leave such batches out, as ``optax.apply_if_finite`` does. With them the state alone is judged.

Axes: S steps, one batch each, R runs.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num, PyTree

from jaxbatch.gradients.updates import Optimizer, update
from jaxbatch.machine.constants import call_compiled
from jaxbatch.sums import Losses, Weighted


def batch_means(losses: Losses | Num[np.ndarray, "..."]) -> Float[np.ndarray, "*R S"]:
    """The mean losses of batches, from what :func:`jaxbatch.sums.loss_of_batch` returns of each; NaN where nothing counts.

    Example:
        >>> batch_means(Weighted(jnp.array([6.0, 0.0]), jnp.array([2.0, 0.0]))).tolist()
        [3.0, nan]
    """
    if not isinstance(losses, Weighted):
        return np.asarray(losses)
    total, weight = (np.asarray(leaf, np.float64) for leaf in losses)
    with np.errstate(over="ignore"):
        return np.where(weight == 0, np.nan, total / np.where(weight == 0, 1, weight))


def mean_over_batches(losses: Losses | Num[np.ndarray, "..."]) -> Float[np.ndarray, "*R"]:
    """The mean of the batches' mean losses; batches in which nothing counts are left out, and NaN if there is no other.

    Example:
        >>> mean_over_batches(Weighted(jnp.array([6.0, 0.0, 1.0]), jnp.array([2.0, 0.0, 1.0]))).item()
        2.0
    """
    means = batch_means(losses)
    if not isinstance(losses, Weighted):
        return np.asarray(means.mean(-1, dtype=np.float64))
    counts = np.asarray(losses.weight) != 0
    return np.where(counts.any(-1), np.where(counts, means, 0).sum(-1) / np.maximum(counts.sum(-1), 1), np.nan)


def are_nonfinite(losses: Losses | Num[np.ndarray, "..."]) -> Bool[np.ndarray, "*R S"]:
    """Which batches have a loss that is NaN or infinite; one in which nothing counts has none.

    Example:
        >>> are_nonfinite(Weighted(jnp.array([6.0, 0.0, jnp.inf]), jnp.array([2.0, 0.0, 0.0]))).tolist()
        [False, False, True]
    """
    bad = ~np.isfinite(batch_means(losses))
    return bad & ((np.asarray(losses.weight) != 0) | ~np.isfinite(losses.total)) if isinstance(losses, Weighted) else bad


def first_nonfinite(losses: Losses | Num[np.ndarray, "..."]) -> int | None:
    """Index of the first loss that is NaN or infinite, or None.

    Example:
        >>> first_nonfinite(jnp.array([0.5, jnp.inf, jnp.nan]))
        1
    """
    bad = np.flatnonzero(are_nonfinite(losses))
    return int(bad[0]) if len(bad) else None


def judge(losses: Losses | Num[np.ndarray, "..."], finite: bool, skips: Callable[[], bool]) -> tuple[float, int | None]:
    """The mean loss of a record, and the index of the batch with which the run diverged, or None.

    Args:
        losses: of S batches.
        finite: whether the state after them is finite.
        skips: whether the optimizer leaves out what is not finite, see :func:`skips_nonfinite`; only called where that matters. The
            mean is then that of the other batches.

    Example:
        >>> judge(np.array([0.5, np.nan]), True, lambda: False)[1], judge(np.array([0.5, np.nan]), True, lambda: True)
        (1, (0.5, None))
    """
    bad = first_nonfinite(losses)
    if bad is not None and finite and skips():
        means = batch_means(losses)
        known = means[np.isfinite(means)]
        return float(known.mean(dtype=np.float64)) if len(known) else np.nan, None
    if bad is None and not finite:
        bad = len(batch_means(losses)) - 1
    return float(mean_over_batches(losses)), bad


def skips_nonfinite(optimizer: Optimizer, params: PyTree) -> bool:
    """Whether an update with a gradient and a loss of NaN leaves parameters and the optimizer's state finite.

    Args:
        optimizer: any that :func:`jaxbatch.gradients.updates.update` takes.
        params: finite ones.

    Example:
        >>> import optax
        >>> skips_nonfinite(optax.adam(0.1), jnp.ones(2)), skips_nonfinite(optax.apply_if_finite(optax.adam(0.1), 3), jnp.ones(2))
        (False, True)
    """
    begun = params, optimizer.init(params)
    nothing = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
    after = call_compiled(lambda params, state, nothing: update(optimizer, nothing, state, params, jnp.array(jnp.nan)), *begun, nothing)
    return bool(make_is_finite(begun)(after))


def make_is_finite(start: PyTree, *, runs: bool = False) -> Callable[[PyTree], Bool[Array, "*R"]]:
    """Makes a compiled check whether all leaves of a state that were finite at the start are still finite.

    Parts of an optimizer's state may start as infinite, such as the best loss so far in ``optax.contrib.reduce_on_plateau``.
    Such parts are not checked.

    Args:
        start: the state at the start of training, any pytree. Leaves that are not floating-point, such as integers and keys,
            are not checked.
        runs: whether leaves have a leading axis R of runs; then each run is checked separately.

    Returns:
        ``is_finite(state)``, of shape ``()`` or ``(R,)``.

    Example:
        >>> is_finite = make_is_finite({"w": jnp.zeros(2), "best": jnp.array(jnp.inf)})
        >>> bool(is_finite({"w": jnp.ones(2), "best": jnp.array(jnp.inf)}))
        True
        >>> bool(is_finite({"w": jnp.array([0.0, jnp.nan]), "best": jnp.array(1.0)}))
        False
    """
    return make_check(which_are_finite(start), runs=runs)


def which_are_finite(start: PyTree) -> tuple[bool, ...]:
    """Which leaves of a state are floating-point and finite.

    Example:
        >>> which_are_finite([jnp.array(3), jnp.zeros(2), jnp.array(jnp.inf)])
        (False, True, False)
    """
    return tuple(_is_floating(leaf) and bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(start))


def make_check(watched: Sequence[bool], *, runs: bool = False) -> Callable[[PyTree], Bool[Array, "*R"]]:
    """:func:`make_is_finite`, from whether each leaf of the state is watched.

    Example:
        >>> bool(make_check([False, True])([jnp.array(jnp.nan), jnp.zeros(2)]))
        True
    """

    def one(state):
        leaves = [leaf for leaf, wanted in zip(jax.tree.leaves(state), watched, strict=True) if wanted]
        finite = [jnp.isfinite(leaf).all() for leaf in leaves]
        return jnp.stack(finite).all() if finite else jnp.array(True)

    return jax.jit(jax.vmap(one) if runs else one)


def _is_floating(leaf) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf) if not hasattr(leaf, "dtype") else leaf.dtype, jnp.inexact)
