"""Maximum pooling, alone and together with the convolution before it.

Axes: B examples, H × W pixels, C channels, O output channels, k kernel width.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxbatch.layers.choose import Layout, choose_phases, choose_reshaped_pool
from jaxbatch.layers.convolution import conv


def max_pool(x: Array, window: int, *, layout: Layout) -> Array:
    """Maximum over windows of ``window`` × ``window`` pixels that do not overlap; incomplete windows at the edge are dropped.

    If several pixels are equal to the maximum, an accelerator (XLA's ``reduce_window``) sends the gradient to one of them. A
    CPU shares it equally between them, which is many times faster there. Both are subgradients.

    Raises:
        ValueError: the window is larger than the image.

    Example:
        >>> max_pool(jnp.arange(4.0).reshape(1, 2, 2, 1), 2, layout="native").item()
        3.0
    """
    first, rows, columns, last = x.shape
    if min(rows, columns) < window:
        raise ValueError(f"max_pool: window={window} does not fit an image of {rows}x{columns}. Use larger images.")
    if layout == "native" and not choose_reshaped_pool():
        return nn.max_pool(x, (window, window), (window, window))
    # Rows and columns are the middle axes of both layouts.
    rows, columns = rows // window, columns // window
    x = x[:, : rows * window, : columns * window]
    return x.reshape(first, rows, window, columns, window, last).max((2, 4))


def conv_max_pool(
    x: Array,
    kernel: Float[Array, "O k k C"],
    *,
    window: int,
    layout: Layout,
    strides: int = 1,
    padding: int = 0,
) -> Array:
    r"""``max_pool(conv(x, kernel), window)``, with a faster way in ``batch_minor``.

    The p² = window² pixels that a pooling window compares are p² *phases* of the convolution. All phases at a place use the
    same (k+p−1)² pixels of the input, so one matrix product computes them side by side: the kernel, shifted to each phase and
    padded with zeros, is a (p²·O) × (k+p−1)²C matrix. Compared with plain im2col, the gathered patches are smaller by
    p²k²/(k+p−1)² (2.8 for k = 5, p = 2), and the multiplications are more by (k+p−1)²/k² (1.44). The product has p² times the
    rows, and the maximum is taken over a leading axis, in long vectors. On CPU the memory matters most.
    :func:`jaxbatch.layers.choose.choose_phases` says where this is faster; elsewhere im2col is used.

    Raises:
        ValueError: as :func:`conv` and :func:`max_pool`.

    Example:
        >>> images, kernel = jnp.arange(36.0).reshape(1, 6, 6, 1), jnp.ones((1, 3, 3, 1))
        >>> from jaxbatch.layers import to_layout
        >>> x = to_layout(images, "batch_minor")
        >>> conv_max_pool(x, kernel, window=2, layout="batch_minor")[0, :, :, 0].tolist()
        [[126.0, 144.0], [234.0, 252.0]]
    """

    def in_parts():
        return max_pool(conv(x, kernel, layout=layout, strides=strides, padding=padding), window, layout=layout)

    if layout != "batch_minor" or strides != 1:
        return in_parts()
    phases, wide = window * window, kernel.shape[1] + window - 1
    rows, columns = ((n + 2 * padding - kernel.shape[1] + 1) // window for n in x.shape[1:3])
    patch_size = rows * columns * wide * wide * kernel.shape[3] * x.shape[-1]
    kernel_size = phases * wide * wide * kernel[:, 0, 0].size
    if min(rows, columns) < 1 or not choose_phases(patch_size, kernel_size):
        return in_parts()
    x = jnp.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    shifts = [(i, j) for i in range(wide) for j in range(wide)]
    patches = jnp.concatenate([x[:, i : i + rows * window : window, j : j + columns * window : window] for i, j in shifts])
    shifted = [jnp.pad(kernel, [(0, 0), (i, window - 1 - i), (j, window - 1 - j), (0, 0)]) for i in range(window) for j in range(window)]
    matrix = jnp.stack(shifted).reshape(phases * kernel.shape[0], -1)
    out = matrix @ patches.reshape(matrix.shape[1], -1)
    return out.reshape(phases, kernel.shape[0], rows, columns, -1).max(0)
