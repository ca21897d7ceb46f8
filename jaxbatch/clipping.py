r"""Sums over per-example gradients that never keep them: clipped, squared, counted, whatever a function makes of one.

:func:`jaxbatch.per_example_gradients` returns B copies of the parameters. A sum needs one, and the gradients of a microbatch.

Axes: B examples, M examples of a microbatch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from jaxbatch.groups import CPU_VMAP, LossFn, check_loss, losses_and_aux
from jaxbatch.independence import check_independent_losses
from jaxbatch.microbatches import check_microbatch_size
from jaxbatch.sums import add, cast_like, squared_norm, widen, zero_sum


class ClippedSum(NamedTuple):
    """The sum of clipped gradients, like the parameters, and the gradients' norms before clipping."""

    total: PyTree
    norms: Float[Array, "B"]


def clipped_gradient_sum(
    loss_fn: LossFn, params: PyTree, batch: PyTree, max_norm: float | Float[Array, ""], *, microbatch_size: int | None = None
) -> ClippedSum:
    r""":math:`\sum_i g_i \min(1, C / |g_i|)`: every example's gradient scaled down to a norm of at most C, then summed.

    What differentially private training adds its noise to, and what keeps one odd example from deciding a step.

    Args:
        loss_fn: ``(params, batch) -> losses``, one loss per example.
        params: pytree of floating-point arrays.
        batch: pytree with leading axis B.
        max_norm: C, above 0, of the whole gradient over all leaves.
        microbatch_size: examples whose gradients are there at a time, M; the memory is that of M copies of the parameters.
            ``None``: 64.

    Returns:
        ``total`` like ``params``, summed in float32 at least and cast at the end; ``norms`` ``(B,)``. Divide by B for the mean.

    Raises:
        ValueError: a ``max_norm`` not above 0, and all of :func:`jaxbatch.per_example_gradients`.

    Example:
        >>> loss_fn = lambda w, x: 0.5 * (x - w) ** 2  # the gradient of an example is w - x
        >>> total, norms = clipped_gradient_sum(loss_fn, jnp.array(0.0), jnp.array([1.0, -3.0, 5.0]), max_norm=2.0)
        >>> total.item(), norms.tolist()  # -1 + 2 - 2
        (-1.0, [1.0, 3.0, 5.0])

    References:
        Abadi et al., `Deep Learning with Differential Privacy <https://arxiv.org/abs/1607.00133>`_, 2016: algorithm 1.
    """
    if not isinstance(max_norm, jax.core.Tracer) and not max_norm > 0:
        raise ValueError(f"max_norm={max_norm} must be above 0.")

    def clip(gradient):
        norm = jnp.sqrt(squared_norm(gradient))
        scale = jnp.where(norm > max_norm, max_norm / norm, 1.0)  # where first: a norm of 0 divides nothing
        return jax.tree.map(lambda leaf: leaf * scale, widen(gradient)), norm

    total, norms = _fold(loss_fn, params, batch, clip, microbatch_size)
    return ClippedSum(cast_like(total, params), norms)


def sum_of_gradients(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    function: Callable[[PyTree], PyTree],
    *,
    microbatch_size: int | None = None,
) -> PyTree:
    r""":math:`\sum_i f(g_i)` over the examples of a batch, in the memory of a microbatch's gradients.

    Args:
        loss_fn, params, batch, microbatch_size: see :func:`clipped_gradient_sum`.
        function: f, of one example's gradient (a pytree like ``params``) to any pytree of arrays.

    Returns:
        What f returns, summed over the examples, in float32 at least.

    Raises:
        ValueError: as :func:`jaxbatch.per_example_gradients`.

    Example:
        >>> loss_fn = lambda w, x: 0.5 * (x - w) ** 2
        >>> x = jnp.array([1.0, -3.0, 5.0])
        >>> sum_of_gradients(loss_fn, jnp.array(0.0), x, lambda g: {"squares": g**2, "positive": g > 0}, microbatch_size=2)
        {'positive': Array(1, dtype=int32), 'squares': Array(35., dtype=float32)}
    """
    return _fold(loss_fn, params, batch, lambda gradient: (function(gradient), None), microbatch_size)[0]


def _fold(loss_fn, params, batch, function, microbatch_size: int | None):
    """``function(gradient) -> (what is summed, what is kept for each example)``."""
    batch_size = check_loss(loss_fn, params, batch)
    check_independent_losses(loss_fn, params, batch)
    size = min(batch_size, CPU_VMAP if microbatch_size is None else microbatch_size)
    check_microbatch_size(size)

    def one(example):
        alone = jax.tree.map(lambda leaf: leaf[None], example)
        return function(jax.grad(lambda p: losses_and_aux(loss_fn, p, alone)[0].sum())(params))

    def add_part(total, part):
        found, kept = jax.vmap(one)(part)
        return add(total, jax.tree.map(lambda leaf: leaf.sum(0), widen(found))), kept

    cut = lambda start, stop: jax.tree.map(lambda leaf: leaf[start:stop], batch)
    shapes = jax.eval_shape(lambda part: jax.vmap(one)(part)[0], cut(0, 1))
    total = zero_sum(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], jnp.int32 if leaf.dtype == bool else leaf.dtype), shapes))
    full, kept = batch_size // size * size, []
    parts = jax.tree.map(lambda leaf: leaf[:full].reshape(-1, size, *leaf.shape[1:]), batch)
    total, found = lax.scan(add_part, total, parts)
    kept.append(jax.tree.map(lambda leaf: leaf.reshape(full, *leaf.shape[2:]), found))
    if full < batch_size:
        total, found = add_part(total, cut(full, batch_size))
        kept.append(found)
    return total, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *kept)
