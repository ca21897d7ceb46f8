"""What :func:`jaxbatch.advise` answers: a batch size and a learning rate, with their reasons and doubts."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxbatch.advice.choices import Choice, Objective, cost_from_seconds
from jaxbatch.advice.probes import Probe
from jaxbatch.advice.throughput import Throughput
from jaxbatch.advice.time_words import time_sentences
from jaxbatch.intervals import Interval, ratio_of_means, unknown
from jaxbatch.training.goals import Goal


class Advice(NamedTuple):
    """A recommendation. If there is none, ``batch_size`` is None and ``doubts`` say why. Intervals are 95% intervals."""

    batch_size: int | None
    learning_rate: float | None
    objective: Objective
    goal: Goal
    choices: tuple[Choice, ...]  # every batch size that was considered, in ascending order
    close_sizes: tuple[int, ...]  # the sizes whose ``relative_cost`` is at most a tenth above the least one
    candidates: tuple[int, ...]  # these, and those with a chance of a tenth or more to be as close to the best
    critical_batch_size: Interval  # above it, larger batches save few updates; n = 0 where only one size was considered
    noise_scale: Interval  # the gradient noise scale, mean over the runs that reached the goal; n = 0 where it was not measured
    throughput: Throughput
    largest_batch_size: int | None  # the largest that memory holds; None: every size that was considered fits; 0: not known
    expected_regret: float  # how much more than the true best the setting is expected to cost, as a fraction of it
    probes: tuple[Probe, ...]  # the short runs that the advice rests on
    doubts: tuple[str, ...]
    rules: tuple[str, ...]  # what to do with the other hyperparameters when the batch changes
    elsewhere: tuple[tuple[float, int], ...] = ()  # the best size if the fixed time of an update were so many times as long
    run_length: int | None = None  # the updates over which the schedule of the advised setting goes; None: the optimizer takes a rate alone

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
        choice, alone = self.choice, len(self.choices) == 1
        least = {"time": "the least time", "examples": "the fewest examples", "balanced": "the least of time × examples"}[self.objective]
        least = least if round(min(one.relative_cost.value for one in self.choices), 2) >= 1 else f"close to {least}, and seen to be so,"
        only = ", the only one considered," if alone else ""
        return [
            f"Train with batch size {self.batch_size}{only} and learning rate {self.learning_rate:.3g}: {least} to {self.goal}.",
            *([] if alone else [self.comparison()]),
            f"Expected, as a mean over runs: {choice.updates:,.0f} updates, {choice.examples:,.0f} examples, {choice.seconds:.3g} s of training. "
            f"A single run may take {choice.next_run.low:,.0f} to {choice.next_run.high:,.0f} updates, and notices the goal at its next evaluation, "
            f"up to {choice.look:,} updates later.",
            *time_sentences(self.choices, choice.batch_size, self.objective, self.throughput),
            *self.reasons(),
            *([] if alone else self.changes()),
            *self.doubts,
        ]

    def comparison(self) -> str:
        """Which other sizes may be as good, and which are expected to be nearly so, by the numbers of ``choices``."""
        others = [size for size in self.candidates if size != self.batch_size]
        runs = f"{len(self.probes)} probes (short runs)"
        undecided = (
            f"These {runs} do not show that it is better than B = {_listed(others)}."
            if others
            else f"By these {runs}, no other size is likely to cost at most a tenth more than the best."
        )
        considered, close = [choice.batch_size for choice in self.choices], self.close_sizes
        first = considered.index(close[0])
        whole = tuple(considered[first : first + len(close)]) == close and len(close) > 2
        sizes = f"B = {close[0]} to {close[-1]} are" if whole else f"B = {_listed(close)} are" if len(close) > 1 else f"Only B = {close[0]} is"
        return f"{undecided} {sizes} expected to cost at most 10% more than the least."

    def reasons(self) -> list[str]:
        """Where the device is busy, where noise stops mattering, and what memory holds."""
        knee, critical = self.throughput.knee, self.critical_batch_size
        how = "by its data sheet, which is a bound" if self.throughput.bound else "as timed"
        between = math.sqrt(knee.value * critical.value)  # NaN where the critical batch size is not known
        theory = f" Theory puts the least time at √({critical.value:,.0f} × {knee.value:,.0f}) = {between:,.0f}." if 1 <= between < math.inf else ""
        saving = f" Larger batches save few updates from about B = {critical:,.0f} on." if critical.n else ""
        noise = f" The gradient noise scale of the runs is {self.noise_scale:,.0f}." if self.noise_scale.n else ""
        if self.largest_batch_size is None:
            memory = "Every size considered fits in memory."
        elif self.largest_batch_size:
            memory = f"Memory holds a batch of at most {self.largest_batch_size:,}."
        else:
            memory = "How much memory the device has is not known."
        busy = f"The device is busy from B = {knee:,.0f} on ({how})."
        if math.isinf(knee.value):
            busy = f"An update takes the same time at every size ({how})."
        return [f"{busy}{saving}{noise}{theory} {memory}"]

    def changes(self) -> list[str]:
        """What would change the answer."""
        other = [
            f"B = {size} if the fixed time of an update is {factor:g} times as long" for factor, size in self.elsewhere if size != self.batch_size
        ]
        device = f"on another device the best size would be {', and '.join(other)}; " if other else ""
        sentences = [f"What would change the answer: {device}a harder goal, which has a larger critical batch size, makes the best size larger."]
        if self.elsewhere and not other:
            least, most = (pick(factor for factor, _ in self.elsewhere) for pick in (min, max))
            sentences.append(f"A device whose fixed time of an update is {least:g} to {most:g} times as long would not change it.")
        return sentences

    def snippet(self, make_optimizer: str = "make_optimizer") -> str:
        """Code that trains with the advised setting; ``make_optimizer`` is the name of the function that was given as ``optimizer``.

        Its duration is enough for about 95% of runs; they look at the goal as often as the runs that the advice rests on.
        """
        if self.batch_size is None:
            return "# no advice: " + " ".join(self.doubts)
        that_end = " that do not diverge" if self.choice.diverged else ""
        if not self.choice.evaluations_per_epoch:  # runs of a function of the user's own
            enough = f"about 95% of runs{that_end} reach {self.goal} within {self.choice.enough_updates} updates"
            return f"run(batch_size={self.batch_size}, learning_rate={self.learning_rate:.3g}, seed=0)  # {enough}"
        length = "" if self.run_length is None else f", {self.run_length}"
        return (
            f"optimizer = {make_optimizer}({self.learning_rate:.3g}{length})\n"
            f"duration = jb.steps({self.choice.enough_updates})  # about 95% of runs{that_end} reach {self.goal} within it\n"
            f"config = jb.FitConfig(optimizer, batch_size={self.batch_size}, duration=duration, "
            f"evaluations_per_epoch={self.choice.evaluations_per_epoch})"
        )


def noise_scale_of(probes: Sequence[Probe]) -> Interval:
    """The gradient noise scale from the runs that reached the goal, each of which counts once."""
    pairs = [(probe.trace, probe.signal) for probe in probes if probe.reached and math.isfinite(probe.signal)]
    if not pairs:
        return unknown()
    return ratio_of_means(*map(list, zip(*pairs, strict=True)), nonnegative=True, scale="linear")


def cost_of_update(objective: Objective, throughput: Throughput, batch_sizes: Sequence[int]) -> Mapping[int, float]:
    """What an update costs at each size: seconds, examples, or the square root of their product.

    Raises:
        ValueError: the objective is unknown.
    """
    seconds = np.array([throughput.seconds_at(size) for size in batch_sizes])
    return dict(zip(batch_sizes, cost_from_seconds(objective, batch_sizes, seconds).tolist(), strict=True))


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes[:-1])) + (" and " if len(sizes) > 1 else "") + str(sizes[-1]) if sizes else ""
