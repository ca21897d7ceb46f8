r"""Products of the mean loss's Hessian matrix with vectors, without the matrix.

The Hessian :math:`H = \nabla^2_\theta\, \tfrac1B \sum_i \ell_i(\theta)` of P parameters has :math:`P^2` entries. A product
:math:`Hv` is the derivative of the gradient in the direction v (forward over reverse mode), and costs about two gradients.

Axes: B examples, P parameters, m examples of a microbatch.
"""

import jax
from jaxtyping import Array, Float, PyTree

from jaxbatch.gradients.cut import Cut
from jaxbatch.gradients.groups import Loss, LossFn, check_loss, leading_axis
from jaxbatch.gradients.parts import Part, fold
from jaxbatch.kinds import checked
from jaxbatch.sums import cast_like, or_nan, totals, weight_of, widen


@checked
def hessian_vector_product(
    loss_fn: LossFn, params: PyTree, vector: PyTree, batch: PyTree, *, microbatch_size: int | None = None, has_aux: bool = False
) -> PyTree[Float[Array, "..."]]:
    r"""The product :math:`Hv` of the Hessian of the batch's mean loss with a vector.

    It is summed over microbatches in float32 at least, so that it needs the memory of one microbatch. Every microbatch size gives the
    same product up to the order of summation. Parameters of lower precision are cast to float32 first, because differences of
    gradients in bfloat16 have hardly a digit. With :class:`jaxbatch.Weighted` losses the mean is weighted.

    Batch normalisation in training mode couples the examples: the moments are those of the microbatch, the derivative goes through
    them, and another microbatch size is another function, as in training. A state of running moments is not used and not changed. For
    the function that is evaluated, hand in a loss that applies the model with its running moments.

    Args:
        loss_fn: ``(params, batch) -> losses``, one loss per example; or ``(losses, aux)`` with ``has_aux``. It is differentiated
            in forward mode too, which ``jax.custom_vjp`` forbids.
        params: pytree of floating-point arrays.
        vector: a pytree like ``params``.
        batch: pytree with leading axis B.
        microbatch_size: the most examples worked on at a time, as in :func:`jaxbatch.accumulated_gradient`; ``None``: all.
        has_aux: whether ``loss_fn`` returns ``(losses, aux)``; aux is left out.

    Returns:
        A pytree like ``params``, float32 at least.

    Raises:
        ValueError: ``vector`` is not like ``params``, and all errors of :func:`jaxbatch.accumulated_gradient`.

    Example:
        >>> import jax.numpy as jnp
        >>> loss_fn = lambda w, x: 0.5 * (x @ w) ** 2
        >>> hessian_vector_product(loss_fn, jnp.zeros(2), jnp.array([1.0, 1.0]), jnp.array([[2.0, 0.0], [0.0, 4.0]])).tolist()
        [2.0, 8.0]

    References:
        Pearlmutter, *Fast exact multiplication by the Hessian*, 1994.
    """
    loss, _ = check_loss(loss_fn, params, batch, has_aux)
    check_like(params, vector, "vector")
    return product(loss, widen(params), vector, batch, microbatch_size)


def product(loss: Loss, params: PyTree, vector: PyTree, batch: PyTree, microbatch_size: int | None) -> PyTree:
    """:func:`hessian_vector_product` without its checks, at parameters of float32 at least."""
    batch_size = leading_axis(batch)
    vector = cast_like(vector, params)

    def measure(part):
        near_mean = 2.0 ** -min(14, leading_axis(part).bit_length())  # exact, and what is computed in float16 within the loss stays finite

        def total(p):
            losses, _ = loss(p, part)
            return widen(totals(losses)).sum() * near_mean, weight_of(losses)

        _, tangent, weight = jax.jvp(jax.grad(total, has_aux=True), (params,), (vector,), has_aux=True)
        return Part((jax.tree.map(lambda leaf: leaf / near_mean, tangent), weight))

    size = Cut(batch_size, microbatch_size=microbatch_size).at_a_time
    summed, weight = fold(measure, batch, size, at_a_time=1).summed  # two side by side compile twice as long, and need twice the memory
    return jax.tree.map(lambda leaf: leaf / (batch_size if weight is None else or_nan(weight).astype(leaf.dtype)), summed)


def check_like(params: PyTree, other: PyTree, name: str) -> None:
    """Raises a ValueError that names the first leaf of ``other`` that is not of the shape of its leaf in ``params``.

    Example:
        >>> import jax.numpy as jnp
        >>> check_like({"w": jnp.ones(2)}, {"w": jnp.ones(3)}, "vector")
        Traceback (most recent call last):
        ValueError: vector['w'] has shape (3,), and params['w'] has shape (2,): vector must be a pytree like params.
    """
    wanted, got = str(jax.tree.structure(params)), str(jax.tree.structure(other))
    if wanted != got:
        raise ValueError(f"{name} must be a pytree like params, {wanted}, but is {got}.")
    for (path, leaf), own in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(other), strict=True):
        shapes = [getattr(one, "shape", ()) for one in (own, leaf)]
        if shapes[0] != shapes[1]:
            at = jax.tree_util.keystr(path)
            raise ValueError(f"{name}{at} has shape {shapes[0]}, and params{at} has shape {shapes[1]}: {name} must be a pytree like params.")
