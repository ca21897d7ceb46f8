"""Ratios, products and slopes from independent groups of measurements above 0, with their intervals."""

import math
from collections.abc import Sequence

import numpy as np

from jaxbatch.interval_ends import log_combination_ends
from jaxbatch.intervals import Interval, around


def ratio_of_separate_means(numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray) -> Interval:
    """The ratio of the means of two independent groups of measurements above 0, with its 95% interval.

    Args:
        numerators, denominators: at least one measurement each, finite and above 0.

    Returns:
        The ratio; ``n`` is the size of the smaller group. The interval is that of :func:`log_combination`.

    Example:
        >>> print(f"{ratio_of_separate_means([20.0, 22.0, 21.0], [10.0, 11.0, 9.0]):.2f}")
        2.10 [1.70, 2.59]
    """
    ratio = log_combination([numerators, denominators], [1.0, -1.0])
    with np.errstate(over="ignore"):
        value, low, high = (float(np.exp(part)) for part in ratio[:3])
    return around(value, low, high, ratio.n)


def log_combination(groups: Sequence[Sequence[float] | np.ndarray], weights: Sequence[float] | np.ndarray) -> Interval:
    """The sum of weights times the logarithms of the means of independent groups, with its 95% interval; a slope is such a sum.

    Args:
        groups: measurements above 0, such as those of the seeds at each batch size.
        weights: one a group.

    Returns:
        ``n`` is the size of the smallest group; with a single measurement there the ends are NaN. How the interval is made:
        :func:`jaxbatch.interval_ends.log_combination_ends`.

    Raises:
        ValueError: a group is empty, holds what is not finite, or has a mean that is not above 0.

    Example:
        >>> print(f"{log_combination([[1.0, 1.1, 0.9], [2.0, 2.2, 1.8]], [-1.0, 1.0]):.2f}")  # of ratio 2
        0.69 [0.46, 0.92]
    """
    arrays = [np.asarray(group, float).ravel() for group in groups]
    for position, group in enumerate(arrays):
        if not len(group) or not np.isfinite(group).all() or not group.mean() > 0:
            raise ValueError(f"groups[{position}]={group.tolist()} must hold finite numbers, at least one, whose mean is above 0.")
    weights = np.asarray(weights, float)
    value, n = float(weights @ [np.log(group.mean()) for group in arrays]), min(map(len, arrays))
    low, high = log_combination_ends(arrays, weights) if n > 1 else (math.nan, math.nan)
    return around(value, low, high, n)


def product(one: Interval, other: Interval) -> Interval:
    """The product of two independent estimates above 0, from their intervals: squared distances to the ends add up, on a logarithmic scale.

    Args:
        one, other: from at least 2 measurements each; a lower end below 0 counts as 0.

    Returns:
        ``n`` and ``left_out`` are those of ``one``. An end that one of them lacks is NaN.

    Example:
        >>> f"{product(Interval(10.0, 5.0, 20.0, 3), Interval(2.0, 1.0, 4.0, 8)):.1f}"
        '20.0 [7.5, 53.3]'

    References:
        Zou and Donner, *Construction of confidence limits about effect measures: a general approach*, 2008.
    """
    value, n = one.value * other.value, one.n
    if not (one.value > 0 and other.value > 0):
        return one.times(other.value)
    with np.errstate(divide="ignore", over="ignore"):
        down, up = (math.hypot(*(np.log(part[end] / part.value) if part[end] > 0 or end == 2 else np.inf for part in (one, other))) for end in (1, 2))
        low, high = float(value * np.exp(-down)), float(value * np.exp(up))
    missing = any(math.isnan(end) for part in (one, other) for end in part[1:3])
    return around(value, *((math.nan, math.nan) if missing else (low, high)), n, one.left_out)
