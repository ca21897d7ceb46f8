"""Chooses runs that somebody else makes, one after another, until the best batch size and learning rate are known well enough.

The same search as :mod:`jaxbatch.advice.search`, for runs that cannot be kept waiting beside each other and of which little is known
beforehand: the race makes its runs one after another, first short ones of many rates, then longer ones of the better half; the time of
an update comes from the runs themselves; and a size whose run does not fit into memory is out, with all that are larger. What comes next
depends on the runs before it alone, and several at a time on those before all of them, so a search that was stopped goes on to the same answer.
"""

import math
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Protocol, runtime_checkable

import numpy as np

from jaxbatch.advice.any_runs import Shown
from jaxbatch.advice.choices import cost_from_seconds
from jaxbatch.advice.estimates import Space, cost_of_best, make_estimate, middle_size
from jaxbatch.advice.probes import Probe
from jaxbatch.advice.run_pool import run_in_threads
from jaxbatch.advice.run_race import PENDING, NextRun, RunQuestion, race_runs
from jaxbatch.advice.run_times import throughput_of_runs
from jaxbatch.advice.search import CONFIRMED, LONG_PATIENCE, PATIENCE, SPARE, choose_next, is_settled
from jaxbatch.advice.throughput import NOT_TIMED, Throughput

_START = 1.0  # seconds until the first look, from which on a run of the race trains for as long
_FAILURES = 3  # runs that fail, one after another, end the search


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
    earlier = dict(known) if isinstance(known, Mapping) else dict(enumerate(known))
    kept = {number: shown for number, shown in earlier.items() if not shown.cut}
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
        if sum(one[:2] == following[:2] and one.repeat for one in chosen) == CONFIRMED:
            break  # whether more are needed depends on how these end
        chosen.append(following)
        pending = Probe(following.batch_size, following.learning_rate, 0, 0, False, False, 0, math.nan, math.nan, math.nan)
        tried.append(Shown(pending, math.nan, 0, 0, failure=PENDING))
    return chosen


def make_run(runs: ShownRuns, following: NextRun, seed: int, is_over: Callable[[], bool]) -> Shown:
    """Makes a run, to the goal or until it need not go on."""
    shown = first = None
    began, start = time.perf_counter(), 0.0  # start: until the first look
    with closing(runs.show(following.batch_size, following.learning_rate, seed)) as looks:
        for shown in looks:
            probe, spent = shown.probe, time.perf_counter() - began
            start = start or spent
            too_early = not following.needs_progress and spent < 2 * start and start > _START  # it would have trained for less time than it began
            if (probe.updates >= following.most and not too_early) or probe.reached or probe.diverged:
                break
            if is_over():
                shown = shown._replace(cut=True)
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
    once = without_shorter(inside)
    probes = [shown.probe for shown in once if shown.counts]
    if not any(probe.reached for probe in probes):
        return race_runs(inside, question, middle_size(sizes))
    space = space_of(whole, question)
    estimate, tried = make_estimate(probes, space, question.prefer), [shown.probe for shown in once]
    left = question.max_probes - len(made)
    if is_settled(probes, space, estimate, question.tolerance, left):
        return None
    spare = left - question.max_probes // SPARE
    (size, rate), repeat = choose_next(tried, space, estimate, question.tolerance, spare)
    most = (LONG_PATIENCE if repeat else PATIENCE) * cost_of_best(probes, space, estimate) / space.cost_of_update[size]
    return NextRun(size, rate, max(1, math.ceil(most)), True, repeat)


def fails_always(made: Sequence[Shown]) -> bool:
    """Whether runs fail for a reason that is not their setting, and not memory.

    That is so where several failed, one after another, and either no run has gone well or each of them had a rate and a batch size that are not
    larger than those of a run that had. A script may well stop with an error at a rate that is too large.
    """
    last = made[-_FAILURES:]
    if len(last) < _FAILURES or not all(shown.failure and shown.fits for shown in last):
        return False
    well = [shown.probe for shown in made if shown.counts]
    smaller = lambda one: any(one.learning_rate <= probe.learning_rate and one.batch_size <= probe.batch_size for probe in well)
    return not well or all(smaller(shown.probe) for shown in last)


def sizes_that_fit(made: Sequence[Shown], batch_sizes: Sequence[int]) -> tuple[int, ...]:
    """The sizes below the smallest whose run did not fit into memory.

    Where a run of that size or a larger one has got as far, it was something else: another program on the device, or somebody who ended it.
    """
    ran = [shown.probe for shown in made if shown.counts]
    fitted = lambda one: any(probe.batch_size >= one.batch_size and probe.updates > one.updates for probe in ran)
    least = min((shown.probe.batch_size for shown in made if not shown.fits and not fitted(shown.probe)), default=math.inf)
    return tuple(size for size in batch_sizes if size < least)


def without_shorter(made: Sequence[Shown]) -> list[Shown]:
    """The runs, but for those of the race that were ended before the goal, where a longer one of the same setting says what they do."""
    first = next((number for number, shown in enumerate(made) if shown.probe.reached), len(made))
    longest: dict[tuple[int, float], tuple[int, int]] = {}
    for number, shown in enumerate(made):
        if shown.counts:
            cell = shown.probe.batch_size, shown.probe.learning_rate
            longest[cell] = max(longest.get(cell, (0, 0)), (shown.probe.updates, number))

    def says_no_more(number: int, shown: Shown) -> bool:
        ended = shown.counts and not shown.probe.reached and not shown.probe.diverged
        return number < first and ended and longest[shown.probe.batch_size, shown.probe.learning_rate][1] != number

    return [shown for number, shown in enumerate(made) if not says_no_more(number, shown)]


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
