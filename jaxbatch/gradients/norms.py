"""Norms and directions of gradients of any size: 1e20 and 1e-30, whose squares no float32 holds, are gradients too."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxbatch.sums import squared_norm, widen


def norm(tree: PyTree) -> Float[Array, ""]:
    """The square root of the sum of squares over all leaves, also where a square is too large or too small for its type.

    Example:
        >>> [round(norm(jnp.array([3.0, -4.0]) * size).item() / size, 5) for size in (1e20, 1e-30)], norm(jnp.zeros(2)).item()
        ([5.0, 5.0], 0.0)
    """
    tree, exponent = _to_one(widen(tree))
    return jnp.ldexp(jnp.sqrt(squared_norm(tree)), exponent)


def direction(tree: PyTree) -> PyTree:
    """The tree divided by its :func:`norm`, in float32 at least; NaN if that is 0.

    Example:
        >>> [round(value, 6) for value in direction(jnp.array([3e-30, -4e-30])).tolist()]
        [0.6, -0.8]
    """
    tree, _ = _to_one(widen(tree))
    length = jnp.sqrt(squared_norm(tree))
    return jax.tree.map(lambda leaf: leaf / length.astype(leaf.dtype), tree)


def _to_one(tree: PyTree) -> tuple[PyTree, Int[Array, ""]]:
    """The tree, multiplied by the power of two that brings its largest number near 1, which rounds nothing; and the exponent."""
    largest = functools.reduce(jnp.maximum, [jnp.abs(leaf).max(initial=0) for leaf in jax.tree.leaves(tree)], jnp.zeros(()))
    exponent = jnp.frexp(jnp.where(jnp.isfinite(largest), largest, 1))[1]
    return jax.tree.map(lambda leaf: jnp.ldexp(leaf, -exponent), tree), exponent
