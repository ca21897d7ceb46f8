"""What the contrastive study trains: two views of each image, a small encoder, NT-Xent over the batch or within groups of it.

A run is one compiled program. Its batches are indices, and views are made from them where they are encoded, so that a batch of any
size takes the memory of a microbatch.

Axes: B examples, D components of a representation, S updates.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

import jaxbatch as jb
from experiments.harness.deformed import grid, read_at
from experiments.harness.tuned_runs import init_layers, make_gradient, make_run
from jaxbatch.augment import example_keys
from jaxbatch.batches import epoch_batches

SHIFT, ANGLE, SCALE, NOISE = 1.25, 0.25, 0.15, 0.3  # pixels, radians, part of the size, grey levels of 0 to 1
WIDTHS, PROJECTION = (128, 64), 32  # of the encoder, the last one is the representation; of the head that the loss sees
CHUNK = 1024  # columns of the matrix of pairs in memory


def halve(images) -> Float[Array, "N H W"]:
    """Grey levels from 0 to 1 in half the resolution: an encoder of 14 × 14 pixels costs a quarter, and digits stay legible.

    Example:
        >>> print(halve(jnp.full((1, 2, 4, 1), 255, jnp.uint8)))
        [[[1. 1.]]]
    """
    grey = jnp.asarray(images, jnp.float32).mean(-1) / 255
    count, height, width = grey.shape
    return grey.reshape(count, height // 2, 2, width // 2, 2).mean((2, 4))


def make_view(key: Key[Array, ""], image: Float[Array, "H W"]) -> Float[Array, "H W"]:
    """The image moved, turned, scaled and with noise, all drawn from ``key``."""
    for_shift, for_angle, for_scale, for_noise = jax.random.split(key, 4)
    down, right = jax.random.uniform(for_shift, (2,), minval=-SHIFT, maxval=SHIFT)
    angle = jax.random.uniform(for_angle, minval=-ANGLE, maxval=ANGLE)
    scale = jnp.exp(jax.random.uniform(for_scale, minval=-SCALE, maxval=SCALE))
    rows, columns = grid(image.shape[0])
    middle, cos, sin = (image.shape[0] - 1) / 2, jnp.cos(angle) * scale, jnp.sin(angle) * scale
    moved = read_at(image, cos * rows - sin * columns + middle + down, sin * rows + cos * columns + middle + right)
    return moved + NOISE * jax.random.normal(for_noise, image.shape)


def init_params(key: Key[Array, ""], pixels: int) -> list[dict[str, Array]]:
    """The layers of the encoder, and the one that projects for the loss."""
    widths = (pixels, *WIDTHS, PROJECTION)
    return init_layers(jax.random.split(key, len(widths) - 1), widths)


def represent(params: PyTree, images: Float[Array, "B H W"]) -> Float[Array, "B D"]:
    """The representation that is judged: before the projection."""
    x = images.reshape(images.shape[0], -1)
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"][None])
    return x


def project(params: PyTree, images: Float[Array, "B H W"]) -> Float[Array, "B P"]:
    """What the loss sees."""
    return represent(params, images) @ params[-1]["w"] + params[-1]["b"][None]


def make_encode(images: Float[Array, "N H W"]) -> Callable:
    """``encode(params, (indices, keys))``: the projections of two views of each example."""

    def encode(params, batch):
        indices, keys = batch
        pairs = jax.vmap(lambda key: jax.random.split(key))(keys)
        return tuple(project(params, jax.vmap(make_view)(pairs[:, n], images[indices])) for n in (0, 1))

    return encode


def losses_within(
    first: Float[Array, "B P"], second: Float[Array, "B P"], group: int, temperature: float, chunk_size: int | None = CHUNK
) -> Float[Array, "B"]:
    """NT-Xent of each example, told apart from the others of its group of ``group`` consecutive examples only."""
    count = first.shape[0]
    if group == count:
        return jb.nt_xent(first, second, temperature, chunk_size=chunk_size)
    split = lambda z: z.reshape(count // group, group, -1)
    return jax.vmap(lambda a, b: jb.nt_xent(a, b, temperature))(split(first), split(second)).reshape(-1)


class Order(NamedTuple):
    """The batches of a run, and the pass over the data set that each belongs to."""

    indices: Int[Array, "S B"]
    epochs: Int[Array, "S"]


@functools.lru_cache(maxsize=32)
def make_order(seed: int, num_examples: int, batch_size: int, total: int) -> Order:
    """Batches that see ``total`` examples. No batch holds an example twice: what is left of a pass and fills none is left out."""
    updates, per_pass = total // batch_size, num_examples // batch_size
    passes = range(-(-updates // per_pass))
    indices = jnp.concatenate([epoch_batches(seed, n, num_examples, batch_size).indices for n in passes])[:updates]
    return Order(indices, jnp.repeat(jnp.arange(len(passes)), per_pass)[:updates])


def gradient_on(images, microbatch_size: int, group: int, temperature: float, batch_size: int, *, cached: bool | None = None) -> Callable:
    """The gradient of NT-Xent, cached in microbatches where the batch is larger than one of them; see :func:`make_gradient`.

    Cached, the matrix of pairs is worked out in chunks of columns; in one piece it is whole.
    """
    if cached is None:
        cached = batch_size > microbatch_size
    chunk_size = CHUNK if cached else None
    loss_fn = lambda params, views: losses_within(*views, group, temperature, chunk_size)
    return make_gradient(loss_fn, make_encode(images), microbatch_size if cached else None)


def make_arm_run(config: Any, batch_size: int, group: int, updates: int) -> Callable:
    """The compiled run of a size and a way, see :func:`make_run`."""
    on = lambda images: gradient_on(images, config.microbatch_size, group, config.temperature, batch_size)
    return make_run(config, on, example_keys, updates)
