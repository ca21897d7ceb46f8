"""Searches for the setting whose run of a given length ends best: short runs first, then longer ones, then whole ones.

The cost of a run is its part of a whole run of its size. Every run has a schedule of its own length, so that short runs tell of long
ones by the law alone, and runs of one length can be compared at the same part of it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxbatch.advice.end_estimate import FEWEST_UPDATES, RACE, EndEstimate, EndSpace, count_whole, is_longest, make_estimate
from jaxbatch.advice.end_fit import LEARNED, which_are_lost
from jaxbatch.advice.ending import Ending

REPEATS = 2  # runs that repeat the best setting
_STAGES = ((0.2, 8), (0.36, 4), (1.0, 1))  # up to this part of the budget, runs of this part of the longest length
_STRIDE = 4  # how many times larger or smaller than the sizes that were run another one may be
_TOGETHER = 3  # short runs that are chosen from one fit


@runtime_checkable
class EndRuns(Protocol):
    """What makes runs."""

    def run(self, batch_size: int, learning_rate: float, num_steps: int, seed: int) -> Iterator[Ending]:
        """The run so far at each look, to its end."""


class Next(NamedTuple):
    """The run to make next."""

    batch_size: int
    learning_rate: float
    num_steps: int
    repeat: bool = False


def search_endings(
    runs: EndRuns,
    space: EndSpace,
    *,
    first_size: int,
    most: float,
    seed: int = 0,
    known: Sequence[Ending] = (),
    on_ending: Callable[[Ending, int], None] = lambda ending, number: None,
    within_budget: Callable[[], bool] = lambda: True,
) -> tuple[Ending, ...]:
    """Makes run after run until they cost as much as ``most`` whole runs of the longest length that can be paid.

    Args:
        runs: makes a run.
        space: the settings to choose from.
        first_size: the batch size of the first, shortest runs.
        most: what all runs may cost.
        seed: of the first run; each later one has its own.
        known: the runs of an earlier call that was stopped, in their order; they are not made again.
        on_ending: called with each new run and its number.
        within_budget: whether another run may begin.
    """
    endings, fits = list(known), Fits(space)
    while within_budget() and (following := choose_next(endings, space, first_size, most, fits)) is not None:
        ending = run_ahead(runs, space, following, endings, seed + len(endings))
        if ending is None:
            break  # the time was over before its first look
        on_ending(ending, len(endings))
        endings.append(ending)
    return tuple(endings)


def cost_of(ending: Ending, space: EndSpace) -> float:
    """What a run cost, in whole runs of its size."""
    return ending.updates / space.payable_steps[ending.batch_size]


class Fits:
    """The estimate from the first so many runs; the last one is kept, because several runs may be chosen from it.

    Args:
        space: the settings to choose from.
    """

    def __init__(self, space: EndSpace):
        self._space = space
        self._of: tuple[int, EndEstimate | None] = (0, None)

    def first(self, endings: Sequence[Ending], count: int) -> EndEstimate:
        """The estimate from the first ``count`` runs."""
        if self._of[1] is None or self._of[0] != count:
            self._of = count, make_estimate(endings[:count], self._space)
        assert self._of[1] is not None
        return self._of[1]


def choose_next(endings: Sequence[Ending], space: EndSpace, first_size: int, most: float, fits: Fits) -> Next | None:
    """The run to make next; None if the search is over. It depends on nothing but the runs before it."""
    racing = race_next(endings, space, first_size, most)
    if racing is not None:
        return racing
    spent = sum(cost_of(ending, space) for ending in endings)
    if spent >= most - 0.5 or not has_ended(endings, space):  # no whole run is left
        return None
    part = next(part for until, part in _STAGES if spent < until * most)
    chosen = len(endings) % _TOGETHER if part > 1 else 0
    while not has_ended(endings[: len(endings) - chosen], space):
        chosen -= 1
    estimate = fits.first(endings, len(endings) - chosen)
    if part > 1 or space.num_steps != space.payable_steps:  # at a horizon no run is one of those that are asked about
        size, rate = _explore(endings, space, estimate, part)
        return Next(space.batch_sizes[size], space.learning_rates[rate], short_steps(space, space.batch_sizes[size], part))
    space = space.suited_to(endings)
    left, repeats = most - spent, int(count_whole(endings, space, repeats=True)[estimate.best])
    whole = count_whole(endings, space)
    if not whole[estimate.best] or left < REPEATS - repeats + 0.5:
        return _whole(space, estimate.best, bool(whole[estimate.best]))
    size, rate = _explore(endings, space, estimate, 1)
    return _whole(space, (size, rate), bool(whole[size, rate]) and (size, rate) == estimate.best)


def has_ended(endings: Sequence[Ending], space: EndSpace) -> bool:
    """Whether a run has come to its end and was not lost."""
    space = space.suited_to(endings)
    return any(ending.ended and not lost for ending, lost in zip(endings, which_are_lost(endings, space.scale, space.start), strict=True))


def race_next(endings: Sequence[Ending], space: EndSpace, first_size: int, most: float) -> Next | None:
    """The next of the shortest runs: every second rate at one size, and those about the best again with twice the length while none has learned.

    Where runs are so short that this would cost more than half of the whole, fewer rates begin.
    """
    rates, part, first = list(space.learning_rates[::2]), RACE, 0
    while len(rates) > 2 and len(rates) * short_steps(space, first_size, RACE) / space.payable_steps[first_size] > most / 2:
        rates = rates[::2]
    while True:
        heat, steps = endings[first : first + len(rates)], short_steps(space, first_size, part)
        scale = space.suited_to(endings[: first + len(rates)]).scale
        if first and sum(cost_of(ending, space) for ending in endings[:first]) + len(rates) * steps / space.payable_steps[first_size] > most / 2:
            return None
        if len(heat) < len(rates):
            return Next(first_size, rates[len(heat)], steps)
        if steps >= space.payable_steps[first_size] or any(one.ended and scale.write(one.value) < scale.write(space.start) - LEARNED for one in heat):
            return None
        values = [scale.write(one.value) if one.ended else math.inf for one in heat]
        best = int(np.argmin(values))
        near = [rate for rate, value in zip(rates[max(best - 2, 0) : best + 3], values[max(best - 2, 0) : best + 3], strict=True) if value < math.inf]
        rates, first, part = near or rates, first + len(heat), part // 2


def _whole(space: EndSpace, cell: tuple[int, int], repeat: bool) -> Next:
    size = space.batch_sizes[cell[0]]
    return Next(size, space.learning_rates[cell[1]], space.payable_steps[size], repeat)


def short_steps(space: EndSpace, batch_size: int, part: int) -> int:
    """The updates of a run that is ``part`` times shorter than the longest, but long enough to tell something."""
    whole = space.payable_steps[batch_size]
    return min(whole, max(round(whole / part), FEWEST_UPDATES))


def _explore(endings: Sequence[Ending], space: EndSpace, estimate: EndEstimate, part: int) -> tuple[int, int]:
    """The setting that one draw of the law holds for the best, or, every second time, one that says most of how large a batch may be.

    The size is the best one at the length that is asked about, and its rate the best one at the length of the run, which differs from that
    at the end: a rate that is best for a long run says little in a short one. A draw takes each setting as often as it may be the best
    (Thompson, 1933).
    """
    seen = {ending.batch_size for ending in endings if ending.ended}
    near = np.array([min(seen) <= _STRIDE * size and size <= _STRIDE * max(seen) for size in space.batch_sizes])  # the law is not trusted far off
    steps = {size: short_steps(space, size, part) for size in space.batch_sizes}
    draw = int(np.random.default_rng(len(endings)).integers(len(estimate.value)))
    of_sizes = np.where(near, estimate.costs()[draw].min(1), math.inf)
    size = int(of_sizes.argmin())
    tried = np.zeros(len(space.batch_sizes))
    for ending in endings:
        tried[space.batch_sizes.index(ending.batch_size)] += ending.num_steps >= steps[ending.batch_size]
    at_length = sum(ending.num_steps == steps[ending.batch_size] for ending in endings)
    if at_length % 2 and len(space.batch_sizes) > 1:
        chance = np.stack([estimate.within(None).mean(0), estimate.within(0.05).mean(0)]).mean(0)
        doubt = np.where(near, chance * (1 - chance) / (1 + tried), -1.0)
        if doubt.max() > 0.02:
            size = int(doubt.argmax())
    return size, int(estimate.costs_of(space, steps, size)[draw].argmin())


def run_ahead(runs: EndRuns, space: EndSpace, following: Next, endings: Sequence[Ending], seed: int) -> Ending | None:
    """Makes a run. It is ended half way if it has learned nothing by then and a whole run had.

    More would not be sound: a small rate, or a large one before its schedule falls, may be far behind half way and end best.
    """
    write, ending = space.suited_to(endings).scale.write, None
    least = write(space.start) - LEARNED
    others_learned = any(is_longest(other, space) and write(other.at(0.5)) < least for other in endings)
    for look in runs.run(following.batch_size, following.learning_rate, following.num_steps, seed):
        ending = look._replace(repeat=following.repeat)
        if others_learned and ending.num_steps // 2 <= ending.updates < ending.num_steps and not write(ending.value) < least:
            break
    return ending
