"""Chooses runs that somebody else makes, one after another, until the best batch size and learning rate are known well enough.

The same search as :mod:`jaxbatch.advice.search`, for runs that cannot be kept waiting beside each other and of which little is known
beforehand: the race makes its runs one after another, first short ones of many rates, then longer ones of the better half; the time of
an update comes from the runs themselves; and a size whose run does not fit into memory is out, with all that are larger. What comes next
depends on the runs before it alone, and several at a time on those before all of them, so a search that was stopped goes on to the same answer.
"""

import math
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxbatch.advice.any_runs import Shown
from jaxbatch.advice.choices import Objective, cost_from_seconds
from jaxbatch.advice.estimates import Space, cost_of_best, make_estimate, middle_size
from jaxbatch.advice.probes import Probe
from jaxbatch.advice.run_pool import run_in_threads
from jaxbatch.advice.run_times import throughput_of_runs
from jaxbatch.advice.search import LONG_PATIENCE, PATIENCE, SPARE, choose_next, is_settled, rates_beside
from jaxbatch.advice.throughput import NOT_TIMED, Throughput

_LONGER = 4  # how many times longer the runs of the next heat are
_FEWEST = 8  # updates of the shortest runs
_HEATS = 1024  # the longest run ÷ the shortest at most, where the longest is known
_PENDING = "is being made"
_FAILURES = 3  # runs that fail without a look, one after another, end the search


class RunQuestion(NamedTuple):
    """What a search over somebody else's runs chooses from, and when it ends."""

    objective: Objective
    batch_sizes: tuple[int, ...]
    learning_rates: tuple[float, ...]
    num_steps: Mapping[int, float]  # updates of the longest run, by batch size; infinite: not known
    num_examples: int | None = None  # in the training set, if it is known
    max_probes: int = 40
    tolerance: float = 0.05
    seed: int = 0

    @property
    def prefer(self) -> str:
        """Which of two sizes to take that cost the same, see :class:`jaxbatch.advice.settling.Setting`."""
        return "larger" if self.objective == "examples" else "smaller"


class NextRun(NamedTuple):
    """The run to make next, and when it ends if it has not reached the goal."""

    batch_size: int
    learning_rate: float
    most: float  # updates, after which it ends at its next look
    needs_progress: bool = False  # whether it ends at a quarter of these, too, if its loss has not fallen
    repeat: bool = False  # whether it repeats the best setting


@runtime_checkable
class ShownRuns(Protocol):
    """What makes runs."""

    def show(self, batch_size: int, learning_rate: float, seed: int) -> Generator[Shown, None, None]:
        """The run so far at each look."""


def search_runs(
    runs: ShownRuns,
    question: RunQuestion,
    *,
    jobs: int = 1,
    known: Mapping[int, Shown] | Sequence[Shown] = (),
    on_run: Callable[[Shown, int], None] = lambda shown, number: None,
    is_over: Callable[[], bool] = lambda: False,
) -> tuple[Shown, ...]:
    """Makes run after run, or several at a time: as many as ``jobs`` are chosen from the same runs, and the next ones when all have ended.

    Args:
        runs: makes a run.
        question: what to choose from.
        jobs: how many runs are made at a time, each in a thread of its own.
        known: the runs of an earlier call that was stopped, by number, or in their order; they are not made again.
        on_run: called with each new run and its number.
        is_over: whether no time is left; then a run ends at its next look, and none begins.
    """
    kept = dict(known) if isinstance(known, Mapping) else dict(enumerate(known))
    made = list[Shown]()
    stopped = threading.Event()
    make = lambda number, one: make_run(runs, one, question.seed + number, lambda: stopped.is_set() or is_over())
    with run_in_threads(jobs, stopped) as map_done:
        while following := next_runs(made, question, jobs):
            numbers = range(len(made), len(made) + len(following))
            lacking = [(number, one) for number, one in zip(numbers, following, strict=True) if number not in kept]
            if lacking and is_over():
                break
            for number, shown in map_done(make, lacking):
                kept[number] = shown
                on_run(shown, number)
            made += [kept[number] for number in numbers]
    return (*made, *(kept[number] for number in sorted(kept) if number >= len(made)))


def next_runs(made: Sequence[Shown], question: RunQuestion, jobs: int) -> list[NextRun]:
    """The runs to make next, at a time; none if the search is over. One that is chosen counts as tried for those after it."""
    chosen, tried = list[NextRun](), list(made)
    while len(chosen) < jobs and (following := next_run(tried, question, len(made))) is not None:
        chosen.append(following)
        pending = Probe(following.batch_size, following.learning_rate, 0, 0, False, False, 0, math.nan, math.nan, math.nan)
        tried.append(Shown(pending, math.nan, 0, 0, failure=_PENDING))
    return chosen


def make_run(runs: ShownRuns, following: NextRun, seed: int, is_over: Callable[[], bool]) -> Shown:
    """Makes a run, to the goal or until it need not go on."""
    shown = first = None
    with closing(runs.show(following.batch_size, following.learning_rate, seed)) as looks:
        for shown in looks:
            probe = shown.probe
            if probe.updates >= following.most or is_over():
                break
            if first is None:
                first = probe.loss  # there is nothing to compare it with yet
            elif following.needs_progress and probe.updates >= following.most / 4 and not probe.loss < first:
                break  # what has not begun to learn in a quarter of the time is not ahead at the end
    assert shown is not None
    return shown._replace(probe=shown.probe._replace(repeat=following.repeat))


def next_run(made: Sequence[Shown], question: RunQuestion, ended: int | None = None) -> NextRun | None:
    """The run to make next; None if the search is over, or waits for those that are being made.

    Args:
        made: the runs, in their order.
        question: what to choose from.
        ended: how many of them have ended; those after them are being made. None: all.
    """
    whole = made[:ended]
    sizes = sizes_that_fit(whole, question.batch_sizes)
    if len(made) >= question.max_probes or not sizes or fails_always(whole):
        return None
    inside = [shown for shown in made if shown.probe.batch_size in sizes]
    probes = [shown.probe for shown in inside if shown.counts]
    if not any(probe.reached for probe in probes):
        return _race(inside, question, middle_size(sizes))
    space = space_of(whole, question)
    estimate, tried = make_estimate(probes, space, question.prefer), [shown.probe for shown in inside]
    left = question.max_probes - len(made)
    if is_settled(probes, space, estimate, question.tolerance, left):
        return None
    spare = left - question.max_probes // SPARE
    (size, rate), repeat = choose_next(tried, space, estimate, question.tolerance, spare)
    most = (LONG_PATIENCE if repeat else PATIENCE) * cost_of_best(probes, space, estimate) / space.cost_of_update[size]
    return NextRun(size, rate, max(1, math.ceil(most)), True, repeat)


def fails_always(made: Sequence[Shown]) -> bool:
    """Whether several runs failed without a look, one after another, for other reasons than memory."""
    last = made[-_FAILURES:]
    return len(last) == _FAILURES and all(shown.failure and shown.fits and not shown.looks for shown in last)


def sizes_that_fit(made: Sequence[Shown], batch_sizes: Sequence[int]) -> tuple[int, ...]:
    """The sizes below the smallest whose run did not fit into memory."""
    least = min((shown.probe.batch_size for shown in made if not shown.fits), default=math.inf)
    return tuple(size for size in batch_sizes if size < least)


def space_of(made: Sequence[Shown], question: RunQuestion) -> Space:
    """The settings to choose from, with the cost of an update as the runs so far show it."""
    sizes = sizes_that_fit(made, question.batch_sizes)
    throughput = times_of(made, sizes)
    seconds = np.array([throughput.seconds_at(size) for size in sizes]) if throughput.seconds else np.ones(len(sizes))
    return Space(sizes, question.learning_rates, dict(zip(sizes, cost_from_seconds(question.objective, sizes, seconds).tolist(), strict=True)))


def times_of(made: Sequence[Shown], batch_sizes: Sequence[int]) -> Throughput:
    """The time of an update by batch size; runs with one look, whose start counts in, only where a size has no others."""
    rows = [(shown.probe.batch_size, shown.seconds_per_update, shown.looks > 1) for shown in made if shown.seconds_per_update > 0]
    paced = {size for size, _, several in rows if several}
    seconds = dict[int, list[float]]()
    for size, value, several in rows:
        if several or (size not in paced and not paced):
            seconds.setdefault(size, []).append(value)
    return throughput_of_runs(seconds, batch_sizes) if seconds else NOT_TIMED


def _race(inside: Sequence[Shown], question: RunQuestion, size: int) -> NextRun | None:
    """The next of the runs that look for a rate that works, at one size: heat after heat, each longer and with fewer rates.

    A heat begins with the rates that were best in the one before. The last one is as long as a run may be, or its runs end by themselves.
    """
    here, longest = [shown for shown in inside if shown.probe.batch_size == size], question.num_steps[size]
    in_epoch = 0 if question.num_examples is None else question.num_examples / size / 8
    length = math.ceil(max(_FEWEST, in_epoch, longest / _HEATS if math.isfinite(longest) else 0))
    rates = list(question.learning_rates[::2]) if len(question.learning_rates) > 3 else list(question.learning_rates)
    while len(rates) > max(2, question.max_probes // 2):
        rates = rates[::2]
    first = 0
    while True:
        heat = here[first : first + len(rates)]
        if len(heat) < len(rates):
            return NextRun(size, rates[len(heat)], min(length, longest))
        if any(shown.failure == _PENDING for shown in heat):
            return None  # the next heat depends on how these end
        updates = max(shown.probe.updates for shown in heat)
        if updates < length or length >= longest:  # none goes on
            break
        order = sorted(range(len(heat)), key=lambda number: _rank(heat[number]))
        finite = [number for number in order if math.isfinite(_rank(heat[number]))]
        if not finite:
            break
        keep = finite[: max(2, math.ceil(len(rates) / 3))]
        first, rates, length = first + len(heat), [rates[number] for number in keep], _LONGER * max(length, updates)
    beside = rates_beside([shown.probe for shown in here if shown.counts], question.learning_rates[::2], question.learning_rates)
    return NextRun(size, beside[0], longest) if beside else None


def _rank(shown: Shown) -> float:
    return shown.probe.loss if shown.counts and not shown.probe.diverged and math.isfinite(shown.probe.loss) else math.inf
