"""What :func:`jaxbatch.advise` answers: a batch size and a learning rate, with their reasons and doubts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxbatch.advice.probes import Probe
from jaxbatch.advice.search import Estimate, Space
from jaxbatch.advice.throughput import Throughput
from jaxbatch.advice.time_words import time_sentences
from jaxbatch.intervals import Interval, around, ratio_of_means
from jaxbatch.training.goals import Goal

Objective = Literal["time", "examples", "balanced"]
_CLOSE = 1.1  # sizes that cost at most so many times the best belong to the range


class Choice(NamedTuple):
    """What is expected of one batch size at its best learning rate."""

    batch_size: int
    learning_rate: float
    updates: Interval  # to the goal
    examples: Interval
    seconds: Interval  # of training
    relative_cost: Interval  # the objective, relative to the advised setting
    chance: float  # that it costs at most a tenth more than the best size
    probes: int  # how many runs were made at this size


class Advice(NamedTuple):
    """A recommendation. If there is none, ``batch_size`` is None and ``doubts`` say why. Intervals are 95% intervals."""

    batch_size: int | None
    learning_rate: float | None
    objective: Objective
    goal: Goal
    choices: tuple[Choice, ...]  # every batch size that was considered, in ascending order
    close_sizes: tuple[int, ...]  # the sizes that are expected to cost at most a tenth more than the best
    candidates: tuple[int, ...]  # the sizes that may be the best as well, as far as these probes show
    critical_batch_size: Interval  # above it, larger batches save few updates
    noise_scale: Interval  # the gradient noise scale, mean over the runs that reached the goal; n = 0 where it was not measured
    throughput: Throughput
    largest_batch_size: int | None  # the largest that memory holds; None: every size that was considered fits; 0: not known
    expected_regret: float  # how much more than the true best the setting is expected to cost, as a fraction of it
    probes: tuple[Probe, ...]  # the short runs that the advice rests on
    doubts: tuple[str, ...]
    rules: tuple[str, ...]  # what to do with the other hyperparameters when the batch changes
    elsewhere: tuple[tuple[float, int], ...] = ()  # the best size if the fixed time of an update were so many times as long

    @property
    def choice(self) -> Choice:
        """The row of the advised batch size."""
        return next(choice for choice in self.choices if choice.batch_size == self.batch_size)

    @property
    def cost_seconds(self) -> float:
        """Seconds of training that all probes took together, without compilation and evaluation."""
        return sum(probe.updates * self.throughput.seconds_at(probe.batch_size) for probe in self.probes)

    @property
    def cost_examples(self) -> int:
        """Examples that all probes saw together."""
        return sum(probe.updates * probe.batch_size for probe in self.probes)

    def sentences(self) -> list[str]:
        """The answer in words."""
        if self.batch_size is None:
            return ["No advice.", *self.doubts]
        choice, others = self.choice, [size for size in self.candidates if size != self.batch_size]
        least = {"time": "the least time", "examples": "the fewest examples", "balanced": "the least of time × examples"}[self.objective]
        undecided = (
            f"These {len(self.probes)} probes (short runs) do not show that it is better than B = {_listed(others)}."
            if others
            else f"By these {len(self.probes)} probes (short runs), no other size comes within a tenth of its cost."
        )
        low, high = min(self.close_sizes), max(self.close_sizes)
        sizes = f"B = {low} to {high} are" if low < high else f"Only B = {low} is"
        span = f"{sizes} expected to cost at most 10% more than the best"
        return [
            f"Train with batch size {self.batch_size} and learning rate {self.learning_rate:.3g}: {least} to {self.goal}.",
            f"{undecided} {span}.",
            f"Expected: {choice.updates:,.0f} updates, {choice.examples:,.0f} examples, {choice.seconds:.3g} s of training.",
            *time_sentences(self.choices, choice.batch_size, self.objective, self.throughput),
            *self.reasons(),
            *self.changes(),
            *self.doubts,
        ]

    def reasons(self) -> list[str]:
        """Where the device is busy, where noise stops mattering, and what memory holds."""
        knee, critical = self.throughput.knee, self.critical_batch_size
        how = "by its data sheet, which is a bound" if self.throughput.bound else "as timed"
        between = math.sqrt(knee.value * critical.value)
        theory = f" Theory puts the least time at √({critical.value:,.0f} × {knee.value:,.0f}) = {between:,.0f}." if 1 <= between < math.inf else ""
        noise = f" The gradient noise scale of the runs is {self.noise_scale:,.0f}." if self.noise_scale.n else ""
        if self.largest_batch_size is None:
            memory = "Every size considered fits in memory."
        elif self.largest_batch_size:
            memory = f"Memory holds a batch of at most {self.largest_batch_size:,}."
        else:
            memory = "How much memory the device has is not known."
        busy = f"The device is busy from B = {knee:,.0f} on ({how})."
        return [f"{busy} Larger batches save few updates from about B = {critical:,.0f} on.{noise}{theory} {memory}"]

    def changes(self) -> list[str]:
        """What would change the answer."""
        devices = [f"B = {size} if the fixed time of an update is {factor:g} times as long" for factor, size in self.elsewhere]
        device = f"on another device the best size would be {', and '.join(devices)}; " if devices else ""
        return [f"What would change the answer: {device}a harder goal, which has a larger critical batch size, makes the best size larger."]

    def snippet(self, make_optimizer: str = "make_optimizer") -> str:
        """Code that trains with the advised setting; ``make_optimizer`` is the name of the function that takes the rate."""
        if self.batch_size is None:
            return "# no advice: " + " ".join(self.doubts)
        return (
            f"optimizer = {make_optimizer}({self.learning_rate:.3g})\n"
            f"config = jb.FitConfig(optimizer, batch_size={self.batch_size}, duration=jb.steps({round(2 * float(self.choice.updates))}))"
        )


def summarize(estimate: Estimate, space: Space, throughput: Throughput, probes: Sequence[Probe], objective: Objective) -> dict[str, Any]:
    """The fields of :class:`Advice` that follow from an estimate."""
    seconds = {size: throughput.seconds_at(size) for size in space.batch_sizes}
    expected = estimate.log_cost.mean(0)
    chosen = estimate.log_cost[:, estimate.best[0], estimate.best[1]]
    by_size = estimate.log_cost.min(2)  # in every draw, a size at the best rate of that draw
    near = by_size - by_size.min(1, keepdims=True) <= np.log(_CLOSE)
    choices = []
    for row, size in enumerate(space.batch_sizes):
        rate = int(expected[row].argmin()) if row != estimate.best[0] else estimate.best[1]
        updates = np.exp(estimate.log_updates[:, row, rate])
        tried = sum(probe.batch_size == size for probe in probes)
        relative = np.exp(estimate.log_cost[:, row, rate] - chosen)
        choices.append(
            Choice(
                batch_size=size,
                learning_rate=space.learning_rates[rate],
                updates=_spread(updates, tried),
                examples=_spread(updates * size, tried),
                seconds=_spread(updates * seconds[size], tried),
                relative_cost=_spread(relative, tried),
                chance=float(near[:, row].mean()),
                probes=tried,
            )
        )
    least = expected.min()
    elsewhere = tuple((factor, _best_size_elsewhere(estimate, space, throughput, factor)) for factor in (0.1, 10.0))
    return {
        "elsewhere": elsewhere if objective == "time" else (),
        "batch_size": space.batch_sizes[estimate.best[0]],
        "learning_rate": space.learning_rates[estimate.best[1]],
        "choices": tuple(choices),
        "close_sizes": tuple(size for size, costs in zip(space.batch_sizes, expected, strict=True) if costs.min() - least <= np.log(_CLOSE)),
        "candidates": tuple(choice.batch_size for choice in choices if choice.chance >= 0.1),
        "critical_batch_size": _spread(estimate.posterior.critical_batch_size, len(probes)),
        "expected_regret": estimate.regret,
    }


def _best_size_elsewhere(estimate: Estimate, space: Space, throughput: Throughput, factor: float) -> int:
    """The best size, by time, on a device whose fixed time of an update is ``factor`` times as long, all else equal."""
    fixed = (factor - 1) * float(throughput.seconds_per_update)
    shortest = 0.01 * min(throughput.seconds_at(size) for size in space.batch_sizes)  # the line is only approximate
    seconds = np.array([max(throughput.seconds_at(size) + fixed, shortest) for size in space.batch_sizes])
    expected = (estimate.log_updates.mean(0) + np.log(seconds)[:, None]).min(1)
    return space.batch_sizes[int(expected.argmin())]


def noise_scale_of(probes: Sequence[Probe]) -> Interval:
    """The gradient noise scale from the runs that reached the goal, each of which counts once."""
    pairs = [(probe.trace, probe.signal) for probe in probes if probe.reached and math.isfinite(probe.signal)]
    if not pairs:
        return Interval(math.nan, math.nan, math.nan, 0)
    return ratio_of_means(*map(list, zip(*pairs, strict=True)), nonnegative=True)


def cost_of_update(objective: Objective, throughput: Throughput, batch_sizes: Sequence[int]) -> Mapping[int, float]:
    """What an update costs at each size: seconds, examples, or the square root of their product.

    Raises:
        ValueError: the objective is unknown.
    """
    seconds = {size: throughput.seconds_at(size) for size in batch_sizes}
    if objective == "time":
        return seconds
    if objective == "examples":
        return {size: float(size) for size in batch_sizes}
    if objective == "balanced":
        return {size: float(np.sqrt(size * seconds[size])) for size in batch_sizes}
    raise ValueError(f"objective={objective!r} must be 'time', 'examples' or 'balanced'.")


def _spread(draws: np.ndarray, count: int) -> Interval:
    """The median of draws with the interval that holds 95% of them; ``count`` runs are behind it."""
    low, middle, high = np.quantile(draws, [0.025, 0.5, 0.975])
    return around(float(middle), float(low), float(high), max(count, 2))


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes[:-1])) + (" and " if len(sizes) > 1 else "") + str(sizes[-1]) if sizes else ""
