"""Trains many runs of one compiled program, for example learning rates × seeds.

On an accelerator a small network leaves most of the device idle, so one program computes all runs side by side (``vmap``). On
a CPU several threads run the same program, each for another run, because a step on few examples keeps only one core busy.

Axes: R runs, S steps, B examples in a batch.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbatch.batches import Duration, check_seed, epoch_order, in_examples
from jaxbatch.data.streams import is_stream
from jaxbatch.gradients.groups import check_num_groups
from jaxbatch.gradients.run_lengths import for_length, takes_num_steps
from jaxbatch.gradients.updates import Optimizer, check_make_optimizer, check_optimizer, takes_traced
from jaxbatch.kinds import checked
from jaxbatch.machine.compiling import Programs
from jaxbatch.machine.constants import call_compiled
from jaxbatch.machine.cores import num_cores
from jaxbatch.states import as_arrays
from jaxbatch.training.cut import choose_cut, choose_evaluation_size
from jaxbatch.training.cut_check import check_parts
from jaxbatch.training.divergence import judge, make_is_finite, skips_nonfinite
from jaxbatch.training.evaluation import make_test
from jaxbatch.training.plan_machine import make_look_ahead, make_plan
from jaxbatch.training.plans import FitConfig, Progress, advance
from jaxbatch.training.sweep_programs import (
    Runs,
    choose_runs,
    known_settings,
    make_compiler,
    of_run,
    over_runs,
    setting_indices,
    stack_runs,
)
from jaxbatch.training.tasks import Task, check_data, tokens_seen, updates_of
from jaxbatch.training.train_state import TrainState, compile_start, key_of_start, make_init_state, start_shapes


@checked
def sweep(
    task: Task,
    make_optimizer: Callable[..., Optimizer],
    settings: Any,
    seeds: Sequence[int | np.integer],
    *,
    batch_size: int,
    duration: Duration,
    num_groups: int | None = None,
    evaluations_per_epoch: int = 1,
    after: Mapping[str, Any] | None = None,
    runs: Runs | None = None,
    eval_params: Callable[[Any, Any], Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Trains R runs at once and yields ``evaluations_per_epoch`` records an epoch.

    Each run equals :func:`jaxbatch.fit` with ``make_optimizer(setting)`` and its seed: it has the same start, the same order of
    examples and, up to rounding, the same updates.

    Args:
        task: see :func:`jaxbatch.classification_task`.
        make_optimizer: ``setting -> optimizer``. The setting is a traced number (or a pytree of them), such as a learning rate.
            A function that must know its value, for example for an ``if``, as some of optax's schedules do, gets it as a Python
            number. Then each setting has a program of its own, whatever ``runs`` says, and compiling takes as many times as long.
            With a second argument, ``(setting, num_steps) -> optimizer``, it also gets the number of updates of the run, as a Python number.
        settings: a pytree with leading axis R, such as an array of learning rates.
        seeds: R integers.
        batch_size: B, the same for all runs, because another size needs another program.
        duration: see :class:`jaxbatch.FitConfig`.
        num_groups: K, the updates that each batch makes, see :class:`jaxbatch.FitConfig`; records count batches.
        evaluations_per_epoch: see :class:`jaxbatch.FitConfig`.
        after: ``batches``, ``diverged_at_batch`` and ``state`` of an earlier record of the same sweep, to continue from. After
            its last record the sweep yields nothing.
        runs: ``"vmap"``: all runs side by side in one program. ``"threads"``: a program for one run, in as many threads as
            there are cores. ``"map"``: one run after another in one program. ``None``: threads on CPU, vmap elsewhere.
        eval_params: see :class:`jaxbatch.FitConfig`.

    Yields:
        Records with ``batches``, ``total_batches``, ``examples``, ``epoch``, ``train_seconds`` and ``compile_seconds`` of all
        runs together; arrays ``(R,)`` of ``loss``, ``test_<name>`` of every metric and ``diverged_at_batch`` (see
        :func:`jaxbatch.fit`; -1 where losses and state are finite); and ``state`` with leaves ``(R, ...)``. A run that has
        diverged goes on with NaN, or is not computed any further where that saves time.

    Raises:
        ValueError: the numbers of settings and seeds differ; ``runs`` is unknown; the data are a stream; and the errors of
            :func:`jaxbatch.fit` for its data, sizes, seeds and optimizer.

    Example:
        >>> import optax
        >>> loss_fn = lambda w, x: 0.5 * (x - w) ** 2
        >>> metrics_fn = lambda w, x: {"loss": loss_fn(w, x)}
        >>> task = Task(lambda key: jnp.array(0.0), loss_fn, metrics_fn, jnp.ones(4), jnp.ones(4))
        >>> from jaxbatch import steps
        >>> (record,) = sweep(task, optax.sgd, jnp.array([0.0, 0.5]), [0, 0], batch_size=4, duration=steps(1))
        >>> record["test_loss"].tolist()
        [0.5, 0.125]
    """
    _check_arrays(task)
    count = len(seeds)
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(settings)}
    if count == 0 or sizes != {(count,)}:
        raise ValueError(f"settings must have the leading axis of seeds, {count}, and at least 1; found {sorted(sizes)}.")
    for seed in seeds:
        check_seed(seed)
    settings = jax.tree.map(jnp.asarray, settings)
    if num_groups is not None:
        check_num_groups(num_groups, batch_size)
    length = updates_of(task, duration, batch_size) * (num_groups or 1) if takes_num_steps(make_optimizer) else None
    make_optimizer = _for_runs(make_optimizer, of_run(settings, 0), length)
    begun = states = start_states(task, make_optimizer, settings, seeds)
    cut = choose_cut(task, start_shapes(task), batch_size, num_groups=num_groups, may_piece=False)
    check_parts(task, of_run(states, 0).params, cut)
    duration = in_examples(duration, task.tokens_per_example)
    config = FitConfig(None, batch_size, duration, evaluations_per_epoch=evaluations_per_epoch)
    plan, batches, failed = make_plan(config, task.num_examples), 0, np.full(count, -1)
    if after is not None:
        states = jax.tree.map(lambda old, new: jnp.asarray(new, old.dtype), states, after["state"])
        batches, failed = int(after["batches"]), np.array(after["diverged_at_batch"])
    progress, total = plan.progress((), batches), plan.batches_left(Progress(), ())
    look_ahead = make_look_ahead(plan, progress, ())
    runs, used, ordered = runs or choose_runs(), set[int](), None
    at_once = {"vmap": count, "threads": min(count, num_cores())}.get(runs, 1)
    test = over_runs(make_test(task, choose_evaluation_size(task, at_once=at_once), eval_params), runs)
    is_finite, skips = make_is_finite(begun, runs=True), _ask_once(make_optimizer, settings, begun)
    traced = takes_traced(make_optimizer, of_run(settings, 0), start_shapes(task))
    with Programs(make_compiler(task, make_optimizer, settings, states, cut, runs, traced)) as programs:
        while (segment := plan.next(progress, ())) is not None:
            start, stop = segment.first, segment.first + segment.num_examples
            if segment.epoch != ordered:
                orders, ordered = {seed: np.asarray(epoch_order(seed, segment.epoch, task.num_examples)) for seed in set(seeds)}, segment.epoch
            indices = np.stack([orders[seed][start:stop] for seed in seeds]).reshape(count, segment.num_batches, batch_size)
            program = programs[segment.num_batches]
            programs.ahead(num_batches for num_batches, _ in look_ahead(progress, ()))
            started = time.perf_counter()
            seed_epochs = np.array([(seed, segment.epoch) for seed in seeds], np.uint32)
            states, losses = jax.block_until_ready(program.run(states, indices, seed_epochs, failed < 0))
            seconds = time.perf_counter() - started
            losses = jax.device_get(losses)
            fine = np.asarray(is_finite(states))
            judged = [judge(of_run(losses, run), bool(fine[run]), functools.partial(skips, run, bool(failed[run] < 0))) for run in range(count)]
            failed = np.array([batches + bad if old < 0 and bad is not None else old for old, (_, bad) in zip(failed, judged, strict=True)])
            progress, batches = advance(progress, segment), batches + segment.num_batches
            metrics = jax.tree.map(np.asarray, test(task.test_data, states))
            yield {
                "batches": batches,
                "total_batches": total,
                "examples": batches * batch_size,
                **tokens_seen(task, batches * batch_size),
                "epoch": segment.end,
                "loss": np.array([loss for loss, _ in judged]),
                **{f"test_{name}": values for name, values in metrics.items()},
                "diverged_at_batch": failed,
                "train_seconds": seconds,
                "compile_seconds": 0.0 if segment.num_batches in used else program.compile_seconds,
                "state": states,
            }
            used.add(segment.num_batches)


def _for_runs(make_optimizer: Callable[..., Optimizer], setting: Any, length: int | None) -> Callable[[Any], Optimizer]:
    """The function of a setting alone, once it is checked; the length is that of every run, if the function takes one."""
    check_make_optimizer(make_optimizer, setting, num_steps=length)
    return for_length(make_optimizer, length)


def _ask_once(make_optimizer: Callable[[Any], Optimizer], settings: Any, begun: TrainState) -> Callable[[int, bool], bool]:
    """``(run, alive) -> whether its optimizer leaves out what is not finite``; each setting is asked once, because that compiles."""
    known = known_settings(settings)
    first = setting_indices(known)
    asked = functools.cache(lambda run: skips_nonfinite(make_optimizer(known[run]), of_run(begun.params, run)))
    return lambda run, alive: alive and asked(first[run])


def _check_arrays(task: Task) -> None:
    for name, data in (("train_data", task.train_data), ("test_data", task.test_data)):
        if is_stream(data):
            raise ValueError(f"{name} is a stream, and the runs of a sweep read arrays on the device. Train them one after another with fit.")
    check_data(task)


def start_states(task: Task, make_optimizer: Callable[[Any], Optimizer], settings: Any, seeds: Sequence[int | np.integer]) -> TrainState:
    """The start states of R runs, with leaves ``(R, ...)``.

    Example:
        >>> import optax
        >>> task = Task(lambda key: jax.random.normal(key, (2,)), None, None, jnp.zeros((4, 1)), None)
        >>> start_states(task, optax.sgd, jnp.array([0.1, 0.2, 0.3]), [0, 1, 2]).params.shape
        (3, 2)
    """
    if not takes_traced(make_optimizer, of_run(settings, 0), start_shapes(task)):
        begin = make_init_state(task)
        return stack_runs([begin(make_optimizer(setting), seed) for setting, seed in zip(known_settings(settings), seeds, strict=True)])
    start = compile_start(task)  # by the program that a run alone begins with, for each seed once
    begun = {seed: start(key_of_start(seed)) for seed in dict.fromkeys(seeds)}
    check_optimizer(make_optimizer(of_run(settings, 0)), begun[seeds[0]][0])
    params, model_state = stack_runs([begun[seed] for seed in seeds])
    opt_state = call_compiled(jax.vmap(lambda setting, params: make_optimizer(setting).init(params)), settings, params)
    return as_arrays(TrainState(params, opt_state, jnp.zeros(len(seeds), jnp.int32), model_state))
