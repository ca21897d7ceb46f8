"""Which batch size to train with, and which learning rate, measured on the user's own task."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np

from jaxbatch.advice.advice import Advice, cost_of_update, noise_scale_of
from jaxbatch.advice.choices import Objective, summarize
from jaxbatch.advice.doubts import check_finite_data, check_not_there_yet, doubts_of, why_none
from jaxbatch.advice.estimates import Space, make_estimate, usual_sizes
from jaxbatch.advice.largest_batch import find_largest_batch
from jaxbatch.advice.memory import make_measure
from jaxbatch.advice.probes import MakeOptimizer, Probe, ProbePrograms, Prober, make_adjustable
from jaxbatch.advice.request import check_known, check_limits, check_question
from jaxbatch.advice.rules import rules_for
from jaxbatch.advice.search import search
from jaxbatch.advice.throughput import NOT_TIMED, Throughput
from jaxbatch.advice.timed_updates import find_throughput
from jaxbatch.advice.watch import Watch, WatchedRuns, print_progress
from jaxbatch.batches import Duration, epochs
from jaxbatch.gradients.updates import check_make_optimizer
from jaxbatch.intervals import Interval
from jaxbatch.machine.targets import as_bytes, find_target
from jaxbatch.training.goals import Goal, check_goal
from jaxbatch.training.steps import start_shapes
from jaxbatch.training.tasks import Task

LEARNING_RATES = tuple(float(f"{10 ** (quarter / 4):.3g}") for quarter in range(-16, 3))  # 0.0001 to 3.16, four to a power of ten


def advise(
    task: Task,
    goal: str | Goal,
    *,
    optimizer: MakeOptimizer,
    objective: Objective = "time",
    batch_sizes: Sequence[int] | None = None,
    learning_rates: Sequence[float] = LEARNING_RATES,
    longest: Duration = epochs(30),
    evaluations_per_epoch: int = 12,
    target: str = "here",
    memory: str | float | None = None,
    budget: float | None = None,
    max_probes: int = 30,
    tolerance: float = 0.05,
    measure_noise: bool = True,
    seed: int = 0,
    throughput: Throughput | None = None,
    known: Sequence[Probe] = (),
    on_probe: Callable[[Probe, int], None] = lambda probe, number: None,
    on_progress: Callable[[str], None] | None = print_progress,
) -> Advice:
    r"""Recommends a batch size and a learning rate for a task, from short runs chosen one after another.

    Every run goes to the goal, or ends when it has cost half as much again as the best one. All runs, also those that ended
    early, enter a model of the updates to the goal (:mod:`jaxbatch.advice.updates_model`); the cost of an update is timed. For
    the objective ``"time"``, theory puts the best size at :math:`\sqrt{B_\text{crit} B_\text{knee}}`, between where the gradient's
    noise stops mattering and where the device is busy.

    Args:
        task: its ``test_data`` are what the goal is judged on; hold them out of the training set (:func:`jaxbatch.hold_out`).
        goal: such as ``"accuracy>0.98"``, see :func:`jaxbatch.as_goal`. Take one that a good run reaches in some epochs.
        optimizer: ``learning_rate -> optimizer``, as ``optax.adamw`` or ``functools.partial(optax.sgd, momentum=0.9)``. The rate
            is traced, so that one program serves all; where it cannot be, as by some of optax's schedules, each rate is compiled.
        objective: ``"time"``: seconds of training to the goal. ``"examples"``: examples to the goal. ``"balanced"``: the
            geometric mean of both.
        batch_sizes: to choose from; ``None``: powers of two up to half the data set. With one size, the answer is its learning rate.
        learning_rates: to choose from, in ascending order.
        longest: the longest run, should none reach the goal sooner.
        evaluations_per_epoch: how often a run looks at the goal.
        target: the device to train on: ``"here"``, or one of :data:`jaxbatch.TARGETS`, for which the time of an update is only
            bounded and memory is predicted. Runs are always made here.
        memory: bytes that a step may need, such as ``"8GiB"``. ``None``: what the device has.
        budget: seconds from the call on, timing and compiling included. When they are over, a run ends at its next look, and what
            is known by then is the answer. ``None``: ``max_probes`` alone decides.
        max_probes: the largest number of runs, including those that only start the search (one for every second rate, or fewer).
        tolerance: the search ends when the setting is expected to cost less than this fraction more than the best.
        measure_noise: whether runs measure the gradient noise scale on the way (:class:`jaxbatch.NoiseMonitor`), where a batch can
            be cut without changing the model; elsewhere it is left out. It is not used for the advice. Its programs take twice as
            long to compile.
        seed: the seed of the first run; each later one has its own.
        throughput: times of an update, if they were measured before. ``None``: they are measured here, with the loading of examples
            if the task has a stream.
        known: runs of an earlier call that was stopped; they are not made again.
        on_probe: called after each run, with the run and its number, for records.
        on_progress: called with a line on what is going on, from the start; by default it is printed to standard error. ``None``:
            nothing is said.

    Returns:
        An :class:`Advice`. If no run reaches the goal, it holds no batch size, and its ``doubts`` say why.

    Raises:
        ValueError: an argument is of another kind; the goal is not one of the task's metrics or is reached before training; the data
            hold NaN; a size or rate is impossible; the objective or target is unknown; and the errors of :func:`jaxbatch.fit`.

    References:
        McCandlish et al., `An Empirical Model of Large-Batch Training <https://arxiv.org/abs/1812.06162>`_, 2018. Shallue et
        al., `Measuring the Effects of Data Parallelism <https://arxiv.org/abs/1811.03600>`_, 2018.
    """
    limits: dict[str, Any] = {"longest": longest, "budget": budget, "max_probes": max_probes, "tolerance": tolerance, "seed": seed}
    check_limits(**limits, measure_noise=measure_noise, throughput=throughput, known=known, on_probe=on_probe, on_progress=on_progress)
    watch = Watch(budget, on_progress)
    watch.say("looking at the task")
    setting, programs = settle(
        task,
        goal,
        optimizer=optimizer,
        objective=objective,
        batch_sizes=batch_sizes,
        learning_rates=learning_rates,
        evaluations_per_epoch=evaluations_per_epoch,
        target=target,
        memory=memory,
        seed=seed,
    )
    check_known(known, setting.batch_sizes, setting.learning_rates)
    if throughput is None and watch.is_over and not known:
        return watch.confess(conclude(setting, NOT_TIMED, ()))
    if throughput is None:
        lowest = setting.learning_rates[0]
        shared: dict[str, Any] = {"programs": programs.at(lowest), "start": lambda: programs.start(lowest, seed)}
        throughput = find_throughput(task, optimizer(lowest), setting.batch_sizes, target, watch.left, watch.say, **shared)
    prober = Prober(programs, setting.goal, longest, evaluations_per_epoch, measure_noise)
    outcome = search(
        WatchedRuns(prober, watch),
        setting.space(throughput),
        first_size=_middle(setting.batch_sizes),
        max_probes=max_probes,
        tolerance=tolerance,
        prefer=setting.prefer,
        seed=seed,
        known=known,
        on_probe=watch.reporting(on_probe),
        within_budget=lambda probes: watch.grant(),
    )
    return watch.confess(conclude(setting, throughput, outcome.probes))


class Setting(NamedTuple):
    """What is settled before the first run."""

    goal: Goal
    objective: Objective
    batch_sizes: tuple[int, ...]
    learning_rates: tuple[float, ...]
    evaluations_per_epoch: int
    num_examples: int
    start: float  # the goal's metric before training
    largest_batch_size: int | None  # that memory holds; None: every size that is considered fits; 0: not known
    rules: tuple[str, ...]

    @property
    def prefer(self) -> str:
        """Which of two sizes that cost the same: fewer examples go with a smaller one, less time with a larger one."""
        return "larger" if self.objective == "examples" else "smaller"

    def space(self, throughput: Throughput) -> Space:
        """The settings to choose from, with the cost of an update."""
        return Space(self.batch_sizes, self.learning_rates, cost_of_update(self.objective, throughput, self.batch_sizes))


def settle(
    task: Task,
    goal: str | Goal,
    *,
    optimizer: MakeOptimizer,
    objective: Objective,
    batch_sizes: Sequence[int] | None,
    learning_rates: Sequence[float],
    evaluations_per_epoch: int,
    target: str,
    memory: str | float | None,
    seed: int,
) -> tuple[Setting, ProbePrograms]:
    """Checks what :func:`advise` was given; returns the setting, and what its runs share."""
    check_question(task, goal, batch_sizes, learning_rates, evaluations_per_epoch, seed)
    goal, sizes = check_goal(task, goal), _sizes(task.num_examples, batch_sizes)
    rates = tuple(sorted({float(rate) for rate in learning_rates}))
    if len(rates) < 3:
        raise ValueError(f"learning_rates={list(rates)} must hold at least 3 different finite numbers above 0.")
    if objective not in get_args(Objective):
        raise ValueError(f"objective={objective!r} must be 'time', 'examples' or 'balanced'.")
    check_finite_data(task)
    check_make_optimizer(optimizer, rates[0], "optimizer")
    adjustable = make_adjustable(optimizer, rates[0], start_shapes(task))
    programs = ProbePrograms(task, adjustable, rates[0])
    begun = programs.start(rates[0], seed)
    start = check_not_there_yet(programs.at(rates[0]), begun, goal)
    largest = _largest_that_fits(task, optimizer(rates[0]), sizes, target, memory)
    sizes = tuple(size for size in sizes if not largest or size <= largest)
    if not sizes:
        raise ValueError(f"memory={memory!r} holds a batch of at most {largest}, so there is nothing to choose from. Take a smaller model.")
    rules = tuple(rules_for(begun.opt_state))
    return Setting(goal, objective, sizes, rates, evaluations_per_epoch, task.num_examples, start, largest, rules), programs


def conclude(setting: Setting, throughput: Throughput, probes: Sequence[Probe]) -> Advice:
    """The advice that follows from runs. Nothing is run."""
    common: dict[str, Any] = {
        "objective": setting.objective,
        "goal": setting.goal,
        "throughput": throughput,
        "largest_batch_size": setting.largest_batch_size,
        "probes": tuple(probes),
        "rules": setting.rules,
        "noise_scale": noise_scale_of(probes),
    }
    if not any(probe.reached for probe in probes):
        unknown = Interval(np.nan, np.nan, np.nan, 0)
        nothing: dict[str, Any] = {"choices": (), "close_sizes": (), "candidates": (), "critical_batch_size": unknown, "expected_regret": np.nan}
        return Advice(None, None, doubts=(why_none(probes, setting.goal, setting.start),), **nothing, **common)
    space = setting.space(throughput)
    estimate = make_estimate(probes, space, setting.prefer)
    fields = summarize(
        estimate,
        space,
        throughput,
        probes,
        setting.objective,
        prefer=setting.prefer,
        evaluations_per_epoch=setting.evaluations_per_epoch,
        num_examples=setting.num_examples,
    )
    doubts = doubts_of(probes, space, estimate, fields["choices"][estimate.best[0]], setting.num_examples)
    return Advice(doubts=tuple(doubts), **fields, **common)


def _sizes(count: int, batch_sizes: Sequence[int] | None) -> tuple[int, ...]:
    sizes = tuple(sorted(set(map(int, usual_sizes(count) if batch_sizes is None else batch_sizes))))
    if not sizes or sizes[0] < 1 or sizes[-1] > count:
        raise ValueError(f"batch_sizes={list(sizes)} must hold sizes between 1 and the {count} examples of the data set.")
    return sizes


def _middle(sizes: Sequence[int]) -> int:
    """The size nearest to 64, or to the middle of the sizes if that is smaller."""
    aim = min(64.0, float(np.sqrt(sizes[0] * sizes[-1])) * 2)
    return min(sizes, key=lambda size: abs(np.log(size / aim)))


def _largest_that_fits(task: Task, optimizer: Any, sizes: Sequence[int], target: str, memory: str | float | None) -> int | None:
    """The largest batch that fits in memory; None if even the largest of the sizes does, 0 if the device's memory is not known."""
    device = find_target(target)
    limit = device.usable if memory is None else as_bytes(memory, "memory")
    if not limit:
        return 0
    if make_measure(task, optimizer=optimizer, target=device)(sizes[-1]).total <= 0.9 * limit:
        return None
    return find_largest_batch(task, optimizer=optimizer, target=device, budget=memory).batch_size
