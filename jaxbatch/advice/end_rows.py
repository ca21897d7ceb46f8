"""What every batch size would end with, as numbers with their intervals, from the draws of an estimate.

Axes: D draws, S batch sizes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxbatch.advice.end_estimate import BANDS, EndEstimate, EndSpace, is_longest
from jaxbatch.advice.end_fit import law_values, which_are_lost
from jaxbatch.advice.ending import Ending
from jaxbatch.intervals import Interval, around

_PRIOR_RUNS = 4  # the weight of the spread of all runs against that of one setting's


class EndChoice(NamedTuple):
    """What a run of one batch size at its best learning rate would end with."""

    batch_size: int
    learning_rate: float
    num_steps: int  # updates of that run
    value: Interval  # the metric at its end, the mean over runs
    next_run: Interval  # that of one more run: 95% of runs lie between these ends
    more_data: Interval  # how many times the data it needs to end where the best setting of all does, be it known which one that is or not
    chances: tuple[float, ...]  # that it ends within the noise of the best setting, and within each of BANDS of its data
    runs: int  # runs of this size, of any rate and length
    whole: int  # those of this rate and the longest length, that were made to the end
    lost: int  # runs of this rate that diverged, or ended as if they had learned nothing


def rows_of(estimate: EndEstimate, space: EndSpace, endings: Sequence[Ending]) -> tuple[EndChoice, ...]:
    """A row for each batch size, in ascending order."""
    space = space.suited_to(endings)
    rates, values, more = estimate.rates, estimate.best_of_sizes, np.exp(estimate.more_data)
    sigma, random, rows = estimate.fitted.sigma_of_one, np.random.default_rng(1), []
    lost = {number for number, is_lost in enumerate(which_are_lost(endings, space.scale, space.start)) if is_lost}
    for row, size in enumerate(space.batch_sizes):
        rate = space.learning_rates[rates[row]]
        mine = [number for number, ending in enumerate(endings) if ending.batch_size == size]
        same = [number for number in mine if endings[number].learning_rate == rate]
        kept = [endings[number] for number in same if number not in lost]
        whole = [ending for ending in kept if ending.ended and is_longest(ending, space)]
        mean, spread = values[:, row], sigma
        repeats = [ending for ending in whole if ending.repeat]
        if repeats and space.num_steps[size] == space.payable_steps[size]:
            mean, spread = typical_value(estimate, space, (row, int(rates[row])), repeats)
        one = np.minimum(mean + spread * random.standard_normal(len(mean)), estimate.fitted.start)
        chances = tuple(float(estimate.within(band)[:, row].mean()) for band in (None, *BANDS))
        rows.append(
            EndChoice(
                size,
                rate,
                space.num_steps[size],
                _metric(space, mean, len(whole)),
                _metric(space, one, len(whole)),
                _spread(more[:, row], len(whole)),
                chances,
                len(mine),
                len(whole),
                len(lost.intersection(same)),
            )
        )
    return tuple(rows)


def typical_value(
    estimate: EndEstimate, space: EndSpace, cell: tuple[int, int], repeats: Sequence[Ending]
) -> tuple[Float[np.ndarray, "D"], Float[np.ndarray, "D"]]:
    """Draws of the mean and the standard deviation of a setting from the runs that repeat it, without the winner's gain.

    The best of many noisy settings looks better than it is. The runs that repeat it were not chosen for their own luck, and the law rests
    on all runs; it counts as one run more.
    """
    grid = space.grid().reshape(len(space.batch_sizes), len(space.learning_rates), 3)
    law = law_values(estimate.fitted, grid[cell][None])[:, 0]
    seen = np.array([space.scale.write(ending.value) for ending in repeats])
    random, count, sigma = np.random.default_rng(3), len(repeats), estimate.fitted.sigma_of_one
    squares = ((seen - seen.mean()) ** 2).sum() + _PRIOR_RUNS * sigma**2
    spread = np.sqrt(squares / random.chisquare(_PRIOR_RUNS + count - 1, len(sigma)))
    center = (law + seen.sum()) / (1 + count)
    return center + spread / math.sqrt(1 + count) * random.standard_normal(len(center)), spread


def _metric(space: EndSpace, draws: np.ndarray, count: int) -> Interval:
    """The interval of a metric whose draws are on the law's scale."""
    return _spread(space.scale.read(draws), count)


def _spread(draws: np.ndarray, count: int) -> Interval:
    """The median of draws with the interval that holds 95% of them; ``count`` whole runs of the setting are behind it, often none."""
    low, middle, high = np.quantile(draws, [0.025, 0.5, 0.975])
    return around(float(middle), float(low), float(high), count)
