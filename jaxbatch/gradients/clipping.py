r"""Sums over per-example gradients, clipped or changed by any function, without keeping all of these gradients.

:func:`jaxbatch.per_example_gradients` returns B copies of the parameters. A sum needs the memory of one copy and of the
gradients of a microbatch.

With :class:`jaxbatch.Weighted` losses an example's gradient is that of its own mean, total / weight, as in
:func:`jaxbatch.per_example_gradients`. Every example counts once in a sum: its weight only matters within it.

Axes: B examples, M examples of a microbatch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxbatch.gradients.groups import LossFn, check_loss, of_each_device
from jaxbatch.gradients.independence import check_independent_losses
from jaxbatch.gradients.norms import norm
from jaxbatch.gradients.parts import CPU_VMAP, Part, fold
from jaxbatch.kinds import checked
from jaxbatch.sums import cast_like, loss_of_one, widen


class ClippedSum(NamedTuple):
    """The sum of clipped gradients, a pytree like the parameters, and the gradients' norms before clipping."""

    total: PyTree
    norms: Float[Array, "B"]


@checked
def clipped_gradient_sum(
    loss_fn: LossFn, params: PyTree, batch: PyTree, max_norm: float | Float[Array, ""], *, microbatch_size: int | None = None
) -> ClippedSum:
    r""":math:`\sum_i g_i \min(1, C / |g_i|)`: every example's gradient scaled down to a norm of at most C, then summed.

    Differentially private training adds noise to this sum. Clipping also limits the effect of one odd example on a step.

    Args:
        loss_fn: ``(params, batch) -> losses``, one loss per example.
        params: pytree of floating-point arrays.
        batch: pytree with leading axis B.
        max_norm: C, above 0, the largest norm of an example's gradient over all leaves.
        microbatch_size: M, the number of gradients in memory at a time, each as large as the parameters. ``None``: 64.

    Returns:
        ``total`` like ``params``, summed in float32 at least and cast at the end; ``norms`` ``(B,)``. Divide by B for the mean.

    Raises:
        ValueError: ``max_norm`` is not above 0, and all errors of :func:`jaxbatch.per_example_gradients`.

    Example:
        >>> loss_fn = lambda w, x: 0.5 * (x - w) ** 2  # the gradient of an example is w - x
        >>> total, norms = clipped_gradient_sum(loss_fn, jnp.array(0.0), jnp.array([1.0, -3.0, 5.0]), max_norm=2.0)
        >>> total.item(), norms.tolist()  # -1 + 2 - 2
        (-1.0, [1.0, 3.0, 5.0])

    References:
        Abadi et al., `Deep Learning with Differential Privacy <https://arxiv.org/abs/1607.00133>`_, 2016: algorithm 1.
    """

    def clip(gradient):
        length = norm(gradient)
        scale = jnp.where(length > max_norm, max_norm / length, 1.0)  # the quotient for a norm of 0 is not used
        return jax.tree.map(lambda leaf: leaf * scale, widen(gradient)), length

    total, norms = _fold(loss_fn, params, batch, clip, microbatch_size)
    return ClippedSum(cast_like(total, params), norms)


@checked
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
        function: f, which takes one example's gradient (a pytree like ``params``) and returns any pytree of arrays.

    Returns:
        The sum of f's results over the examples, in float32 at least.

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
    """Sums over examples; ``function(gradient)`` returns ``(a part of the sum, a result to keep for each example)``."""
    loss, batch_size = check_loss(loss_fn, params, batch)
    check_independent_losses(loss, params, batch)
    params = of_each_device(params, batch)

    def measure(one):
        summed, kept = function(jax.grad(lambda p: loss_of_one(loss(p, one)[0]))(params))
        return Part(summed, jax.tree.map(lambda leaf: leaf[None], kept))

    return fold(measure, batch, 1, method="vmap", at_a_time=min(batch_size, microbatch_size or CPU_VMAP))[:2]
