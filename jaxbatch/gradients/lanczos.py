"""The Hessian among a few vectors that its products with one make, by Lanczos' method, and where their space ends.

Axes: B examples, P parameters, k steps.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree
from matfree import decomp

from jaxbatch.gradients.groups import Loss
from jaxbatch.gradients.hessian import product
from jaxbatch.sums import widen


def operator(loss: Loss, params: PyTree, batch: PyTree, microbatch_size: int | None) -> tuple[Array, Callable[[Array], Array]]:
    """The parameters as one vector, and the function that multiplies such a vector by the Hessian.

    Example:
        >>> flat, multiply = operator(Loss(lambda w, x: 0.5 * (x * w[None] ** 2).sum(-1)), jnp.ones(2), jnp.array([[3.0, -1.0]]), None)
        >>> multiply(flat).tolist()
        [3.0, -1.0]
    """
    flat, unravel = ravel_pytree(widen(params))

    def multiply(vector):
        turned = product(loss, unravel(flat), unravel(vector), batch, microbatch_size)
        return ravel_pytree(turned)[0].astype(flat.dtype)

    return flat, multiply


def outside(spaces: Float[Array, "k P"], vector: Float[Array, "P"]) -> Float[Array, "P"]:
    """The part of a vector orthogonal to the rows of ``spaces``, computed twice because of rounding.

    Example:
        >>> outside(jnp.array([[1.0, 0.0]]), jnp.array([2.0, 3.0])).tolist()
        [0.0, 3.0]
    """
    for _ in range(2):
        vector = vector - (spaces @ vector) @ spaces
    return vector


def lanczos(loss: Loss, microbatch_size: int | None, steps: int) -> Callable[..., tuple[Array, Array, Array]]:
    """``(params, batch, spaces, start) -> (orthogonal vectors (k, P), the Hessian among them (k, k), how much is left)``, outside of ``spaces``.

    Example:
        >>> run = lanczos(Loss(lambda w, x: 0.5 * (x * w[None] ** 2).sum(-1)), None, 1)
        >>> _, matrix, left = run(jnp.ones(2), jnp.array([[3.0, -1.0]]), jnp.zeros((0, 2)), jnp.array([1.0, 0.0]))
        >>> matrix.tolist(), float(left)
        ([[3.0]], 0.0)
    """

    def run(params, batch, spaces, start):
        _, multiply = operator(loss, params, batch, microbatch_size)
        multiply_outside = lambda vector: outside(spaces, multiply(vector))
        # matfree's tridiag_sym is this with the two off-diagonals averaged, which hides where a space ends.
        basis = decomp.hessenberg(steps, reortho="full", custom_vjp=False)(multiply_outside, start)
        return basis.Q_tall, basis.J_small, jnp.linalg.norm(basis.residual)

    return run


def tridiagonal(matrix: np.ndarray, rest: float, products: np.ndarray, known: float) -> tuple[np.ndarray, bool]:
    """The symmetric matrix among the vectors up to where their space ends, and whether it has ended.

    After its end, what is left to make the next vector of is rounding errors, or nothing, which gives NaN.

    Args:
        matrix: the Hessian among the vectors, with what was left for the next one below the diagonal.
        rest: what was left after the last one.
        products: of the vectors with each other.
        known: the largest absolute eigenvalue of earlier spaces, whose rounding errors are in this one.

    Example:
        >>> small, ended = tridiagonal(np.array([[2.0, 1.0, 0.4], [1.0, 3.0, 0.4], [0.0, 1e-20, 5.0]]), 0.3, np.eye(3), 0.0)
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
