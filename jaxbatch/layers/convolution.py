r"""The ways to compute a convolution; :mod:`jaxbatch.layers.choose` chooses one. All give the same numbers up to rounding.

Axes: B examples, H × W pixels of the image, R × Q of the result, C channels, O output channels, k kernel width.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxbatch.batches import even_part
from jaxbatch.layers.choose import SMALL_PRODUCT, Algorithm, Layout, choose_conv, images_at_a_time
from jaxbatch.layers.derivatives import with_backward

_NUMBERS = ("NHWC", "OHWI", "NHWC")


def conv(
    x: Array,
    kernel: Float[Array, "O k k C"],
    *,
    layout: Layout,
    strides: int = 1,
    padding: int = 0,
    algorithm: Algorithm | None = None,
) -> Array:
    """Two-dimensional convolution (cross-correlation) with ``padding`` zeros on each side.

    Args:
        x: activations in ``layout``.
        kernel: ``(O, k, k, C)``. Each output channel is a row, so that neither the product nor the per-example gradient of the
            kernel needs a transpose.
        layout: ``"batch_minor"`` or ``"native"``, see :mod:`jaxbatch.layers.choose`.
        strides: step between outputs, in pixels.
        padding: zeros around the image, in pixels.
        algorithm: in the native layout, how it is computed; ``None``: the fastest.

    Raises:
        ValueError: the channels do not match, or the kernel is larger than the padded image.

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
    if layout == "batch_minor":
        return _batch_minor(x, kernel, strides, padding)
    algorithm = algorithm or choose_conv((rows, columns), size, batch_size=x.shape[0], padding=padding)
    if algorithm == "platform":
        return _xla(x, kernel, strides, padding)
    if algorithm == "product":
        return x[:, ::strides, ::strides] @ kernel[:, 0, 0].T
    shape = _Shape(rows, columns, size, strides, padding)
    if algorithm == "dense":
        return _dense(x, kernel, shape)

    def forward(x, kernel):
        out = _patches_product(x, kernel, shape) if algorithm == "patches" else _xla(x, kernel, strides, padding)
        return out, (x, kernel)

    def backward(residuals, cotangent):
        x, kernel = residuals
        return _turned(cotangent, kernel, shape), _kernel_gradient(x, cotangent, shape)

    return with_backward(forward, backward)(x, kernel)


class _Shape(NamedTuple):
    """The numbers that determine a convolution's geometry."""

    rows: int
    columns: int
    size: int
    strides: int
    padding: int

    @property
    def result(self) -> tuple[int, int]:
        """R, Q."""
        rows, columns = ((n + 2 * self.padding - self.size) // self.strides + 1 for n in (self.rows, self.columns))
        return rows, columns


def _xla(x, kernel, strides, padding):
    pads = [(padding, padding)] * 2
    return lax.conv_general_dilated(x, kernel, (strides, strides), pads, dimension_numbers=_NUMBERS)


def _batch_minor(x, kernel, strides, padding):
    size, channels = kernel.shape[2:]
    x = jnp.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    rows, columns = ((n - size) // strides + 1 for n in x.shape[1:3])
    # For each of the k² kernel positions, the pixels that it is multiplied with; stacked, (k²C) × (RQB).
    patches = jnp.concatenate(
        [x[:, i : i + (rows - 1) * strides + 1 : strides, j : j + (columns - 1) * strides + 1 : strides] for i in range(size) for j in range(size)]
    )
    out = kernel.reshape(kernel.shape[0], -1) @ patches.reshape(size * size * channels, -1)
    return out.reshape(kernel.shape[0], rows, columns, -1)


def _patches(x, shape: _Shape):
    """Gathers images (B, H, W, C) into (B·R·Q, k²C): the pixels under the kernel at each place."""
    pad, strides = (shape.padding, shape.padding), shape.strides
    x = jnp.pad(x, [(0, 0), pad, pad, (0, 0)])
    rows, columns = ((n - 1) * strides + 1 for n in shape.result)
    offsets = [(i, j) for i in range(shape.size) for j in range(shape.size)]
    taps = [x[:, i : i + rows : strides, j : j + columns : strides] for i, j in offsets]
    return jnp.concatenate(taps, -1).reshape(-1, shape.size**2 * x.shape[-1])


def _chunk(x, shape: _Shape) -> int:
    patch_bytes = math.prod(shape.result) * shape.size**2 * x.shape[3] * x.dtype.itemsize
    return even_part(x.shape[0], images_at_a_time(patch_bytes, x.shape[0]))


def _kernel_gradient(x, cotangent, shape: _Shape):
    """The sum over pixels of cotangent × patch, with the patches of a few images at a time."""
    outputs, chunk = cotangent.shape[-1], _chunk(x, shape)
    dtype = jnp.promote_types(x.dtype, jnp.float32)  # bfloat16 is too coarse for a long sum

    @jax.checkpoint  # gathers the patches again instead of keeping them
    def product(x, cotangent):
        rows = cotangent.reshape(-1, outputs)
        return lax.dot_general(rows, _patches(x, shape), (((0,), (0,)), ((), ())), preferred_element_type=dtype)

    full = x.shape[0] // chunk * chunk
    if full == chunk:
        total = product(x[:full], cotangent[:full])
    else:
        parts = [leaf[:full].reshape(-1, chunk, *leaf.shape[1:]) for leaf in (x, cotangent)]
        zero = jnp.zeros((outputs, shape.size**2 * x.shape[3]), dtype)
        side_by_side = 2 if zero.size < SMALL_PRODUCT else 1
        total, _ = lax.scan(lambda total, part: (total + product(*part), None), zero, parts, unroll=side_by_side)
    if full < x.shape[0]:
        total += product(x[full:], cotangent[full:])
    return total.reshape(outputs, shape.size, shape.size, -1).astype(x.dtype)


def _patches_product(x, kernel, shape: _Shape):
    """Forward by im2col, a few images at a time."""
    matrix, size = kernel.reshape(kernel.shape[0], -1).T, (-1, *shape.result, kernel.shape[0])

    def product(image):
        return (_patches(image[None], shape) @ matrix).reshape(size)[0]

    return lax.map(product, x, batch_size=_chunk(x, shape))


def _turned(cotangent, kernel, shape: _Shape):
    """The input's gradient as a *forward* convolution of the cotangent with the kernel turned by 180 degrees.

    With strides s the image is treated as H/s × W/s blocks of s × s pixels, with s²C channels. On these blocks the convolution
    has stride 1, and no zeros have to be written between the cotangent's pixels.
    """
    size, strides, padding = shape.size, shape.strides, shape.padding
    blocks = -(-size // strides)
    short = blocks * strides - size
    kernel = jnp.pad(kernel, [(0, 0), (0, short), (0, short), (0, 0)])
    outputs, channels = kernel.shape[0], kernel.shape[3]
    kernel = kernel.reshape(outputs, blocks, strides, blocks, strides, channels).transpose(2, 4, 5, 1, 3, 0)
    kernel = kernel.reshape(strides * strides * channels, blocks, blocks, outputs)[:, ::-1, ::-1]
    if strides == 1 and padding < size:
        return conv(cotangent, kernel, layout="native", padding=size - 1 - padding)
    out = conv(cotangent, kernel, layout="native", padding=blocks - 1)
    batch, rows, columns, _ = out.shape
    out = out.reshape(batch, rows, columns, strides, strides, channels).transpose(0, 1, 3, 2, 4, 5)
    return _crop(out.reshape(batch, rows * strides, columns * strides, channels), shape)


def _crop(padded, shape: _Shape):
    """Cuts the image out of the padded image; pixels that no window reached become zero."""
    padding, rows, columns = shape.padding, shape.rows, shape.columns
    out = padded[:, padding : padding + rows, padding : padding + columns]
    return jnp.pad(out, [(0, 0), (0, rows - out.shape[1]), (0, columns - out.shape[2]), (0, 0)])


def _dense_matrix(kernel, shape: _Shape):
    """The matrix of all shifts of the kernel, (R·Q·O) × (H·W·C), with which a convolution is one product over whole images.

    Row (r, q, o) holds the weights of all inputs for output o at pixel (r, q): the shifted kernel, and zeros elsewhere.
    """
    padding, strides, size = shape.padding, shape.strides, shape.size
    images, results = (shape.rows, shape.columns), shape.result
    before = [max(0, (n - 1) * strides - padding) for n in results]
    after = [max(0, padding + n - size) for n in images]
    field = jnp.pad(kernel, [(0, 0), *zip(before, after), (0, 0)])
    top, left = (at + padding for at in before)
    corners = [(top - r * strides, left - q * strides) for r in range(results[0]) for q in range(results[1])]
    windows = [field[:, row : row + images[0], column : column + images[1]] for row, column in corners]
    return jnp.stack(windows).reshape(math.prod(results) * kernel.shape[0], -1)


def _dense(x, kernel, shape: _Shape):
    return (x.reshape(x.shape[0], -1) @ _dense_matrix(kernel, shape).T).reshape(-1, *shape.result, kernel.shape[0])
