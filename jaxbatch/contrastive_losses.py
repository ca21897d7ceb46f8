r"""Contrastive losses, one value per example: each example is told apart from all others of the batch.

They compare B representations with B others, in a matrix of B × B similarities: 1 GiB in float32 for B = 16,384. With
``chunk_size`` the matrix is worked out a chunk of columns at a time, and again in the backward pass, so that it is never whole.

The length of a representation does not matter: all are divided by it, so a similarity is a cosine over a temperature.

Axes: B examples, D components of a representation.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Number = float | Float[Array, ""]


def unit_length(vectors: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """The vectors along ``axis`` divided by their lengths, computed in float32 at least; a vector of zeros stays zero, and so is its gradient.

    Example:
        >>> unit_length(jnp.array([[0.0, 4.0], [0.0, 0.0]])).tolist()
        [[0.0, 1.0], [0.0, 0.0]]
    """
    wide = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
    square = (wide**2).sum(axis, keepdims=True)
    return (wide / jnp.sqrt(jnp.where(square > 0, square, 1)) * (square > 0)).astype(vectors.dtype)


def info_nce(first: Float[Array, "B D"], second: Float[Array, "B D"], temperature: Number, *, chunk_size: int | None = None) -> Float[Array, "B"]:
    r"""The loss of CLIP: which second belongs to a first, and which first to a second?

    With similarities :math:`s_{ij}` = cos(first i, second j) / temperature, the loss of example i is
    :math:`-s_{ii} + \tfrac12 \log\sum_j e^{s_{ij}} + \tfrac12 \log\sum_j e^{s_{ji}}`.

    Args:
        first, second: representations; those of the same example belong together, all others do not.
        temperature: above 0; it may be learned.
        chunk_size: the most columns of the matrix in memory at a time; ``None``: all.

    Returns:
        One loss per example, in float32 at least.

    Raises:
        ValueError: the shapes differ, ``chunk_size`` is below 1, or a temperature is not above 0.

    Example:
        >>> x = jnp.eye(3)
        >>> print(info_nce(x, x, 0.5).round(4), info_nce(x, x, 0.5, chunk_size=2).round(4))
        [0.2395 0.2395 0.2395] [0.2395 0.2395 0.2395]

    References:
        Radford et al., `Learning Transferable Visual Models From Natural Language Supervision
        <https://arxiv.org/abs/2103.00020>`_, 2021: figure 3; van den Oord et al., `Representation Learning with Contrastive
        Predictive Coding <https://arxiv.org/abs/1807.03748>`_, 2018: eq. 4, of one direction.
    """
    first, second = _checked(first, second, temperature, chunk_size)
    rows, columns = _log_sums(first / temperature, second, chunk_size, without_self=False)
    return (rows + columns) / 2 - (first * second).sum(1) / temperature


def nt_xent(first: Float[Array, "B D"], second: Float[Array, "B D"], temperature: Number, *, chunk_size: int | None = None) -> Float[Array, "B"]:
    r"""The loss of SimCLR: which of the 2B - 1 other views is of the same example?

    With all 2B views in a row and :math:`s_{ij}` their cosines over the temperature, a view's loss is
    :math:`-s_{ip} + \log\sum_{j \ne i} e^{s_{ij}}`, p being the other view of the same example. An example's is the mean of its two.

    Args:
        first, second, temperature, chunk_size: as in :func:`info_nce`; the matrix is 2B × 2B.

    Returns:
        One loss per example, in float32 at least.

    Raises:
        ValueError: as :func:`info_nce`.

    Example:
        >>> print(nt_xent(jnp.eye(2), jnp.eye(2), 1.0).round(4))  # log(e + 2) - 1
        [0.5514 0.5514]

    References:
        Chen et al., `A Simple Framework for Contrastive Learning of Visual Representations <https://arxiv.org/abs/2002.05709>`_,
        2020: eq. 1 and algorithm 1.
    """
    first, second = _checked(first, second, temperature, chunk_size)
    views = jnp.concatenate([first, second])
    rows, _ = _log_sums(views / temperature, views, chunk_size, without_self=True)
    return rows.reshape(2, -1).mean(0) - (first * second).sum(1) / temperature


def sigmoid_contrastive(
    first: Float[Array, "B D"], second: Float[Array, "B D"], temperature: Number, bias: Number, *, chunk_size: int | None = None
) -> Float[Array, "B"]:
    r"""The loss of SigLIP: does this pair belong together, yes or no, for all B × B pairs?

    The loss of example i is :math:`\sum_j \log(1 + e^{-y_{ij} (s_{ij} + b)})`, with similarities s as in :func:`info_nce` and y = 1 for
    j = i, else -1.

    Args:
        first, second, temperature, chunk_size: as in :func:`info_nce`. SigLIP starts from a temperature of 0.1.
        bias: b, usually learned; SigLIP starts from -10, because nearly all pairs do not belong together.

    Returns:
        One loss per example, in float32 at least; their mean is the paper's loss.

    Raises:
        ValueError: as :func:`info_nce`.

    Example:
        >>> print(sigmoid_contrastive(jnp.eye(2), jnp.eye(2), 1.0, -1.0).round(4))  # log(2) + log(1 + 1/e)
        [1.0064 1.0064]

    References:
        Zhai et al., `Sigmoid Loss for Language Image Pre-Training <https://arxiv.org/abs/2303.15343>`_, 2023: section 3.2, algorithm 1.
    """
    first, second = _checked(first, second, temperature, chunk_size)
    scaled, rows = first / temperature, jnp.arange(first.shape[0])[:, None]

    def one(total, columns, part):
        logits = scaled @ part.T + bias
        signed = jnp.where(rows == columns[None], -logits, logits)
        return total + jnp.where(columns[None] < second.shape[0], jax.nn.softplus(signed), 0).sum(1), ()

    return _over_columns(one, jnp.zeros_like(scaled[:, 0]), second, chunk_size)[0]


def _checked(first, second, temperature: Number, chunk_size: int | None):
    if first.shape != second.shape:
        raise ValueError(f"first has shape {first.shape} and second {second.shape}: they must have the same shape, with one example in each row.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1.")
    if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0.")
    wide = jnp.promote_types(jnp.result_type(first, second), jnp.float32)
    return unit_length(first.astype(wide)), unit_length(second.astype(wide))


def _log_sums(scaled, second, chunk_size: int | None, *, without_self: bool):
    """The log-sum-exp of each row and of each column of ``scaled @ second.T``; with ``apart``, without the diagonal."""
    count, rows = second.shape[0], jnp.arange(scaled.shape[0])[:, None]

    def one(state, columns, part):
        largest, total = state
        left_out = (columns[None] >= count) | ((rows == columns[None]) & without_self)
        logits = jnp.where(left_out, -jnp.inf, scaled @ part.T)
        new = jnp.maximum(largest, lax.stop_gradient(logits.max(1)))
        by = jnp.where(new == -jnp.inf, 0, new)  # no logit yet
        total = total * jnp.exp(largest - by) + jnp.exp(logits - by[:, None]).sum(1)
        of_columns = () if without_self else jax.nn.logsumexp(jnp.where(columns[None] < count, logits, 0), 0)
        return (new, total), of_columns

    start = jnp.full_like(scaled[:, 0], -jnp.inf), jnp.zeros_like(scaled[:, 0])
    (largest, total), of_columns = _over_columns(one, start, second, chunk_size)
    return largest + jnp.log(total), of_columns if without_self else of_columns[:count]


def _over_columns(one: Callable, state, second, chunk_size: int | None):
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
