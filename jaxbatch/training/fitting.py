"""Trains a whole run: it is planned record by record, compiled ahead of need, and reported in records.

Axes: S steps.
"""

import functools
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbatch.batches import epoch_order
from jaxbatch.kinds import check_fields, checked
from jaxbatch.machine.compiling import Programs
from jaxbatch.training.devices import find_devices
from jaxbatch.training.divergence import judge, skips_nonfinite
from jaxbatch.training.plan_machine import Plan, make_look_ahead, make_plan
from jaxbatch.training.plans import FitConfig, advance, settled
from jaxbatch.training.run_fields import RunFields, put_back, take_out
from jaxbatch.training.run_programs import RunPrograms
from jaxbatch.training.tasks import Task, tokens_seen
from jaxbatch.training.train_state import TrainState


@checked
def fit(task: Task, config: FitConfig, *, state: TrainState | None = None) -> Iterator[dict[str, Any]]:
    """Trains and yields ``evaluations_per_epoch`` records an epoch, and one more if the duration ends or the batch size changes between two.

    With a :class:`jaxbatch.BatchSizePolicy` the batch size changes at records alone.

    An epoch is one compiled program, or a Python loop over a compiled step where that is faster
    (:mod:`jaxbatch.training.loops`). With a schedule of batch sizes, the next size is compiled in the background during
    training, and with a policy all sizes that may come next.

    Args:
        task: see :func:`classification_task`, or any :class:`Task` made of plain functions.
        config: see :class:`FitConfig`.
        state: the ``state`` of an earlier record, to continue from. It knows its epoch and how many examples of it were seen.
            With another batch size, the rest of that epoch is cut into new batches, and no example comes twice. ``duration``
            counts from the start of the earlier run. If a state was changed elsewhere, or its ``step`` was set by hand, it is
            assumed to have followed ``config`` for ``step`` updates, which a policy refuses. ``None``: start from the seed.

    Yields:
        Records with ``batches`` and ``examples`` seen, ``total_batches`` of the run (with a policy: if its size stayed as it is now),
        ``batch_size``, ``updates`` (calls of the
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
    records = fit_with(RunPrograms(task, config.optimizer), config, state)
    del task, state  # what the run no longer needs, such as a given state after its first step, must be free to go
    yield from records


def fit_with(shared: RunPrograms, config: FitConfig, state: TrainState | None) -> Iterator[dict[str, Any]]:
    """:func:`fit` with programs that it shares with other runs; their optimizer is trained with, whatever ``config.optimizer`` is."""
    task, config = shared.task, config._replace(optimizer=shared.optimizer)
    config, num_examples = settled(config, task.tokens_per_example), task.num_examples
    plan = make_plan(config, num_examples)
    begun, state = state is not None, shared.begin(config.seed, state)
    test = shared.test(config.microbatch_size, config.evaluation_batch_size, config.eval_params)
    fields, state = take_out(plan, config, num_examples, state)  # only the host needs them
    is_finite = shared.is_finite(state._replace(opt_state=config.optimizer.init(state.params)) if begun else state)
    skips = functools.cache(lambda: skips_nonfinite(config.optimizer, state.params))  # type: ignore[union-attr]  # of the loop: no longer None
    settings: dict[str, Any] = {"devices": find_devices(config.num_devices), "parallel": config.parallel, "monitor": config.monitor}
    cut_of = shared.cuts(config, state.params, frozenset(plan.batch_sizes))
    shapes, (train_data, test_data) = jax.eval_shape(lambda: state), shared.data(settings["devices"])  # shapes, as arrays would stay alive
    with Programs(lambda key: shared.epoch(shapes, *key, cut=cut_of(key[1]), **settings)) as programs:
        used, started = set[tuple[int, int]](), time.perf_counter()
        total, look_ahead = fields.progress.batches + plan.batches_left(*fields.now), make_look_ahead(plan, *fields.now)
        if config.compile_first:
            _compile_now(programs, plan.programs(*fields.now))
        waited = time.perf_counter() - started
        order_of = functools.lru_cache(1)(lambda epoch: np.asarray(epoch_order(config.seed, epoch, num_examples)))
        while (segment := plan.next(*fields.now)) is not None:
            state = jax.tree.map(jnp.copy, state)  # the caller may keep the yielded state, and the program reuses memory
            state = state._replace(opt_state=plan.with_rate(fields.choice, state.opt_state))
            key, count = segment.program, segment.num_batches
            started = time.perf_counter()
            program = programs[key]
            stall_seconds, waited = waited + time.perf_counter() - started, 0.0
            programs.ahead(look_ahead(*fields.now))
            started = time.perf_counter()
            indices = order_of(segment.epoch)[segment.first : segment.first + segment.num_examples].reshape(count, segment.batch_size)
            state, losses = jax.block_until_ready(program.run(state, train_data, indices, (config.seed, segment.epoch)))
            seconds = time.perf_counter() - started
            losses, noise_fields = fields.noise.read(losses)
            losses = jax.device_get(losses)  # to the host: on the device each length needs another program
            progress = advance(fields.progress, segment)
            loss, bad = judge(losses, bool(is_finite(state)), skips)
            record = {
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
            }
            fields, error = _after(plan, fields._replace(progress=progress), record)
            total = total if plan.is_fixed else progress.batches + plan.batches_left(*fields.now)
            yield record | {"total_batches": total, "state": put_back(fields, state)}
            used.add(key)
            if error is not None:
                raise error
            if bad is not None:
                return


def _after(plan: Plan, fields: RunFields, record: Mapping[str, Any]) -> tuple[RunFields, Exception | None]:
    """What a run knows after a record, and the error of its policy, if it made one: it is raised after the record, which is not lost."""
    if record["diverged"]:
        return fields, None
    try:
        return fields._replace(choice=plan.react(fields.choice, record)), None
    except Exception as error:  # the policy is the user's own function
        return fields, error


def _compile_now(programs: Programs, keys: Iterable[tuple[int, int]]) -> None:
    """Compiles programs; those that the background thread has not begun are compiled here, in parallel."""
    keys = list(dict.fromkeys(keys))
    programs.ahead(keys)
    for key in keys:
        programs[key]
