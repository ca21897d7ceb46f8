"""Images read at other places: shifted, turned, bent, with bilinear interpolation, on the device.

Axes: H × W pixels of an image, N places.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def read_at(image: Float[Array, "H W"], rows: Float[Array, "..."], columns: Float[Array, "..."]) -> Float[Array, "..."]:
    """The image at places between its pixels, by bilinear interpolation; outside it is 0.

    Example:
        >>> image = jnp.array([[0.0, 4.0], [8.0, 0.0]])
        >>> read_at(image, jnp.array([0.0, 0.5, 0.25, -5.0]), jnp.array([1.0, 0.5, 0.0, 0.0])).tolist()
        [4.0, 3.0, 2.0, 0.0]
    """
    height, width = image.shape
    flat = jnp.pad(image, 1).reshape(-1)  # a border of zeros, into which places outside fall
    rows, columns = jnp.clip(rows + 1, 0, height + 1), jnp.clip(columns + 1, 0, width + 1)
    top, left = (jnp.minimum(jnp.floor(at), last) for at, last in ((rows, height), (columns, width)))
    down, right = rows - top, columns - left
    corner = (top * (width + 2) + left).astype(jnp.int32)
    upper = flat[corner] * (1 - right) + flat[corner + 1] * right
    lower = flat[corner + width + 2] * (1 - right) + flat[corner + width + 3] * right
    return upper * (1 - down) + lower * down


def grid(size: int) -> tuple[Float[Array, "S S"], Float[Array, "S S"]]:
    """Rows and columns of the pixels of a square image, counted from its centre.

    Example:
        >>> print(grid(2)[0])
        [[-0.5 -0.5]
         [ 0.5  0.5]]
    """
    line = jnp.arange(size, dtype=jnp.float32) - (size - 1) / 2
    rows, columns = jnp.meshgrid(line, line, indexing="ij")
    return rows, columns
