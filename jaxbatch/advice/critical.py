r"""The critical batch size from the updates that several batch sizes need to reach a goal.

Far below the critical batch size, a batch of twice the size needs half the updates. Far above it, it needs as many. Between
them, :math:`S(B) = S_\min (1 + B_\text{crit} / B)`.

Axes: N runs, of all sizes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxbatch.intervals import Interval, around, fieller
from jaxbatch.kinds import checked

_ROUNDS = 50  # of fitting; it settles in a few
_ROUNDING = 1e-9  # of the updates; a part of the line below it is zero but for rounding


class CriticalFit(NamedTuple):
    """The numbers of :math:`S = S_\\min (1 + B_\\text{crit} / B)`, each with its interval. None is below 0."""

    min_updates: Interval  # of very large batches; 0: larger batches always save updates in proportion
    critical_batch_size: Interval
    examples: Interval  # the fewest to the goal, which very small batches need: min_updates * critical_batch_size

    @property
    def min_examples(self) -> float:
        """The fewest examples to the goal; finite where larger batches always save updates in proportion, too."""
        return float(self.examples)


def crossing(more_than: float, updates: float) -> float:
    """The update at which a run met its goal, as far as looks tell: the middle of those after the look that did not show it.

    A run is seen to have met the goal at the next evaluation only. Where evaluations are far apart, that is late by half the updates between
    two on average, which are more at a small batch size, so that a fit over sizes would take the delay for examples.

    Args:
        more_than: the updates at the last look without the goal; 0 if there was none.
        updates: those at the look that showed it.

    Example:
        >>> crossing(30, 40), crossing(39, 40)
        (35.5, 40.0)
    """
    return (more_than + 1 + updates) / 2


@checked
def critical_batch_size(updates: Mapping[int, Sequence[float] | np.ndarray]) -> CriticalFit:
    r"""Fits the updates S to a goal as :math:`S = S_\min (1 + B_\text{crit} / B)` with neither number below 0.

    A generalised linear model: runs of all sizes spread in proportion to their mean, which is linear in :math:`S_\min` and
    :math:`S_\min B_\text{crit}`. Take the updates at the best learning rate of each size; at one rate for all sizes the fit measures
    the rate, not the batch.

    Args:
        updates: for each batch size, the updates to the goal, one for each seed; where a run was evaluated now and then, the middle between
            the evaluation that showed the goal and the one before. Leave out sizes at which some run did not reach the goal: it is only
            known that they need more updates.

    Returns:
        Three numbers with 95% intervals. The spread is pooled over the sizes, so two seeds of each, or one of many sizes, have
        an interval, too; it is Student's with N - 2 degrees of freedom, and Fieller's for the critical batch size. That is infinite if larger
        batches always save updates in proportion, and its upper end if ``min_updates`` does not differ significantly from zero.
        ``n`` counts all N runs.

    Raises:
        ValueError: fewer than 3 batch sizes, a size below 1, or updates that are not finite and above 0.

    Example:
        >>> fit = critical_batch_size({size: [100 * (1 + 32 / size)] * 3 for size in (8, 64, 512)})
        >>> round(float(fit.critical_batch_size), 3), round(float(fit.min_updates), 3), round(fit.min_examples, 1)
        (32.0, 100.0, 3200.0)
        >>> fit = critical_batch_size({8: [1000.0], 16: [500.0], 32: [250.0]})
        >>> [float(number) for number in fit]
        [0.0, inf, 8000.0]

    References:
        McCandlish et al., `An Empirical Model of Large-Batch Training <https://arxiv.org/abs/1812.06162>`_, 2018: eq. 2.7
        in one variable. McCullagh and Nelder, *Generalized Linear Models*, 1989, chapter 8: constant coefficient of variation.
    """
    if len(updates) < 3:
        raise ValueError(f"updates holds {len(updates)} batch sizes, and the fit of two numbers needs at least 3.")
    for size, of_size in updates.items():
        if size < 1 or not len(of_size) or not all(value > 0 and math.isfinite(value) for value in of_size):
            raise ValueError(f"updates[{size}]={list(of_size)} must hold finite numbers above 0, for a size of at least 1.")
    sizes = np.array([size for size in updates for _ in updates[size]], float)
    values = np.array([value for size in updates for value in updates[size]], float)
    unit, scale = sizes.min(), values.max()  # so that both numbers of the fit are of the order of 1 at most
    columns = np.stack([np.ones(len(sizes)), unit / sizes], 1)
    least, examples = _fit(columns, values / scale)
    (free_least, free_examples), covariance = _free_fit(columns, values / scale, least, examples)
    n = len(values)
    ratio = fieller(free_examples, free_least, covariance[1, 1], covariance[0, 1], covariance[0, 0], n - 1, scale=unit, nonnegative=True)
    of = lambda value, free, variance, one: _above_zero(one * value, one * free, one * math.sqrt(variance), n)
    critical = unit * examples / least if least > 0 else math.inf
    return CriticalFit(
        of(least, free_least, covariance[0, 0], scale),
        around(critical, ratio.low, ratio.high, n),
        of(examples, free_examples, covariance[1, 1], scale * unit),
    )


def _fit(columns: Float[np.ndarray, "N 2"], values: Float[np.ndarray, "N"]) -> tuple[float, float]:
    """The two numbers, neither below 0, at which the score of the model is zero or points below zero: weights follow the line."""
    from scipy.optimize import nnls

    numbers = np.zeros(2)
    line = values
    for _ in range(_ROUNDS):
        before, (numbers, _) = numbers, nnls(columns / line[:, None], values / line)
        line = columns @ numbers
        if np.allclose(numbers, before, rtol=1e-12, atol=0):
            break
    least, examples = (float(number) if number > _ROUNDING else 0.0 for number in numbers)
    return least, examples


def _free_fit(columns, values, least: float, examples: float) -> tuple[Float[np.ndarray, "2"], Float[np.ndarray, "2 2"]]:
    """The numbers without bounds, with the weights of the fit with bounds, and their covariance."""
    line = columns @ [least, examples]
    rows, targets = columns / line[:, None], values / line
    numbers, *_ = np.linalg.lstsq(rows, targets, rcond=None)
    numbers = np.where(np.abs(numbers) > _ROUNDING, numbers, 0.0)
    rest = targets - rows @ numbers
    variance = float(rest @ rest) / (len(values) - 2)
    return numbers, np.linalg.inv(rows.T @ rows) * (variance if variance > _ROUNDING**2 else 0.0)


def _above_zero(value: float, free: float, error: float, n: int) -> Interval:
    from scipy import stats

    reach = float(stats.t.ppf(0.975, n - 2)) * error
    return around(value, max(free - reach, 0.0), max(free + reach, 0.0), n)
