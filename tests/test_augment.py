"""Augmentation against NumPy, image by image, and its independence of how examples are batched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbatch.augment import crop_and_flip, example_keys


def by_hand(key, image, padding, flip):
    """The same draws, the change spelled out in NumPy."""
    for_crop, for_flip = jax.random.split(key)
    top, left = np.asarray(jax.random.randint(for_crop, (2,), 0, 2 * padding + 1)) if padding else (0, 0)
    padded = np.pad(np.asarray(image), ((padding, padding), (padding, padding), (0, 0)))
    image = padded[top : top + image.shape[0], left : left + image.shape[1]]
    return image[:, ::-1] if flip and bool(jax.random.bernoulli(for_flip)) else image


@pytest.mark.parametrize("padding", [0, 2, 4])
@pytest.mark.parametrize("flip", [True, False])
def test_against_numpy(padding, flip):
    images = jnp.asarray(np.random.default_rng(0).integers(1, 256, (32, 8, 6, 3), dtype=np.uint8))
    keys = example_keys(3, 5, jnp.arange(32))
    found = jax.jit(lambda k, x: crop_and_flip(k, x, padding=padding, flip=flip))(keys, images)
    for key, image, mine in zip(keys, images, found, strict=True):
        np.testing.assert_array_equal(mine, by_hand(key, image, padding, flip))
    if not padding and not flip:
        np.testing.assert_array_equal(found, images)


def test_every_place_and_both_sides_come_up_evenly():
    image = np.zeros((9, 9, 1), np.uint8)
    image[4, 3] = 1  # off the middle, so that a flip shows
    found = crop_and_flip(example_keys(0, 0, jnp.arange(4000)), jnp.broadcast_to(image, (4000, 9, 9, 1)), padding=2)
    places, counts = np.unique(np.argwhere(np.asarray(found)[..., 0])[:, 1:], axis=0, return_counts=True)
    assert len(places) == 5 * 7 and counts.sum() == 4000  # columns 1..5 straight, 3..7 mirrored
    straight = np.asarray(found)[..., 0].sum(1)[:, :3].sum()  # columns that only an unmirrored image reaches
    assert abs(straight / 4000 - 0.5 * 2 / 5) < 0.03


def test_an_example_is_changed_alike_in_any_batch():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), dtype=np.uint8))
    whole = crop_and_flip(example_keys(0, 2, jnp.arange(10)), images)
    order = jnp.array([7, 3, 9])
    np.testing.assert_array_equal(crop_and_flip(example_keys(0, 2, order), images[order]), whole[order])
    other_epoch = crop_and_flip(example_keys(0, 3, jnp.arange(10)), images)
    assert (np.asarray(other_epoch) != np.asarray(whole)).any()
    with pytest.raises(ValueError, match="padding=-1 pixels"):
        crop_and_flip(example_keys(0, 0, order), images[order], padding=-1)
