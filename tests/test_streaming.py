"""Batches made on the host: nothing lost, nothing out of order, errors where they belong, threads that end."""

import threading

import jax
import numpy as np
import pytest

import jaxbatch as jb
from jaxbatch.streaming import decode_png, encode_png, shift


def images_of(count, side=6, channels=1):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_every_bit(channels):
    images = images_of(5, channels=channels)
    np.testing.assert_array_equal(decode_png(encode_png(images)), images)


def test_shift_against_rolling():
    images = images_of(25)
    offsets = np.array([(down, right) for down in range(-2, 3) for right in range(-2, 3)])
    for image, (down, right), found in zip(images, offsets, shift(images, offsets), strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        np.testing.assert_array_equal(found, np.roll(padded, (down, right), (0, 1))[2:-2, 2:-2])
    np.testing.assert_array_equal(shift(images, np.zeros((25, 2), int)), images)


@pytest.mark.parametrize("depth", [1, 3])
def test_order_and_device(depth):
    made = ({"x": np.full(4, n), "y": np.array(n)} for n in range(20))
    found = list(jb.prefetch(made, depth))
    assert [int(batch["y"]) for batch in found] == list(range(20))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
    assert list(jb.prefetch(iter([]))) == []


def test_no_more_is_made_than_asked_for():
    made = []

    def batches():
        for n in range(100):
            made.append(n)
            yield np.array(n)

    stream = jb.prefetch(batches(), 2)
    next(stream)
    stream.close()
    assert len(made) <= 5
    assert not [thread for thread in threading.enumerate() if thread.name == "jaxbatch-prefetch"]


def test_an_error_comes_where_the_batch_would_have():
    def batches():
        yield np.array(1)
        raise OSError("the disk is gone")

    stream = jb.prefetch(batches())
    assert int(next(stream)) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    with pytest.raises(ValueError, match="depth=0 must be at least 1"):
        next(jb.prefetch(batches(), 0))


def test_float64_stays(x64):
    (batch,) = jb.prefetch([np.array([0.1])])
    assert batch.dtype == np.float64
