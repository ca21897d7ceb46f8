"""How far a measured number can be trusted: intervals of means, medians, ratios and slopes.

Axes: T measurements, one a seed, a round or a step.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A number with its 95% interval and the number of measurements n behind it."""

    value: float
    low: float
    high: float
    n: int

    def __format__(self, spec: str) -> str:
        if self.n == 0:
            return "none"
        value = format(self.value, spec)
        return value if self.n == 1 else f"{value} [{format(self.low, spec)}, {format(self.high, spec)}]"

    def __float__(self) -> float:
        return float(self.value)

    def excludes(self, reference: float) -> bool:
        """Whether the interval says that the value differs from ``reference``; never with fewer than 2 values."""
        return self.n > 1 and not self.low <= reference <= self.high


def interval(values: Sequence[float | None] | np.ndarray, statistic=np.mean, *, seed: int = 0) -> Interval:
    """A statistic of ``values`` with its 95% percentile bootstrap interval.

    One value has no interval (its ends are NaN); values that are not finite are left out of both.

    Args:
        values: independent measurements, one a seed or a round.
        statistic: ``np.mean`` or ``np.median``.
        seed: of the resampling.

    Example:
        >>> mean = interval([1.0, 2.0, 3.0, 4.0])
        >>> f"{mean:.2f}", mean.excludes(0.0)
        ('2.50 [1.50, 3.50]', True)

    References:
        Efron, *Bootstrap methods: another look at the jackknife*, 1979; scipy.stats.bootstrap.
    """
    values = np.asarray([value for value in values if value is not None], float)
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    if len(values) == 1:
        return Interval(float(values[0]), float("nan"), float("nan"), 1)
    from scipy import stats  # costs half a second; --help should not pay it

    ends = stats.bootstrap(
        (values,), statistic, method="percentile", n_resamples=5000, rng=np.random.default_rng(seed)
    ).confidence_interval
    return Interval(float(statistic(values)), float(ends.low), float(ends.high), len(values))


def ratio_of_means(numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray) -> Interval:
    r"""The ratio of two means, measured in pairs, with its 95% interval after Fieller.

    Means are taken *before* dividing: a mean of ratios is biased, and without bounds where a denominator is near
    zero. The interval holds every :math:`\rho` for which :math:`\overline{x} - \rho\,\overline{y}` cannot be told from
    zero. Where the mean of the denominators itself cannot be told from zero, no ratio is too large: ``high`` is
    infinite, and ``low`` what is excluded from below (``-inf`` where nothing is).

    Args:
        numerators: ``(T,)``.
        denominators: ``(T,)``, of the same measurements; pairs that are not finite are left out.

    Returns:
        The ratio; its ends are NaN for one pair.

    Example:
        >>> ratio = ratio_of_means([12.0, 20.0, 16.0], [1.0, 1.5, 0.5])
        >>> round(ratio.value, 1), ratio.low < 16 < ratio.high
        (16.0, True)
        >>> ratio_of_means([5.0, 6.0, 7.0], [-1.0, 2.0, -0.5]).high
        inf

    References:
        Fieller, *Some problems in interval estimation*, 1954.
    """
    pairs = np.stack([np.ravel(np.asarray(numerators, float)), np.ravel(np.asarray(denominators, float))])
    pairs = pairs[:, np.isfinite(pairs).all(0)]
    n = pairs.shape[1]
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    x, y = pairs.mean(1)
    value = x / y if y else math.copysign(math.inf, x)
    if n == 1:
        return Interval(float(value), math.nan, math.nan, 1)
    from scipy import stats

    quantile = stats.t.ppf(0.975, n - 1) ** 2
    (var_x, covariance), (_, var_y) = np.cov(pairs) / n
    # The ends solve a rho^2 - 2 b rho + c = 0.
    a, b, c = y**2 - quantile * var_y, x * y - quantile * covariance, x**2 - quantile * var_x
    discriminant = b**2 - a * c
    if a > 0:
        root = math.sqrt(max(discriminant, 0.0))
        return Interval(float(value), float((b - root) / a), float((b + root) / a), n)
    if a == 0 or discriminant <= 0:
        return Interval(float(value), -math.inf, math.inf, n)
    return Interval(float(value), float((b - math.sqrt(discriminant)) / a), math.inf, n)


def resampled(
    groups: Sequence[Sequence[float] | np.ndarray], fit: Callable[[list[np.ndarray]], float], *, resamples: int = 1000, seed: int = 0
) -> Interval:
    """A number fitted to several groups of measurements, with a 95% bootstrap interval over the members of each.

    Args:
        groups: measurements, one sequence for each place fitted to, as the seeds at each batch size.
        fit: the groups, as arrays, to the number; NaN where it cannot be found.
        resamples: how often every group is drawn anew from its own members.
        seed: of the drawing.

    Returns:
        The fit of all measurements; ``n`` is the size of the smallest group. Draws without a fit are left out, and
        the interval's ends are NaN where they are more than half.

    Example:
        >>> slope = resampled([[1.0, 1.1, 0.9], [2.0, 2.1, 1.9]], lambda groups: groups[1].mean() - groups[0].mean())
        >>> round(slope.value, 3), slope.excludes(0.0)
        (1.0, True)
    """
    groups = [np.asarray(group, float) for group in groups]
    n = min((len(group) for group in groups), default=0)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    random = np.random.default_rng(seed)
    draws = np.array([fit([random.choice(group, len(group)) for group in groups]) for _ in range(resamples)])
    draws = draws[~np.isnan(draws)]
    low = high = math.nan
    if n > 1 and len(draws) > resamples / 2:  # an order statistic, not between two of them: one may be infinite
        low, high = np.quantile(draws, [0.025, 0.975], method="inverted_cdf")
    return Interval(float(fit(groups)), float(low), float(high), n)
