"""The regret of what a run ends with, told in data: how many times the data a setting needs to end where the sweep's best setting does.

The sweep's best setting was run at several lengths, on seeds by which it was not chosen, each with the schedule of its own length and at its rate
and the rates beside it. At each length the rate with the best mean counts. These means by the logarithm of the length, made monotone (least
squares; lengths at which a longer run ended no better are pooled into one, at the mean of their logarithms) and joined by straight lines, are the
curve. A value is read on it as a length: the one at which the sweep's best setting would end with that value. A setting that ends where the curve
is at length a, while the best one ends where it is at length b, both as means over the judging seeds, has the regret b / a: its own curve is taken
to be the same one, shifted by the factor b / a in length, so it needs b / a times the data to end where the best does.

A value that is worse than the curve's worst has an infinite regret; one that is better than its best is read as the longest length.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import isotonic_regression

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


def make_curve(ends: Mapping[float, Mapping[float, Sequence[float]]]) -> Curve:
    """The curve from what runs end with, less is better, by length and rate.

    Args:
        ends: by length, by rate, the values of its runs; a rate of which a run diverged has none.

    Example:
        >>> curve = make_curve({0.5: {0.1: [3.0], 0.2: [4.0]}, 1.0: {0.1: [1.0]}, 2.0: {0.1: [1.2]}})
        >>> curve.values.tolist(), np.exp(curve.logs).round(3).tolist()
        ([3.0, 1.1], [0.5, 1.414])
    """
    lengths = sorted(length for length, by_rate in ends.items() if by_rate)
    return _monotone(np.log(lengths), [min(float(np.mean(values)) for values in ends[length].values()) for length in lengths])


def _monotone(logs: np.ndarray, means: Sequence[float]) -> Curve:
    """The curve through means, which are pooled where they do not fall."""
    fitted = isotonic_regression(means, increasing=False)
    blocks = list(zip(fitted.blocks[:-1], fitted.blocks[1:], strict=True))
    return Curve(np.array([logs[first:last].mean() for first, last in blocks]), np.array([fitted.x[first] for first, _ in blocks]))


def group_ends(rows: Iterable[dict], sign: float) -> dict[float, dict[float, list[float]]]:
    """The rows of a curve by length and rate, for :func:`make_curve`; rates of which a run diverged are left out.

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
        ends: see :func:`make_curve`.
    """

    def __init__(self, ends: Mapping[float, Mapping[float, Sequence[float]]]):
        self._random = np.random.default_rng(0)
        self._curve = make_curve(ends)
        lengths = sorted(length for length, by_rate in ends.items() if by_rate)
        means = [np.min([self._means(values) for values in ends[length].values()], axis=0) for length in lengths]
        self._curves = [_monotone(np.log(lengths), drawn) for drawn in np.transpose(means)]

    def _means(self, values: Sequence[float]) -> np.ndarray:
        """The means of runs that are drawn anew, DRAWS times."""
        return np.array(values)[self._random.integers(len(values), size=(DRAWS, len(values)))].mean(1)

    def regret(self, mine: Sequence[float | None], best: Sequence[float | None]) -> Interval:
        """How many times the data a setting needs.

        Args:
            mine: what its judged runs end with, less is better; None where one diverged.
            best: those of the sweep's best setting.
        """
        if None in mine or None in best:
            return Interval(np.inf if None not in best else np.nan, np.nan, np.nan, len(mine))
        if list(mine) == list(best):
            return around(1.0, 1.0, 1.0, len(mine))
        value = _ratio(self._curve, np.mean(mine), np.mean(best))
        drawn = zip(self._curves, self._means(mine), self._means(best), strict=True)  # type: ignore[arg-type]
        draws = [_ratio(curve, one, other) for curve, one, other in drawn]
        low, high = np.quantile(draws, [0.025, 0.975], method="closest_observation")
        return around(value, min(float(low), value), max(float(high), value), len(mine))


def _ratio(curve: Curve, mine: float, best: float) -> float:
    """The regret on one curve."""
    length = curve.length(mine)
    return curve.length(best) / length if length else np.inf
