r"""How curved the mean loss is: the ends of its Hessian's spectrum by Lanczos' method, and the trace by Hutchinson's.

Both need products of the Hessian with vectors alone (:func:`jaxbatch.hessian_vector_product`). The recursions are those of
``matfree`` (Krämer et al., `Gradients of functions of large matrices <https://arxiv.org/abs/2405.17277>`_, 2024); here are the
products over microbatches, the spaces that end early, and what the results may be trusted for.

Axes: B examples, P parameters, k steps, n eigenvalues, S samples.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key, PyTree
from matfree import decomp, stochtrace

from jaxbatch.gradients.groups import Loss, LossFn, check_loss
from jaxbatch.gradients.hessian import product
from jaxbatch.intervals import Interval, interval
from jaxbatch.kinds import checked
from jaxbatch.machine.compiling import compile_ahead, take_out_constants
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
    loss, _ = check_loss(loss_fn, params, batch, has_aux)
    first, _ = ravel_pytree(widen(params))
    size = first.size
    if not 1 <= count <= size:
        raise ValueError(f"count={count} must be between 1 and the number of parameters, {size}.")
    if num_steps < count:
        raise ValueError(f"num_steps={num_steps} must be at least count={count}.")
    spaces, ritz = jnp.zeros((0, size), first.dtype), list[tuple[float, Array]]()
    for number in range(count):
        steps = min(num_steps, size - len(spaces))
        start = _outside(spaces, jax.random.normal(jax.random.fold_in(key, number), (size,), first.dtype))
        arguments = (params, batch, spaces, start)
        space, matrix, rest = _compiled(_lanczos(loss, microbatch_size, steps), *arguments)(*arguments)
        known = max((abs(value) for value, _ in ritz), default=0.0)
        small, ended = _tridiagonal(np.asarray(matrix, float), float(rest), np.asarray(space @ space.T), known)
        if not np.isfinite(small).all():
            return HessianEigenvalues(*(np.full(count, np.nan) for _ in range(4)))
        values, vectors = np.linalg.eigh(small)
        space = space[: len(small)]
        ritz += [(value, jnp.asarray(vectors[:, index], first.dtype) @ space) for index, value in enumerate(values)]
        spaces = jnp.concatenate([spaces, space])
        if not ended or len(spaces) == size:
            break
    ritz.sort(key=lambda pair: -pair[0])
    multiply, pairs = _multiplication(loss, params, batch, microbatch_size), []
    for _, vector in (*ritz[:count], *ritz[: -count - 1 : -1]):
        vector = vector / jnp.linalg.norm(vector)
        turned = multiply(vector)
        value = vector @ turned
        pairs.append((float(value), float(jnp.linalg.norm(turned - value * vector))))
    values, residuals = np.array(pairs).T
    return HessianEigenvalues(values[:count], residuals[:count], values[count:], residuals[count:])


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
    loss, _ = check_loss(loss_fn, params, batch, has_aux)

    multiply, (flat, _) = _multiplication(loss, params, batch, microbatch_size), ravel_pytree(widen(params))
    draw, sample = stochtrace.sampler_signs(flat, num=1), stochtrace.monte_carlo_trace()
    values = np.array([float(sample(multiply, draw(one)[0])) for one in jax.random.split(key, num_samples)])
    return interval(values)


def _compiled(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """The compiled ``function``, or its program from an earlier call."""
    run, constants = take_out_constants(function, *arguments)
    program = compile_ahead(jax.jit(run), constants, *arguments)
    return lambda *arguments: program(constants, *arguments)


def _multiplication(loss: Loss, params: PyTree, batch: PyTree, microbatch_size: int | None) -> Callable[[Array], Array]:
    """``v -> Hv`` as one compiled program."""
    flat, _ = ravel_pytree(widen(params))
    program = _compiled(lambda p, b, v: _operator(loss, p, b, microbatch_size)[1](v), params, batch, flat)
    return lambda vector: program(params, batch, vector)


def _operator(loss: Loss, params: PyTree, batch: PyTree, microbatch_size: int | None):
    """The parameters as one vector, and the function that multiplies such a vector by the Hessian."""
    flat, unravel = ravel_pytree(widen(params))

    def multiply(vector):
        turned = product(loss, unravel(flat), unravel(vector), batch, microbatch_size)
        return ravel_pytree(turned)[0].astype(flat.dtype)

    return flat, multiply


def _outside(spaces: Float[Array, "k P"], vector: Float[Array, "P"]) -> Float[Array, "P"]:
    """The part of a vector orthogonal to the rows of ``spaces``, computed twice because of rounding."""
    for _ in range(2):
        vector = vector - (spaces @ vector) @ spaces
    return vector


def _lanczos(loss: Loss, microbatch_size: int | None, steps: int):
    """``(params, batch, spaces, start) -> (orthogonal vectors (k, P), the Hessian among them (k, k), how much is left)``, outside of ``spaces``."""

    def run(params, batch, spaces, start):
        _, multiply = _operator(loss, params, batch, microbatch_size)
        outside = lambda vector: _outside(spaces, multiply(vector))
        # matfree's tridiag_sym is this with the two off-diagonals averaged, which hides where a space ends.
        basis = decomp.hessenberg(steps, reortho="full", custom_vjp=False)(outside, start)
        return basis.Q_tall, basis.J_small, jnp.linalg.norm(basis.residual)

    return run


def _tridiagonal(matrix: np.ndarray, rest: float, products: np.ndarray, known: float) -> tuple[np.ndarray, bool]:
    """The symmetric matrix among the vectors up to where their space ends, and whether it has ended.

    After its end, what is left to make the next vector of is rounding errors, or nothing, which gives NaN.

    Args:
        matrix: the Hessian among the vectors, with what was left for the next one below the diagonal.
        rest: what was left after the last one.
        products: of the vectors with each other.
        known: the largest absolute eigenvalue of earlier spaces, whose rounding errors are in this one.

    Example:
        >>> small, ended = _tridiagonal(np.array([[2.0, 1.0, 0.4], [1.0, 3.0, 0.4], [0.0, 1e-20, 5.0]]), 0.3, np.eye(3), 0.0)
        >>> small.tolist(), ended
        ([[2.0, 1.0], [1.0, 3.0]], True)
    """
    eps = np.finfo(products.dtype).eps
    left = np.append(np.diag(matrix, -1), rest)
    diagonal = np.diag(matrix)
    for length in range(1, len(matrix) + 1):
        scale = max(known, np.abs(diagonal[:length]).max(), np.abs(left[: length - 1]).max(initial=0))
        following = products[length, : length + 1] - np.eye(length + 1)[length] if length < len(matrix) else np.zeros(1)
        if ended := bool(not left[length - 1] > eps**0.75 * scale or not np.abs(following).max() <= eps**0.5):
            break
    return np.diag(diagonal[:length]) + np.diag(left[: length - 1], 1) + np.diag(left[: length - 1], -1), ended
