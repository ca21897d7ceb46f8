"""The time of an iteration, with loading and without: its flags, its rounds, and what the records say of them."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxbatch as jb
from experiments.harness.optimizers import make_optimizer
from experiments.harness.resuming import first_missing_round, missing
from experiments.harness.study import SizesConfig
from experiments.harness.task import has_text
from jaxbatch.batches import even_part
from jaxbatch.data.streaming import decode_png, encode_png, prefetch, shift
from jaxbatch.gradients.groups import losses_and_aux
from jaxbatch.gradients.parts import Part, fold
from jaxbatch.intervals import Interval, interval
from jaxbatch.machine.timing import timed_rounds
from jaxbatch.results.records import Record
from jaxbatch.training.loops import compile_epoch
from jaxbatch.training.steps import make_task_step
from jaxbatch.training.tasks import Task
from jaxbatch.training.train_state import init_state

LONGEST_SHIFT = 2  # pixels


@dataclasses.dataclass(frozen=True)
class SpeedConfig(SizesConfig):
    """Flags of the timings."""

    learning_rate: float | None = None
    """Learning rate; it does not change the times. Default: 0.02 for SGD, 0.001 for Adam, 0.01 for an optimizer of your own."""
    seeds: int = 1
    """Not used by this study: it repeats its measurements in rounds, not with seeds."""
    rounds: int = 20
    """Rounds of the measurement; each runs everything once, in random order."""
    examples_per_round: int = 6000
    """Examples in each timing, within 4 to 500 iterations; the time of an epoch is scaled up from it."""


def host_batches(task: Task, blobs: list[bytes], indices: np.ndarray, seed: int = 0) -> Iterator[tuple]:
    """Batches as a host makes them: images are decoded and each is shifted by up to 2 pixels; with their labels."""
    labels, random = np.asarray(task.train_data[1]), np.random.default_rng(seed)
    for index in indices:
        images = decode_png([blobs[i] for i in index])
        offsets = random.integers(-LONGEST_SHIFT, LONGEST_SHIFT + 1, (len(index), 2))
        yield shift(images, offsets), labels[index]


def loss_alone(task: Task):
    """The task's loss function without what it returns beside the losses."""
    has_aux = task.update_model_state is not None
    return lambda params, batch: losses_and_aux(task.loss_fn, params, batch, has_aux)[0]


def forward_only(task: Task, batch_size: int):
    """A step that computes the losses and no gradient, in the microbatches of the training step."""
    loss = loss_alone(task)

    def step(params, batch):
        part = even_part(batch_size, task.examples_at_a_time or batch_size)
        return params, fold(lambda some: Part(examples=loss(params, some)), batch, part, at_a_time=1).examples

    return step


def gradient_only(task: Task):
    """A step that computes losses and gradient but no update; it returns the gradient, so that the compiler keeps it."""
    loss = loss_alone(task)

    def step(carry, batch):
        params, _ = carry
        losses, gradient = jb.losses_and_mean_gradient(loss, params, batch, microbatch_size=task.examples_at_a_time)
        return (params, gradient), losses

    return step


def contenders(task: Task, config: SpeedConfig, blobs: list[bytes] | None, batch_size: int, parts: bool = True) -> tuple[dict[str, Any], int, float]:
    """What is timed at one batch size, the number of iterations, and the seconds to compile the epoch.

    ``blobs`` are the images as PNG; None: the examples are no named images, and loading is not timed. ``parts``: also what an iteration
    consists of.
    """
    optimizer = make_optimizer(config)(config.learning_rate)
    step = make_task_step(task, optimizer, batch_size)
    state = init_state(task, optimizer, 0)
    order = np.asarray(jb.epoch_order(0, 0, task.num_examples))
    count = int(np.clip(config.examples_per_round // batch_size, 4, 500))
    indices = np.resize(order, (count, batch_size))
    rest = (task.train_data, indices, *(() if task.prepare is None else (np.zeros(2, np.uint32),)))  # seed and epoch

    def compiled(step, carry):
        return compile_epoch(step, carry, task.train_data, count, batch_size, prepare=task.prepare)

    started = time.perf_counter()
    epoch = compiled(step, state)
    compile_seconds = time.perf_counter() - started

    def fresh(tree):
        return jax.tree.map(jnp.copy, tree)  # programs reuse the memory of their arguments

    made = {"resident": lambda: epoch(fresh(state), *rest)}
    if parts:
        carry = (state.params, jax.tree.map(jnp.zeros_like, state.params))
        forward, gradient = compiled(forward_only(task, batch_size), state.params), compiled(gradient_only(task), carry)
        made |= {"forward": lambda: forward(fresh(state.params), *rest), "gradient": lambda: gradient(fresh(carry), *rest)}
    if blobs is None:
        return made, count, compile_seconds
    ready = list(prefetch(host_batches(task, blobs, indices)))
    one_step = jax.jit(step, donate_argnums=0)

    def through(batches):
        now = fresh(state)
        for batch in batches:
            now, losses = one_step(now, batch)
        return now, losses

    made["streamed"] = lambda: through(prefetch(host_batches(task, blobs, indices)))
    if parts:
        made |= {"compute": lambda: through(ready), "loading": lambda: list(prefetch(host_batches(task, blobs, indices)))}
    return made, count, compile_seconds


def measure_speed(task: Task, config: SpeedConfig, first_round: int = 0, parts: bool = True) -> Iterator[Record]:
    """A record per round and batch size, in milliseconds per iteration; one per batch size with its compile time."""
    if first_round >= config.rounds:
        return
    blobs = None if config.task or has_text(config) else encode_png(np.asarray(task.train_data[0]))
    functions, counts = {}, {}
    for size in config.batch_sizes:
        made, counts[size], compile_seconds = contenders(task, config, blobs, size, parts)
        functions |= {(name, size): function for name, function in made.items()}
        yield {
            "kind": "compile",
            "batch_size": size,
            "seconds": compile_seconds,
            "iterations": counts[size],
            "iterations_per_epoch": task.num_examples // size,
        }
    for number, times in enumerate(timed_rounds(functions, config.rounds - first_round, seed=first_round), first_round):
        for size in config.batch_sizes:
            per_iteration = {f"{name}_ms": ms / counts[size] for (name, of), ms in times.items() if of == size}
            yield {"kind": "speed", "round": number, "batch_size": size} | per_iteration


def measure_missing_speed(task: Task, config: SpeedConfig, known: Sequence[Record], parts: bool = True) -> Iterator[Record]:
    """The records of :func:`measure_speed` that are not in ``known``; its last round may be incomplete after a kill."""
    rows = [record for record in known if record["kind"] in ("speed", "compile")]
    first = first_missing_round(rows, config.rounds, kind=["speed"], batch_size=config.batch_sizes or ())
    yield from missing(rows, measure_speed(task, config, first, parts), ("kind", "round", "batch_size"))


def rounds_of(records: Sequence[Record], batch_size: int) -> list[Record]:
    """The timed rounds of one batch size."""
    return [record for record in records if record["kind"] == "speed" and record["batch_size"] == batch_size]


def has_loading(records: Sequence[Record]) -> bool:
    """Whether loading was timed: only for images, and so not for a task of the user's own."""
    return any("streamed_ms" in record for record in records if record["kind"] == "speed")


def times(records: Sequence[Record], batch_size: int, name: str) -> Interval:
    """Milliseconds an iteration, median over the rounds."""
    return interval([record[f"{name}_ms"] for record in rounds_of(records, batch_size)], np.median, scale="log")
