"""Functions whose gradient is computed another way than the function's own operations would give."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, PyTree


def with_backward(forward: Callable[..., tuple[Array, PyTree]], backward: Callable[[PyTree, Array], tuple[Array, ...]]) -> Callable[..., Array]:
    r"""The function ``forward`` with ``backward`` as its gradient, in every mode of differentiation.

    ``jax.custom_vjp`` would forbid forward mode and so Hessian-vector products. Here the *tangent* is defined, as
    the transpose of ``backward`` (the two are each other's transpose by definition); reverse mode transposes it
    once more and arrives at ``backward`` itself. What ``backward`` computes from the residuals alone is better
    wrapped in ``jax.checkpoint``: otherwise it counts as work that can be done, and kept, in the forward pass.

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
