r"""The critical batch size from the updates that several batch sizes need to reach a goal.

Far below the critical batch size, a batch of twice the size needs half the updates. Far above it, it needs as many. Between
them, :math:`S(B) = S_\min (1 + B_\text{crit} / B)`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxbatch.intervals import Interval, resampled


class CriticalFit(NamedTuple):
    """The two numbers of :math:`S = S_\\min (1 + B_\\text{crit} / B)`, each with its interval."""

    min_updates: Interval
    critical_batch_size: Interval

    @property
    def min_examples(self) -> float:
        """The fewest examples to the goal, which very small batches need: ``min_updates * critical_batch_size``."""
        return float(self.min_updates) * float(self.critical_batch_size)


def critical_batch_size(updates: Mapping[int, Sequence[float]]) -> CriticalFit:
    r"""Fits the updates S to a goal as :math:`S = S_\min (1 + B_\text{crit} / B)`.

    Least squares of the relative error, which is linear in :math:`S_\min` and :math:`S_\min B_\text{crit}`. Take the updates at
    the best learning rate of each size; at one rate for all sizes the fit measures the rate, not the batch.

    Args:
        updates: for each batch size, the updates to the goal, one for each seed. Leave out sizes at which some run did not
            reach the goal: it is only known that they need more updates.

    Returns:
        Both numbers with 95% bootstrap intervals over the seeds. The critical batch size is infinite if larger batches always
        save updates in proportion. The ends are NaN with one seed.

    Raises:
        ValueError: fewer than 3 batch sizes, a size below 1, or updates that are not finite and above 0.

    Example:
        >>> fit = critical_batch_size({size: [100 * (1 + 32 / size)] * 3 for size in (8, 64, 512)})
        >>> round(float(fit.critical_batch_size), 3), round(float(fit.min_updates), 3)
        (32.0, 100.0)

    References:
        McCandlish et al., `An Empirical Model of Large-Batch Training <https://arxiv.org/abs/1812.06162>`_, 2018: eq. 2.7
        in one variable.
    """
    if len(updates) < 3:
        raise ValueError(f"updates holds {len(updates)} batch sizes, and the fit of two numbers needs at least 3.")
    for size, of_size in updates.items():
        if size < 1 or not len(of_size) or not all(value > 0 and math.isfinite(value) for value in of_size):
            raise ValueError(f"updates[{size}]={list(of_size)} must hold finite numbers above 0, for a size of at least 1.")
    sizes = sorted(updates)

    def solve(drawn):
        rows = [(1 / value, 1 / (value * size)) for size, group in zip(sizes, drawn, strict=True) for value in group]
        (least, examples), *_ = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)
        return least, examples

    def critical(drawn):
        least, examples = solve(drawn)
        return max(examples, 0.0) / least if least > 0 else math.inf

    groups = [updates[size] for size in sizes]
    return CriticalFit(resampled(groups, lambda drawn: solve(drawn)[0]), resampled(groups, critical))
