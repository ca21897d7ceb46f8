"""Which batch size and learning rate a training run wants that is not JAX's: any function that makes runs, in any framework."""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from jaxbatch.advice.advice import Advice
from jaxbatch.advice.any_runs import AnyRuns, MakeRun, Shown, check_run, must_have_length
from jaxbatch.advice.choices import Objective
from jaxbatch.advice.request import LEARNING_RATES, check_functions, check_lists, check_spending
from jaxbatch.advice.run_race import RunQuestion
from jaxbatch.advice.run_search import fails_always, search_runs, sizes_that_fit, times_of, without_shorter
from jaxbatch.advice.run_sizes import sizes_to_choose, steps_at
from jaxbatch.advice.settling import Setting, conclude
from jaxbatch.advice.watch import Watch, print_progress
from jaxbatch.batches import Duration
from jaxbatch.kinds import check_kind
from jaxbatch.training.goals import Goal, as_goal


def advise_runs(
    run: MakeRun,
    goal: str | Goal,
    *,
    objective: Objective = "time",
    batch_sizes: Sequence[int] | None = None,
    learning_rates: Sequence[float] = LEARNING_RATES,
    longest: Duration | None = None,
    num_examples: int | None = None,
    budget: float | None = None,
    max_probes: int = 40,
    tolerance: float = 0.05,
    seed: int = 0,
    jobs: int = 1,
    known: Mapping[int, Shown] | Sequence[Shown] = (),
    on_run: Callable[[Shown, int], None] = lambda shown, number: None,
    on_progress: Callable[[str], None] | None = print_progress,
) -> Advice:
    """Recommends a batch size and a learning rate for runs that a function makes, in PyTorch, Keras, NumPy or whatever it likes.

    It is the search of :func:`jaxbatch.advise`; what differs is in :mod:`jaxbatch.advice.run_search`.

    Args:
        run: ``run(batch_size, learning_rate, seed)``, called by name, that yields a :class:`jaxbatch.Look` now and then, with the metric of
            the goal as its ``value``. It is a generator: it is closed where the run need not go on, which is its moment to clean up. An
            error that it raises is a run that failed; :class:`jaxbatch.OutOfMemory`, or the framework's own error for that, means that the
            batch does not fit, and larger ones are not tried. If it takes ``num_steps``, it gets the updates of ``longest``.
        goal: such as ``"val_loss<0.4"``, see :func:`jaxbatch.as_goal`.
        objective: ``"time"``, ``"examples"`` or ``"balanced"``, see :func:`jaxbatch.advise`.
        batch_sizes: to choose from; ``None``: powers of two from 8 to 1,024, or up to half of ``num_examples``.
        learning_rates: to choose from.
        longest: the longest run; ``None``: a run goes on until it ends by itself. In epochs only with ``num_examples``.
        num_examples: in the training set.
        budget: seconds from the call on; when they are over, a run ends at its next look, and what is known by then is the answer.
        max_probes: the largest number of runs.
        tolerance: the search ends when the setting is expected to cost less than this fraction more than the best.
        seed: the seed of the first run; each later one has its own.
        jobs: how many runs are made at a time, each in a thread of its own; for functions that start processes or wait for another machine.
        known: runs of an earlier call that was stopped, in their order or by the number that ``on_run`` got; they are not made again.
        on_run: called after each run with what it showed and its number, for records.
        on_progress: called with a line on what is going on; by default it is printed to standard error. ``None``: nothing is said.

    Returns:
        An :class:`Advice`. If no run reaches the goal, it holds no batch size, and its ``doubts`` say why.

    Raises:
        ValueError: an argument is of another kind or out of range, or ``run`` lacks an argument.

    Example:
        >>> def run(batch_size, learning_rate, seed):  # stands for a training loop
        ...     for updates in range(10, 2000, 10):
        ...         gained = updates * min(learning_rate, 0.1) / (1 + 32 / batch_size)
        ...         yield Look(updates, updates * batch_size, updates * (0.01 + 0.0001 * batch_size), 1 / (1 + gained))
        >>> from jaxbatch.advice.looks import Look
        >>> advice = advise_runs(run, "error<0.1", batch_sizes=[8, 32, 128], max_probes=16, on_progress=None)
        >>> advice.batch_size
        32
    """
    limits: dict[str, Any] = {"max_probes": max_probes, "tolerance": tolerance, "seed": seed}
    check_run(run)
    goal = as_goal(goal)
    check_spending(Duration(1, "steps") if longest is None else longest, budget, max_probes, tolerance, seed)
    check_functions(on_run=on_run, on_progress=on_progress)
    check_kind("jobs", jobs, int)
    if jobs < 1:
        raise ValueError(f"jobs={jobs} must be at least 1.")
    earlier = known.values() if isinstance(known, Mapping) else known
    numbered = not isinstance(known, Mapping) or all(isinstance(number, int) for number in known)
    if not isinstance(known, Sequence | Mapping) or not numbered or not all(isinstance(shown, Shown) for shown in earlier):
        raise ValueError("known must be the runs of an earlier call, as on_run got them, in their order or by their numbers.")
    question = ask_runs(run, batch_sizes, learning_rates, longest, num_examples, objective, **limits)
    return answer_runs(AnyRuns(run, goal, question.num_steps), question, Watch(budget, on_progress), on_run, known, jobs)


def ask_runs(
    run: MakeRun,
    batch_sizes: Sequence[int] | None,
    learning_rates: Sequence[float],
    longest: Duration | None,
    num_examples: int | None,
    objective: Objective,
    **limits: Any,
) -> RunQuestion:
    """The question of :func:`advise_runs`, checked but for its limits.

    Raises:
        ValueError: see there.
    """
    check_lists(batch_sizes, learning_rates)
    if objective not in get_args(Objective):
        raise ValueError(f"objective={objective!r} must be 'time', 'examples' or 'balanced'.")
    sizes = sizes_to_choose(batch_sizes, num_examples)
    rates = tuple(sorted({float(rate) for rate in learning_rates}))
    if len(rates) < 3:
        raise ValueError(f"learning_rates={list(rates)} must hold at least 3 different finite numbers above 0.")
    if longest is None and must_have_length(run):
        raise ValueError("run takes num_steps, the updates of its whole length: give longest, as jaxbatch.steps(5000).")
    return RunQuestion(objective, sizes, rates, steps_at(longest, sizes, num_examples), num_examples, **limits)


def answer_runs(
    runs: AnyRuns,
    question: RunQuestion,
    watch: Watch,
    on_run: Callable[[Shown, int], None],
    known: Mapping[int, Shown] | Sequence[Shown],
    jobs: int,
) -> Advice:
    """The search behind :func:`advise_runs`."""

    def report(shown: Shown, number: int) -> None:
        watch.say(f"run {number + 1}: {describe_run(shown)}")
        on_run(shown, number)

    made = search_runs(WatchedShow(runs, watch), question, jobs=jobs, known=known, on_run=report, is_over=lambda: watch.is_over)
    return watch.confess(conclude_runs(runs.goal, question, made))


class WatchedShow(NamedTuple):
    """Runs that say now and then how far they are."""

    runs: AnyRuns
    watch: Watch

    def show(self, batch_size: int, learning_rate: float, seed: int) -> Generator[Shown, None, None]:
        """The run so far at each look."""
        looks = self.runs.show(batch_size, learning_rate, seed)
        try:
            for shown in looks:
                probe = shown.probe
                if not shown.failure:
                    self.watch.say_sometimes(f"B = {batch_size}, learning rate {learning_rate:.3g}: {probe.updates} updates, {probe.value:.4g}")
                yield shown
        finally:
            looks.close()


def describe_run(shown: Shown) -> str:
    """A run in a line.

    Example:
        >>> from jaxbatch.advice.probes import Probe
        >>> describe_run(Shown(Probe(8, 0.1, 0, 30, True, False, 20, 0.9, 0.9, 0.1), 0.01, 10, 3))
        'B = 8, learning rate 0.1: reached the goal after 30 updates'
    """
    probe = shown.probe
    end = "diverged" if probe.diverged else "reached the goal" if probe.reached else "ended without the goal"
    failed = f"does not fit: {shown.failure}" if not shown.fits else f"failed: {shown.failure}" if shown.failure else ""
    return f"B = {probe.batch_size}, learning rate {probe.learning_rate:.3g}: {failed or f'{end} after {probe.updates} updates'}"


def conclude_runs(goal: Goal, question: RunQuestion, made: Sequence[Shown]) -> Advice:
    """The advice that follows from runs. Nothing is run."""
    sizes = sizes_that_fit(made, question.batch_sizes)
    counted = without_shorter([shown for shown in made if shown.probe.batch_size in sizes and shown.counts])
    start = next((shown.start for shown in made if math.isfinite(shown.start)), math.nan)
    largest = _largest(made, question.batch_sizes, sizes)
    looks = {size: _look_at(counted, size) for size in sizes}
    setting = Setting(goal, question.objective, sizes, question.learning_rates, 1, question.num_examples or 0, start, largest, (), looks=looks)
    advice = conclude(setting, times_of(made, sizes), [shown.probe for shown in counted])
    doubts, wrong = advice.doubts if counted or not made else (), _doubts(made, question, sizes)
    everything = tuple(shown.probe for shown in made if shown.counts and shown.probe.batch_size in sizes)
    return advice._replace(probes=everything, doubts=(*wrong, *doubts) if advice.batch_size is None else (*doubts, *wrong))


def _doubts(made: Sequence[Shown], question: RunQuestion, sizes: Sequence[int]) -> list[str]:
    """What went wrong with runs."""
    unfit = [shown for shown in made if not shown.fits]
    failed = [shown for shown in made if shown.failure and (shown.fits or shown.probe.batch_size in sizes)]
    doubts, timed = list[str](), [shown for shown in made if shown.counts]
    if not sizes:
        doubts.append(f"No batch size fits into memory: {unfit[-1].failure}")
    elif len(sizes) < len(question.batch_sizes):
        doubts.append(f"B = {question.batch_sizes[len(sizes)]} did not fit into memory, and it and larger ones are left out.")
    if failed:
        ended = " one after another, so the search ended" if fails_always(made) else ""
        doubts.append(f"{len(failed)} of {len(made)} runs failed{ended}; the last one: {failed[-1].failure}")
    if question.objective != "examples" and timed and not any(shown.looks > 1 for shown in timed):
        doubts.append("No run gave two looks by which an update could be timed, so seconds hold the start of a run. Let it look more often.")
    return doubts


def _largest(made: Sequence[Shown], batch_sizes: Sequence[int], sizes: Sequence[int]) -> int | None:
    """The largest size that is considered where a larger one did not fit; None if the largest of all ran; 0 if no run shows it."""
    if len(sizes) < len(batch_sizes):
        return sizes[-1] if sizes else 0
    return None if any(shown.look and shown.probe.batch_size == batch_sizes[-1] for shown in made) else 0


def _look_at(counted: Sequence[Shown], size: int) -> int:
    """The updates between two looks at a size, from the runs of the nearest size that was run."""
    rows = [(abs(math.log(shown.probe.batch_size / size)), shown.look) for shown in counted if shown.look]
    nearest = min((distance for distance, _ in rows), default=0.0)
    near = sorted(look for distance, look in rows if distance == nearest)
    return near[len(near) // 2] if near else 1
