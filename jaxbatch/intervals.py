"""How far a measured number can be trusted: intervals of means, medians, ratios and slopes.

Axes: T measurements, one for each seed, round or step.
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
        """Whether ``reference`` lies outside the interval; False with fewer than 2 values or without ends."""
        return self.n > 1 and bool(self.low > reference or reference > self.high)


def around(value: float, low: float, high: float, n: int) -> Interval:
    """An interval that contains its value. An end on the wrong side, through rounding or bias, is set to the value.

    Example:
        >>> around(3.0, 3.5, 4.0, 10), around(math.nan, 3.5, 4.0, 10).excludes(9.0)
        (Interval(value=3.0, low=3.0, high=4.0, n=10), False)
    """
    if math.isnan(value):
        return Interval(math.nan, math.nan, math.nan, n)
    low, high = (end if math.isnan(end) else pick(end, value) for end, pick in ((low, min), (high, max)))
    return Interval(float(value), float(low), float(high), n)


def interval(values: Sequence[float | None] | np.ndarray, statistic=np.mean, *, seed: int = 0) -> Interval:
    """A statistic of ``values`` with its 95% percentile bootstrap interval.

    A single value has no interval (its ends are NaN). Values that are not finite are ignored.

    Args:
        values: independent measurements, one for each seed or round.
        statistic: ``np.mean`` or ``np.median``.
        seed: the seed of the resampling.

    Example:
        >>> mean = interval([1.0, 2.0, 3.0, 4.0])
        >>> f"{mean:.2f}", mean.excludes(0.0)
        ('2.50 [1.50, 3.50]', True)

    References:
        Efron, *Bootstrap methods: another look at the jackknife*, 1979; scipy.stats.bootstrap.
    """
    known = np.asarray([value for value in values if value is not None], float)
    known = known[np.isfinite(known)]
    if len(known) == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    if len(known) == 1:
        return Interval(float(known[0]), float("nan"), float("nan"), 1)
    from scipy import stats  # costs half a second; --help should not pay it

    ends = stats.bootstrap((known,), statistic, method="percentile", n_resamples=5000, rng=np.random.default_rng(seed)).confidence_interval
    return around(statistic(known), ends.low, ends.high, len(known))


def ratio_of_means(numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray, *, nonnegative: bool = False) -> Interval:
    r"""The ratio of two means, measured in pairs, with Fieller's 95% interval.

    Means are taken *before* dividing: a mean of ratios is biased, and unbounded where a denominator is near zero. Fieller's
    set holds every :math:`\rho` for which :math:`\overline{x} - \rho\,\overline{y}` does not differ significantly from
    zero, among them the ratio itself. If the mean of the denominators differs significantly from zero, the set is an
    interval. If not, the set is everything, or everything but an interval; then the ratio is unbounded on both sides, from
    ``-inf`` to ``inf``.

    Args:
        numerators: ``(T,)``.
        denominators: ``(T,)``, of the same measurements; pairs that are not finite are left out.
        nonnegative: whether both true means, and so the true ratio, are known to be at least 0. If the ratio found is at least
            0 too, the interval is the part of the set from 0 on; so it may have a lower end even without an upper one.

    Returns:
        The ratio, which always lies within its ends; the ends are NaN for one pair.

    Example:
        >>> ratio = ratio_of_means([12.0, 20.0, 16.0], [1.0, 1.5, 0.5])
        >>> round(ratio.value, 1), ratio.low < 16 < ratio.high
        (16.0, True)
        >>> print(f"{ratio_of_means([5.0, 6.0, 7.0], [1.0, 2.0, -0.5]):.1f}")
        7.2 [-inf, inf]
        >>> print(f"{ratio_of_means([5.0, 6.0, 7.0], [1.0, 2.0, -0.5], nonnegative=True):.1f}")
        7.2 [1.0, inf]

    References:
        Fieller, *Some problems in interval estimation*, 1954.
    """
    pairs = np.stack([np.ravel(np.asarray(numerators, float)), np.ravel(np.asarray(denominators, float))])
    pairs = pairs[:, np.isfinite(pairs).all(0)]
    n = pairs.shape[1]
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    units = np.exp2(np.frexp(np.abs(pairs).max(1))[1] - 1.0)  # powers of two, so that no square below overflows
    x, y = map(float, (pairs / units[:, None]).mean(1))
    scale = float(units[0]) / float(units[1])
    value = scale * (x / y) if y else math.copysign(math.inf, x)
    if n == 1:
        return Interval(value, math.nan, math.nan, 1)
    var_x, covariance, var_y = map(float, (np.cov(pairs / units[:, None]) / n).ravel()[[0, 1, 3]])
    return fieller(x, y, var_x, covariance, var_y, n, scale=scale, nonnegative=nonnegative)


def fieller(
    x: float, y: float, var_x: float, covariance: float, var_y: float, n: float, *, scale: float = 1.0, nonnegative: bool = False
) -> Interval:
    """``scale`` times the ratio x / y of two means, with Fieller's 95% interval as :func:`ratio_of_means` tells it.

    Args:
        x, y: the means.
        var_x, covariance, var_y: of the means, not of single measurements.
        n: the number of measurements, at least 2; for a weighted mean the effective number, which need not be whole.
        scale: for means in other units.
        nonnegative: see :func:`ratio_of_means`.

    Example:
        >>> print(f"{fieller(16.0, 1.0, 0.0, 0.0, 0.01, 1000):.1f}")
        16.0 [13.4, 19.9]
    """
    from scipy import stats

    value = scale * (x / y) if y else math.copysign(math.inf, x)
    quantile = float(stats.t.ppf(0.975, n - 1)) ** 2
    # The set is where a rho^2 - 2 b rho + c <= 0.
    a, b, c = y**2 - quantile * var_y, x * y - quantile * covariance, x**2 - quantile * var_x
    n, low, high = round(n), -math.inf, math.inf
    discriminant = b**2 - a * c
    if a > 0 or (a < 0 < discriminant):
        far = b + math.copysign(math.sqrt(max(discriminant, 0.0)), b)  # a sum, not a difference: it loses no digits
        ends = sorted((scale * far / a, scale * c / far if far else 0.0))
        if a > 0:
            low, high = ends
        elif nonnegative and ends[0] < 0:  # starts after the excluded part; if that begins above 0, both sides of it remain
            low = ends[1]
    if nonnegative and value >= 0:
        return around(value, max(low, 0.0), high, n)
    return around(value, low, high, n) if a > 0 else around(value, -math.inf, math.inf, n)


def resampled(
    groups: Sequence[Sequence[float] | np.ndarray], fit: Callable[[list[np.ndarray]], float], *, resamples: int = 1000, seed: int = 0
) -> Interval:
    """A number fitted to several groups of measurements, with a 95% bootstrap interval over the members of each.

    Args:
        groups: one sequence of measurements for each group, such as the seeds at each batch size.
        fit: takes the groups, as arrays, and returns the number; NaN if there is none.
        resamples: how often new members are drawn for every group, from its own members.
        seed: the seed of the drawing.

    Returns:
        The fit of all measurements, within its ends; ``n`` is the size of the smallest group. Draws without a fit are left
        out. The ends are NaN if more than half of the draws, or all measurements together, have no fit.

    Example:
        >>> slope = resampled([[1.0, 1.1, 0.9], [2.0, 2.1, 1.9]], lambda groups: groups[1].mean() - groups[0].mean())
        >>> round(slope.value, 3), slope.excludes(0.0)
        (1.0, True)
    """
    arrays = [np.asarray(group, float) for group in groups]
    n = min((len(group) for group in arrays), default=0)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    random = np.random.default_rng(seed)
    draws = np.array([fit([random.choice(group, len(group)) for group in arrays]) for _ in range(resamples)])
    draws = draws[~np.isnan(draws)]
    low = high = math.nan
    if n > 1 and len(draws) > resamples / 2:  # an order statistic, not between two of them: one may be infinite
        low, high = np.quantile(draws, [0.025, 0.975], method="inverted_cdf")
    return around(fit(arrays), low, high, n)
