"""Benchmarks of losses that couple the batch, and of a softmax over many classes, against the same in one piece."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from side_by_side import make_rows, time_contenders

import jaxbatch as jb

CLASSES_PER_EXAMPLE = 16


def coupled(rounds: int, batch_size: int, parts: int) -> list[dict]:
    """Compares time and memory of both with plain JAX, which holds everything at once."""
    rows = []
    for name, ours, plain, arguments in (
        _contrastive(batch_size, -(-batch_size // parts)),
        _classes(batch_size, CLASSES_PER_EXAMPLE * batch_size, -(-CLASSES_PER_EXAMPLE * batch_size // parts)),
    ):
        contenders = {"ours": functools.partial(ours, *arguments), "plain step": functools.partial(plain, *arguments)}
        held = {who: f.lower(*arguments).compile().memory_analysis() for who, f in (("ours", ours), ("plain", plain))}
        memory = {f"{who}_temporary_bytes": analysis.temp_size_in_bytes for who, analysis in held.items()}
        times = time_contenders(contenders, rounds)
        rows += [row | memory for row in make_rows("coupled", name, batch_size, parts, times)]
    return rows


def _normal(*shape: int, scale: float = 1.0):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape) * scale, jnp.float32)


def _contrastive(batch_size: int, microbatch_size: int):
    widths = (512, 1024, 1024, 128)
    params = [_normal(*shape, scale=shape[0] ** -0.5) for shape in zip(widths[:-1], widths[1:], strict=True)]

    def one(params, x):
        for kernel in params[:-1]:
            x = jax.nn.relu(x @ kernel)
        return x @ params[-1]

    encode = lambda params, batch: (one(params, batch[0]), one(params, batch[1]))
    loss_fn = lambda params, views: jb.info_nce(*views, 0.1)
    ours = jax.jit(lambda params, batch: tuple(jb.coupled_gradient(loss_fn, encode, params, batch, microbatch_size)))
    plain = jax.jit(jax.value_and_grad(lambda params, batch: loss_fn(params, encode(params, batch)).mean()))
    x = _normal(batch_size, widths[0])
    return "contrastive MLP", ours, plain, (params, (x, x[::-1]))


def _classes(batch_size: int, num_classes: int, chunk_size: int):
    features, kernel = _normal(batch_size, 256), _normal(256, num_classes, scale=0.1)
    labels = jnp.arange(batch_size) % num_classes
    ours = jax.jit(jax.value_and_grad(lambda x, k: jb.chunked_cross_entropy(x, k, labels, chunk_size=chunk_size).mean(), (0, 1)))
    plain = jax.jit(jax.value_and_grad(lambda x, k: jb.cross_entropy(x @ k, labels).mean(), (0, 1)))
    return f"{num_classes:,} classes", ours, plain, (features, kernel)
