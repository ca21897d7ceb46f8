"""How far a measured number can be trusted: intervals of means, medians, ratios and slopes. All hold the truth in 95% of cases.

docs/intervals.md lists them all, with how often each held a known truth.

Axes: T measurements, one for each seed, round or step.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxbatch.interval_ends import FEW, Scale, ends_of, log_ratio_ends
from jaxbatch.kinds import checked


class Interval(NamedTuple):
    """A number with its 95% interval, the number of measurements n behind it, and how many were left out because they are not finite.

    One measurement alone has no ends: they are NaN. What follows from a model of other measurements has ends whatever its n, which may be 0.

    A format writes all of it: ``1.05 [0.95, 1.15] (2 of 4)`` is the number from 2 of 4 runs, because two diverged.
    """

    value: float
    low: float
    high: float
    n: int
    left_out: int = 0

    def __format__(self, spec: str) -> str:
        text = "none" if self.n == 0 and not self._has_ends else format(self.value, spec)
        if self._has_ends:
            text += f" [{format(self.low, spec)}, {format(self.high, spec)}]"
        return text + (f" ({self.n} of {self.n + self.left_out})" if self.left_out else "")

    @property
    def _has_ends(self) -> bool:
        return self.n > 1 or not math.isnan(self.low + self.high)

    def __float__(self) -> float:
        return float(self.value)

    def excludes(self, reference: float) -> bool:
        """Whether ``reference`` lies outside the interval; False without ends."""
        return self._has_ends and bool(self.low > reference or reference > self.high)

    def times(self, factor: float) -> "Interval":
        """The interval in another unit.

        Example:
            >>> Interval(1.0, 0.5, 2.0, 3).times(-100)
            Interval(value=-100.0, low=-200.0, high=-50.0, n=3, left_out=0)
        """
        low, high = (self.low, self.high) if factor >= 0 else (self.high, self.low)
        return self._replace(value=factor * self.value, low=factor * low, high=factor * high)

    def less(self, reference: float) -> "Interval":
        """The interval of the difference from a number that is known exactly.

        Example:
            >>> Interval(1.5, 1.0, 2.0, 3).less(1.0)
            Interval(value=0.5, low=0.0, high=1.0, n=3, left_out=0)
        """
        return self._replace(value=self.value - reference, low=self.low - reference, high=self.high - reference)


def unknown(left_out: int = 0) -> Interval:
    """The interval of nothing: no measurement, or none that is finite.

    Example:
        >>> f"{unknown():.1f}", f"{unknown(4):.1f}"
        ('none', 'none (0 of 4)')
    """
    return Interval(math.nan, math.nan, math.nan, 0, left_out)


def around(value: float, low: float, high: float, n: int, left_out: int = 0) -> Interval:
    """An interval that contains its value. An end on the wrong side, through rounding or bias, is set to the value.

    Example:
        >>> around(3.0, 3.5, 4.0, 10)[:3], around(math.nan, 3.5, 4.0, 10).excludes(9.0)
        ((3.0, 3.0, 4.0), False)
    """
    if math.isnan(value):
        return Interval(math.nan, math.nan, math.nan, n, left_out)
    low, high = (end if math.isnan(end) else pick(end, value) for end, pick in ((low, min), (high, max)))
    return Interval(float(value), float(low), float(high), n, left_out)


@checked
def interval(values: Sequence[float | None] | np.ndarray, statistic=np.mean, *, scale: Scale = "any") -> Interval:
    """The mean or the median of ``values`` with its 95% interval.

    The interval of the mean is Student's on the linear scale. On the logarithmic one it is Cox's with Student's quantile (Olsson):
    of the mean, not of the geometric mean. With more than 50 values it is Student's on every scale. The interval of the median has
    two of the values as its ends, from 6 values on, whatever they are distributed like; with fewer it is Student's, of the values
    or of their logarithms, which are exact where those are normal.

    Args:
        values: independent measurements, one for each seed or round. Those that are not finite, or None, are left out, and the
            result says how many.
        statistic: ``np.mean`` or ``np.median``.
        scale: on which scale the values are normal, if that is known. ``"linear"`` for differences and accuracies; ``"log"`` for
            what is above 0 and spreads in proportion, such as updates or seconds; ``"any"`` makes an interval that holds on
            both. ``"linear"`` is taken wherever values are not all above 0 (for ``"any"`` also: all below).

    Returns:
        ``n`` counts the values behind it. A single value has no ends (NaN), and where none is finite n is 0.

    Raises:
        ValueError: another statistic or scale.

    Example:
        >>> mean = interval([1.0, 2.0, 3.0, 4.0, float("nan")], scale="linear")
        >>> f"{mean:.2f}", mean.excludes(0.0)
        ('2.50 [0.45, 4.55] (4 of 5)', True)

    References:
        Student, *The probable error of a mean*, 1908. Olsson, `Confidence intervals for the mean of a log-normal distribution
        <https://doi.org/10.1080/10691898.2005.11910638>`_, 2005, section 3.4. Conover, *Practical nonparametric statistics*, 1999, section 3.2.
    """
    if statistic not in (np.mean, np.median):
        raise ValueError(f"statistic={statistic!r} must be np.mean or np.median: no interval of another one is known here.")
    if scale not in ("linear", "log", "any"):
        raise ValueError(f"scale={scale!r} must be 'linear', 'log' or 'any'.")
    every = np.array([math.nan if value is None else value for value in values], float).ravel()
    known = every[np.isfinite(every)]
    n, left_out = len(known), len(every) - len(known)
    if n < 2:
        return unknown(left_out) if n == 0 else Interval(float(known[0]), math.nan, math.nan, 1, left_out)
    if scale == "any" and (known < 0).all():
        low, high = (-end for end in ends_of(-known, statistic, scale)[::-1])
    else:
        low, high = ends_of(known, statistic, scale)
    return around(statistic(known), low, high, n, left_out)


@checked
def ratio_of_means(
    numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray, *, nonnegative: bool = False, scale: Scale = "any"
) -> Interval:
    r"""The ratio of two means, measured in pairs, with Fieller's 95% interval.

    Means are taken *before* dividing: a mean of ratios is biased, and unbounded where a denominator is near zero. Fieller's
    set holds every :math:`\rho` for which :math:`\overline{x} - \rho\,\overline{y}` does not differ significantly from
    zero, among them the ratio itself. If the mean of the denominators differs significantly from zero, the set is an
    interval. If not, the set is everything, or everything but an interval; then the ratio is unbounded on both sides, from
    ``-inf`` to ``inf``.

    Args:
        numerators: ``(T,)``.
        denominators: ``(T,)``, of the same measurements; pairs that are not finite are left out, and counted.
        nonnegative: whether both true means, and so the true ratio, are known to be at least 0. Then a mean below 0 counts as 0, the
            ratio is infinite where the denominators' is, and the interval is the part of the set from 0 on; so it may have a
            lower end even without an upper one.
        scale: see :func:`interval`. On the logarithmic scale, which needs pairs above 0, the interval is Cox's of the difference of
            two means' logarithms; ``"any"`` is the hull of both.

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
        Fieller, *Some problems in interval estimation*, 1954. Olsson, 2005: see :func:`interval`.
    """
    every = np.stack([np.ravel(np.asarray(numerators, float)), np.ravel(np.asarray(denominators, float))])
    pairs = every[:, np.isfinite(every).all(0)]
    n = pairs.shape[1]
    left_out = every.shape[1] - n
    if n == 0:
        return unknown(left_out)
    units = np.exp2(np.frexp(np.abs(pairs).max(1))[1] - 1.0)  # powers of two, so that no square below overflows
    pairs = pairs / units[:, None]
    x, y = map(float, pairs.mean(1))
    unit = float(units[0]) / float(units[1])
    if n == 1:
        return Interval(_ratio(x, y, unit, nonnegative), math.nan, math.nan, 1, left_out)
    var_x, covariance, var_y = map(float, (np.cov(pairs) / n).ravel()[[0, 1, 3]])
    ratio = fieller(x, y, var_x, covariance, var_y, n, scale=unit, nonnegative=nonnegative)._replace(left_out=left_out)
    if scale == "linear" or (pairs <= 0).any() or n > FEW:
        return ratio
    low, high = (unit * end for end in log_ratio_ends(pairs))
    if scale == "any":
        low, high = min(low, ratio.low), max(high, ratio.high)
    return around(ratio.value, low, high, n, left_out)


def _ratio(x: float, y: float, scale: float, nonnegative: bool) -> float:
    if nonnegative:
        x, y = max(x, 0.0), max(y, 0.0)
    return scale * (x / y) if y else math.copysign(math.inf, x)


def fieller(
    x: float, y: float, var_x: float, covariance: float, var_y: float, n: float, *, scale: float = 1.0, nonnegative: bool = False
) -> Interval:
    """``scale`` times the ratio x / y of two means, with Fieller's 95% interval as :func:`ratio_of_means` tells it.

    Args:
        x, y: the means.
        var_x, covariance, var_y: of the means, not of single measurements.
        n: the number of measurements, at least 2; for a weighted mean the effective number, which need not be whole. Where the
            variances have d degrees of freedom it is d + 1.
        scale: for means in other units.
        nonnegative: see :func:`ratio_of_means`.

    Example:
        >>> print(f"{fieller(16.0, 1.0, 0.0, 0.0, 0.01, 1000):.1f}")
        16.0 [13.4, 19.9]
        >>> print(f"{fieller(16.0, -0.1, 0.0, 0.0, 0.01, 1000, nonnegative=True):.1f}")
        inf [166.3, inf]
    """
    from scipy import stats

    value = _ratio(x, y, scale, nonnegative)
    quantile = float(stats.t.ppf(0.975, n - 1)) ** 2
    # The set is where a rho^2 - 2 b rho + c <= 0. A mean differs significantly from zero where a (that of y) or c (of x) is above 0.
    a, b, c = y**2 - quantile * var_y, x * y - quantile * covariance, x**2 - quantile * var_x
    n, low, high = round(n), -math.inf, math.inf
    discriminant = b**2 - a * c
    if a > 0 or (a < 0 < discriminant):
        far = b + math.copysign(math.sqrt(max(discriminant, 0.0)), b)  # a sum, not a difference: it loses no digits
        ends = sorted((scale * far / a, scale * c / far if far else 0.0))
        if a > 0:
            low, high = ends
        elif nonnegative and c > 0 and x > 0:  # starts after the excluded part
            low = ends[1]
    if not nonnegative:
        return around(value, low, high, n)
    if a >= 0 >= y:  # below its range: as near as the range allows, a denominator of zero
        return around(value, math.inf if c > 0 and x > 0 else 0.0, math.inf, n)
    return around(value, max(low, 0.0), max(high, 0.0), n)
