"""Benchmarks of a transformer: its training step, one gradient for each sequence, dense layers on two axes and on three."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench_training import step_contenders
from side_by_side import IN_A_ROW, in_a_row, make_rows, start_peer, time_contenders

import jaxbatch as jb
from jaxbatch.training.train_state import init_state

RATE, DECAY = 1e-3, 0.1
SEQUENCES_A_ROUND = 64  # at least; so that a round takes a second or so on two cores
WIDTH = 128
GRADIENTS = 8  # sequences with a gradient each: every one has the size of the network


def random_text(num_sequences: int, sequence_length: int, dtype) -> jb.Task:
    """The default transformer on random tokens."""
    tokens = np.random.default_rng(0).integers(0, 256, num_sequences * sequence_length + 1, dtype=np.uint8)
    dataset = jb.TextDataset("random", tokens, tokens[: sequence_length + 1], tokens[:0], 256)
    return jb.language_task(jb.TransformerLM(dtype=dtype), dataset, sequence_length=sequence_length)


def language(rounds: int, batch_sizes: tuple[int, ...], sequence_length: int, bfloat16: bool) -> list[dict]:
    """Compares training steps with AdamW with PyTorch eager's, and per-sequence gradients with ``torch.func``'s."""
    dtype, rows = jnp.bfloat16 if bfloat16 else jnp.float32, []
    label = f"transformer, {sequence_length} tokens" + (" bfloat16" if bfloat16 else "")
    settings = {"rate": RATE, "weight_decay": DECAY, "bfloat16": bfloat16}
    optimizer = optax.adamw(RATE, weight_decay=DECAY)
    for batch_size in batch_sizes:
        num_steps = max(2, SEQUENCES_A_ROUND // batch_size)  # the first step after a pause is slow
        task = random_text(num_steps * batch_size, sequence_length, dtype)
        contenders, peer = step_contenders(task, "TransformerLM", optimizer, batch_size, num_steps, **settings)
        rows += make_rows("language", label, batch_size, 1, time_contenders(contenders, rounds, peer), per=num_steps)
    return rows + sequence_gradients(rounds, sequence_length, label, dtype, settings) + dense_layers(rounds, sequence_length)


def sequence_gradients(rounds: int, sequence_length: int, label: str, dtype, settings: dict) -> list[dict]:
    """Compares a gradient for each sequence with ``torch.func``'s."""
    task = random_text(GRADIENTS, sequence_length, dtype)
    params = init_state(task, optax.sgd(0.0), 0).params
    ours = jax.jit(lambda params, batch: jb.per_example_gradients(task.loss_fn, params, batch))
    mean = jax.jit(lambda params, batch: jb.losses_and_mean_gradient(task.loss_fn, params, batch))
    contenders = {"ours": lambda: ours(params, task.train_data), "mean gradient": lambda: mean(params, task.train_data)}
    peer = start_peer(task, params, "TransformerLM", GRADIENTS, GRADIENTS, **settings)
    if peer:
        contenders["torch.func vmap"] = lambda: peer.run("func")
    times = time_contenders(in_a_row(contenders), rounds, peer)
    return make_rows("sequences", label, GRADIENTS, GRADIENTS, times, per=IN_A_ROW)


def dense_layers(rounds: int, sequence_length: int) -> list[dict]:
    """Compares the gradient of two dense layers on tokens in one axis with that on sequences and tokens in two."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (SEQUENCES_A_ROUND, sequence_length, WIDTH))
    kernels = jax.random.normal(keys[1], (WIDTH, 4 * WIDTH)) / WIDTH, jax.random.normal(keys[2], (4 * WIDTH, WIDTH)) / WIDTH

    @jax.jit
    def gradient(x, kernels):
        return jax.grad(lambda x, kernels: (jax.nn.gelu(x @ kernels[0]) @ kernels[1]).var(), argnums=(0, 1))(x, kernels)

    flat = x.reshape(-1, WIDTH)
    contenders = {"ours": lambda: gradient(flat, kernels), "three axes": lambda: gradient(x, kernels)}
    return make_rows("dense", "two dense layers", SEQUENCES_A_ROUND, 1, time_contenders(in_a_row(contenders), rounds), per=IN_A_ROW)
