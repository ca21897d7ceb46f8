"""Batches made on the host: nothing lost, nothing out of order, errors where they belong, threads that end."""

import threading

import jax
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.data.streaming import decode_png, encode_png, shift


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
    with pytest.raises(ValueError, match="depth=0 must be a whole number of at least 1"):
        next(jb.prefetch(batches(), 0))


def test_float64_stays(x64):
    (batch,) = jb.prefetch([np.array([0.1])])
    assert batch.dtype == np.float64


def aligned(count):
    """Memory that XLA:CPU takes as it is, without a copy."""
    raw = np.empty(count * 4 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count * 4].view(np.float32)


def test_a_buffer_may_be_filled_anew():
    buffer = aligned(1024)

    def batches():
        for number in range(8):
            buffer[:] = number
            yield buffer

    assert [float(batch[0]) for batch in list(jb.prefetch(batches()))] == list(range(8))
    placed = jb.prefetch(batches(), put=lambda batch: jax.device_put(batch, jax.devices()[0]))
    assert [float(batch[-1]) for batch in list(placed)] == list(range(8))


class Reused:
    """A stream of 0, 1, 2 ... that fills one buffer anew for every part."""

    def __init__(self, count, size):
        self.num_examples, self.example = count, jax.ShapeDtypeStruct((1024,), np.float32)
        self.buffer = aligned(size * 1024).reshape(size, 1024)

    def parts(self, indices, place=(0, 0)):
        for part in indices:
            self.buffer[: len(part)] = np.asarray(part, np.float32)[:, None]
            yield self.buffer[: len(part)]


def test_a_stream_may_use_its_buffer_again():
    loss_fn = lambda w, x: w * x.mean(1)
    task = jb.Task(lambda key: jax.numpy.array(0.0), loss_fn, lambda w, x: {"value": x.mean(1)}, Reused(64, 4), Reused(64, 64))
    for _ in range(3):
        (record,) = jb.fit(task, jb.FitConfig(optax.sgd(1.0), 64, microbatch_size=4))
        assert float(record["state"].params) == -31.5 and record["test_value"] == 31.5
