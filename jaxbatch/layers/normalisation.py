r"""Batch normalisation over the examples and pixels of an array ``(B, H, W, C)``.

Axes: B examples, H × W pixels, C channels.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbatch.layers.derivatives import with_backward


def channel_moments(x: Float[Array, "B H W C"]) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
    r"""Mean and variance of each channel, :math:`E[x]` and :math:`\max(E[x^2] - E[x]^2, 0)`, in float32 at least.

    Example:
        >>> mean, variance = channel_moments(jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1))
        >>> mean.item(), variance.item()
        (2.0, 1.0)
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    count = x.size // x.shape[3]
    mean, square = channel_sum(wide) / count, channel_sum(wide * wide) / count
    return mean, jnp.maximum(square - mean * mean, 0)


def channel_sum(x: Float[Array, "B H W C"]) -> Float[Array, "C"]:
    """The sum over examples and pixels, in two steps.

    The first adds whole rows of W·C numbers: long vectors on a CPU, where C alone may be as short as 16.

    Example:
        >>> channel_sum(jnp.ones((2, 3, 4, 1))).tolist()
        [24.0]
    """
    batch, rows, columns, channels = x.shape
    return x.reshape(batch * rows, columns * channels).sum(0).reshape(columns, channels).sum(0)


def shared_moments(x: Float[Array, "B H W C"], axis_name: str) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
    """As :func:`channel_moments`, over the shares of all devices along a mapped axis; shares are of one size."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    count = x.size // x.shape[3]
    mean, square = jax.lax.pmean((channel_sum(wide) / count, channel_sum(wide * wide) / count), axis_name)
    return mean, jnp.maximum(square - mean * mean, 0)


def synchronised_batch_norm(
    x: Float[Array, "B H W C"], scale: Float[Array, "C"], bias: Float[Array, "C"], axis_name: str, epsilon: float = 1e-5
) -> Float[Array, "B H W C"]:
    """:func:`batch_norm` of the batch that lies in shares on the devices along a mapped axis.

    To be called under ``pmap`` or ``shard_map``; automatic gradients, which pass between the devices too.
    """
    mean, variance = shared_moments(x, axis_name)
    inverse = jax.lax.rsqrt(variance + epsilon)
    return affine(x, scale * inverse, bias - mean * scale * inverse)


def batch_norm(
    x: Float[Array, "B H W C"], scale: Float[Array, "C"], bias: Float[Array, "C"], epsilon: float = 1e-5
) -> Float[Array, "B H W C"]:
    r""":math:`\gamma\,(x - \mu)/\sqrt{\sigma^2 + \epsilon} + \beta`, with the batch's own moments.

    The gradient is the textbook's, :math:`\mathrm dx = \frac{\gamma}{\sqrt{\sigma^2+\epsilon}}\big[\mathrm dy -
    \overline{\mathrm dy} - \hat x\,\overline{\mathrm dy\,\hat x}\big]`, in two passes over the activations.

    Args:
        x: activations; moments are taken in float32 at least, the result has x's type.
        scale: :math:`\gamma`.
        bias: :math:`\beta`.
        epsilon: added to the variance.

    Example:
        >>> x = jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1)
        >>> batch_norm(x, jnp.ones(1), jnp.zeros(1), epsilon=0.0).ravel().tolist()
        [-1.0, 1.0]

    References:
        Ioffe and Szegedy, `Batch Normalization <https://arxiv.org/abs/1502.03167>`_, 2015: algorithm 1, section 3.
    """
    count = x.size // x.shape[3]

    def forward(x, scale, bias):
        mean, variance = channel_moments(x)
        inverse = jax.lax.rsqrt(variance + epsilon)
        return affine(x, scale * inverse, bias - mean * scale * inverse), (x, scale, mean, inverse)

    def backward(residuals, cotangent):
        x, scale, mean, inverse = residuals
        wide = cotangent.astype(mean.dtype)
        bias_gradient = channel_sum(wide)
        scale_gradient = (channel_sum(wide * x) - mean * bias_gradient) * inverse
        # dx = slope · dy + curve · x + constant: one pass.
        slope = scale * inverse
        curve = -slope * inverse * scale_gradient / count
        constant = -slope * bias_gradient / count - curve * mean
        dx = wide * spread(slope) + (x * spread(curve) + spread(constant))
        return dx.astype(x.dtype), scale_gradient.astype(scale.dtype), bias_gradient.astype(scale.dtype)

    return with_backward(forward, backward)(x, scale, bias)


def affine(x: Float[Array, "B H W C"], slope: Float[Array, "C"], shift: Float[Array, "C"]) -> Float[Array, "B H W C"]:
    """``x * slope + shift`` for each channel, in x's type.

    Example:
        >>> affine(jnp.ones((1, 1, 1, 2)), jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0])).ravel().tolist()
        [1.0, 3.0]
    """
    return (x * spread(slope) + spread(shift)).astype(x.dtype)


def spread(per_channel: Float[Array, "C"]) -> Float[Array, "1 1 1 C"]:
    """A number for each channel, ready to meet an array ``(B, H, W, C)``."""
    return per_channel.reshape(1, 1, 1, -1)
