"""The mean loss on the straight line between two sets of parameters.

Axes: B examples, L points.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree

from jaxbatch.gradients.cut import Cut
from jaxbatch.gradients.groups import LossFn, check_loss
from jaxbatch.gradients.hessian import check_like
from jaxbatch.gradients.parts import Part, fold
from jaxbatch.kinds import checked
from jaxbatch.machine.compiling import KeptPrograms
from jaxbatch.sums import cast_like, or_nan, totals, weight_of, widen


@checked
def loss_along_line(
    loss_fn: LossFn,
    params: PyTree,
    other: PyTree,
    batch: PyTree,
    points: Sequence[float] | np.ndarray,
    *,
    microbatch_size: int | None = None,
    has_aux: bool = False,
) -> Float[Array, "L"]:
    r"""The mean loss at :math:`(1 - t)\,\theta + t\,\theta'` for each point t.

    Args:
        loss_fn: ``(params, batch) -> losses``, one loss (or metric) per example; or ``(losses, aux)`` with ``has_aux``.
        params: :math:`\theta`, at t = 0.
        other: :math:`\theta'`, at t = 1; a pytree like ``params``.
        batch: pytree with leading axis B. The mean is over all of it, weighted with :class:`jaxbatch.Weighted` losses.
        points: L numbers; below 0 and above 1 the line goes on.
        microbatch_size: the most examples worked on at a time; ``None``: all. What holds for batch normalisation stands in
            :func:`jaxbatch.hessian_vector_product`.
        has_aux: whether ``loss_fn`` returns ``(losses, aux)``; aux is left out.

    Returns:
        L means, in float32 at least; one point after another is computed.

    Raises:
        ValueError: there is no point, or one is not finite; ``other`` is not like ``params``; and all errors of
            :func:`jaxbatch.accumulated_gradient`.

    Example:
        >>> loss_fn = lambda w, x: (x - w) ** 2
        >>> loss_along_line(loss_fn, jnp.array(0.0), jnp.array(2.0), jnp.ones(4), [0.0, 0.5, 1.0, 1.5]).tolist()
        [1.0, 0.0, 1.0, 4.0]

    References:
        Goodfellow et al., `Qualitatively characterizing neural network optimization problems
        <https://arxiv.org/abs/1412.6544>`_, 2015; Keskar et al., `On Large-Batch Training for Deep Learning
        <https://arxiv.org/abs/1609.04836>`_, 2017, section 2.2.1.
    """
    return LossLine(loss_fn, params, batch, microbatch_size, has_aux)(params, other, points)


class LossLine:
    """The mean loss of one batch on many lines, with programs that are traced and compiled at their first use.

    Args:
        loss_fn, batch, microbatch_size, has_aux: as :func:`loss_along_line` takes them. What the loss closes over is read once.
        params: of which only the shapes are used.

    Example:
        >>> line = LossLine(lambda w, x: (x - w) ** 2, jnp.zeros(()), jnp.ones(4))
        >>> [line(jnp.array(0.0), jnp.array(end), [0.0, 0.5]).tolist() for end in (2.0, 4.0)]
        [[1.0, 0.0], [1.0, 1.0]]
    """

    def __init__(self, loss_fn: LossFn, params: PyTree, batch: PyTree, microbatch_size: int | None = None, has_aux: bool = False):
        self._loss, self._batch_size = check_loss(loss_fn, params, batch, has_aux)
        self._batch, self._microbatch_size = batch, microbatch_size
        self._kept = KeptPrograms()

    def __call__(self, params: PyTree, other: PyTree, points: Sequence[float] | np.ndarray) -> Float[Array, "L"]:
        """See :func:`loss_along_line`."""
        check_like(params, other, "other")
        positions = np.asarray(points, float)
        if positions.ndim != 1 or positions.size == 0 or not np.isfinite(positions).all():
            raise ValueError(f"points={points!r} must be a list of at least one finite number.")
        size = Cut(self._batch_size, microbatch_size=self._microbatch_size).at_a_time

        def mean_at(params, other, batch, t):
            between = jax.tree.map(lambda a, b: (1 - t).astype(a.dtype) * a + t.astype(a.dtype) * b, widen(params), widen(other))
            between = cast_like(between, params)

            def measure(part):
                losses, _ = self._loss(between, part)
                return Part((widen(totals(losses)).sum(), weight_of(losses)))

            total, weight = fold(measure, batch, size).summed
            return total / (self._batch_size if weight is None else or_nan(weight))

        run = lambda params, other, batch, points: lax.map(lambda t: mean_at(params, other, batch, t), points)
        return self._kept("line", run, params, other, self._batch, jnp.asarray(positions, jnp.result_type(float)))
