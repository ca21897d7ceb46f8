"""Trains a whole run: it is planned epoch by epoch, compiled ahead of need, and reported in records.

Axes: S steps.
"""

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbatch.batches import check_seed, epoch_order, in_examples
from jaxbatch.gradients.groups import check_params
from jaxbatch.gradients.part_norms import check_monitor
from jaxbatch.gradients.updates import check_optimizer
from jaxbatch.machine.compiling import Programs
from jaxbatch.states import as_arrays
from jaxbatch.training.divergence import first_nonfinite, make_is_finite
from jaxbatch.training.epochs import compile_task_epoch
from jaxbatch.training.monitor import NoiseTrack, check_sizes
from jaxbatch.training.plans import (
    FitConfig,
    Progress,
    Segment,
    advance,
    plan_segments,
    progress_after,
    python_numbers,
    read_progress,
    write_progress,
)
from jaxbatch.training.steps import TrainState, init_state, make_test, start_shapes
from jaxbatch.training.tasks import Task, tokens_seen


def fit(task: Task, config: FitConfig, *, state: TrainState | None = None) -> Iterator[dict[str, Any]]:
    """Trains and yields ``evaluations_per_epoch`` records an epoch, and one more if the duration ends between two of them.

    An epoch is one compiled program, or a Python loop over a compiled step where that is faster
    (:mod:`jaxbatch.training.loops`). With a schedule of batch sizes, the next size is compiled in the background during
    training.

    Args:
        task: see :func:`classification_task`, or any :class:`Task` made of plain functions.
        config: see :class:`FitConfig`.
        state: the ``state`` of an earlier record, to continue from. It knows its epoch and how many examples of it were seen.
            With another batch size, the rest of that epoch is cut into new batches, and no example comes twice. ``duration``
            counts from the start of the earlier run. If a state was changed elsewhere, or its ``step`` was set by hand, it is
            assumed to have followed ``config`` for ``step`` updates. ``None``: start from the seed.

    Yields:
        Records with ``batches`` and ``examples`` seen, ``total_batches`` of the run, ``batch_size``, ``updates`` (calls of the
        optimizer; ``optax.MultiSteps`` changes the parameters only at some of them), ``epoch`` (a fraction), mean training
        ``loss`` since the last record, ``test_<name>`` of every metric, ``train_seconds`` (computation since the last record),
        ``compile_seconds`` of the programs first used in this record, ``stall_seconds`` (the part of these for which the run
        had to wait), ``diverged``, ``diverged_at_batch`` and ``state``. If a loss or the state is not finite, the run ends with
        a last record: ``diverged`` is True, and ``diverged_at_batch`` is the first batch whose loss is not finite, or the last
        batch of the record if only the state is not finite. Without ``test_data`` there is no ``test_<name>``. The loss is the
        mean of the batches' mean losses, and that of a batch is weighted if its losses are :class:`jaxbatch.Weighted`.
        With ``task.tokens_per_example`` there are the ``tokens`` seen. With ``config.monitor`` there are the fields of
        docs/noise.md too, from ``noise_signal`` to ``noise_scale_average_high``.

    Raises:
        ValueError: a batch is larger than the data set; the duration has no unit; metrics are not one value per example; there
            are too few devices; ``prepare`` gets parts of a batch and its result for an example depends on the other examples;
            the leaves of the data disagree on the number of examples; the seed is outside [0, 2**32); ``state`` is at or past
            the end of ``duration``; the optimizer is not one of optax's or is a line search; ``monitor`` is given and all batches
            have one example, or it is preconditioned and the optimizer has no second moments.

    Example:
        >>> import optax
        >>> from jaxbatch import epochs
        >>> loss_fn = lambda w, x: 0.5 * (x - w) ** 2
        >>> metrics_fn = lambda w, x: {"loss": loss_fn(w, x)}
        >>> data = jnp.array([1.0, 2.0, 3.0, 4.0])
        >>> task = Task(lambda key: jnp.array(0.0), loss_fn, metrics_fn, data, data)
        >>> records = fit(task, FitConfig(optax.sgd(0.5), batch_size=4, duration=epochs(3)))
        >>> [round(record["test_loss"], 4) for record in records]
        [1.4062, 0.8203, 0.6738]
    """
    config, num_examples = python_numbers(config), task.num_examples
    check_seed(config.seed)
    config = config._replace(duration=in_examples(config.duration, task.tokens_per_example))
    plan_segments(config, num_examples)  # raises an error if the plan is wrong
    params = state.params if state is not None else start_shapes(task)
    check_params(params)
    check_optimizer(config.optimizer, params)
    if config.monitor is not None:
        check_monitor(config.monitor, jax.eval_shape(config.optimizer.init, params), params)
        check_sizes(config.monitor, [segment.batch_size for segment in plan_segments(config, num_examples)])
    test = make_test(task, min(500, config.microbatch_size or 500), config.eval_params)
    begun = state is not None
    state = as_arrays(state if begun else init_state(task, config.optimizer, config.seed))
    progress = _progress(config, state, num_examples)
    noise = NoiseTrack(config.monitor, state.params, state.noise)
    state = state._replace(progress=(), noise=())  # only the host needs them
    segments = plan_segments(config, num_examples, start=progress)
    total = progress.batches + sum(segment.num_batches for segment in segments)
    if not segments and config.duration.amount > 0:
        raise ValueError(_past_the_end(config, state, progress, num_examples))
    is_finite = make_is_finite(state._replace(opt_state=config.optimizer.init(state.params)) if begun else state)
    with Programs(_epoch_compiler(task, config, state)) as programs:
        used, started = set(), time.perf_counter()
        if config.compile_first:
            programs.ahead(segment.program for segment in segments)
            for segment in segments:
                programs[segment.program]  # programs that the background thread has not begun are compiled here, in parallel
        waited = time.perf_counter() - started
        for number, segment in enumerate(segments):
            state = jax.tree.map(jnp.copy, state)  # the caller may keep the yielded state, and the program reuses memory
            key, count = segment.program, segment.num_batches
            started = time.perf_counter()
            program = programs[key]
            stall_seconds, waited = waited + time.perf_counter() - started, 0.0
            programs.ahead(later.program for later in segments[number + 1 :])
            started = time.perf_counter()
            order = np.asarray(epoch_order(config.seed, segment.epoch, num_examples))
            indices = order[segment.first : segment.first + segment.num_examples].reshape(count, segment.batch_size)
            seed_epoch = config.seed, segment.epoch
            state, losses = jax.block_until_ready(program.run(state, task.train_data, indices, seed_epoch))
            seconds = time.perf_counter() - started
            losses, noise_fields = noise.read(losses)
            losses = np.asarray(losses)  # on the host, because on the device each length would need another program
            progress = advance(progress, segment)
            bad = first_nonfinite(losses)
            if bad is None and not is_finite(state):
                bad = count - 1
            diverged_at = None if bad is None else progress.batches - count + bad
            fields = noise_fields | tokens_seen(task, progress.examples)
            times = {"train_seconds": seconds, "compile_seconds": 0.0 if key in used else program.compile_seconds, "stall_seconds": stall_seconds}
            record = _record(segment, progress, total, losses, test(task.test_data, state), times | fields, diverged_at, state)
            yield record | {"state": record["state"]._replace(noise=as_arrays(noise.written()))}
            used.add(key)
            if bad is not None:
                return


def _record(
    segment: Segment,
    progress: Progress,
    total: int,
    losses: np.ndarray,
    metrics: dict[str, Any],
    times: dict[str, float],
    diverged_at: int | None,
    state: TrainState,
) -> dict[str, Any]:
    return {
        "batches": progress.batches,
        "total_batches": total,
        "batch_size": segment.batch_size,
        "examples": progress.examples,
        "updates": int(state.step),
        "epoch": segment.end,
        "loss": float(losses.mean(dtype=np.float64)),
        **{f"test_{name}": float(value) for name, value in metrics.items()},
        **times,
        "diverged": diverged_at is not None,
        "diverged_at_batch": diverged_at,
        "state": state._replace(progress=jnp.asarray(write_progress(progress, int(state.step)))),
    }


def _progress(config: FitConfig, state: TrainState, num_examples: int) -> Progress:
    updates = int(state.step)
    written = read_progress(state.progress, updates)
    return progress_after(config, num_examples, updates // (config.num_groups or 1)) if written is None else written


def _past_the_end(config: FitConfig, state: TrainState, progress: Progress, num_examples: int) -> str:
    amount, unit = config.duration
    asked, done = (
        f"duration={unit}({amount}), which counts from the start of the run",
        {"steps": progress.batches, "examples": progress.examples, "epochs": progress.epoch},
    )
    if done[unit] < amount:
        return (
            f"state.step={int(state.step)} leaves {num_examples - progress.offset} examples of epoch {progress.epoch}, fewer than a batch, and "
            f"that epoch is the last of {asked}. Take a longer duration or a smaller batch."
        )
    return (
        f"state.step={int(state.step)} is at or past the end of {asked} ({progress.batches} batches, {progress.examples} examples so far). "
        "Take a longer duration; or, to train these parameters as the start of another run, state._replace(step=jnp.zeros((), int))."
    )


def _epoch_compiler(task: Task, config: FitConfig, state: TrainState):
    """Makes ``(batch_size, num_batches) -> program``; only the shapes of the state are kept."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    if config.num_devices < 1:
        raise ValueError(f"num_devices={config.num_devices} must be at least 1.")
    if config.parallel not in ("jit", "pmap"):
        raise ValueError(f"parallel={config.parallel!r} must be 'jit' or 'pmap'.")
    devices = jax.devices()[: config.num_devices]
    if len(devices) < config.num_devices:
        raise ValueError(f"num_devices={config.num_devices}, and JAX finds {len(devices)} here.")
    settings: dict[str, Any] = {
        "num_groups": config.num_groups,
        "microbatch_size": config.microbatch_size,
        "devices": devices,
        "method": config.parallel,
        "monitor": config.monitor,
    }
    return lambda key: compile_task_epoch(task, config.optimizer, shapes, key[1], key[0], **settings)
