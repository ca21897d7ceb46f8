r"""Convolution and pooling that are fast where XLA's own are not.

On CPU, XLA has a fast convolution only outside compiled loops, a slow weight gradient, and a slow
max-pool gradient. What is fast everywhere is a matrix product, so here a convolution on CPU is *im2col*:
the k × k patches are gathered by slicing, and one product with the kernel does the rest. On a GPU or TPU
the platform's convolution is the right one. Two layouts, chosen by :func:`choose_layout`:

===============  ==========================  ======================================================
``batch_minor``  ``(C, H, W, B)``, im2col    CPU. Neighbouring examples are neighbours in memory, so
                                             every slice and every maximum is a long vector
``native``       ``(B, H, W, C)``, ``lax``   GPU, TPU
===============  ==========================  ======================================================

A convolution followed by a max-pool, :func:`conv_max_pool`, has a faster way still in ``batch_minor``. All give
the same numbers up to the rounding of a different order of summation. Axes: B examples, H × W pixels,
C channels, O output channels, k kernel width.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

Layout = Literal["batch_minor", "native"]


def choose_layout(platform: str | None = None) -> Layout:
    """The fastest layout on a platform (default: the one JAX computes on).

    Example:
        >>> choose_layout("cpu"), choose_layout("gpu")
        ('batch_minor', 'native')
    """
    return "batch_minor" if (platform or jax.default_backend()) == "cpu" else "native"


def to_layout(images: Float[Array, "B H W C"], layout: Layout) -> Array:
    """Images as they come, ``(B, H, W, C)``, into ``layout``."""
    return images.transpose(3, 1, 2, 0) if layout == "batch_minor" else images


def flatten(x: Array, layout: Layout) -> Float[Array, "B features"]:
    """Activations in ``layout`` to one row per example, features in (H, W, C) order whatever the layout.

    Example:
        >>> images = jnp.arange(8.0).reshape(2, 2, 1, 2)
        >>> bool((flatten(to_layout(images, "batch_minor"), "batch_minor") == images.reshape(2, 4)).all())
        True
    """
    if layout == "batch_minor":
        return x.transpose(1, 2, 0, 3).reshape(-1, x.shape[-1]).T
    return x.reshape(x.shape[0], -1)


def conv(
    x: Array,
    kernel: Float[Array, "O k k C"],
    *,
    layout: Layout,
    strides: int = 1,
    padding: int = 0,
) -> Array:
    """Two-dimensional convolution (cross-correlation), zero padding of ``padding`` pixels on each side.

    Args:
        x: activations in ``layout``.
        kernel: ``(O, k, k, C)``: a row for each output channel, so that neither the product nor the
            gradient of one example's kernel has to transpose it.
        layout: see the module's docstring.
        strides: step between outputs, in pixels.
        padding: zeros around the image, in pixels.

    Raises:
        ValueError: channels that do not match, or a kernel larger than the padded image.

    Example:
        >>> x, kernel = jnp.ones((1, 3, 3, 1)), jnp.ones((1, 2, 2, 1))
        >>> conv(x, kernel, layout="native").shape
        (1, 2, 2, 1)
    """
    size, channels = kernel.shape[2:]
    rows, columns = x.shape[1:3]
    x_channels = x.shape[0] if layout == "batch_minor" else x.shape[3]
    if x_channels != channels:
        raise ValueError(f"conv: the input has {x_channels} channels and the kernel is for {channels}.")
    if min(rows, columns) + 2 * padding < size:
        raise ValueError(
            f"conv: a {size}x{size} kernel does not fit an image of {rows}x{columns} with padding={padding}. "
            "Use larger images, more padding or a smaller kernel."
        )
    if layout == "native":
        pads = [(padding, padding)] * 2
        return lax.conv_general_dilated(
            x, kernel, (strides, strides), pads, dimension_numbers=("NHWC", "OHWI", "NHWC")
        )
    x = jnp.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    rows, columns = ((n - size) // strides + 1 for n in x.shape[1:3])
    # For each of the k² kernel positions the pixels that it meets; stacked, (k²C) × (HWB).
    patches = jnp.concatenate(
        [
            x[:, i : i + (rows - 1) * strides + 1 : strides, j : j + (columns - 1) * strides + 1 : strides]
            for i in range(size)
            for j in range(size)
        ]
    )
    out = kernel.reshape(kernel.shape[0], -1) @ patches.reshape(size * size * channels, -1)
    return out.reshape(kernel.shape[0], rows, columns, -1)


def max_pool(x: Array, window: int, *, layout: Layout) -> Array:
    """Maximum over windows of ``window`` × ``window`` pixels that do not overlap; a rest at the edge is dropped.

    Where several pixels tie, ``native`` (XLA's ``reduce_window``) sends the gradient to one of them and
    the others share it equally: both are subgradients.

    Raises:
        ValueError: a window larger than the image.

    Example:
        >>> max_pool(jnp.arange(4.0).reshape(1, 2, 2, 1), 2, layout="native").item()
        3.0
    """
    first, rows, columns, last = x.shape
    if min(rows, columns) < window:
        raise ValueError(f"max_pool: window={window} does not fit an image of {rows}x{columns}. Use larger images.")
    if layout == "native":
        return nn.max_pool(x, (window, window), (window, window))
    rows, columns = rows // window, columns // window
    x = x[:, : rows * window, : columns * window]
    return x.reshape(first, rows, window, columns, window, last).max((2, 4))


def conv_max_pool(
    x: Array,
    kernel: Float[Array, "O k k C"],
    *,
    window: int,
    layout: Layout,
    padding: int = 0,
) -> Array:
    r"""``max_pool(conv(x, kernel), window)``, with a faster way in ``batch_minor``.

    The p² = window² pixels that a pooling window compares are p² *phases* of the convolution. All phases
    at a place see the same (k+p−1)² pixels of the input, so one matrix product computes them side by side:
    the kernel, shifted to each phase and padded with zeros, is a (p²·O) × (k+p−1)²C matrix. Against
    plain im2col the gathered patches shrink by p²k²/(k+p−1)² (2.8 for k = 5, p = 2) while the
    multiplications grow by (k+p−1)²/k² (1.44), the product has p² times the rows, and the maximum is taken
    over a leading axis, in long vectors. On CPU, memory is what decides. Where the padded kernel would outweigh the patches it saves (the last layers of a
    network, small batches), im2col is used.

    Raises:
        ValueError: as :func:`conv` and :func:`max_pool`.

    Example:
        >>> images, kernel = jnp.arange(36.0).reshape(1, 6, 6, 1), jnp.ones((1, 3, 3, 1))
        >>> x = to_layout(images, "batch_minor")
        >>> conv_max_pool(x, kernel, window=2, layout="batch_minor")[0, :, :, 0].tolist()
        [[126.0, 144.0], [234.0, 252.0]]
    """
    phases, wide = window * window, kernel.shape[1] + window - 1
    rows, columns = ((n + 2 * padding - kernel.shape[1] + 1) // window for n in x.shape[1:3])
    patch_size = rows * columns * wide * wide * kernel.shape[3] * x.shape[-1]
    kernel_size = phases * wide * wide * kernel[:, 0, 0].size
    if layout != "batch_minor" or min(rows, columns) < 1 or patch_size < 3 * kernel_size:
        return max_pool(conv(x, kernel, layout=layout, padding=padding), window, layout=layout)
    x = jnp.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    shifts = [(i, j) for i in range(wide) for j in range(wide)]
    patches = jnp.concatenate(
        [x[:, i : i + rows * window : window, j : j + columns * window : window] for i, j in shifts]
    )
    shifted = [
        jnp.pad(kernel, [(0, 0), (i, window - 1 - i), (j, window - 1 - j), (0, 0)])
        for i in range(window)
        for j in range(window)
    ]
    matrix = jnp.stack(shifted).reshape(phases * kernel.shape[0], -1)
    out = matrix @ patches.reshape(matrix.shape[1], -1)
    return out.reshape(phases, kernel.shape[0], rows, columns, -1).max(0)


def torch_uniform(fan_in: int):
    r"""PyTorch's default initialisation of weights and biases: uniform on :math:`\pm 1/\sqrt{\text{fan-in}}`."""

    def init(key, shape, dtype=jnp.float32):
        bound = 1 / math.sqrt(fan_in)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class ConvMaxPool(nn.Module):
    """Convolution with bias, then a max-pool, in a given layout; initialised as PyTorch does."""

    features: int
    kernel_size: int
    window: int
    layout: Layout
    padding: int = 0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[0] if self.layout == "batch_minor" else x.shape[3]
        init = torch_uniform(channels * self.kernel_size**2)
        kernel = self.param("kernel", init, (self.features, self.kernel_size, self.kernel_size, channels))
        bias = self.param("bias", init, (self.features,))
        out = conv_max_pool(x, kernel, window=self.window, layout=self.layout, padding=self.padding)
        # A constant per channel can be added after the maximum, to a quarter of the pixels.
        return out + bias.reshape((-1, 1, 1, 1) if self.layout == "batch_minor" else (1, 1, 1, -1))
