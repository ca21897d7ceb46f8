"""What the study of very many classes trains: an encoder with a margin softmax over all identities, never all logits at once.

Axes: B examples, D components of an embedding, C identities, S updates, I identities that are verified, E examples of each.
"""

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

import jaxbatch as jb
from experiments.faces.identities import SIZE, keys_of, make_images
from experiments.harness.tuned_runs import init_layers, make_gradient, make_run
from jaxbatch.batches import epoch_order

WIDTHS = (SIZE * SIZE, 256, 64)  # of the encoder; the last one is the embedding
MARGINS = types.MappingProxyType({"softmax": None, "cosface": jb.additive_margin, "arcface": jb.angular_margin})


def init_params(key: Key[Array, ""], num_identities: int) -> dict[str, Any]:
    """The layers of the encoder, and a random direction for each identity."""
    keys = jax.random.split(key, len(WIDTHS))
    return {"encoder": init_layers(keys[:-1], WIDTHS), "kernel": jax.random.normal(keys[-1], (WIDTHS[-1], num_identities))}


def embed(params: PyTree, images: Float[Array, "B S S"]) -> Float[Array, "B D"]:
    """Embeddings of unit length."""
    first, last = params["encoder"]
    hidden = jax.nn.relu(images.reshape(images.shape[0], -1) @ first["w"] + first["b"][None])
    return jb.unit_length(hidden @ last["w"] + last["b"][None])


def make_encode(sources: Float[Array, "P 8 8"]) -> Callable:
    """``encode(params, (identities, keys)) -> (embeddings, identities)``; images are made here, so those of a microbatch are there."""
    return lambda params, batch: (embed(params, make_images(sources, *batch)), batch[0])


def make_losses(config: Any, loss: str, chunk_size: int | None) -> Callable:
    """``losses(params, (embeddings, identities))``, one for each example; without a chunk size by all B × C logits."""
    margin = None if MARGINS[loss] is None else MARGINS[loss](config.margin)

    def losses(params, encoded):
        embeddings, identities = encoded
        kernel = jb.unit_length(params["kernel"], axis=0)
        if chunk_size is not None:
            return jb.chunked_cross_entropy(embeddings, kernel, identities, chunk_size=chunk_size, scale=config.scale, margin=margin)
        cosines = embeddings @ kernel
        if margin is not None:
            own = jnp.arange(kernel.shape[1])[None] == identities[:, None]
            cosines = jnp.where(own, margin(jnp.take_along_axis(cosines, identities[:, None], 1)[:, 0])[:, None], cosines)
        return jb.cross_entropy(config.scale * cosines, identities)

    return losses


def gradient_on(config: Any, sources, loss: str, batch_size: int, *, chunked: bool = True) -> Callable:
    """The gradient of the softmax; batches above a microbatch are encoded in microbatches; see :func:`make_gradient`."""
    loss_fn = make_losses(config, loss, config.chunk_size if chunked else None)
    in_parts = batch_size > config.microbatch_size and chunked
    return make_gradient(loss_fn, make_encode(sources), config.microbatch_size if in_parts else None)


class Order(NamedTuple):
    """The identities of each batch, and the pass over all identities that each example belongs to."""

    identities: Int[Array, "S B"]
    epochs: Int[Array, "S B"]


@functools.lru_cache(maxsize=8)
def make_order(seed: int, num_identities: int, batch_size: int, total: int) -> Order:
    """``total`` examples in batches: every identity once in a pass. A batch may hold several passes, with other examples of an identity."""
    passes = -(-total // num_identities)
    identities = jnp.concatenate([epoch_order(seed, n, num_identities) for n in range(passes)])[:total]
    return Order(identities.reshape(-1, batch_size), (jnp.arange(total) // num_identities).reshape(-1, batch_size))


def make_arm_run(config: Any, loss: str, batch_size: int, updates: int) -> Callable:
    """The compiled run of a loss and a size, see :func:`make_run`."""
    return make_run(config, lambda sources: gradient_on(config, sources, loss, batch_size), keys_of, updates)


@functools.partial(jax.jit, static_argnames=("count", "examples"))
def embeddings_of(params, sources, first: int, *, count: int, examples: int) -> Float[Array, "I E D"]:
    """Embeddings of ``examples`` images of each of ``count`` identities, from number ``first`` on."""
    identities = jnp.repeat(first + jnp.arange(count), examples)
    epochs = jnp.tile(jnp.arange(examples), count)
    return embed(params, make_images(sources, identities, keys_of(0, epochs, identities))).reshape(count, examples, -1)


def verification(embeddings: Float[Array, "I E D"], false_accept_rate: float) -> dict[str, float]:
    """Are two images of the same identity? By their cosine, over all pairs.

    Returns:
        ``true_accepts``: the share of pairs of one identity above the threshold that ``false_accept_rate`` of the pairs of two
        identities are above; ``accuracy``: the mean of the shares of both kinds that are told right, at the best threshold.

    Example:
        >>> embeddings = jnp.eye(3)[:, None].repeat(2, 1)  # three identities, two equal embeddings of each
        >>> verification(embeddings, 0.1)
        {'true_accepts': 1.0, 'accuracy': 1.0}
    """
    flat = np.asarray(embeddings, np.float32).reshape(-1, embeddings.shape[-1])
    identities = np.repeat(np.arange(embeddings.shape[0]), embeddings.shape[1])
    one, other = np.triu_indices(len(flat), 1)
    cosines, same = (flat @ flat.T)[one, other], identities[one] == identities[other]
    genuine, impostor = np.sort(cosines[same]), np.sort(cosines[~same])
    threshold = impostor[len(impostor) - 1 - int(false_accept_rate * len(impostor))]
    accepted = 1 - np.searchsorted(genuine, genuine, "left") / len(genuine)  # at a threshold of each genuine cosine
    rejected = np.searchsorted(impostor, genuine, "left") / len(impostor)
    return {"true_accepts": float((genuine > threshold).mean()), "accuracy": float(((accepted + rejected) / 2).max())}
