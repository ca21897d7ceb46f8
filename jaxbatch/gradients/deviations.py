r"""Signal and noise of a gradient from the deviations of its parts, which lose no digits where the noise is far below the signal.

The formulas of :mod:`jaxbatch.gradients.signal_and_trace` take :math:`|\sum_k g_k|^2` from :math:`\sum_k |g_k|^2`. Of two nearly equal
numbers in float32 little is left, and sums of many equal terms are rounded in one direction. So here the parts are measured from an
origin a, the mean gradient of the first part that counts: with :math:`e_k = g_k - w_k a`, :math:`E = \sum_k e_k`,
:math:`W = \sum_k w_k` and :math:`q = \sum_k w_k^2`,

.. math:: \sum_k |g_k|^2 - \frac q{W^2} \Big|\sum_k g_k\Big|^2 = \sum_k |e_k|^2 - \frac q{W^2} |E|^2 +
    2 a \cdot \sum_k (w_k - w_1) e_k - \frac2W \Big(\sum_k w_k (w_k - w_1)\Big)\, a \cdot E.

Every term on the right is of the size of the noise; the last two are 0 where all weights are equal.

Axes: n parts at a time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxbatch.gradients.signal_and_trace import pairs_of, signal_and_trace
from jaxbatch.sums import inner_product, squared_norm, widen, zero_sum


class Weights(NamedTuple):
    """What parts that weigh differently add to :class:`Deviations`."""

    first: Float[Array, ""]  # w_1, of the part at the origin
    sum: Float[Array, ""]  # W
    squares: Float[Array, ""]  # q
    beyond: Float[Array, ""]  # sum of w_k (w_k - w_1)
    deviations: PyTree  # sum of (w_k - w_1) e_k


class Deviations(NamedTuple):
    """Sums over parts, measured from an origin."""

    begun: Bool[Array, ""]  # whether there is an origin
    origin: PyTree  # a
    sum: PyTree  # E
    squares: Float[Array, ""]  # sum of |e_k|^2
    weights: Weights | None  # None: every part weighs 1


def no_deviations(params: PyTree, weighted: bool) -> Deviations:
    """The sums before the first part."""
    zeros = zero_sum(params)
    squares = squared_norm(zeros)  # all made of the parameters, because in shard_map they know which devices they differ on
    none = squares.astype(jnp.float32)
    return Deviations(squares > 0, zeros, zeros, squares, Weights(none, none, none, none, zeros) if weighted else None)


def with_parts(total: Deviations, parts: tuple[PyTree, Float[Array, "n"] | None]) -> Deviations:
    """The sums with n parts more: their summed gradients, leaves ``(n, ...)``, and their weights.

    Example:
        >>> total = with_parts(no_deviations(jnp.array(0.0), False), (jnp.array([5.0, 7.0]), None))
        >>> total.origin.item(), total.sum.item(), total.squares.item()
        (5.0, 2.0, 4.0)
    """
    gradients, weights = widen(parts[0]), parts[1]
    if weights is None:
        origin = jax.tree.map(lambda old, leaf: jnp.where(total.begun, old, leaf[0]), total.origin, gradients)
        away = jax.tree.map(lambda leaf, a: leaf - a[None], gradients, origin)
        return Deviations(jnp.ones_like(total.begun), origin, _plus(total.sum, away), total.squares + squared_norm(away), None)
    before, number = total.weights, jnp.argmax(weights > 0)  # the first part that counts, if one does
    assert before is not None
    first = jnp.where(total.begun, before.first, weights[number])
    mean = lambda old, leaf: jnp.where(total.begun, old, leaf[number] / jnp.where(first == 0, 1, first).astype(leaf.dtype))
    origin = jax.tree.map(mean, total.origin, gradients)
    along = lambda weight, leaf: weight.astype(leaf.dtype).reshape(-1, *(1,) * (leaf.ndim - 1))
    away = jax.tree.map(lambda leaf, a: leaf - along(weights, leaf) * a[None], gradients, origin)
    over = jax.tree.map(lambda leaf: along(weights - first, leaf) * leaf, away)
    sums = Weights(
        first,
        before.sum + weights.sum(),
        before.squares + (weights**2).sum(),
        before.beyond + (weights * (weights - first)).sum(),
        _plus(before.deviations, over),
    )
    return Deviations(first != 0, origin, _plus(total.sum, away), total.squares + squared_norm(away), sums)


def _plus(total: PyTree, parts: PyTree) -> PyTree:
    return jax.tree.map(lambda whole, leaf: whole + leaf.sum(0), total, parts)


def statistics_of(total: Deviations, num_parts: int, batch_size: int) -> tuple[Float[Array, ""], Float[Array, ""]]:
    r"""Unbiased :math:`|G|^2` and :math:`\mathrm{tr}\,\Sigma`, the latter of one of ``batch_size`` examples; NaN without two parts that count.

    Example:
        >>> total = with_parts(no_deviations(jnp.array(0.0), False), (jnp.array([5.0, 7.0]), None))
        >>> [value.item() for value in statistics_of(total, 2, 2)]  # the variance; the mean squared less half of it
        [35.0, 2.0]
    """
    if total.weights is None:
        mean = jax.tree.map(lambda a, leaf: a + leaf / num_parts, total.origin, total.sum)
        noise = total.squares - squared_norm(total.sum) / num_parts
        return signal_and_trace(squared_norm(mean), noise, num_parts - 1, batch_size, batch_size / num_parts)
    _, weight, squares, beyond, deviations = total.weights
    pairs, several = pairs_of(weight, squares)
    weight = jnp.where(several, weight, 1)
    cross = inner_product(total.origin, deviations) - beyond / weight * inner_product(total.origin, total.sum)
    noise = total.squares - squares / weight**2 * squared_norm(total.sum) + 2 * cross
    mean = jax.tree.map(lambda a, leaf: a + leaf / weight.astype(leaf.dtype), total.origin, total.sum)
    return signal_and_trace(squared_norm(mean), jnp.where(several, batch_size * noise, jnp.nan), pairs, batch_size)
