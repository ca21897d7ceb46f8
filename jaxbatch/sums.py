"""Sums over the parts of a batch. A sum is kept in float32 at least and cast once, at the end.

A part's gradient may be bfloat16 or float16. The sum of such gradients may not: bfloat16 has 8 binary digits, so that
256 + 1 gives 256, and the largest float16 is 65,504. All code that adds up parts (microbatches, groups, devices, losses,
metrics, squared norms) uses this module. It casts neither float32 nor float64.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def widen(tree: PyTree) -> PyTree:
    """Casts floating-point leaves to float32 at least and leaves the others as they are.

    Example:
        >>> widen(jnp.ones(2, jnp.bfloat16)).dtype.name, widen(jnp.ones(2, jnp.int8)).dtype.name
        ('float32', 'int8')
    """

    def one(leaf):
        dtype = jnp.result_type(leaf)
        wide = jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype
        return jnp.asarray(leaf, wide)

    return jax.tree.map(one, tree)


def zero_sum(tree: PyTree) -> PyTree:
    """The zeros from which a sum of such trees starts.

    Example:
        >>> zero_sum(jnp.ones(2, jnp.bfloat16))
        Array([0., 0.], dtype=float32)
    """
    return jax.tree.map(jnp.zeros_like, widen(tree))


def add(total: PyTree, part: PyTree) -> PyTree:
    """``total + part`` in the types of ``total``, which comes from :func:`zero_sum`.

    Example:
        >>> float(add(jnp.array(256.0), jnp.array(1.0, jnp.bfloat16)))
        257.0
    """
    return jax.tree.map(lambda whole, leaf: whole + jnp.asarray(leaf, whole.dtype), total, part)


def mean_of_sum(total: PyTree, count: int | Float[Array, ""], like: PyTree) -> PyTree:
    """``total / count``, cast to the types of ``like``: the last step of a sum.

    Example:
        >>> mean_of_sum(jnp.array(4096.0), 4096, jnp.array(0.0, jnp.bfloat16))
        Array(1, dtype=bfloat16)
    """
    return cast_like(jax.tree.map(lambda leaf: leaf / count, total), like)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """Casts the leaves to the types of ``like``."""
    return jax.tree.map(lambda leaf, wanted: leaf.astype(jnp.result_type(wanted)), tree, like)


def squared_norm(tree: PyTree) -> Float[Array, ""]:
    """The sum of squares over all leaves, squared and summed in float32 at least.

    Example:
        >>> squared_norm({"a": jnp.full(4, 300.0, jnp.float16)}).item()  # a square alone is beyond float16
        360000.0
    """
    return inner_product(tree, tree)


def inner_product(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """The sum of products over all leaves of two trees, multiplied and summed in float32 at least.

    Example:
        >>> inner_product(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])).item()
        11.0
    """
    products = jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), widen(a), widen(b)))
    return functools.reduce(jnp.add, products) if products else jnp.zeros(())
