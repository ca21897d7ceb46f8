r"""The time of an update by batch size as a line, fitted to measured times or to bounds for an accelerator that is not here.

A device that is idle between updates, or that a small batch does not fill, takes a time for each update that does not depend on
the batch; beyond it, each example costs as much as the next: :math:`T(B) = \alpha + \beta B`. From the *knee*
:math:`B = \alpha / \beta` on, more than half of the time goes to examples, and a larger batch saves less and less time per example.

Axes: B examples in a batch, R rounds.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxbatch.advice.memory import make_measure
from jaxbatch.advice.time_bound import make_step_bound, work_by_batch_size
from jaxbatch.gradients.updates import Optimizer
from jaxbatch.interval_ends import median_ends
from jaxbatch.intervals import Interval, around, interval, unknown
from jaxbatch.kinds import checked
from jaxbatch.machine.targets import Target, find_target
from jaxbatch.training.tasks import Task

_ROUNDING = 1e-9  # of the longest time; a part of the line below it is zero but for rounding


class Throughput(NamedTuple):
    r"""The time of an update as a line :math:`T(B) = \alpha + \beta B`, and the times that the line was fitted to."""

    seconds_per_update: Interval  # alpha
    seconds_per_example: Interval  # beta
    knee: Interval  # alpha / beta, in examples; 0: an update has no fixed time; inf: examples take no time that shows
    seconds: dict[int, Interval]  # median seconds of an update, by batch size
    error: float  # the largest relative misfit of the line at the measured sizes; 0 with two sizes, whatever the truth
    bound: bool = False  # whether ``seconds`` are lower bounds, not measurements; the line through them is not a bound
    ready_seconds: dict[int, float] | None = None  # of an update whose examples are loaded already, where ``seconds`` count loading

    def seconds_at(self, batch_size: float) -> float:
        """Seconds of an update with any batch size, between the *measured* times on straight lines.

        Where the line does not hold (see ``error``), the measured times are nearer to the truth. Outside the measured sizes the
        nearest two are extended. There, an update on more examples takes at least as long, and at most in proportion longer.

        Raises:
            ValueError: ``batch_size`` is not above 0.

        Example:
            >>> found = fit_throughput({10: [2.0], 20: [3.0], 40: [4.0]})
            >>> [round(found.seconds_at(size), 3) for size in (5, 15, 30, 80)]
            [1.5, 2.5, 3.5, 6.0]
        """
        if not batch_size > 0:
            raise ValueError(f"batch_size={batch_size} must be above 0.")
        sizes = sorted(self.seconds)
        times = [self.seconds[size].value for size in sizes]
        if sizes[0] <= batch_size <= sizes[-1]:
            return float(np.interp(batch_size, sizes, times))
        here, other = (0, 1) if batch_size < sizes[0] else (-1, -2)
        slope = (times[other] - times[here]) / (sizes[other] - sizes[here])
        low, high = sorted((times[here], times[here] * batch_size / sizes[here]))
        return min(max(times[here] + slope * (batch_size - sizes[here]), low), high)


NOT_TIMED = Throughput(unknown(), unknown(), unknown(), {}, math.nan)  # where there was no time to time anything


@checked
def fit_throughput(rounds: Mapping[int, Sequence[float] | np.ndarray]) -> Throughput:
    r"""Fits measured times of an update as :math:`T(B) = \alpha + \beta B` with :math:`\alpha, \beta \ge 0`.

    Least squares of the relative error of the line at each size's median time. It takes medians, because sometimes something
    else runs on the same machine.

    Args:
        rounds: for each batch size, seconds per update ``(R,)``. The times at the same place were measured in the same round, so
            a line of its own is fitted to each round: a machine that is slow for a round is slow for all sizes.

    Returns:
        The line with 95% intervals of the median over the rounds' own lines, see :func:`jaxbatch.interval`; they assume nothing of
        how times are distributed from 6 rounds on. With fewer rounds a knee that is infinite in one of them is not bounded. With one
        round the ends are NaN.

    Raises:
        ValueError: fewer than 2 batch sizes, a size below 1, sizes with different numbers of rounds, or times that are not finite
            and above 0.

    Example:
        >>> found = fit_throughput({size: [0.002 + 0.0001 * size] * 3 for size in (1, 8, 64)})
        >>> round(found.knee.value, 3), round(found.seconds_per_example.value, 6), found.error < 1e-9
        (20.0, 0.0001, True)

    References:
        Qiao et al., `Pollux: Co-adaptive Cluster Scheduling for Goodput-Optimized Deep Learning
        <https://arxiv.org/abs/2008.12260>`_, 2021, section 3.2: the same line for the time of a gradient, :math:`\alpha_\text{grad}
        + \beta_\text{grad} m`.
    """
    if len(rounds) < 2:
        raise ValueError(f"rounds holds {len(rounds)} batch sizes, and a line needs at least 2.")
    first = len(next(iter(rounds.values())))
    for size, times in rounds.items():
        if size < 1 or not len(times) or not all(value > 0 and math.isfinite(value) for value in times):
            raise ValueError(f"rounds[{size}]={list(times)} must hold finite seconds above 0, for a size of at least 1.")
        if len(times) != first:
            raise ValueError(f"rounds[{size}] holds {len(times)} times, but another size has {first}: every round must time every size.")
    sizes = sorted(rounds)
    table = np.stack([np.asarray(rounds[size], float) for size in sizes], 1)  # (R, sizes)
    medians = np.median(table, 0)
    values = line_through(sizes, medians)
    alpha, beta, knee = (_median_of_rounds(value, of_rounds) for value, of_rounds in zip(values, line_through(sizes, table), strict=True))
    error = float(np.abs((values[0] + values[1] * np.array(sizes)) / medians - 1).max())
    return Throughput(alpha, beta, knee, {size: interval(rounds[size], np.median, scale="log") for size in sizes}, error)


def _median_of_rounds(value: float, of_rounds: Float[np.ndarray, "R"]) -> Interval:
    """The interval of a part of the line from that part of each round's own line; a part is at least 0, and may be infinite."""
    n = len(of_rounds)
    if n == 1:
        low = high = math.nan
    elif (of_rounds == of_rounds[0]).all():
        low = high = float(of_rounds[0])
    elif n < 6 and np.isfinite(of_rounds).all():
        low, high = interval(of_rounds, np.median)[1:3]
    else:
        low, high = median_ends(of_rounds)
    return around(float(value), max(low, 0.0), high, n)


@checked
def predicted_throughput(task: Task, optimizer: Optimizer, batch_sizes: Iterable[int], target: str | Target) -> Throughput:
    """Lower bounds on the time of an update on an accelerator that need not be here, from its data sheet.

    An update takes at least as long as its operations at the device's peak, and as its bytes at full bandwidth
    (:mod:`jaxbatch.advice.time_bound`). Real updates take longer, small ones often many times as long: nothing here knows what it
    costs to start one. So the knee of the bounds is not that of the device. It says where the bytes that every update moves, those of
    parameters and optimizer state, weigh as much as the examples.

    Args:
        task: see :class:`jaxbatch.Task`.
        optimizer: any optax optimizer.
        batch_sizes: at least 2 sizes B, whether or not they fit in the device's memory (:func:`jaxbatch.max_batch_size`).
        target: a name of :data:`jaxbatch.TARGETS`, or a :class:`jaxbatch.Target`.

    Returns:
        ``seconds`` whose intervals have no ends, and ``bound=True``.

    Raises:
        ValueError: the target is unknown, its figures are not known, or its compiler is not installed.
    """
    sizes, device = check_sizes(batch_sizes), find_target(target)
    if not device.peak or not device.bandwidth:
        raise ValueError(f"target={device.name!r}: its peak and bandwidth are not known, so there is no bound. measure_throughput times this device.")
    memory = make_measure(task, optimizer=optimizer, target=device, step_alone=True)
    bound = make_step_bound(task, device, work_by_batch_size(task, optimizer))
    return fit_throughput({size: [bound(memory(size)).seconds] for size in sizes})._replace(bound=True)


def check_sizes(batch_sizes: Iterable[int], num_examples: int | None = None) -> list[int]:
    """At least two batch sizes, in ascending order, none above the data set.

    Example:
        >>> check_sizes([64, 8, 8], num_examples=100)
        [8, 64]
    """
    listed = list(batch_sizes) if isinstance(batch_sizes, Iterable) and not isinstance(batch_sizes, str) else [None]
    if not all(isinstance(size, int | np.integer) and not isinstance(size, bool) for size in listed):
        raise ValueError(f"batch_sizes={batch_sizes!r} must be a list of whole numbers, as [16, 64, 256].")
    sizes = sorted({int(size) for size in listed})
    if len(sizes) < 2 or sizes[0] < 1:
        raise ValueError(f"batch_sizes={sizes} must hold at least 2 different sizes, each at least 1.")
    if num_examples is not None and sizes[-1] > num_examples:
        raise ValueError(f"batch_sizes={sizes}: {sizes[-1]} is larger than the data set (num_examples={num_examples}). Leave it out.")
    return sizes


def line_through(sizes: Sequence[int], seconds: np.ndarray) -> np.ndarray:
    """``[alpha, beta, alpha / beta]`` of least squared relative error, neither below 0, for times ``(..., sizes)``: ``(3, ...)``."""
    size = np.array(sizes) / sizes[-1]
    one, two = 1 / seconds, size / seconds  # the columns; the line is to be near 1 times them
    a, b, c, d, e = (one**2).sum(-1), (one * two).sum(-1), (two**2).sum(-1), one.sum(-1), two.sum(-1)
    alpha, slope = (c * d - b * e) / (a * c - b**2), (a * e - b * d) / (a * c - b**2)
    least = _ROUNDING * seconds.max(-1)
    flat, steep = slope < least, alpha < least  # never both, because the times are above 0; then the other part is fitted alone
    alpha, slope = np.where(steep, 0, np.where(flat, d / a, alpha)), np.where(flat, 0, np.where(steep, e / c, slope))
    with np.errstate(divide="ignore"):
        return np.stack([alpha, slope / sizes[-1], sizes[-1] * alpha / slope])
