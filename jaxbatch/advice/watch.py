"""A search under a clock: what is going on is said from the start, and no run goes on when the time is over."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxbatch.advice.advice import Advice
from jaxbatch.advice.probes import Probe
from jaxbatch.advice.search import Runs

_EVERY = 1.0  # seconds between two messages about the same run


def print_progress(message: str) -> None:
    """Prints what is going on to standard error."""
    print(f"jaxbatch.advise: {message}", file=sys.stderr, flush=True)


class Watch:
    """A clock that starts when it is made.

    Args:
        budget: seconds; ``None``: no limit.
        say: gets a message now and then; ``None``: nobody does.

    Example:
        >>> watch = Watch(0.0, None)
        >>> watch.is_over, Watch(None, None).left
        (True, inf)
    """

    def __init__(self, budget: float | None, say: Callable[[str], None] | None):
        self._budget = math.inf if budget is None else budget
        self._end = math.inf if budget is None else time.perf_counter() + budget
        self._say, self._said = say, -math.inf
        self._granted = False

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._end - time.perf_counter()

    @property
    def is_over(self) -> bool:
        """Whether the time is over."""
        return self.left <= 0

    def say(self, message: str) -> None:
        """Passes a message on."""
        self._said = time.perf_counter()
        if self._say is not None:
            self._say(message)

    def say_sometimes(self, message: str) -> None:
        """Passes a message on, unless the last one was a moment ago."""
        if time.perf_counter() - self._said > _EVERY:
            self.say(message)

    def reporting(self, on_probe: Callable[[Probe, int], None]) -> Callable[[Probe, int], None]:
        """``on_probe``, with a message about each run."""

        def report(probe: Probe, number: int) -> None:
            end = "reached the goal" if probe.reached else "diverged" if probe.diverged else "ended without the goal"
            self.say(f"run {number + 1}: B = {probe.batch_size}, learning rate {probe.learning_rate:.3g}: {end} after {probe.updates} updates")
            on_probe(probe, number)

        return report

    def confess(self, advice: Advice) -> Advice:
        """The advice; if there is none and the time is over, its doubts begin with that."""
        if advice.batch_size is not None or not self.is_over:
            return advice
        over = f"The budget of {self._budget:g} s was over after run {len(advice.probes)}: give more."
        return advice._replace(doubts=(over, *advice.doubts))

    def grant(self) -> bool:
        """Whether another run may begin; if so, it gets as far as its first look, even if the time is over by then."""
        self._granted = not self.is_over
        return self._granted

    def take_grant(self) -> bool:
        """Whether a run may begin now: it was granted, or there is time."""
        granted, self._granted = self._granted, False
        return granted or not self.is_over


class WatchedRuns:
    """Runs that end at the first look after the time is over. One that would begin after that shows nothing.

    Args:
        runs: what makes the runs.
        watch: the clock.
    """

    def __init__(self, runs: Runs, watch: Watch):
        self._runs, self._watch = runs, watch

    @property
    def task(self) -> Any:
        """The task of the runs."""
        return self._runs.task

    def run(self, batch_size: int, learning_rate: float, seed: int) -> Iterator[Probe]:
        """The run so far at each evaluation."""
        if not self._watch.take_grant():
            return
        self._watch.say_sometimes(f"B = {batch_size}, learning rate {learning_rate:.3g}: compiling")
        for probe in self._runs.run(batch_size, learning_rate, seed):
            self._watch.say_sometimes(f"B = {batch_size}, learning rate {learning_rate:.3g}: {probe.updates} updates, {probe.value:.4g}")
            yield probe
            if self._watch.is_over:
                return
