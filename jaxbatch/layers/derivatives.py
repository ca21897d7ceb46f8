"""Functions whose gradient is computed in another way than by differentiating their operations."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, PyTree


def with_backward(forward: Callable[..., tuple[Array, PyTree]], backward: Callable[[PyTree, Array], tuple[Array, ...]]) -> Callable[..., Array]:
    r"""The function ``forward`` with ``backward`` as its gradient, in every mode of differentiation.

    ``jax.custom_vjp`` would forbid forward mode and so Hessian-vector products. This function instead defines the *tangent*
    (the derivative of forward mode) as the transpose of ``backward``, which it is by definition. Reverse mode transposes it
    again, which gives ``backward`` itself. If ``backward`` computes something from the residuals alone, wrap that in
    ``jax.checkpoint``; otherwise it may be computed in the forward pass and kept in memory.

    Args:
        forward: ``(*primals) -> (result, residuals)``.
        backward: ``(residuals, cotangent) -> one cotangent for each primal``, linear in the cotangent.

    Example:
        >>> cube = with_backward(lambda x: (x**3, x), lambda x, d: (3 * x**2 * d,))
        >>> jax.grad(cube)(2.0).item(), jax.jvp(cube, (2.0,), (1.0,))[1].item(), jax.hessian(cube)(2.0).item()
        (12.0, 12.0, 12.0)
    """

    @jax.custom_jvp
    def function(*primals):
        return forward(*primals)[0]

    def rule(primals, tangents):
        result, residuals = forward(*primals)
        wanted = [index for index, tangent in enumerate(tangents) if type(tangent) is not SymbolicZero]
        if not wanted:
            return result, jnp.zeros_like(result)

        def cotangents(cotangent):
            everything = backward(residuals, cotangent)
            return [everything[index] for index in wanted]

        transpose = jax.linear_transpose(cotangents, result)
        return result, transpose([tangents[index] for index in wanted])[0]

    function.defjvp(rule, symbolic_zeros=True)
    return function
