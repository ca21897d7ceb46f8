r"""Batch normalisation over the examples and pixels of an array ``(B, H, W, C)``.

The moments of a batch are its mean and variance. A ``mask`` ``(B,)`` is False for slots that hold no example of their own
(fillers). These are left out of the moments, their outputs are 0, and they have no gradient. No mask costs nothing.

Axes: B examples, H × W pixels, C channels.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxbatch.layers.derivatives import with_backward


def channel_moments(x: Float[Array, "B H W C"], mask: Bool[Array, "B"] | None = None) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
    r"""Mean and variance of each channel, :math:`E[x]` and :math:`\max(E[x^2] - E[x]^2, 0)`, in float32 at least.

    Both are 0 where ``mask`` leaves no example.

    Example:
        >>> mean, variance = channel_moments(jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1))
        >>> mean.item(), variance.item()
        (2.0, 1.0)
        >>> channel_moments(jnp.array([1.0, 3.0, 9.0]).reshape(3, 1, 1, 1), jnp.array([True, True, False]))[0].item()
        2.0
    """
    return _moments(clear(x, mask), at_least_one(count_values(x, mask)))


def _moments(x, count):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean, square = channel_sum(wide) / count, channel_sum(wide * wide) / count
    return mean, jnp.maximum(square - mean * mean, 0)


def count_values(x: Float[Array, "B H W C"], mask: Bool[Array, "B"] | None = None) -> float | Float[Array, ""]:
    """The number of values in each channel, over examples (without fillers) and pixels; a plain number without a mask.

    Example:
        >>> count_values(jnp.ones((3, 2, 2, 1))), count_values(jnp.ones((3, 2, 2, 1)), jnp.array([True, False, False])).item()
        (12.0, 4.0)
    """
    if mask is None:
        return float(x.size // x.shape[3])  # of 2,000,000 images it is more than an int32 holds
    return mask.sum(dtype=jnp.promote_types(x.dtype, jnp.float32)) * (x.shape[1] * x.shape[2])


def at_least_one(count: float | Float[Array, ""]) -> float | Float[Array, ""]:
    """The count, but at least 1, so that a sum over nothing, which is 0, can be divided by it."""
    return count if isinstance(count, float) else jnp.maximum(count, 1)


def clear(x: Float[Array, "B H W C"], mask: Bool[Array, "B"] | None) -> Float[Array, "B H W C"]:
    """Sets x to 0 in the slots that hold no example of their own, whatever they contain."""
    return x if mask is None else jnp.where(mask.reshape(-1, 1, 1, 1), x, jnp.zeros((), x.dtype))


def channel_sum(x: Float[Array, "B H W C"]) -> Float[Array, "C"]:
    """The sum over examples and pixels, in two steps.

    The first step adds whole rows of W·C numbers. On a CPU these are long vectors, while C alone may be as small as 16.

    Example:
        >>> channel_sum(jnp.ones((2, 3, 4, 1))).tolist()
        [24.0]
    """
    batch, rows, columns, channels = x.shape
    return x.reshape(batch * rows, columns * channels).sum(0).reshape(columns, channels).sum(0)


def shared_moments(x: Float[Array, "B H W C"], axis_name: str, mask: Bool[Array, "B"] | None = None) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
    """Like :func:`channel_moments`, over the shares of all devices along a mapped axis; all shares have the same size."""
    wide = clear(x.astype(jnp.promote_types(x.dtype, jnp.float32)), mask)
    if mask is None:
        count = count_values(x)
        mean, square = jax.lax.pmean((channel_sum(wide) / count, channel_sum(wide * wide) / count), axis_name)
    else:
        total, squares, count = jax.lax.psum((channel_sum(wide), channel_sum(wide * wide), count_values(x, mask)), axis_name)
        mean, square = total / at_least_one(count), squares / at_least_one(count)
    return mean, jnp.maximum(square - mean * mean, 0)


def synchronised_batch_norm(
    x: Float[Array, "B H W C"],
    scale: Float[Array, "C"],
    bias: Float[Array, "C"],
    axis_name: str,
    epsilon: float = 1e-5,
    mask: Bool[Array, "B"] | None = None,
) -> Float[Array, "B H W C"]:
    """:func:`batch_norm` of a batch whose shares are on the devices along a mapped axis.

    Call it under ``pmap`` or ``shard_map``. JAX computes the gradients, which are exchanged between the devices too.
    """
    mean, variance = shared_moments(x, axis_name, mask)
    inverse = jax.lax.rsqrt(variance + epsilon)
    return clear(affine(clear(x, mask), scale * inverse, bias - mean * scale * inverse), mask)


def batch_norm(
    x: Float[Array, "B H W C"],
    scale: Float[Array, "C"],
    bias: Float[Array, "C"],
    epsilon: float = 1e-5,
    mask: Bool[Array, "B"] | None = None,
) -> Float[Array, "B H W C"]:
    r""":math:`\gamma\,(x - \mu)/\sqrt{\sigma^2 + \epsilon} + \beta`, with the batch's own moments.

    The gradient is the textbook's, :math:`\mathrm dx = \frac{\gamma}{\sqrt{\sigma^2+\epsilon}}\big[\mathrm dy -
    \overline{\mathrm dy} - \hat x\,\overline{\mathrm dy\,\hat x}\big]`, in two passes over the activations.

    Args:
        x: activations; moments are computed in float32 at least, and the result has x's type.
        scale: :math:`\gamma`.
        bias: :math:`\beta`.
        epsilon: added to the variance.
        mask: False where a slot holds no example of its own.

    Example:
        >>> x = jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1)
        >>> batch_norm(x, jnp.ones(1), jnp.zeros(1), epsilon=0.0).ravel().tolist()
        [-1.0, 1.0]

    References:
        Ioffe and Szegedy, `Batch Normalization <https://arxiv.org/abs/1502.03167>`_, 2015: algorithm 1, section 3.
    """

    def forward(x, scale, bias, *counts):
        # Masked slots are zero and so do not change the sums; only the count of the others has to be passed in.
        mean, variance = _moments(x, counts[0] if counts else count_values(x))
        inverse = jax.lax.rsqrt(variance + epsilon)
        return affine(x, scale * inverse, bias - mean * scale * inverse), (x, scale, mean, inverse, *counts)

    def backward(residuals, cotangent):
        x, scale, mean, inverse, *counts = residuals
        count = counts[0] if counts else count_values(x)
        wide = cotangent.astype(mean.dtype)
        bias_gradient = channel_sum(wide)
        scale_gradient = (channel_sum(wide * x) - mean * bias_gradient) * inverse
        # dx = slope · dy + curve · x + constant: one pass.
        slope = scale * inverse
        curve = -slope * inverse * scale_gradient / count
        constant = -slope * bias_gradient / count - curve * mean
        dx = wide * spread(slope) + (x * spread(curve) + spread(constant))
        gradients = dx.astype(x.dtype), scale_gradient.astype(scale.dtype), bias_gradient.astype(scale.dtype)
        return (*gradients, *(jnp.zeros_like(one) for one in counts))

    if mask is None:
        return with_backward(forward, backward)(x, scale, bias)
    count = at_least_one(count_values(x, mask))  # passed on, because forward and backward must not close over a traced value
    return clear(with_backward(forward, backward)(clear(x, mask), scale, bias, count), mask)


def affine(x: Float[Array, "B H W C"], slope: Float[Array, "C"], shift: Float[Array, "C"]) -> Float[Array, "B H W C"]:
    """``x * slope + shift`` for each channel, in x's type.

    Example:
        >>> affine(jnp.ones((1, 1, 1, 2)), jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0])).ravel().tolist()
        [1.0, 3.0]
    """
    return (x * spread(slope) + spread(shift)).astype(x.dtype)


def spread(per_channel: Float[Array, "C"]) -> Float[Array, "1 1 1 C"]:
    """Reshapes a number for each channel to broadcast with an array ``(B, H, W, C)``."""
    return per_channel.reshape(1, 1, 1, -1)
