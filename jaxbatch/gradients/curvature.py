r"""How curved the mean loss is: the ends of its Hessian's spectrum by Lanczos' method, and the trace by Hutchinson's.

Both need products of the Hessian with vectors alone (:func:`jaxbatch.hessian_vector_product`). The recursions are those of
``matfree`` (Krämer et al., `Gradients of functions of large matrices <https://arxiv.org/abs/2405.17277>`_, 2024); here are the
products over microbatches, the spaces that end early, and what the results may be trusted for.

Axes: B examples, P parameters, k steps, n eigenvalues, S samples.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key, PyTree
from matfree import stochtrace

from jaxbatch.gradients.groups import LossFn, check_loss
from jaxbatch.gradients.lanczos import lanczos, operator, outside, tridiagonal
from jaxbatch.intervals import Interval, interval
from jaxbatch.kinds import checked
from jaxbatch.machine.compiling import KeptPrograms
from jaxbatch.sums import widen


class HessianEigenvalues(NamedTuple):
    """Both ends of a spectrum; each value's residual ``|Hv - value * v|`` is the farthest that the nearest eigenvalue can be."""

    largest: Float[np.ndarray, "n"]  # descending
    largest_residuals: Float[np.ndarray, "n"]
    smallest: Float[np.ndarray, "n"]  # ascending
    smallest_residuals: Float[np.ndarray, "n"]


@checked
def hessian_eigenvalues(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    count: int = 1,
    *,
    key: Key[Array, ""],
    num_steps: int = 40,
    microbatch_size: int | None = None,
    has_aux: bool = False,
) -> HessianEigenvalues:
    r"""The largest and the smallest eigenvalues of the Hessian of the batch's mean loss, by Lanczos' method.

    The Hessian's action on the space of :math:`q, Hq, \dots, H^{k-1}q` for a random q is a small matrix, whose eigenvectors give
    vectors v. Each value is :math:`v^\top H v` for a v of length 1. So no value is above the largest eigenvalue or below the
    smallest, and a negative value proves that H has a negative eigenvalue. An eigenvalue of H lies within the residual
    :math:`|Hv - (v^\top H v) v|`, which is computed with one more product for each v and not from the recursion. If a residual is
    too large, take more steps. All this holds up to rounding, about :math:`10^{-6}` of the largest absolute eigenvalue in float32.

    The vectors are orthogonalised twice against all earlier ones, so none comes back through rounding. If the space ends
    before k steps, because H has fewer different eigenvalues, another begins orthogonal to it, up to ``count`` spaces. So repeated
    eigenvalues, zeros too, come as often as they are repeated. In a space that does not end, an *exactly* repeated one comes once.

    Args:
        loss_fn, params, batch, microbatch_size, has_aux: as :func:`jaxbatch.hessian_vector_product` takes them; see there for
            batch normalisation.
        count: n, eigenvalues at each end.
        key: of the random first vector.
        num_steps: k, products in a space; more than the P parameters are cut to P. k vectors of P numbers are kept.

    Returns:
        ``largest``, from the largest down, ``smallest``, from the smallest up, and their residuals; all NaN if a product is not
        finite. On CPU a model with XLA's convolutions is slow here, because the steps are a compiled loop.

    Raises:
        ValueError: ``count`` is below 1 or above P; ``num_steps`` is below ``count``; and all errors of
            :func:`jaxbatch.hessian_vector_product`.

    Example:
        >>> loss_fn = lambda w, x: 0.5 * (x * w[None] ** 2).sum(-1)
        >>> batch = jnp.array([[8.0, 1.0, -2.0], [2.0, 1.0, -2.0]])
        >>> found = hessian_eigenvalues(loss_fn, jnp.zeros(3), batch, count=2, key=jax.random.key(0))
        >>> found.largest.round(4).tolist(), found.smallest.round(4).tolist(), bool(found.largest_residuals.max() < 1e-4)
        ([5.0, 1.0], [-2.0, 1.0], True)

    References:
        Golub and Van Loan, *Matrix Computations*, 4th edition, sections 10.1 and 8.1; Parlett, *The Symmetric Eigenvalue Problem*,
        sections 4.5 and 13.
    """
    return Curvature(loss_fn, params, batch, microbatch_size, has_aux).eigenvalues(params, count, key=key, num_steps=num_steps)


@checked
def hessian_trace(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    num_samples: int = 32,
    *,
    key: Key[Array, ""],
    microbatch_size: int | None = None,
    has_aux: bool = False,
) -> Interval:
    r"""The trace of the Hessian of the batch's mean loss, by Hutchinson's estimate, with a 95% interval.

    The mean of :math:`z^\top H z` over vectors z of random signs is the trace, and its variance is twice the sum of the squared
    entries off the diagonal, divided by S. The interval is that of :func:`jaxbatch.interval`, because few large eigenvalues make the products skew.

    Args:
        loss_fn, params, batch, microbatch_size, has_aux: as :func:`jaxbatch.hessian_vector_product` takes them.
        num_samples: S, products.
        key: of the signs.

    Returns:
        The trace within its ends, with n = S; the ends are NaN for one sample. NaN if no product is finite. The interval covers the
        choice of signs, not that of the batch.

    Raises:
        ValueError: ``num_samples`` is below 1, and all errors of :func:`jaxbatch.hessian_vector_product`.

    Example:
        >>> loss_fn = lambda w, x: 0.5 * (x * w[None] ** 2).sum(-1)
        >>> found = hessian_trace(loss_fn, jnp.zeros(3), jnp.array([[5.0, 1.0, -2.0]]), 4, key=jax.random.key(0))
        >>> f"{found:.3f}"
        '4.000 [4.000, 4.000]'

    References:
        Hutchinson, *A stochastic estimator of the trace of the influence matrix*, 1989.
    """
    return Curvature(loss_fn, params, batch, microbatch_size, has_aux).trace(params, num_samples, key=key)


class Curvature:
    """The curvature of one loss over one batch at many parameters, with programs that are traced and compiled at their first use.

    Args:
        loss_fn, batch, microbatch_size, has_aux: as :func:`jaxbatch.hessian_vector_product` takes them. What the loss closes over is
            read once, so it must not change.
        params: of which only the shapes are used.

    Example:
        >>> of_loss = Curvature(lambda w, x: 0.25 * (x * w[None] ** 4).sum(-1), jnp.zeros(1), jnp.ones((2, 1)))
        >>> [of_loss.eigenvalues(jnp.array([at]), key=jax.random.key(0)).largest.tolist() for at in (1.0, 2.0)]
        [[3.0], [12.0]]
    """

    def __init__(self, loss_fn: LossFn, params: PyTree, batch: PyTree, microbatch_size: int | None = None, has_aux: bool = False):
        self._loss, _ = check_loss(loss_fn, params, batch, has_aux)
        self._batch, self._microbatch_size = batch, microbatch_size
        self._kept = KeptPrograms()

    def eigenvalues(self, params: PyTree, count: int = 1, *, key: Key[Array, ""], num_steps: int = 40) -> HessianEigenvalues:
        """See :func:`hessian_eigenvalues`."""
        first, _ = ravel_pytree(widen(params))
        size = first.size
        if not 1 <= count <= size:
            raise ValueError(f"count={count} must be between 1 and the number of parameters, {size}.")
        if num_steps < count:
            raise ValueError(f"num_steps={num_steps} must be at least count={count}.")
        spaces, ritz = jnp.zeros((0, size), first.dtype), list[tuple[float, Array]]()
        for number in range(count):
            steps = min(num_steps, size - len(spaces))
            start = outside(spaces, jax.random.normal(jax.random.fold_in(key, number), (size,), first.dtype))
            arguments = (params, self._batch, spaces, start)
            space, matrix, rest = self._kept(("lanczos", steps), lanczos(self._loss, self._microbatch_size, steps), *arguments)
            known = max((abs(value) for value, _ in ritz), default=0.0)
            small, ended = tridiagonal(np.asarray(matrix, float), float(rest), np.asarray(space @ space.T), known)
            if not np.isfinite(small).all():
                return HessianEigenvalues(*(np.full(count, np.nan) for _ in range(4)))
            values, vectors = np.linalg.eigh(small)
            space = space[: len(small)]
            ritz += [(value, jnp.asarray(vectors[:, index], first.dtype) @ space) for index, value in enumerate(values)]
            spaces = jnp.concatenate([spaces, space])
            if not ended or len(spaces) == size:
                break
        ritz.sort(key=lambda pair: -pair[0])
        multiply, pairs = self._multiplication(params), []
        for _, vector in (*ritz[:count], *ritz[: -count - 1 : -1]):
            vector = vector / jnp.linalg.norm(vector)
            turned = multiply(vector)
            value = vector @ turned
            pairs.append((float(value), float(jnp.linalg.norm(turned - value * vector))))
        values, residuals = np.array(pairs).T
        return HessianEigenvalues(values[:count], residuals[:count], values[count:], residuals[count:])

    def trace(self, params: PyTree, num_samples: int = 32, *, key: Key[Array, ""]) -> Interval:
        """See :func:`hessian_trace`."""
        multiply, (flat, _) = self._multiplication(params), ravel_pytree(widen(params))
        draw, sample = stochtrace.sampler_signs(flat, num=1), stochtrace.monte_carlo_trace()
        values = np.array([float(sample(multiply, draw(one)[0])) for one in jax.random.split(key, num_samples)])
        return interval(values)

    def _multiplication(self, params: PyTree) -> Callable[[Array], Array]:
        """``v -> Hv`` as one compiled program."""
        multiply = lambda p, b, v: operator(self._loss, p, b, self._microbatch_size)[1](v)
        return lambda vector: self._kept("multiply", multiply, params, self._batch, vector)
