"""What :func:`jaxbatch.advise_within` answers: the batch size and rate whose run ends best, and how large a batch loses nothing."""

import math
from typing import NamedTuple

from jaxbatch.advice.end_estimate import BANDS
from jaxbatch.advice.end_lengths import Seconds
from jaxbatch.advice.end_request import Metric
from jaxbatch.advice.end_rows import EndChoice
from jaxbatch.advice.ending import Ending
from jaxbatch.advice.throughput import Throughput
from jaxbatch.batches import Duration
from jaxbatch.intervals import Interval


class EndAdvice(NamedTuple):
    """A recommendation for runs of a fixed length. If there is none, ``batch_size`` is None and ``doubts`` say why."""

    batch_size: int | None
    learning_rate: float | None
    metric: Metric
    within: Duration | Seconds  # the longest run that was made
    horizon: Duration | None  # the length that the answer is for, if it is longer
    start: float  # the metric before training
    choices: tuple[EndChoice, ...]  # every batch size that was considered, in ascending order
    best_size: Interval  # the best batch size; its ends hold it with 90%
    largest_in_noise: int | None  # the largest size that ends in the range of 95% of the best setting's runs, with a chance of at least 90%
    largest_within: tuple[int | None, ...]  # the largest that does so with 1%, 2%, 5% more data, likewise
    growth: Interval  # beta: the critical batch size grows as the run's length to this power
    cost_in_runs: float  # what all runs cost, in runs of the length that the answer is for
    endings: tuple[Ending, ...]  # the runs that the advice rests on
    throughput: Throughput | None  # None: times of an update were not asked for
    largest_batch_size: int | None  # the largest that memory holds; None: every size that was considered fits; 0: not known
    rules: tuple[str, ...]  # what to do with the other hyperparameters when the batch changes
    doubts: tuple[str, ...]

    @property
    def choice(self) -> EndChoice:
        """The row of the advised batch size."""
        return self.at(self.batch_size)

    def at(self, batch_size: int | None) -> EndChoice:
        """The row of a batch size: what is lost if it must be taken.

        Raises:
            ValueError: the size was not considered.
        """
        for choice in self.choices:
            if choice.batch_size == batch_size:
                return choice
        raise ValueError(f"batch_size={batch_size} is not among those considered: {', '.join(str(one.batch_size) for one in self.choices)}.")

    def sentences(self) -> list[str]:
        """The answer in words."""
        if self.batch_size is None:
            return ["No advice.", *self.doubts]
        choice, length = self.choice, in_words(self.within if self.horizon is None else self.horizon)
        run = "A run" if self.horizon is None else "A run that long was not made; it"
        return [
            f"Train {length} with batch size {self.batch_size} and learning rate {self.learning_rate:.3g}: {choice.num_steps:,} updates. "
            f"{run} is expected to end with {self.metric.name} {choice.value:.4g} as a mean over runs; "
            f"a single one between {choice.next_run.low:.4g} and {choice.next_run.high:.4g}.",
            self.comparison(),
            *self.of_large_batches(),
            f"The {len(self.endings)} runs cost as much as {self.cost_in_runs:.1f} runs of {length}.",
            *self.doubts,
        ]

    def comparison(self) -> str:
        """Which other sizes may be the best."""
        low, high = self.best_size.low, self.best_size.high
        others = [choice.batch_size for choice in self.choices if low <= choice.batch_size <= high and choice.batch_size != self.batch_size]
        if not others:
            return "By these runs, no other size is likely to end better."
        listed = ", ".join(map(str, others[:-1])) + (" or " if len(others) > 1 else "") + str(others[-1])
        return f"These runs cannot tell whether B = {listed} ends better."

    def of_large_batches(self) -> list[str]:
        """How large the batch may be before something is lost."""
        named = [(f"{band:.0%} more data", size) for band, size in zip(BANDS, self.largest_within, strict=True)]
        sure = [f"B = {size} with {cost}" for cost, size in named if size is not None and size > (self.batch_size or 0)]
        noise = (
            f"The largest batch that ends within the noise from run to run is B = {self.largest_in_noise}."
            if self.largest_in_noise is not None and self.largest_in_noise > (self.batch_size or 0)
            else "No larger batch is sure to end within the noise from run to run."
            if self.choices[-1].batch_size != self.batch_size
            else ""
        )
        largest = self.choices[-1]
        lost = largest.more_data.value
        need = f"{lost:.3g} times the data" if math.isfinite(lost) and lost < 1e4 else "more data than any run here tells of"
        price = f"B = {largest.batch_size} needs {need} to end where the best setting of all does." if largest.batch_size != self.batch_size else ""
        parts = [part for part in (noise, f"It is likely to end as well: {', '.join(sure)}." if sure else "", price) if part]
        return [" ".join(parts)] if parts else []

    def snippet(self, make_optimizer: str = "make_optimizer", *, with_steps: bool = True) -> str:
        """Code that trains with the advised setting; ``make_optimizer`` is the name of the function that takes rate and updates."""
        if self.batch_size is None:
            return "# no advice: " + " ".join(self.doubts)
        steps = self.choice.num_steps
        arguments = f"{self.learning_rate:.3g}, {steps}" if with_steps else f"{self.learning_rate:.3g}"
        return (
            f"optimizer = {make_optimizer}({arguments})\nconfig = jb.FitConfig(optimizer, batch_size={self.batch_size}, duration=jb.steps({steps}))"
        )


def in_words(length: Duration | Seconds) -> str:
    """A length in words.

    Example:
        >>> from jaxbatch import epochs
        >>> in_words(epochs(2.5)), in_words(Seconds(60))
        ('2.5 epochs', '60 seconds')
    """
    return f"{length.amount:g} seconds" if isinstance(length, Seconds) else f"{length.amount:,g} {length.unit}"
