"""What runs say of every setting at the length that is asked about: draws of what it ends with, and which batch sizes lose nothing.

Axes: D draws, S batch sizes, R learning rates.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxbatch.advice import end_law
from jaxbatch.advice.end_fit import Fitted, fit_endings, predict_divergence, predict_values, which_are_lost
from jaxbatch.advice.end_law import Scale
from jaxbatch.advice.ending import Ending

BANDS = (0.01, 0.02, 0.05)  # more data than the best batch size needs
RACE = 16  # the longest runs ÷ those that come first
FEWEST_UPDATES = 16  # of a short run, below which it tells nothing of a long one
NOISE = 1.96  # standard deviations from run to run: between so many below and above the mean lie 95% of runs
SURE = 0.9  # the chance with which a size is named as one that ends within a band
_UNSEEN = 0.5  # added to the value of a setting without a whole run, in standard deviations from run to run; less with each that was made
_LOST = math.log(8)  # the logarithm of how many times the data count as a setting that is lost
_MOST = 12.0  # the largest logarithm of a ratio of data that is told


class EndSpace(NamedTuple):
    """The settings to choose from, and how long a whole run of each size is."""

    batch_sizes: tuple[int, ...]
    learning_rates: tuple[float, ...]
    num_steps: Mapping[int, int]  # updates of the run that the answer is for
    payable_steps: Mapping[int, int]  # updates of the longest run that may be made; fewer, if the answer is for a horizon
    scale: Scale
    start: float  # the metric before training
    length: float  # examples of the run that the answer is for, of the middle size

    def suited_to(self, endings: Sequence[Ending]) -> "EndSpace":
        """The same settings with the scale that holds what runs showed, which may leave the range that the start lies in."""
        values = [value for ending in endings for value in (ending.value, *(seen for _, seen in ending.looks))]
        return self._replace(scale=self.scale.suited_to(self.start, values))

    def grid(self) -> Float[np.ndarray, "M 3"]:
        """Batch size, learning rate and logarithm of the length of every setting, sizes slowest."""
        rows = [(size, rate, np.log(self.num_steps[size] * size / self.length)) for size in self.batch_sizes for rate in self.learning_rates]
        return np.array(rows, float)


class EndEstimate(NamedTuple):
    """What is known of every setting at its length, less is better; see :class:`jaxbatch.advice.end_law.Scale`."""

    fitted: Fitted
    value: Float[np.ndarray, "D S R"]  # the mean of runs, on the law's scale
    lost: Float[np.ndarray, "D S R"]  # the part of runs that diverge
    best: tuple[int, int]  # indices of size and rate

    @property
    def expected(self) -> Float[np.ndarray, "S R"]:
        """The mean value; runs that diverge end where they began, or where the worst run ended if the start is not known."""
        return self.costs().mean(0)

    def costs(self) -> Float[np.ndarray, "D S R"]:
        """Draws of the mean value, in which runs that diverge count as such."""
        return self._with_lost(self.value, self.lost)

    def regrets(self, doubt: Float[np.ndarray, "S R"] | float = 0.0) -> Float[np.ndarray, "D S R"]:
        """Draws of the logarithm of how many times the data each setting needs to end where the best one does, at most that of 8.

        Args:
            doubt: by how much a setting is taken to end worse than it is expected to.
        """
        worse = self.costs() + doubt
        data = end_law.data_for(self.fitted.draws, worse.reshape(len(worse), -1)).reshape(worse.shape)
        data = np.clip(data, -_MOST, _MOST)
        return np.minimum(data.max((1, 2), keepdims=True) - data, _LOST)

    def costs_of(self, space: EndSpace, num_steps: Mapping[int, int], row: int) -> Float[np.ndarray, "D R"]:
        """The same for runs of other lengths, of one size.

        Args:
            space: the settings.
            num_steps: updates of these runs, by batch size.
            row: the index of the size.
        """
        size = space.batch_sizes[row]
        settings = np.array([(size, rate, np.log(num_steps[size] * size / space.length)) for rate in space.learning_rates])
        return self._with_lost(predict_values(self.fitted, settings), predict_divergence(self.fitted, settings))

    def _with_lost(self, value: np.ndarray, lost: np.ndarray) -> np.ndarray:
        worst = self.fitted.start if math.isfinite(self.fitted.start) else self.fitted.values.max()
        return value + lost * np.maximum(worst - value, 0)

    @property
    def rates(self) -> Int[np.ndarray, "S"]:
        """The index of the rate that is expected to be the best of each size."""
        rates = self.expected.argmin(1)
        rates[self.best[0]] = self.best[1]
        return rates

    @property
    def best_of_sizes(self) -> Float[np.ndarray, "D S"]:
        """The value of each size at that rate."""
        return self.value[:, np.arange(len(self.rates)), self.rates]

    @property
    def behind(self) -> Float[np.ndarray, "D S"]:
        """How much worse each size ends at its rate than the best setting of all, in standard deviations from run to run."""
        return (self.best_of_sizes - self.value.min((1, 2))[:, None]) / self.fitted.sigma[:, None]

    @property
    def more_data(self) -> Float[np.ndarray, "D S"]:
        """The logarithm of how many times the data each size needs at its rate to end where the best setting of all does."""
        values = np.column_stack([self.best_of_sizes, self.value.min((1, 2))])
        data = np.clip(end_law.data_for(self.fitted.draws, values), -_MOST, _MOST)
        return data[:, -1:] - data[:, :-1]

    def within(self, band: float | None) -> Bool[np.ndarray, "D S"]:
        """Which sizes end, as a mean, within a band of the best: of the noise (None: what holds 95% of its runs), or of so much more data."""
        return self.behind <= NOISE if band is None else self.more_data <= np.log1p(band)


def make_estimate(endings: Sequence[Ending], space: EndSpace, *, seed: int = 0, final: bool = False) -> EndEstimate:
    """Fits the law to all runs and finds the setting with the best expected end.

    Args:
        endings: the runs.
        space: the settings to choose from; the metric's scale is that which suits the runs.
        seed: of the draws.
        final: whether the best is to be one that was run to the end of its length, if there is one and that length can be made.
    """
    space = space.suited_to(endings)
    fitted = fit_endings(endings, space.scale, space.start, space.length, seed=seed)
    grid, shape = space.grid(), (-1, len(space.batch_sizes), len(space.learning_rates))
    value, lost = predict_values(fitted, grid).reshape(shape), predict_divergence(fitted, grid).reshape(shape)
    first = EndEstimate(fitted, value, lost, (0, 0))
    whole = count_whole(endings, space)
    doubtful = first.regrets(_UNSEEN * float(np.median(fitted.sigma)) / (1 + whole)).mean(0)
    if final and whole.any() and space.num_steps == space.payable_steps:
        doubtful = np.where(whole > 0, doubtful, np.inf)
    size, rate = np.unravel_index(doubtful.argmin(), doubtful.shape)
    return first._replace(best=(int(size), int(rate)))


def largest_within(estimate: EndEstimate, space: EndSpace, band: float | None, *, sure: float = SURE) -> int | None:
    """The largest batch size whose chance to end within a band is at least ``sure``; None if no size has it."""
    chances = estimate.within(band).mean(0)
    return max((size for size, chance in zip(space.batch_sizes, chances, strict=True) if chance >= sure), default=None)


def count_whole(endings: Sequence[Ending], space: EndSpace, *, repeats: bool = False) -> Float[np.ndarray, "S R"]:
    """How many runs of each setting were made to the end of the longest length; with ``repeats``, how many that repeat it."""
    count = np.zeros((len(space.batch_sizes), len(space.learning_rates)))
    for ending, lost in zip(endings, which_are_lost(endings, space.scale, space.start), strict=True):
        if ending.ended and not lost and ending.repeat >= repeats and is_longest(ending, space):
            count[space.batch_sizes.index(ending.batch_size), space.learning_rates.index(ending.learning_rate)] += 1
    return count


def is_longest(ending: Ending, space: EndSpace) -> bool:
    """Whether a run is of the longest length that may be made at its size."""
    return ending.num_steps >= space.payable_steps[ending.batch_size]
