"""Which batch size to train with, and which learning rate, measured on the user's own task."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from jaxbatch.advice.advice import Advice
from jaxbatch.advice.choices import Objective
from jaxbatch.advice.estimates import middle_size
from jaxbatch.advice.probes import MakeOptimizer, Probe, Prober
from jaxbatch.advice.request import LEARNING_RATES, Question, check_known, check_limits
from jaxbatch.advice.search import search
from jaxbatch.advice.settling import Setting, conclude, settle
from jaxbatch.advice.throughput import NOT_TIMED, Throughput
from jaxbatch.advice.timed_updates import find_throughput
from jaxbatch.advice.watch import Watch, WatchedRuns, print_progress
from jaxbatch.batches import Duration, epochs
from jaxbatch.training.goals import Goal
from jaxbatch.training.tasks import Task


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
        optimizer: ``learning_rate -> optimizer``, as ``optax.adamw`` or ``functools.partial(optax.sgd, momentum=0.9)``. With a schedule:
            ``(learning_rate, num_steps) -> optimizer``, as :func:`jaxbatch.scheduled` makes it, or any function with a parameter ``num_steps``
            or two without a default; ``num_steps`` is the number of updates in ``longest`` at the batch size of a run. Both are traced, so that
            one program serves all; where they cannot be, as by some of optax's schedules, each rate, or rate and length, is compiled.
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
    settings: dict[str, Any] = {"objective": objective, "batch_sizes": batch_sizes, "learning_rates": learning_rates, "target": target}
    settings |= {"evaluations_per_epoch": evaluations_per_epoch, "memory": memory, "measure_noise": measure_noise}

    def on_event(event: Event) -> None:
        if isinstance(event, Ran):
            on_probe(*event)
        elif isinstance(event, str) and on_progress is not None:
            on_progress(event)

    return answer(task, Question(goal, optimizer, **settings, **limits), on_event, Begun(None, throughput, tuple(known)))


class Ran(NamedTuple):
    """A run has ended."""

    probe: Probe
    number: int


Event: TypeAlias = Setting | Throughput | Ran | str  # in this order; messages on what is going on come between


class Begun(NamedTuple):
    """What is known of an earlier search for the same question, which was stopped; none of it is measured again."""

    setting: Setting | None = None
    throughput: Throughput | None = None
    probes: tuple[Probe, ...] = ()


def answer(task: Task, question: Question, on_event: Callable[[Event], None], begun: Begun = Begun()) -> Advice:
    """The search behind :func:`advise`.

    Args:
        task: see :func:`advise`.
        question: what is asked; its limits are checked, see :func:`jaxbatch.advice.request.check_limits`.
        on_event: called with everything that was measured as soon as it is known, for records, and with messages.
        begun: what an earlier call gave to its ``on_event``.
    """
    watch = Watch(question.budget, on_event)
    watch.say("looking at the task")
    setting, programs = settle(task, question, begun.setting)
    if begun.setting is None:
        on_event(setting)
    check_known(begun.probes, setting.batch_sizes, setting.learning_rates)
    throughput = begun.throughput
    if throughput is None and watch.is_over and not begun.probes:
        return watch.confess(conclude(setting, NOT_TIMED, ()))
    if throughput is None:
        lowest = setting.learning_rates[0]
        shared: dict[str, Any] = {"programs": programs.at(lowest), "start": lambda: programs.start(lowest, question.seed)}
        optimizer = question.make_at(task, setting.batch_sizes[0])(lowest)
        throughput = find_throughput(task, optimizer, setting.batch_sizes, question.target, watch.left, watch.say, **shared)
        on_event(throughput)
    prober = Prober(programs, setting.goal, question.longest, question.evaluations_per_epoch, question.measure_noise)
    outcome = search(
        WatchedRuns(prober, watch),
        setting.space(throughput),
        first_size=middle_size(setting.batch_sizes),
        max_probes=question.max_probes,
        tolerance=question.tolerance,
        prefer=setting.prefer,
        seed=question.seed,
        known=begun.probes,
        on_probe=watch.reporting(lambda probe, number: on_event(Ran(probe, number))),
        within_budget=lambda probes: watch.grant(),
    )
    return watch.confess(conclude(setting, throughput, outcome.probes))
