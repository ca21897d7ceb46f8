"""Trains a whole run: it is planned epoch by epoch, compiled ahead of need, and reported in records.

Axes: S steps.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbatch.batches import epoch_order
from jaxbatch.gradients.cut import Cut
from jaxbatch.kinds import check_fields, checked
from jaxbatch.machine.compiling import Programs
from jaxbatch.states import as_arrays
from jaxbatch.training.cut_check import check_parts
from jaxbatch.training.devices import find_devices, put_data
from jaxbatch.training.divergence import judge, make_is_finite, skips_nonfinite
from jaxbatch.training.epochs import compile_task_epoch
from jaxbatch.training.evaluation import choose_evaluation_size, make_test
from jaxbatch.training.monitor import check_unchanged, cuts_of, track_noise
from jaxbatch.training.plans import FitConfig, advance, plan_rest, plan_segments, settled, write_progress
from jaxbatch.training.steps import TrainState, start_state
from jaxbatch.training.tasks import Task, check_data, tokens_seen


@checked
def fit(task: Task, config: FitConfig, *, state: TrainState | None = None) -> Iterator[dict[str, Any]]:
    """Trains and yields ``evaluations_per_epoch`` records an epoch, and one more if the duration ends or the batch size changes between two.

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
        mean of the batches' mean losses. That of a batch is weighted if its losses are :class:`jaxbatch.Weighted`; batches in which
        nothing counts are left out, and NaN stands where nothing counts at all, for metrics too.
        With ``task.tokens_per_example`` there are the ``tokens`` seen. With ``config.monitor`` there are the fields of
        docs/noise.md too, from ``noise_signal`` to ``noise_scale_average_high``.
        An optimizer that leaves out gradients that are not finite, as ``optax.apply_if_finite``, goes on over such batches while the
        state is finite; ``loss`` is then that of the others.

    Raises:
        ValueError: a batch is larger than the data set; the duration has no unit; metrics are not one value per example; there
            are too few devices; ``prepare`` gets parts of a batch and its result for an example depends on the other examples;
            the leaves of the data disagree on the number of examples; the seed is outside [0, 2**32); ``state`` is at or past
            the end of ``duration``; the optimizer is not one of optax's or is a line search; ``monitor`` is given and all batches
            have one example, or it is preconditioned and the optimizer has no second moments, or it would cut batches of a loss,
            ``prepare`` or model state that changes with the cut; a loss couples the examples of batches that are cut, or an aux is a
            sum on several devices (see :class:`jaxbatch.Task`).

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
    check_fields(config)
    check_data(task)
    config, num_examples = settled(config, task.tokens_per_example), task.num_examples
    planned = plan_segments(config, num_examples)  # raises an error if the plan is wrong
    begun, state = state is not None, start_state(task, config.optimizer, config.seed, state)
    noise = track_noise(config.monitor, state, [segment.batch_size for segment in planned])
    test = make_test(task, choose_evaluation_size(task, config.microbatch_size, config.evaluation_batch_size), config.eval_params)
    progress, segments = plan_rest(config, num_examples, state.progress, int(state.step))
    total = progress.batches + sum(segment.num_batches for segment in segments)
    state = state._replace(progress=(), noise=())  # only the host needs them
    is_finite = make_is_finite(state._replace(opt_state=config.optimizer.init(state.params)) if begun else state)
    skips = functools.cache(lambda: skips_nonfinite(config.optimizer, state.params))  # type: ignore[union-attr]  # of the loop: no longer None
    settings: dict[str, Any] = {"devices": find_devices(config.num_devices), "parallel": config.parallel, "monitor": config.monitor}
    cut_of = _checked_cuts(task, config, state.params, {segment.batch_size for segment in planned})
    shapes, (train_data, test_data) = jax.eval_shape(lambda: state), _put_all(task, settings["devices"])  # shapes, as arrays would stay alive
    with Programs(lambda key: compile_task_epoch(task, config.optimizer, shapes, *key, cut=cut_of(key[1]), **settings)) as programs:
        used, started = set[tuple[int, int]](), time.perf_counter()
        if config.compile_first:
            programs.ahead(segment.program for segment in segments)
            for segment in segments:
                programs[segment.program]  # programs that the background thread has not begun are compiled here, in parallel
        waited = time.perf_counter() - started
        order_of = functools.lru_cache(1)(lambda epoch: np.asarray(epoch_order(config.seed, epoch, num_examples)))
        for segment in segments:
            state = jax.tree.map(jnp.copy, state)  # the caller may keep the yielded state, and the program reuses memory
            key, count = segment.program, segment.num_batches
            started = time.perf_counter()
            program = programs[key]
            stall_seconds, waited = waited + time.perf_counter() - started, 0.0
            if not used:  # those of all later ones, once: a look at all of them at each would be quadratic
                programs.ahead(later.program for later in segments)
            started = time.perf_counter()
            indices = order_of(segment.epoch)[segment.first : segment.first + segment.num_examples].reshape(count, segment.batch_size)
            state, losses = jax.block_until_ready(program.run(state, train_data, indices, (config.seed, segment.epoch)))
            seconds = time.perf_counter() - started
            losses, noise_fields = noise.read(losses)
            progress, losses = advance(progress, segment), jax.device_get(losses)  # to the host: on the device each length needs another program
            loss, bad = judge(losses, bool(is_finite(state)), skips)
            to_go_on = {"progress": jnp.asarray(write_progress(progress, int(state.step))), "noise": as_arrays(noise.written())}
            yield {
                "batches": progress.batches,
                "total_batches": total,
                "batch_size": segment.batch_size,
                "examples": progress.examples,
                "updates": int(state.step),
                "epoch": segment.end,
                "loss": loss,
                **{f"test_{name}": float(value) for name, value in test(test_data, state).items()},
                "train_seconds": seconds,
                "compile_seconds": 0.0 if key in used else program.compile_seconds,
                "stall_seconds": stall_seconds,
                **noise_fields,
                **tokens_seen(task, progress.examples),
                "diverged": bad is not None,
                "diverged_at_batch": None if bad is None else progress.batches - count + bad,
                "state": state._replace(**to_go_on),
            }
            used.add(key)
            if bad is not None:
                return


def _checked_cuts(task: Task, config: FitConfig, params: Any, batch_sizes: set[int]) -> Callable[[int], Cut]:
    """``batch_size -> cut``; parts of batches that would train something else than whole batches are refused."""
    cut_of = cuts_of(task, config, params)
    if batch_sizes:
        check_parts(task, params, cut_of(max(batch_sizes)))
    check_unchanged(task, config, params, list(batch_sizes), cut_of)
    return cut_of


def _put_all(task: Task, devices: list[jax.Device]) -> tuple[Any, Any]:
    """Training and test data on their devices, once for all records: NumPy's, which may change from call to call, would be moved for each."""
    return put_data(task.train_data, devices), put_data(task.test_data, devices[:1])
