"""Normalisation and augmentation (random changes) of images on the device, inside jit, before the model sees them.

Each example has its own random key, made from (seed, epoch, number of the example). So the change of an example in an epoch
does not depend on the batch size, the number of devices, or the place from which a run was resumed.

Axes: B examples, H × W pixels, C channels.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Integer, Key, PyTree, Shaped

from jaxbatch.hints import call_function

Prepare = Callable[[Key[Array, "B"], PyTree], PyTree]  # (a key for each example, batch) -> batch
_AUGMENT = 0x61756720  # "aug ": makes these keys differ from the keys of init and shuffling
_TEST = 0x74657374  # "test": likewise


def normalise(images: Shaped[Array, "B H W C"], mean: tuple[float, ...], std: tuple[float, ...]) -> Float[Array, "B H W C"]:
    r"""Maps ``uint8`` images to :math:`(x / 255 - \text{mean}) / \text{std}`, per channel.

    Images of a floating-point type must already be scaled to [0, 1].

    Example:
        >>> round(normalise(jnp.full((1, 1, 1, 1), 51, jnp.uint8), (0.1,), (0.5,)).item(), 6)
        0.2
    """
    if jnp.issubdtype(images.dtype, jnp.integer):
        images = images.astype(jnp.float32) / 255
    shift, scale = (jnp.asarray(v, images.dtype).reshape(1, 1, 1, -1) for v in (mean, std))
    return (images - shift) / scale


def example_keys(
    seed: int | np.integer | Integer[Array, ""], epoch: int | np.integer | Integer[Array, ""], indices: Int[Array, "B"]
) -> Key[Array, "B"]:
    """One key for each example, a pure function of the seed, the epoch and the example's number in the data set.

    Example:
        >>> a, b = (example_keys(0, 3, jnp.array(order)) for order in ([7, 2], [2, 5, 7]))
        >>> bool((a[0] == b[2]) & (a[1] == b[0])), bool(a[0] == a[1])
        (True, False)
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _AUGMENT), epoch)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)


def keys_for_metrics(indices: Int[Array, "B"]) -> Key[Array, "B"]:
    """One key for each example on which metrics are taken, a pure function of its number in the data set.

    So every evaluation of every run sees the same noise, however it is cut, and metrics differ by the parameters alone.

    Example:
        >>> bool(keys_for_metrics(jnp.array([7, 2]))[1] == keys_for_metrics(jnp.arange(3))[2])
        True
    """
    key = jax.random.fold_in(jax.random.key(0), _TEST)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)


def call_prepare(prepare: Prepare, keys: Any, batch: PyTree, name: str = "prepare") -> PyTree:
    """``prepare(keys, batch)``; a function that takes other arguments raises an error that says what it gets."""
    return call_function(name, prepare, keys, batch, gets="a key for each example and a batch")


def prepared(prepare: Prepare | None, batch: PyTree, seed_epoch: Any, index: Any) -> PyTree:
    """The examples ``index`` after ``prepare``, with the key of each; as they are without it."""
    return batch if prepare is None else call_prepare(prepare, example_keys(seed_epoch[0], seed_epoch[1], index), batch)


def prepared_for_metrics(prepare_test: Prepare | None, batch: PyTree, index: Any) -> PyTree:
    """The examples ``index`` of a test set after ``prepare_test``, with the key of each; as they are without it.

    Example:
        >>> prepared_for_metrics(lambda keys, x: (x, keys), jnp.ones(2), jnp.array([0, 1]))[1].shape
        (2,)
    """
    return batch if prepare_test is None else call_prepare(prepare_test, keys_for_metrics(index), batch, "prepare_test")


def batch_shapes(data: PyTree, batch_size: int, prepare: Prepare | None = None) -> PyTree:
    """The shapes of a batch as the loss gets it, after ``prepare``.

    Example:
        >>> batch_shapes(jnp.ones((5, 3)), 2, lambda keys, x: (x, keys))
        (ShapeDtypeStruct(shape=(2, 3), dtype=float32), ShapeDtypeStruct(shape=(2,), dtype=key<fry>))
    """
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch_size, *leaf.shape[1:]), leaf.dtype), data)
    if prepare is None:
        return batch
    keys = jax.eval_shape(lambda: example_keys(0, 0, jnp.zeros(batch_size, jnp.int32)))
    return jax.eval_shape(lambda *pair: call_prepare(prepare, *pair), keys, batch)


def crop_and_flip(keys: Key[Array, "B"], images: Shaped[Array, "B H W C"], *, padding: int = 4, flip: bool = True) -> Shaped[Array, "B H W C"]:
    """Moves each image at random by up to ``padding`` pixels, fills the gap with zeros, and mirrors half of the images.

    This is the same as padding with zeros on all sides, cropping at random to the old size and flipping left to right.

    Args:
        keys: one for each image, see :func:`example_keys`.
        images: of any type; zeros are black only before normalisation.
        padding: pixels on each side; 0 means no crop.
        flip: whether images may be mirrored; use False for digits.

    Raises:
        ValueError: a negative padding.

    Example:
        >>> images = jnp.arange(2 * 4 * 4, dtype=jnp.uint8).reshape(2, 4, 4, 1)
        >>> changed = crop_and_flip(example_keys(0, 0, jnp.arange(2)), images, padding=1)
        >>> changed.shape, changed.dtype
        ((2, 4, 4, 1), dtype('uint8'))

    References:
        Lee et al., `Deeply-Supervised Nets <https://arxiv.org/abs/1409.5185>`_, 2014; as He et al.,
        `Deep Residual Learning <https://arxiv.org/abs/1512.03385>`_, 2015, section 4.2.
    """
    if padding < 0:
        raise ValueError(f"padding={padding} pixels must be at least 0.")

    def one(key, image):
        for_crop, for_flip = jax.random.split(key)
        if padding:
            padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
            top, left = jax.random.randint(for_crop, (2,), 0, 2 * padding + 1)
            image = lax.dynamic_slice(padded, (top, left, 0), image.shape)
        if flip:
            image = jnp.where(jax.random.bernoulli(for_flip), image[:, ::-1], image)
        return image

    return jax.vmap(one)(keys, images)
