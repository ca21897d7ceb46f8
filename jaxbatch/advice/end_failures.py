"""Runs of a fixed length that fail or do not fit, and what a search makes of them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from jaxbatch.advice.any_runs import AnyEndRuns
from jaxbatch.advice.end_estimate import EndSpace
from jaxbatch.advice.end_search import EndRuns
from jaxbatch.advice.ending import Ending, as_written
from jaxbatch.advice.looks import OutOfMemory

_FAILURES = 3  # runs that fail end the search


class Failed(NamedTuple):
    """A run that failed, or whose batch does not fit into memory."""

    batch_size: int
    learning_rate: float
    seed: int
    num_steps: int
    reason: str
    fits: bool


def has_run(one: Failed, ran: Sequence[Ending]) -> bool:
    """Whether a run of that size or a larger one was made, so that its batch does fit."""
    return any(other.batch_size >= one.batch_size for other in ran)


def space_that_fits(made: Sequence[Any], space: EndSpace) -> EndSpace:
    """The settings whose sizes are below the smallest that did not fit, where no run of that size or a larger one was made."""
    ran = [one for one in made if isinstance(one, Ending)]
    failed = [one for one in made if isinstance(one, Failed)]
    least = min((one.batch_size for one in failed if not one.fits and not has_run(one, ran)), default=math.inf)
    sizes = tuple(size for size in space.batch_sizes if size < least)
    asked, payable = ({size: steps[size] for size in sizes} for steps in (space.num_steps, space.payable_steps))
    return space._replace(batch_sizes=sizes, num_steps=asked, payable_steps=payable)


def endings_of(made: Sequence[Ending | Failed], space: EndSpace) -> list[Ending]:
    """What a search sees of runs: those of the sizes that fit; one that failed counts as one that diverged, so that it is not made again."""
    inside = [one for one in made if one.batch_size in space.batch_sizes]
    lost = lambda one: Ending(one.batch_size, one.learning_rate, one.seed, one.num_steps, 0, True, math.nan, ())
    return [lost(one) if isinstance(one, Failed) else as_written(one) for one in inside]


def fails_always(made: Sequence[Ending | Failed]) -> bool:
    """Whether runs fail for a reason that is not their setting, and not memory; see :func:`jaxbatch.advice.run_search.fails_always`."""
    last, ran = made[-_FAILURES:], [one for one in made if isinstance(one, Ending)]
    if len(last) < _FAILURES or not all(isinstance(one, Failed) and (one.fits or has_run(one, ran)) for one in last):
        return False
    return not ran or all(any(one.learning_rate <= other.learning_rate and one.batch_size <= other.batch_size for other in ran) for one in last)


class CountedRuns(EndRuns):
    """Runs whose seeds go on from run to run, those that failed included."""

    def __init__(self, runs: AnyEndRuns, seed: int, made: Sequence[Ending | Failed]):
        self._runs, self._seed, self._made = runs, seed, made
        self._last, self.error = (0, 0.0, 0, 0), cast(Exception | None, None)

    def run(self, batch_size: int, learning_rate: float, num_steps: int, seed: int):
        """The run so far at each look; its seed is counted here."""
        self._last = batch_size, learning_rate, self._seed + len(self._made), num_steps
        try:
            yield from self._runs.run(batch_size, learning_rate, num_steps, self._last[2])
        except (OutOfMemory, RuntimeError) as error:
            self.error = error
            raise

    def failed(self) -> Failed:
        """The last run, which ended with an error."""
        return Failed(*self._last, str(self.error), not isinstance(self.error, OutOfMemory))
