"""The regret of what a run ends with, told in data: how many times the data a setting needs to end where the sweep's best setting does.

The sweep's best setting was run at several lengths, on seeds by which it was not chosen, each with the schedule of its own length and at its rate
and the rates beside it. At each length the rate with the best mean counts; at the whole length it is the mean of the setting's judged runs, which
are more. The curve is the least of these means up to each length, because who gains nothing by a longer run makes a shorter one, joined by straight
lines over the logarithm of the length where it falls. A value is read on it as a length: the one at which the sweep's best setting would end with
that value. A setting that ends where the curve is at length a, while the best one ends where it is at length b, has the regret b / a: its own curve
is taken to be the same one, shifted by the factor b / a in length, so it needs b / a times the data to end where the best does.

A value that is worse than the curve's worst has an infinite regret; one that is better than its best is read as the length of the best.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxbatch.intervals import Interval, around

DRAWS = 1000


class Curve(NamedTuple):
    """What the best setting ends with by length; less is better."""

    logs: np.ndarray  # of the lengths, ascending, in lengths of the whole run
    values: np.ndarray  # descending

    def length(self, value: float) -> float:
        """The length at which the best setting ends with a value; 0 where it is worse than at every length.

        Example:
            >>> curve = Curve(np.log([0.5, 1, 2]), np.array([3.0, 2.0, 1.5]))
            >>> curve.length(2.0), round(curve.length(2.5), 3), curve.length(4.0), curve.length(0.1)
            (1.0, 0.707, 0.0, 2.0)
        """
        if not value <= self.values[0]:
            return 0.0
        return float(np.exp(np.interp(-value, -self.values, self.logs)))


def make_curve(lengths: Sequence[float], means: Sequence[float]) -> Curve:
    """The curve from what runs of each length end with as a mean, less is better.

    Args:
        lengths: ascending, in lengths of the whole run.
        means: of each length.

    Example:
        >>> curve = make_curve([0.5, 1.0, 2.0, 3.0], [3.0, 1.0, 1.2, 0.9])
        >>> curve.values.tolist(), np.exp(curve.logs).round(3).tolist()
        ([3.0, 1.0, 0.9], [0.5, 1.0, 3.0])
    """
    values = np.asarray(means, float)
    falls = np.r_[True, values[1:] < np.minimum.accumulate(values)[:-1]]
    return Curve(np.log(lengths)[falls], values[falls])


def group_ends(rows: Iterable[dict], sign: float) -> dict[float, dict[float, list[float]]]:
    """The rows of a curve by length and rate; rates of which a run diverged are left out.

    Args:
        rows: with ``part``, ``learning_rate`` and ``value``.
        sign: -1 for a metric that shall rise.

    Example:
        >>> group_ends([{"part": 1, "learning_rate": 0.1, "value": 0.9}, {"part": 1, "learning_rate": 0.2, "value": None}], -1.0)
        {1: {0.1: [-0.9]}}
    """
    ends: dict[float, dict[float, list]] = {}
    for row in rows:
        ends.setdefault(row["part"], {}).setdefault(row["learning_rate"], []).append(row["value"])
    whole = {part: {rate: values for rate, values in of.items() if None not in values} for part, of in ends.items()}
    return {part: {rate: [sign * value for value in values] for rate, values in of.items()} for part, of in whole.items()}


class Regrets:
    """Regrets against one curve, with intervals that hold 95% of draws: of the judged runs, and of the curve's.

    Args:
        ends: by length, by rate, the values of the curve's runs, less is better; see :func:`group_ends`.
        best: what the judged runs of the sweep's best setting end with; None where one diverged.
    """

    def __init__(self, ends: Mapping[float, Mapping[float, Sequence[float]]], best: Sequence[float | None]):
        self._random, self._best, self._curves = np.random.default_rng(0), list(best), list[Curve]()
        if None in best:
            return
        lengths = sorted({1.0} | {length for length, by_rate in ends.items() if by_rate})
        groups = [[self._best] if length == 1 else list(ends[length].values()) for length in lengths]
        means = [np.min([self._means(values) for values in group], axis=0) for group in groups]
        self._at_whole = means[lengths.index(1.0)]
        self._curves = [make_curve(lengths, drawn) for drawn in np.transpose(means)]

    @property
    def curve(self) -> Curve:
        """The curve of the runs as they are."""
        return self._curves[0]

    def _means(self, values: Sequence[float | None]) -> np.ndarray:
        """The mean of runs, and then the means of runs that are drawn anew, DRAWS times."""
        drawn = np.array(values, float)[self._random.integers(len(values), size=(DRAWS, len(values)))].mean(1)
        return np.r_[np.mean(np.array(values, float)), drawn]

    def of_an_equal(self) -> np.ndarray:
        """Draws of the regret that a setting exactly as good as the sweep's best would be judged to have, by as many runs of its own."""
        if not self._curves:
            return np.full(DRAWS, np.nan)
        return np.array([ratio(*of) for of in zip(self._curves, self._means(self._best), self._at_whole, strict=True)][1:])

    def of_one_seed(self, ends: Mapping[tuple[int, float], Mapping[int, float | None]]) -> list[float]:
        """The regrets of what a whole sweep with one seed chooses, judged by the sweep's other seeds; one for each seed.

        Args:
            ends: by batch size and rate, what the run of each seed ends with, less is better; None where it diverged.
        """
        regrets = []
        for seed in sorted({seed for of in ends.values() for seed in of}):
            seen = {setting: value for setting, of in ends.items() if (value := of.get(seed)) is not None}
            others = [value for other, value in ends[min(seen, key=seen.__getitem__)].items() if other != seed]
            lost = None in others or not self._curves
            regrets.append(np.inf if lost else ratio(self.curve, float(np.mean(np.array(others, float))), float(self._at_whole[0])))
        return regrets

    def regret(self, mine: Sequence[float | None]) -> Interval:
        """How many times the data a setting needs.

        Args:
            mine: what its judged runs end with, less is better; None where one diverged.
        """
        if None in mine or not self._curves:
            return Interval(np.inf if self._curves else np.nan, np.nan, np.nan, len(mine))
        if list(mine) == self._best:
            return around(1.0, 1.0, 1.0, len(mine))
        value, *draws = map(ratio, self._curves, self._means(mine), self._at_whole)
        low, high = np.quantile(draws, [0.025, 0.975], method="closest_observation")
        return around(value, min(float(low), value), max(float(high), value), len(mine))


def ratio(curve: Curve, mine: float, best: float) -> float:
    """The regret on one curve."""
    length = curve.length(mine)
    return curve.length(best) / length if length else np.inf
