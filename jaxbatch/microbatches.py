"""Gradients summed over microbatches: the memory of one of them, whatever the batch.

Axes: B examples.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from jaxbatch.batches import even_part
from jaxbatch.compiling import compile_ahead
from jaxbatch.groups import LossFn, check_loss, leading_axis, losses_and_aux, side_by_side
from jaxbatch.layers import loops_are_slow
from jaxbatch.sums import add, mean_of_sum, widen, zero_sum


def accumulated_gradient(
    loss_fn: LossFn, params: PyTree, batch: PyTree, microbatch_size: int
) -> PyTree[Float[Array, "..."]]:
    r"""The gradient of the batch's mean loss, summed over microbatches: the memory of one of them.

    The sum is kept in float32 at least and cast to the parameters' types at the end. Equal to ``jax.grad`` of the mean loss up to the order of summation. A last microbatch that is not
    full counts by its number of examples. On CPU a model that is built on XLA's convolutions, which are slow in
    compiled loops, goes through a Python loop over a compiled accumulation; inside ``jit`` it has to be the loop.

    Args:
        loss_fn: ``(params, batch) -> losses``.
        params: pytree of floating-point arrays.
        batch: pytree with leading axis B.
        microbatch_size: examples worked on at a time, at most; need not divide B, though where a divisor is
            near, it is taken.

    Raises:
        ValueError: as :func:`per_example_gradients`.

    Example:
        >>> loss_fn = lambda w, x: 0.5 * (x - w) ** 2
        >>> accumulated_gradient(loss_fn, jnp.array(0.0), jnp.array([1.0, 3.0, 5.0]), 2).tolist()
        -3.0
    """
    batch_size = check_loss(loss_fn, params, batch)
    check_microbatch_size(microbatch_size)
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, batch)))
    if traced or not loops_are_slow(loss_fn, params, batch):
        return microbatch_gradient(loss_fn, params, batch, microbatch_size)[1]
    total, size = zero_sum(params), even_part(batch_size, microbatch_size)
    programs = {}
    for start in range(0, batch_size, size):
        part = jax.tree.map(lambda leaf: leaf[start : start + size], batch)
        length = leading_axis(part)
        if length not in programs:
            programs[length] = _compile_accumulate(loss_fn, total, params, part)
        total = programs[length](total, params, part)
    return mean_of_sum(total, batch_size, params)


def _compile_accumulate(loss_fn, *arguments):
    """``(total, params, microbatch) -> total``, in total's memory.

    The loss is traced at every call, for an object with the same hash may be another function by now; a program is compiled
    once for its text.
    """

    def accumulate(total, params, microbatch):
        gradient = jax.grad(lambda p: widen(losses_and_aux(loss_fn, p, microbatch)[0]).sum())(params)
        return add(total, gradient)

    return compile_ahead(jax.jit(accumulate, donate_argnums=0), *arguments, once=True)


def microbatch_gradient(loss_fn: LossFn, params: PyTree, batch: PyTree, microbatch_size: int, *, has_aux: bool = False):
    """Losses, gradient of their mean, and aux, summed over microbatches in a compiled loop.

    Returns:
        ``(losses, gradient, aux)``; aux has a leading axis of microbatches, or is None without ``has_aux``. Its leaves
        must have the same shapes for a last microbatch that is not full, as moments have.
    """
    batch_size = leading_axis(batch)
    microbatch_size = even_part(batch_size, microbatch_size)
    full = batch_size // microbatch_size * microbatch_size

    def accumulate(total, microbatch):
        def loss_sum(p):
            losses, aux = losses_and_aux(loss_fn, p, microbatch, has_aux)
            return widen(losses).sum(), (losses, aux)

        (_, found), gradient = jax.value_and_grad(loss_sum, has_aux=True)(params)
        return add(total, gradient), found

    total = zero_sum(params)
    cut = lambda start, stop: jax.tree.map(lambda leaf: leaf[start:stop], batch)
    losses, aux = [], []
    if full:
        head = jax.tree.map(lambda leaf: leaf[:full].reshape(-1, microbatch_size, *leaf.shape[1:]), batch)
        total, found = lax.scan(accumulate, total, head, unroll=side_by_side())
        losses.append(found[0].reshape(-1))
        aux.append(found[1])
    if full < batch_size:
        total, found = accumulate(total, cut(full, batch_size))
        losses.append(found[0])
        aux.append(jax.tree.map(lambda leaf: leaf[None], found[1]))
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *aux) if has_aux else None
    return jnp.concatenate(losses), mean_of_sum(total, batch_size, params), joined


def check_microbatch_size(microbatch_size: int) -> None:
    """Raises a ValueError for a size below 1."""
    if microbatch_size < 1:
        raise ValueError(f"microbatch_size={microbatch_size} must be at least 1.")
