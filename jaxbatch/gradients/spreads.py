r"""How the parts of a batch differ, merged pair by pair, so that no digits are lost where the noise is far below the signal.

A sum of squares less the square of a sum is the difference of two nearly equal numbers. So two sums are merged by the difference of their
means. Part k has the gradient :math:`w_k \mu + r_k`, with :math:`w_k` its examples or its weight and :math:`\mu` the mean of all parts, so that
the :math:`r_k` add up to 0; they become :math:`r_k - w_k d` where a merge moves the mean by d.

Without weights :math:`\sum_k |r_k|^2 / w_k` is :math:`\sum_k |g_k|^2 / w_k - W |\mu|^2`. With weights
:math:`\sum_k |r_k|^2 + 2 \mu \cdot \sum_k w_k r_k` is :math:`\sum_k |g_k|^2 - q |\mu|^2`, with :math:`q = \sum_k w_k^2`; the second term is 0
for equal weights.

Source: Chan, Golub and LeVeque, *Updating formulae and a pairwise algorithm for computing sample variances*, 1979.

Axes: P parts, L layers (1 if they are not told apart).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from jaxbatch.sums import or_one, widen

Products = Callable[[PyTree, PyTree], Float[Array, "L"]]  # the inner products of the layers of two gradients


class Spread(NamedTuple):
    """How the parts of a batch differ: of one part, or of several."""

    mean: PyTree  # the mean gradient of an example; with weights, of a weight of 1
    weight: Float[Array, "*P"]  # of all parts: their examples; or W
    parts: Float[Array, "*P"]  # their number, without those of fillers alone; with weights the sum of w_k^2
    squares: Float[Array, "*P L"]  # the sum of |r_k|^2 / m_k; with weights of |r_k|^2
    along: PyTree = None  # with weights the sum of w_k r_k


def spread_of(gradient: PyTree, weight: Array, products: Products, weighted: bool) -> Spread:
    """The spread of a single part, from its summed gradient and its examples, or its weight.

    Example:
        >>> products = lambda one, other: layer_products(one, other, None, False)
        >>> one, other = (spread_of(jnp.array(total), jnp.array(5), products, False) for total in (10.0, 20.0))
        >>> [float(number.sum()) for number in merged(one, other, products)[:4]]  # 5 times the squares of -1 and 1
        [3.0, 10.0, 2.0, 10.0]
    """
    gradient = widen(gradient)
    squares = jnp.zeros_like(products(gradient, gradient))
    weight = weight.astype(squares.dtype)
    mean = jax.tree.map(lambda leaf: leaf / or_one(weight).astype(leaf.dtype), gradient)
    if weighted:
        return Spread(mean, weight, weight**2, squares, jax.tree.map(jnp.zeros_like, gradient))
    return Spread(mean, weight, jnp.minimum(weight, 1), squares)


def merged(one: Spread, other: Spread, products: Products) -> Spread:
    """The spread of the parts of both."""
    whole = or_one(one.weight + other.weight)
    back, on = other.weight / whole, one.weight / whole  # how far the mean of the first is behind that of all, and that of the other beyond
    difference = jax.tree.map(jnp.subtract, other.mean, one.mean)
    sums = _moved(one.mean, difference, back), one.weight + other.weight, one.parts + other.parts
    square, squares = products(difference, difference), one.squares + other.squares
    if one.along is None:
        return Spread(*sums, squares + square * (one.weight * back))
    squares += square * (one.parts * back**2 + other.parts * on**2)
    squares += 2 * (on * products(difference, other.along) - back * products(difference, one.along))
    along = jax.tree.map(jnp.add, one.along, other.along)
    return Spread(*sums, squares, _moved(along, difference, other.parts * on - one.parts * back))


def spread_over_devices(axis: str, own: Spread, products: Products) -> Spread:
    """The spread of the parts of all devices along an axis."""
    weight, parts = lax.psum((own.weight, own.parts), axis)
    whole = or_one(weight)
    mean = lax.psum(jax.tree.map(lambda leaf: leaf * (own.weight / whole).astype(leaf.dtype), own.mean), axis)
    away = jax.tree.map(jnp.subtract, own.mean, mean)
    square = products(away, away)
    if own.along is None:
        return Spread(mean, weight, parts, lax.psum(own.squares + own.weight * square, axis))
    squares = own.squares + own.parts * square + 2 * products(away, own.along)
    # Less what the rounding of the mean leaves over: parts of equal weights have nothing along their mean.
    along = _moved(own.along, away, own.parts - parts / whole * own.weight)
    return Spread(mean, weight, parts, lax.psum(squares, axis), lax.psum(along, axis))


def _moved(tree: PyTree, direction: PyTree, by: Float[Array, ""]) -> PyTree:
    return jax.tree.map(lambda leaf, step: leaf + by.astype(leaf.dtype) * step, tree, direction)


def layer_products(one: PyTree, other: PyTree, metric: PyTree, per_layer: bool) -> Float[Array, "L"]:
    """The inner products of the layers of two gradients, or of all of them, with weights if there is a ``metric``.

    Example:
        >>> gradient = {"a": jnp.ones(2), "b": {"w": jnp.ones(3), "c": jnp.ones(1)}}
        >>> layer_products(gradient, gradient, None, True).tolist()
        [2.0, 4.0]
    """
    products = jax.tree.map(jnp.multiply, widen(one), widen(other))
    products = products if metric is None else jax.tree.map(jnp.multiply, products, metric)
    of_leaves = [jnp.sum(leaf) for leaf in jax.tree.leaves(products)]
    layers = layers_of(one) if per_layer else [""] * len(of_leaves)
    return jnp.stack([sum(norm for norm, own in zip(of_leaves, layers, strict=True) if own == layer) for layer in dict.fromkeys(layers)])


def layers_of(params: PyTree) -> list[str]:
    """The layer of each leaf: where the tree first has several branches, a branch is a layer.

    Example:
        >>> layers_of({"params": {"Conv_0": {"bias": 0.0, "kernel": 0.0}, "Dense_0": 0.0}}), layers_of(0.0)
        (['Conv_0', 'Conv_0', 'Dense_0'], ['params'])
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    depth = 0
    while all(len(path) > depth + 1 for path in paths) and len({path[depth] for path in paths}) == 1:
        depth += 1
    return [jax.tree_util.keystr(path[depth : depth + 1], simple=True) or "params" for path in paths]
