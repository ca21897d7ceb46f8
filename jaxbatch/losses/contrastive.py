r"""Contrastive losses, one value per example: each example is told apart from all others of the batch.

They compare B representations with B others, in a matrix of B × B similarities: 1 GiB in float32 for B = 16,384. With
``chunk_size`` the matrix is worked out a chunk of columns at a time, and again in the backward pass, so that it is never whole.

The length of a representation does not matter: all are divided by it, so a similarity is a cosine over a temperature.

Two examples of a batch may be of one kind: the same picture twice, two texts that fit one picture, two faces of one person. To tell
them apart is then the wrong lesson. With ``labels``, a number for each example, those of one label are left out of each other's
comparisons, or are all taken as belonging together.

Axes: B examples, D components of a representation.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxbatch.kinds import checked
from jaxbatch.losses.contrastive_pairs import Pairs, kinds_of_pairs, over_columns, sums, told_from

Number = float | Float[Array, ""]
SameLabel = Literal["left_out", "positive"]


@checked
def unit_length(vectors: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """The vectors along ``axis`` divided by their lengths, computed in float32 at least; a vector of zeros stays zero, and so is its gradient.

    Example:
        >>> unit_length(jnp.array([[0.0, 4.0], [0.0, 0.0]])).tolist()
        [[0.0, 1.0], [0.0, 0.0]]
    """
    wide = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
    square = (wide**2).sum(axis, keepdims=True)
    return (wide / jnp.sqrt(jnp.where(square > 0, square, 1)) * (square > 0)).astype(vectors.dtype)


@checked
def info_nce(
    first: Float[Array, "B D"],
    second: Float[Array, "B D"],
    temperature: Number,
    *,
    labels: Int[Array, "B"] | None = None,
    same_label: SameLabel = "left_out",
    chunk_size: int | None = None,
) -> Float[Array, "B"]:
    r"""The loss of CLIP: which second belongs to a first, and which first to a second?

    With similarities :math:`s_{ij}` = cos(first i, second j) / temperature, the loss of example i is
    :math:`-s_{ii} + \tfrac12 \log\sum_j e^{s_{ij}} + \tfrac12 \log\sum_j e^{s_{ji}}`.

    Args:
        first, second: representations; those of the same example belong together, all others do not.
        temperature: above 0; it may be learned.
        labels: ``(B,)``; ``None``: every example is of a kind of its own.
        same_label: what becomes of two examples of one label. ``"left_out"``: neither counts in the other's sums. ``"positive"``: they
            belong together as an example's own two do; in place of :math:`s_{ii}` stands the mean similarity with all that belong to i.
        chunk_size: the most columns of the matrix in memory at a time; ``None``: all.

    Returns:
        One loss per example, in float32 at least.

    Raises:
        ValueError: the shapes differ, ``chunk_size`` is below 1, a temperature is not above 0, or ``same_label`` is unknown.

    Example:
        >>> x = jnp.eye(3)
        >>> print(info_nce(x, x, 0.5).round(4), info_nce(x, x, 0.5, chunk_size=2).round(4))
        [0.2395 0.2395 0.2395] [0.2395 0.2395 0.2395]
        >>> print(info_nce(x, x, 0.5, labels=jnp.array([0, 0, 1])).round(4))  # without each other, one comparison is left
        [0.1269 0.1269 0.2395]

    References:
        Radford et al., `Learning Transferable Visual Models From Natural Language Supervision
        <https://arxiv.org/abs/2103.00020>`_, 2021: figure 3; van den Oord et al., `Representation Learning with Contrastive
        Predictive Coding <https://arxiv.org/abs/1807.03748>`_, 2018: eq. 4, of one direction. Khosla et al., `Supervised Contrastive
        Learning <https://arxiv.org/abs/2004.11362>`_, 2020: eq. 2, the mean over positives outside of the logarithm.
    """
    first, second = _checked(first, second, labels, same_label)
    pairs = Pairs(jnp.arange(first.shape[0]), labels, same_label, without_self=False)
    rows, columns = sums(first / temperature, second, pairs, chunk_size)
    target = (first * second).sum(1) / temperature
    return (told_from(rows, target) + told_from(columns, target)) / 2


@checked
def nt_xent(
    first: Float[Array, "B D"],
    second: Float[Array, "B D"],
    temperature: Number,
    *,
    labels: Int[Array, "B"] | None = None,
    same_label: SameLabel = "left_out",
    chunk_size: int | None = None,
) -> Float[Array, "B"]:
    r"""The loss of SimCLR: which of the 2B - 1 other views is of the same example?

    With all 2B views in a row and :math:`s_{ij}` their cosines over the temperature, a view's loss is
    :math:`-s_{ip} + \log\sum_{j \ne i} e^{s_{ij}}`, p being the other view of the same example. An example's is the mean of its two.

    Args:
        first, second, temperature, labels, same_label, chunk_size: as in :func:`info_nce`; the matrix is 2B × 2B. With labels and
            ``"positive"`` it is the loss of SupCon.

    Returns:
        One loss per example, in float32 at least.

    Raises:
        ValueError: as :func:`info_nce`.

    Example:
        >>> print(nt_xent(jnp.eye(2), jnp.eye(2), 1.0).round(4))  # log(e + 2) - 1
        [0.5514 0.5514]

    References:
        Chen et al., `A Simple Framework for Contrastive Learning of Visual Representations <https://arxiv.org/abs/2002.05709>`_,
        2020: eq. 1 and algorithm 1. Khosla et al., `Supervised Contrastive Learning <https://arxiv.org/abs/2004.11362>`_, 2020: eq. 2.
    """
    first, second = _checked(first, second, labels, same_label)
    views, count = jnp.concatenate([first, second]), first.shape[0]
    of_views = None if labels is None else jnp.concatenate([labels, labels])
    pairs = Pairs((jnp.arange(2 * count) + count) % (2 * count), of_views, same_label, without_self=True)
    rows, _ = sums(views / temperature, views, pairs, chunk_size)
    target = (first * second).sum(1) / temperature
    return told_from(rows, jnp.concatenate([target, target])).reshape(2, -1).mean(0)


@checked
def sigmoid_contrastive(
    first: Float[Array, "B D"],
    second: Float[Array, "B D"],
    temperature: Number,
    bias: Number,
    *,
    labels: Int[Array, "B"] | None = None,
    same_label: SameLabel = "left_out",
    chunk_size: int | None = None,
) -> Float[Array, "B"]:
    r"""The loss of SigLIP: does this pair belong together, yes or no, for all B × B pairs?

    The loss of example i is :math:`\sum_j \log(1 + e^{-y_{ij} (s_{ij} + b)})`, with similarities s as in :func:`info_nce` and y = 1 for
    j = i, else -1. With labels and ``"positive"``, y = 1 for all pairs of one label.

    Args:
        first, second, temperature, labels, same_label, chunk_size: as in :func:`info_nce`. SigLIP starts from a temperature of 0.1.
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
    first, second = _checked(first, second, labels, same_label)
    scaled, pairs = first / temperature, Pairs(jnp.arange(first.shape[0]), labels, same_label, without_self=False)

    def one(total, columns, part):
        logits = scaled @ part.T + bias
        own, left_out, also = kinds_of_pairs(pairs, columns)
        signed = jnp.where(own | also, -logits, logits)
        return total + jnp.where(left_out, 0, jax.nn.softplus(signed)).sum(1), ()

    return over_columns(one, jnp.zeros_like(scaled[:, 0]), second, chunk_size)[0]


def _checked(first, second, labels, same_label: str):
    if first.shape != second.shape:
        raise ValueError(f"first has shape {first.shape} and second {second.shape}: they must have the same shape, with one example in each row.")
    if labels is not None and jnp.shape(labels) != first.shape[:1]:
        raise ValueError(f"labels have shape {jnp.shape(labels)} and must be {first.shape[:1]}, one for each example.")
    if same_label not in ("left_out", "positive"):
        raise ValueError(f"same_label={same_label!r} must be 'left_out' or 'positive'.")
    wide = jnp.promote_types(jnp.result_type(first, second), jnp.float32)
    return unit_length(first.astype(wide)), unit_length(second.astype(wide))
