r"""Which examples of a batch a contrastive loss compares, and the sums of their similarities, a chunk of columns at a time.

The loss of a row with the similarity t to its own partner and the log-sum-exp r of those to all others is :math:`\log(1 + e^{r - t})`,
which loses no digits where it is small and is never below 0. As a difference, log-sum-exp of all less t, it is rounding where it is small.

Axes: n columns at a time.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


class Pairs(NamedTuple):
    """Which rows and columns belong together, and which are not compared."""

    own: Int[Array, "rows"]  # the column of each row's own partner
    labels: Int[Array, "rows"] | None  # of rows, and of columns too
    same_label: str
    without_self: bool  # whether row i is never compared with column i


def kinds_of_pairs(pairs: Pairs, columns: Int[Array, "n"]):
    """Of each row with each of these columns: whether it is its own partner; is left out; belongs to it because of its label.

    Example:
        >>> pairs = Pairs(jnp.arange(3), jnp.array([7, 7, 8]), "positive", without_self=False)
        >>> own, left_out, also = kinds_of_pairs(pairs, jnp.arange(3))
        >>> own.astype(int).tolist(), left_out.any().item(), also.astype(int).tolist()
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], False, [[0, 1, 0], [1, 0, 0], [0, 0, 0]])
    """
    count = pairs.own.shape[0]
    own = pairs.own[:, None] == columns[None]
    left_out = jnp.broadcast_to(columns[None] >= count, own.shape)  # chunks are filled up
    if pairs.without_self:
        left_out = left_out | (jnp.arange(count)[:, None] == columns[None])
    if pairs.labels is None:
        return own, left_out, jnp.zeros_like(own)
    of_columns = pairs.labels[jnp.minimum(columns, count - 1)]
    same = (pairs.labels[:, None] == of_columns[None]) & ~own & ~left_out
    return (own, left_out | same, jnp.zeros_like(own)) if pairs.same_label == "left_out" else (own, left_out, same)


class Sums(NamedTuple):
    """What a row (or a column) is compared with: all but its own partner."""

    others: Float[Array, "rows"]  # the log-sum-exp of their similarities, -inf if there are none
    also: Float[Array, "rows"]  # the sum of the similarities of those that belong to it because of their label
    number: Float[Array, "rows"]  # how many these are


def told_from(sums: Sums, target: Float[Array, "rows"]) -> Float[Array, "rows"]:
    """log-sum-exp of all, less the mean similarity of those that belong together; never below 0, however near it is.

    Example:
        >>> print(told_from(Sums(jnp.array([-20.0]), jnp.zeros(1), jnp.zeros(1)), jnp.zeros(1)))  # log(1 + exp(-20))
        [2.0611537e-09]
    """
    return jax.nn.softplus(sums.others - target) + (sums.number * target - sums.also) / (sums.number + 1)


def sums(scaled, second, pairs: Pairs, chunk_size: int | None) -> tuple[Sums, Sums]:
    """The sums of each row and of each column of ``scaled @ second.T``; those of the columns mean nothing with ``without_self``."""
    count = second.shape[0]

    def one(state, columns, part):
        (largest, total), also, number = state
        own, left_out, together = kinds_of_pairs(pairs, columns)
        similarities = scaled @ part.T
        logits, kept = jnp.where(own | left_out, -jnp.inf, similarities), jnp.where(together, similarities, 0)
        new = jnp.maximum(largest, lax.stop_gradient(logits.max(1)))
        by = jnp.where(new == -jnp.inf, 0, new)  # no logit yet
        total = total * jnp.exp(largest - by) + jnp.exp(logits - by[:, None]).sum(1)
        of_columns = () if pairs.without_self else Sums(_log_sum(logits), kept.sum(0), together.sum(0, dtype=kept.dtype))
        return ((new, total), also + kept.sum(1), number + together.sum(1, dtype=kept.dtype)), of_columns

    zeros = jnp.zeros_like(scaled[:, 0])
    ((largest, total), *more), of_columns = over_columns(one, ((jnp.full_like(zeros, -jnp.inf), zeros), zeros, zeros), second, chunk_size)
    others = jnp.where(total > 0, largest + jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf)
    rows = Sums(others, *more)
    return rows, rows if pairs.without_self else jax.tree.map(lambda leaf: leaf[:count], of_columns)


def _log_sum(logits):
    """The log-sum-exp of each column, -inf and without a gradient where all are -inf."""
    largest = lax.stop_gradient(logits.max(0))
    by = jnp.where(largest == -jnp.inf, 0, largest)
    total = jnp.exp(logits - by[None]).sum(0)
    return jnp.where(total > 0, by + jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf)


def over_columns(one: Callable, state, second, chunk_size: int | None):
    """Goes over ``second`` a chunk of rows at a time; ``one(state, their numbers, chunk)`` is computed again in the backward pass."""
    count = second.shape[0]
    if chunk_size is None or chunk_size >= count:
        return one(state, jnp.arange(count), second)
    chunks = -(-count // chunk_size)
    size = -(-count // chunks)  # so that little is filled up
    filled = jnp.pad(second, ((0, chunks * size - count), (0, 0))).reshape(chunks, size, -1)
    numbers = jnp.arange(chunks * size).reshape(chunks, size)
    state, kept = lax.scan(lambda state, part: jax.checkpoint(one)(state, *part), state, (numbers, filled))
    return state, jax.tree.map(lambda leaf: leaf.reshape(-1), kept)
