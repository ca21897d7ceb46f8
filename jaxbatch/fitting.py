"""A whole run: planned epoch by epoch, compiled ahead, told in records.

Axes: S steps.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxbatch.accumulate import compile_accumulating_epoch, compile_streamed_epoch
from jaxbatch.batches import Duration, batches_left, check_duration, epoch_order, epochs, steps_per_epoch
from jaxbatch.compiling import Programs
from jaxbatch.layers import loops_are_slow
from jaxbatch.loops import batch_shapes, compile_epoch, make_evaluate
from jaxbatch.parallel import compile_parallel_epoch
from jaxbatch.streams import is_stream
from jaxbatch.tasks import Task, count_examples
from jaxbatch.train import TrainState, evaluated, init_state, make_task_step


class FitConfig(NamedTuple):
    """How to train. ``duration`` carries its unit: ``epochs(5)``, ``steps(1000)``, ``examples(60_000)``.

    ``batch_size`` is a number or a schedule ``epoch -> number``, epochs counted from 0. The learning rate that goes
    with a schedule is an optax schedule inside ``optimizer``, which counts updates: ``num_groups`` of them a batch.
    ``evaluations_per_epoch`` says how often a record is made; it changes no number of the training itself. ``microbatch_size`` bounds the examples that the device works
    on at a time: a larger batch is accumulated and the schedule stays as it is. ``num_devices`` share every batch, by
    ``parallel``: ``"jit"`` or ``"pmap"`` (:mod:`jaxbatch.parallel`). ``compile_first`` has every batch size of the run
    compiled before its first step: for stages that are shorter than compilation, and where times are compared.
    """

    optimizer: optax.GradientTransformation
    batch_size: int | Callable[[int], int]
    duration: Duration = epochs(1)
    num_groups: int | None = None
    seed: int = 0
    evaluations_per_epoch: int = 1
    microbatch_size: int | None = None
    num_devices: int = 1
    parallel: str = "jit"
    compile_first: bool = False


class Segment(NamedTuple):
    """Batches of one size within one epoch, evaluated at the end."""

    epoch: int
    first: int  # the epoch's batch that comes first
    batch_size: int
    num_batches: int
    end: float  # where this ends, in epochs


def plan_segments(config: FitConfig, num_examples: int, *, done: int = 0) -> list[Segment]:
    """What is left to train after ``done`` batches: the segments of each epoch.

    An epoch has ``evaluations_per_epoch`` of them, as even as whole batches allow, and no more than it has batches.

    Raises:
        ValueError: a batch larger than the data set, a duration without a unit, fewer than 1 evaluation an epoch.

    Example:
        >>> doubling = FitConfig(None, lambda epoch: 2 * 2**epoch, epochs(3))
        >>> [(s.epoch, s.batch_size, s.num_batches) for s in plan_segments(doubling, 8, done=5)]
        [(1, 4, 1), (2, 8, 1)]
    """
    check_duration(config.duration)
    if config.evaluations_per_epoch < 1:
        raise ValueError(f"evaluations_per_epoch={config.evaluations_per_epoch} must be at least 1.")
    amount, unit = config.duration
    segments, batches, examples = [], 0, 0
    for epoch in itertools.count():
        before = {"steps": batches, "examples": examples, "epochs": epoch}[unit]
        if before >= amount:
            return segments
        size = config.batch_size(epoch) if callable(config.batch_size) else config.batch_size
        if not isinstance(size, int | np.integer):
            raise ValueError(f"batch_size={size!r} must be a whole number, or a schedule that gives one for an epoch.")
        size = int(size)  # NumPy's would overflow in the sums below
        per_epoch = steps_per_epoch(num_examples, size)
        left = batches_left(config.duration, before, batch_size=size, per_epoch=per_epoch)
        count = min(per_epoch, left if epoch else max(left, 1))
        parts = min(config.evaluations_per_epoch, per_epoch)
        stops = sorted({min(count, per_epoch * part // parts) for part in range(1, parts + 1)})
        for start, stop in zip([0, *stops], stops):
            start = max(start, done - batches)
            if start < stop:
                segments.append(Segment(epoch, start, size, stop - start, epoch + stop / per_epoch))
        batches, examples = batches + count, examples + count * size


def fit(task: Task, config: FitConfig, *, state: TrainState | None = None) -> Iterator[dict[str, Any]]:
    """Trains and yields ``evaluations_per_epoch`` records an epoch (and one at the end of a duration that ends within).

    An epoch is one compiled program, or a Python loop over a compiled step where that is faster
    (:mod:`jaxbatch.loops`). With a schedule of batch sizes the next size is compiled in the background while the
    run goes on.

    Args:
        task: see :func:`classification_task`, or any :class:`Task` made of plain functions.
        config: see :class:`FitConfig`.
        state: where to go on: the ``state`` of an earlier record, with its ``step`` and so its place in the
            order of examples. ``None``: start from the seed.

    Yields:
        ``batches`` and ``examples`` seen, ``total_batches`` to come to, ``batch_size``, optimizer ``updates``,
        ``epoch`` (a fraction), mean training ``loss`` since the last record, ``test_<name>`` of every metric,
        ``train_seconds`` (computation since the last record), ``compile_seconds`` of the programs first used in it
        and ``stall_seconds``, the part of those that the run had to wait for; ``diverged``, and ``state``. A loss that
        is not finite ends the run with a last record: ``diverged`` True, and ``diverged_at_batch``.

    Raises:
        ValueError: a batch larger than the data set, a duration without a unit, metrics that are not one value per example,
            more devices than there are.

    Example:
        >>> loss_fn = lambda w, x: 0.5 * (x - w) ** 2
        >>> metrics_fn = lambda w, x: {"loss": loss_fn(w, x)}
        >>> data = jnp.array([1.0, 2.0, 3.0, 4.0])
        >>> task = Task(lambda key: jnp.array(0.0), loss_fn, metrics_fn, data, data)
        >>> records = fit(task, FitConfig(optax.sgd(0.5), batch_size=4, duration=epochs(3)))
        >>> [round(record["test_loss"], 4) for record in records]
        [1.4062, 0.8203, 0.6738]
    """
    if not (hasattr(config.optimizer, "init") and hasattr(config.optimizer, "update")):
        raise ValueError(f"optimizer={config.optimizer!r} must be one of optax's, as optax.sgd(0.1).")
    num_examples = task.num_examples
    everything = plan_segments(config, num_examples)
    state = init_state(task, config.optimizer, config.seed) if state is None else state
    done = int(state.step) // (config.num_groups or 1)
    segments = plan_segments(config, num_examples, done=done)
    total = sum(segment.num_batches for segment in everything)
    seen = _num_examples(everything) - _num_examples(segments)
    evaluate = make_evaluate(task.metrics_fn, count_examples(task.test_data), min(500, config.microbatch_size or 500))
    with Programs(_epoch_compiler(task, config, state)) as programs:
        used, started = set(), time.perf_counter()
        if config.compile_first:
            programs.ahead(segment[2:4] for segment in segments)
            for segment in segments:
                programs[segment[2:4]]  # what the background has not begun is compiled here, beside it
        waited = time.perf_counter() - started
        for number, segment in enumerate(segments):
            state = jax.tree.map(jnp.copy, state)  # the caller may keep what was yielded; the program reuses its memory
            key, count = segment[2:4], segment.num_batches
            started = time.perf_counter()
            program = programs[key]
            stall_seconds, waited = waited + time.perf_counter() - started, 0.0
            programs.ahead(later[2:4] for later in segments[number + 1 :])
            started = time.perf_counter()
            first = segment.first * segment.batch_size
            order = np.asarray(epoch_order(config.seed, segment.epoch, num_examples))
            indices = order[first : first + count * segment.batch_size].reshape(count, segment.batch_size)
            unplaced = task.prepare is None and not is_stream(task.train_data)
            place = () if unplaced else (np.array([config.seed, segment.epoch], np.int32),)
            state, losses = jax.block_until_ready(program.run(state, task.train_data, indices, *place))
            seconds = time.perf_counter() - started
            losses = np.asarray(losses)  # its length changes with the batch size: each would be another program
            done, seen = done + count, seen + count * segment.batch_size
            bad = first_nonfinite(losses)
            test = evaluate(evaluated(task, state), task.test_data)
            yield {
                "batches": done,
                "total_batches": total,
                "batch_size": segment.batch_size,
                "examples": seen,
                "updates": int(state.step),
                "epoch": segment.end,
                "loss": float(losses.mean()),
                **{f"test_{name}": float(value) for name, value in test.items()},
                "train_seconds": seconds,
                "compile_seconds": 0.0 if key in used else program.compile_seconds,
                "stall_seconds": stall_seconds,
                "diverged": bad is not None,
                "diverged_at_batch": None if bad is None else done - count + bad,
                "state": state,
            }
            used.add(key)
            if bad is not None:
                return


def _epoch_compiler(task: Task, config: FitConfig, state: TrainState):
    """``(batch_size, num_batches) -> program``; only shapes are kept of the state."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)

    bound = config.microbatch_size
    if bound is not None:
        task = task._replace(microbatch_size=min(bound, task.microbatch_size or bound))

    if config.num_devices < 1:
        raise ValueError(f"num_devices={config.num_devices} must be at least 1.")
    if config.parallel not in ("jit", "pmap"):
        raise ValueError(f"parallel={config.parallel!r} must be 'jit' or 'pmap'.")
    devices = jax.devices()[: config.num_devices]
    if len(devices) < config.num_devices:
        raise ValueError(f"num_devices={config.num_devices}, and JAX finds {len(devices)} here.")
    if config.num_devices > 1 and config.num_groups is not None:
        raise ValueError(f"num_groups={config.num_groups} with num_devices={config.num_devices}: a split step runs on one device.")

    if is_stream(task.train_data) and config.num_groups is not None:
        raise ValueError(f"num_groups={config.num_groups}: a split step needs its batch on the device, not a stream.")

    def compile(key):
        size, count = key
        if is_stream(task.train_data):
            return compile_streamed_epoch(task, config.optimizer, shapes, size, bound, devices, method=config.parallel)
        if config.num_devices > 1:
            return compile_parallel_epoch(task, config.optimizer, shapes, count, size, devices, method=config.parallel)
        if bound is not None and size > bound and config.num_groups is None and loops_are_slow(*_one_part(task, shapes, bound)):
            return compile_accumulating_epoch(task, config.optimizer, shapes, size, bound)
        step = make_task_step(task, config.optimizer, size, num_groups=config.num_groups)
        return compile_epoch(step, shapes, task.train_data, count, size, prepare=task.prepare)

    return compile


def _one_part(task: Task, state: TrainState, size: int):
    """The loss function and what it is given for one microbatch, in shapes."""
    return task.loss_fn, state.params, batch_shapes(task.train_data, size, task.prepare)


def _num_examples(segments: list[Segment]) -> int:
    return sum(segment.num_batches * segment.batch_size for segment in segments)


def first_nonfinite(losses: Float[Array, "S"] | Float[np.ndarray, "S"]) -> int | None:
    """Index of the first loss that is NaN or infinite, or None.

    Example:
        >>> first_nonfinite(jnp.array([0.5, jnp.inf, jnp.nan]))
        1
    """
    bad = np.flatnonzero(~np.isfinite(np.asarray(losses)))
    return int(bad[0]) if len(bad) else None
