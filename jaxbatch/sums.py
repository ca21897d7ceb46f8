r"""Sums and means over examples and over the parts of a batch: in float32 at least, with the weights of the examples if they have any.

A part's gradient may be bfloat16 or float16. The sum of such gradients may not: bfloat16 has 8 binary digits, so that
256 + 1 gives 256, and the largest float16 is 65,504. A sum is cast once, at the end. All code that adds up parts (microbatches,
groups, devices, losses, metrics, squared norms) uses this module. It casts neither float32 nor float64.

The mean over any examples is :math:`\sum_i t_i / \sum_i w_i` with totals t and weights w. The mean of the means of parts is
another number wherever parts have different weights, so a part contributes its sums, and one division comes at the end.
Everything here takes losses without weights too, and then does what one would write by hand.

Axes: B examples.
"""

import functools
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Num, PyTree


def widen(tree: PyTree) -> PyTree:
    """Casts floating-point leaves to float32 at least, integers to 32 bits at least, and leaves the others as they are.

    Example:
        >>> [widen(jnp.ones(2, dtype)).dtype.name for dtype in (jnp.bfloat16, jnp.int8, jnp.uint8, bool)]
        ['float32', 'int32', 'uint32', 'bool']
    """
    kinds = (jnp.floating, jnp.float32), (jnp.signedinteger, jnp.int32), (jnp.unsignedinteger, jnp.uint32)

    def one(leaf):
        dtype = jnp.result_type(leaf)
        least = next((least for kind, least in kinds if jnp.issubdtype(dtype, kind)), dtype)
        return jnp.asarray(leaf, jnp.promote_types(dtype, least))

    return jax.tree.map(one, tree)


def as_floats(tree: PyTree) -> PyTree:
    """Casts integers and bools to floating-point numbers of the default width, in which sums of large ones have no end.

    Example:
        >>> as_floats(jnp.full(3000, 1_000_000, jnp.int32)).sum().item()
        3000000000.0
    """
    default = jnp.result_type(float)
    return jax.tree.map(lambda leaf: widen(leaf) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else jnp.asarray(leaf, default), tree)


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


class Weighted(NamedTuple):
    r"""What a loss or a metric may return in place of one value per example: each example's total and its weight.

    For a language model, ``total`` is the summed loss of a sequence's tokens, and ``weight`` is how many tokens count, without
    padding. Means, and the gradients of means, are then per token over the whole batch, however it is cut into microbatches,
    groups, devices or parts of a stream.

    Args:
        total: ``(B,)``, floating-point; as a metric, integers too.
        weight: ``(B,)``, integers or floating-point numbers of at least 0. Integers are cast to float32 at least. Do not count
            in bfloat16, which cannot hold numbers such as 257.

    An example of weight 0 does not count, whatever its total (the gradient of its total must be finite all the same). If all
    weights are 0, the mean and its gradient are 0 within a step; records leave such a batch out of their mean, a metric is NaN, and an
    optimizer that uses the loss makes no update. Gradients do not go through the weights. While a program is traced, weights
    have no values, so that a negative one cannot be refused: it makes the mean NaN, and a run ends as diverged.

    Example:
        >>> from jaxbatch import losses_and_mean_gradient
        >>> def loss_fn(w, batch):
        ...     x, counts = batch  # (B, tokens), True where a token counts
        ...     return Weighted(jnp.where(counts, (x - w) ** 2, 0).sum(1), counts.sum(1))
        >>> batch = jnp.array([[1.0, 2.0], [3.0, 9.0]]), jnp.array([[True, True], [True, False]])
        >>> losses, gradient = losses_and_mean_gradient(loss_fn, jnp.array(0.0), batch)
        >>> losses.total.tolist(), losses.weight.tolist(), gradient.item()  # -2 * (1 + 2 + 3) / 3 tokens
        ([5.0, 9.0], [2.0, 1.0], -4.0)
    """

    total: Num[Array, "*B"]
    weight: Num[Array, "*B"] | Bool[Array, "*B"]


Losses: TypeAlias = Num[Array, "..."] | Weighted  # metrics may be integers


def counted(losses: Weighted) -> Weighted:
    """The totals of the examples that count, and the weights as numbers that can be summed.

    Example:
        >>> total, weight = counted(Weighted(jnp.array([2.0, jnp.nan, 1.0]), jnp.array([4, 0, -1])))
        >>> total.tolist(), weight.tolist()
        ([2.0, 0.0, 0.0], [4.0, 0.0, nan])
    """
    losses = Weighted(as_floats(losses.total), jnp.asarray(losses.weight))
    total, weight = losses
    floating = [leaf.dtype for leaf in losses if jnp.issubdtype(leaf.dtype, jnp.floating)] or [jnp.result_type(float)]
    of = functools.reduce(jnp.promote_types, floating, jnp.dtype(jnp.float32))
    weight = lax.stop_gradient(weight.astype(of))
    return Weighted(jnp.where(weight > 0, total, 0), jnp.where(weight >= 0, weight, jnp.nan))


def totals(losses: Losses) -> Num[Array, "..."]:
    """The values that are summed: totals, or the losses themselves."""
    return losses.total if isinstance(losses, Weighted) else losses


def weight_of(losses: Losses) -> Float[Array, ""] | None:
    """The sum of the weights, in float32 at least; None if there are none."""
    return widen(losses.weight).sum() if isinstance(losses, Weighted) else None


def divisor(losses: Losses, count: int, axis: str | None = None) -> int | Float[Array, ""]:
    """What a sum over examples is divided by for its mean: their weight, or their number ``count``.

    Args:
        losses: of these examples; on several devices, those of this device.
        count: the number of examples, on all devices.
        axis: the name of the axis of devices over which to sum.

    Example:
        >>> divisor(jnp.ones(3), 3), float(divisor(Weighted(jnp.ones(3), jnp.arange(3.0)), 3))
        (3, 3.0)
    """
    weight = weight_of(losses)
    if weight is None:
        return count
    return or_one(weight if axis is None else lax.psum(weight, axis))


def or_one(weight: Float[Array, ""]) -> Float[Array, ""]:
    """A sum of weights to divide by. If nothing counts, the sum over the examples is 0, and so is the mean."""
    return jnp.where(weight == 0, 1, weight)


def or_nan(weight: Float[Array, ""]) -> Float[Array, ""]:
    """A sum of weights to divide a measured sum by: what is measured of nothing is no number."""
    return jnp.where(weight == 0, jnp.nan, weight)


def mean_loss(losses: Losses) -> Float[Array, ""]:
    """The mean of one loss per example, in float32 at least.

    Example:
        >>> round(mean_loss(jnp.array([1.0, 2.0, 2.0], jnp.bfloat16)).item(), 4)  # bfloat16 has 1.664
        1.6667
        >>> mean_loss(Weighted(jnp.array([3.0, 5.0]), jnp.array([1.0, 3.0]))).item()
        2.0
    """
    if isinstance(losses, Weighted):
        return widen(losses.total).sum() / divisor(losses, 0)
    return widen(losses).mean()


def loss_of_batch(losses: Losses) -> Losses:
    """What a program tells of a batch: its mean loss; with weights the sums, because it may hold nothing that counts.

    Example:
        >>> loss_of_batch(jnp.array([1.0, 3.0])).item(), [leaf.item() for leaf in loss_of_batch(Weighted(jnp.zeros(2), jnp.zeros(2)))]
        (2.0, [0.0, 0.0])
    """
    return sum_losses(losses) if isinstance(losses, Weighted) else mean_loss(losses)


def something_counts(losses: Losses, axis: str | None = None) -> Bool[Array, ""] | None:
    """Whether there is a weight that is not 0, on any device along ``axis``; None if there are no weights."""
    weight = weight_of(losses)
    return None if weight is None else (weight if axis is None else lax.psum(weight, axis)) != 0


def mean_over_devices(losses: Losses, count: int, axis: str) -> Float[Array, ""]:
    """The mean loss of ``count`` examples, of which each device along ``axis`` has some; fillers are 0."""
    return lax.psum(widen(totals(losses)).sum(), axis) / divisor(losses, count, axis)


def loss_of_one(losses: Losses) -> Float[Array, ""]:
    """The loss of a single example, whose leading axis is 1; with a weight it is the example's own mean.

    Example:
        >>> loss_of_one(jnp.array([3.0])).item(), loss_of_one(Weighted(jnp.array([3.0]), jnp.array([2.0]))).item()
        (3.0, 1.5)
    """
    return mean_loss(losses) if isinstance(losses, Weighted) else losses.sum()


def sum_losses(losses: Losses) -> Losses:
    """The sum over examples, of totals and of weights, in float32 at least.

    Example:
        >>> [leaf.item() for leaf in sum_losses(Weighted(jnp.array([3.0, 5.0]), jnp.array([1.0, 3.0])))]
        [8.0, 4.0]
    """
    return jax.tree.map(lambda leaf: widen(leaf).sum(), losses)
