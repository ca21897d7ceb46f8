"""Where the 95% intervals of means, medians and ratios end, as numbers; :mod:`jaxbatch.intervals` makes intervals of them.

Axes: T measurements.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

# On which scale measurements are normal. linear: differences, accuracies. log: what is above 0 and spreads in proportion, as updates,
# seconds or losses. any: not known, so the interval is the hull of those of both scales.
Scale = Literal["linear", "log", "any"]

FEW = 50  # with more measurements their mean is nearly normal whatever they are, and no scale has to be assumed


def ends_of(values: np.ndarray, statistic, scale: Scale) -> tuple[float, float]:
    """The ends of the mean or median of at least 2 values on a scale, or the hull over both.

    Example:
        >>> [round(end, 2) for end in ends_of(np.array([1.0, 2.0, 3.0]), np.mean, "linear")]
        [-0.48, 4.48]
    """
    from scipy import stats  # costs half a second; --help should not pay it

    n, unit = len(values), values.mean()
    quantile = float(stats.t.ppf(0.975, n - 1))
    if statistic is np.median and n >= 6:
        return median_ends(values)
    reach = quantile * values.std(ddof=1) / math.sqrt(n)
    linear = float(unit - reach), float(unit + reach)
    if scale == "linear" or (values <= 0).any() or (statistic is np.mean and n > FEW):
        return linear
    if statistic is np.mean:
        centre, variance = log_mean(values)
    else:
        logs = np.log(values)
        centre, variance = logs.mean(), logs.var(ddof=1) / n
    centre -= np.log(unit)  # so that equal values have equal ends
    with np.errstate(over="ignore"):
        low, high = (float(unit * np.exp(centre + sign * quantile * np.sqrt(variance))) for sign in (-1, 1))
    return (low, high) if scale == "log" else (min(low, linear[0]), max(high, linear[1]))


def median_ends(values: np.ndarray) -> tuple[float, float]:
    """The ends of the 95% interval of a median, two of at least 6 values, of which some may be infinite.

    Example:
        >>> median_ends(np.array([1.0, 2.0, 3.0, 4.0, 5.0, np.inf])), median_ends(np.arange(5.0))
        ((1.0, inf), (-inf, inf))
    """
    from scipy import stats

    n = len(values)
    position = int(stats.binom.ppf(0.025, n, 0.5))  # 0: even the smallest value is above the median too often
    low, high = np.sort(values)[[position - 1, n - position]] if position else (-math.inf, math.inf)
    return float(low), float(high)


def log_mean(values: np.ndarray) -> tuple[float, float]:
    """The logarithm of the mean, above 0, of at least 2 values, estimated from their logarithms, and the variance of the estimate.

    With more than 50 values, or one that is not above 0, it is the logarithm of their mean, whatever they are distributed like.

    Example:
        >>> [round(part, 4) for part in log_mean(np.exp([0.0, 0.2, 0.4]))]
        [0.22, 0.0137]

    References:
        Olsson, *Confidence intervals for the mean of a log-normal distribution*, 2005, section 3.3: Cox's method.
    """
    n, unit = len(values), values.mean()
    if n > FEW or (values <= 0).any():
        return float(np.log(unit)), float((values / unit).var(ddof=1) / n)
    logs = np.log(values) - np.log(unit)  # a quotient of very unequal numbers may be 0
    variance = logs.var(ddof=1)
    return float(np.log(unit) + logs.mean() + variance / 2), float(variance / n + variance**2 / (2 * (n - 1)))


def log_ratio_ends(pairs: np.ndarray) -> tuple[float, float]:
    """The ends of the ratio of two means, from pairs above 0: of the difference of their logarithms as :func:`log_mean` has them.

    Example:
        >>> log_ratio_ends(np.array([[2.0, 4.0, 6.0], [1.0, 2.0, 3.0]]))
        (2.0, 2.0)
    """
    from scipy import stats

    n, means = pairs.shape[1], pairs.mean(1, keepdims=True)
    logs = np.log(pairs) - np.log(means)
    (var_x, covariance), (_, var_y) = np.cov(logs)
    centre = logs[0].mean() - logs[1].mean() + (var_x - var_y) / 2
    variance = (var_x - 2 * covariance + var_y) / n + (var_x**2 - 2 * covariance**2 + var_y**2) / (2 * (n - 1))
    reach = stats.t.ppf(0.975, n - 1) * math.sqrt(max(variance, 0.0))
    with np.errstate(over="ignore"):
        low, high = np.exp([centre - reach, centre + reach]) * float(means[0, 0] / means[1, 0])
    return float(low), float(high)


def log_combination_ends(groups: Sequence[np.ndarray], weights: np.ndarray) -> tuple[float, float]:
    """The ends of the sum of weights times the logarithms of the means of independent groups of at least 2 values above 0 each.

    Student's with the degrees of freedom of Welch and Satterthwaite, from the variances of :func:`log_mean`.

    Example:
        >>> groups = [np.array([1.0, 1.1, 0.9]), np.array([2.0, 2.2, 1.8])]
        >>> [round(end, 2) for end in log_combination_ends(groups, np.array([-1.0, 1.0]))]
        [0.46, 0.92]

    References:
        Welch, *The generalization of Student's problem when several different population variances are involved*, 1947.
    """
    from scipy import stats

    centres, variances = map(np.array, zip(*(log_mean(group) for group in groups), strict=True))
    parts, centre = weights**2 * variances, float(weights @ centres)
    total = float(parts.sum())
    if total == 0:
        return centre, centre
    freedom = total**2 / sum(part**2 / (len(group) - 1) for part, group in zip(parts, groups, strict=True))
    reach = float(stats.t.ppf(0.975, freedom)) * math.sqrt(total)
    return centre - reach, centre + reach
