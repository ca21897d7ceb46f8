"""Converts images to a layout and back. Axes: B examples, H × W pixels, C channels."""

from jaxtyping import Array, Float

from jaxbatch.layers.choose import Layout


def to_layout(images: Float[Array, "B H W C"], layout: Layout) -> Array:
    """Converts images ``(B, H, W, C)`` to ``layout``."""
    return images.transpose(3, 1, 2, 0) if layout == "batch_minor" else images


def flatten(x: Array, layout: Layout) -> Float[Array, "B features"]:
    """Converts activations in ``layout`` to one row per example; features are in (H, W, C) order, whatever the layout.

    Example:
        >>> import jax.numpy as jnp
        >>> images = jnp.arange(8.0).reshape(2, 2, 1, 2)
        >>> bool((flatten(to_layout(images, "batch_minor"), "batch_minor") == images.reshape(2, 4)).all())
        True
    """
    if layout == "batch_minor":
        return x.transpose(1, 2, 0, 3).reshape(-1, x.shape[-1]).T
    return x.reshape(x.shape[0], -1)
