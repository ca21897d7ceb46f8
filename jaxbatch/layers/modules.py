"""The layers as Flax Linen modules. The default initialisation is PyTorch's."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from jaxbatch.layers.choose import Layout
from jaxbatch.layers.convolution import conv
from jaxbatch.layers.masking import example_mask, holds_moments
from jaxbatch.layers.normalisation import affine, batch_norm, channel_moments, count_values, shared_moments, synchronised_batch_norm
from jaxbatch.layers.pooling import conv_max_pool

Initializer = Callable[..., Array]


def torch_uniform(fan_in: int) -> Initializer:
    r"""PyTorch's default initialisation of weights and biases: uniform on :math:`\pm 1/\sqrt{\text{fan-in}}`."""

    def init(key, shape, dtype=jnp.float32):
        bound = 1 / math.sqrt(fan_in)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def he_fan_out(key, shape, dtype=jnp.float32):
    r"""Normal with standard deviation :math:`\sqrt{2/(k^2 O)}`, for kernels ``(O, k, k, C)``; the CIFAR networks use it."""
    return math.sqrt(2 / math.prod(shape[:3])) * jax.random.normal(key, shape, dtype)


class Conv(nn.Module):
    """Convolution in the native layout, ``(B, H, W, C)``. It computes in the type of its input."""

    features: int
    kernel_size: int
    strides: int = 1
    padding: int = 0
    use_bias: bool = True
    kernel_init: Initializer | None = None  # None: PyTorch's
    bias_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[3]
        default = torch_uniform(channels * self.kernel_size**2)
        shape = (self.features, self.kernel_size, self.kernel_size, channels)
        kernel = self.param("kernel", self.kernel_init or default, shape).astype(x.dtype)
        out = conv(x, kernel, layout="native", strides=self.strides, padding=self.padding)
        if not self.use_bias:
            return out
        bias = self.param("bias", self.bias_init or default, (self.features,)).astype(x.dtype)
        return out + bias.reshape(1, 1, 1, -1)


class BatchNorm(nn.Module):
    """Batch normalisation in the native layout.

    In training (``train=True``) the layer normalises with the batch's own moments (mean and variance) and stores these in the
    collection ``batch_stats``. The training loop averages them into the running moments
    (:func:`jaxbatch.training.classification.running_average`), so that a forward pass depends only on parameters and batch. Without
    ``train`` the moments in ``batch_stats`` are used. The stored variance is unbiased, n/(n−1) times the batch's, as in
    PyTorch.

    By default, the moments are those of the batch; on several devices, of each device's share. With ``axis_name``, they are
    those of the whole batch, over the devices along that mapped axis (:data:`jaxbatch.training.devices.AXIS`); without such an
    axis, as on one device, those of the batch. With ``ghost_size``, every contiguous group of that many examples has its own
    moments, and the mean of the groups' moments is stored.

    Fillers (:func:`jaxbatch.layers.example_mask`), which fill up a batch that the number of devices does not divide, are left
    out of the moments, and their outputs are 0.
    """

    epsilon: float = 1e-5
    axis_name: str | None = None
    ghost_size: int | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool, shift: Array | None = None) -> Array:
        """``shift`` is the bias of the preceding convolution, not yet added. It only moves the mean, so it cancels."""
        if x.ndim != 4:
            raise ValueError(f"BatchNorm takes (B, H, W, C) and got shape {x.shape}. For features without pixels, pass x[:, None, None, :].")
        channels = (x.shape[3],)
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        variance = self.variable("batch_stats", "var", jnp.ones, channels)
        if not train or holds_moments(type(self).__name__):
            slope = scale * jax.lax.rsqrt(variance.value + self.epsilon)
            moved = mean.value if shift is None else mean.value - shift
            return affine(x, slope, bias - moved * slope)
        if self.is_initializing():
            return batch_norm(x, scale, bias, self.epsilon)
        out, found_mean, found_variance = self._normalise(x, scale, bias)
        mean.value = found_mean if shift is None else found_mean + shift
        variance.value = found_variance
        return out

    def _normalise(self, x, scale, bias):
        """The result, and the moments to store: mean and unbiased variance."""
        mask = example_mask()
        if mask is not None and len(mask) != len(x):
            raise ValueError(
                f"BatchNorm got {len(x)} examples where the batch has {len(mask)}, some of them fillers, and cannot tell which. "
                "Take a batch size that the number of devices divides."
            )
        count = count_values(x, mask)
        if self.axis_name is not None and self.ghost_size is not None:
            raise ValueError("axis_name and ghost_size: moments are those of the whole batch or of a group. Give only one of the two.")
        if self.axis_name is not None and _is_mapped(self.axis_name):
            count = count * jax.lax.axis_size(self.axis_name) if mask is None else jax.lax.psum(count, self.axis_name)
            mean, variance = jax.lax.stop_gradient(shared_moments(x, self.axis_name, mask))
            out = synchronised_batch_norm(x, scale, bias, self.axis_name, self.epsilon, mask)
        elif self.ghost_size is not None and self.ghost_size < x.shape[0]:
            if x.shape[0] % self.ghost_size:
                raise ValueError(f"ghost_size={self.ghost_size} does not divide the batch of {x.shape[0]} examples.")
            return self._normalise_groups(x, scale, bias, mask)
        else:
            mean, variance = jax.lax.stop_gradient(channel_moments(x, mask))
            out = batch_norm(x, scale, bias, self.epsilon, mask)
        return out, mean, variance * _unbias(count)

    def _normalise_groups(self, x, scale, bias, mask):
        groups, masks = jax.tree.map(lambda leaf: leaf.reshape(-1, self.ghost_size, *leaf.shape[1:]), (x, mask))
        moments = jax.lax.stop_gradient(jax.vmap(channel_moments)(groups, masks))
        out = jax.vmap(lambda group, own: batch_norm(group, scale, bias, self.epsilon, own))(groups, masks).reshape(x.shape)
        if mask is None:
            mean, variance = (leaf.mean(0) for leaf in moments)
            return out, mean, variance * _unbias(count_values(groups[0]))
        counts = jax.vmap(count_values)(groups, masks)  # the weight of a group is its number of examples
        shares = (counts / jnp.maximum(counts.sum(), 1))[:, None]
        return out, (moments[0] * shares).sum(0), (moments[1] * _unbias(counts)[:, None] * shares).sum(0)


def _unbias(count):
    """n / (n - 1), and 1 for a single value."""
    return count / (max(count - 1, 1) if isinstance(count, float) else jnp.maximum(count - 1, 1))


def _is_mapped(axis_name: str) -> bool:
    try:
        jax.lax.axis_size(axis_name)
    except NameError:
        return False
    return True


class ConvBatchNorm(nn.Module):
    """Convolution, then batch normalisation. The convolution's bias is not added: it only moves the stored mean."""

    features: int
    kernel_size: int
    strides: int = 1
    padding: int = 0
    use_bias: bool = False
    kernel_init: Initializer | None = None
    axis_name: str | None = None
    ghost_size: int | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        out = Conv(self.features, self.kernel_size, self.strides, self.padding, False, self.kernel_init)(x)
        norm = BatchNorm(axis_name=self.axis_name, ghost_size=self.ghost_size)
        return norm(out, train=train, shift=bias)


class ConvMaxPool(nn.Module):
    """Convolution with bias, then a max-pool, in a given layout."""

    features: int
    kernel_size: int
    window: int
    layout: Layout
    strides: int = 1
    padding: int = 0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[0] if self.layout == "batch_minor" else x.shape[3]
        init = torch_uniform(channels * self.kernel_size**2)
        kernel = self.param("kernel", init, (self.features, self.kernel_size, self.kernel_size, channels))
        bias = self.param("bias", init, (self.features,))
        out = conv_max_pool(
            x,
            kernel.astype(x.dtype),
            window=self.window,
            layout=self.layout,
            strides=self.strides,
            padding=self.padding,
        )
        # A constant per channel does not change the maximum, so it is added afterwards, to fewer pixels.
        return out + bias.astype(x.dtype).reshape((-1, 1, 1, 1) if self.layout == "batch_minor" else (1, 1, 1, -1))
