"""What happens to images on the device, inside jit, before the model sees them."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


def normalise(
    images: Shaped[Array, "B H W C"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "B H W C"]:
    r"""``uint8`` images to :math:`(x / 255 - \text{mean}) / \text{std}`, per channel.

    Images of a floating type are taken as already scaled to [0, 1].

    Example:
        >>> round(normalise(jnp.full((1, 1, 1, 1), 51, jnp.uint8), (0.1,), (0.5,)).item(), 6)
        0.2
    """
    if jnp.issubdtype(images.dtype, jnp.integer):
        images = images.astype(jnp.float32) / 255
    mean, std = (jnp.asarray(v, images.dtype).reshape(1, 1, 1, -1) for v in (mean, std))
    return (images - mean) / std
