"""What a loss returns besides the losses, over devices: a mean, and a sum where it says so.

Axes: none of its own; leaves may have a leading axis of parts.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, PyTree

from jaxbatch.gradients.groups import is_weighted


def mean_aux(axis: str, aux: PyTree, own: Int32[Array, "*parts"] | None) -> PyTree:
    """The mean of the devices' aux along ``axis``, weighted by their numbers of examples (``own`` None: all are equal).

    A :class:`jaxbatch.Weighted` in it holds sums, which are added up.
    """
    nodes, structure = jax.tree.flatten(aux, is_leaf=is_weighted)
    if any(map(is_weighted, nodes)):
        means = mean_aux(axis, [() if is_weighted(node) else node for node in nodes], own)
        return jax.tree.unflatten(structure, [lax.psum(node, axis) if is_weighted(node) else mean for node, mean in zip(nodes, means, strict=True)])
    if own is None or not jax.tree.leaves(aux):

        def simple_mean(leaf):
            return lax.pmean(leaf, axis) if jnp.issubdtype(leaf.dtype, jnp.inexact) else _mean_of_integers(axis, leaf, simple_mean)

        return jax.tree.map(simple_mean, aux)
    whole = jnp.maximum(lax.psum(own, axis), 1)

    def mean(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return _mean_of_integers(axis, leaf, mean)
        wide = jnp.promote_types(leaf.dtype, jnp.float32)
        weight, total = (count.astype(wide).reshape(*count.shape, *(1,) * (leaf.ndim - own.ndim)) for count in (own, whole))
        # The aux of a device without an example is left out, even if it is NaN.
        return (lax.psum(jnp.where(weight > 0, leaf.astype(wide) * weight, 0), axis) / total).astype(leaf.dtype)

    return jax.tree.map(mean, aux)


def _mean_of_integers(axis: str, leaf: Array, mean: Callable[[Array], Array]) -> Array:
    """The mean of the devices' integers, rounded, in their own type: what all devices agree on, such as a count, comes back exactly."""
    numbers = leaf.astype(jnp.int32) if leaf.dtype == bool else leaf
    least = lax.pmin(numbers, axis)
    return (least + jnp.round(mean((numbers - least).astype(jnp.float32))).astype(numbers.dtype)).astype(leaf.dtype)
