r"""The time of an update by batch size as the runs of a search show it, each at the size that the search chose.

A size that was run n times has the geometric mean of its runs' times, with the interval of Student's t. How much the times of one size
differ is pooled over all sizes, and begins with a tenth, as if that had been seen in three differences: a size is often run but once.
The line :math:`T(B) = \alpha + \beta B` goes through these means.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from jaxbatch.advice.throughput import Throughput, line_through
from jaxbatch.intervals import Interval, around

_DRAWS = 1000
_PRIOR_RUNS, _PRIOR_SPREAD = 3, 0.1  # what is assumed of the spread of times before any is seen, and its weight


def throughput_of_runs(seconds: Mapping[int, Sequence[float]], batch_sizes: Sequence[int]) -> Throughput:
    """Fits the times of an update that runs took.

    Args:
        seconds: by batch size, seconds of an update, one of each run; those that are not finite or not above 0 are left out.
        batch_sizes: all that are considered. While one alone was run, the time of the others is only bounded: between the time of that
            one and in proportion to the size. The middle of both is taken, and the interval holds both.

    Raises:
        ValueError: no time is known.

    Example:
        >>> throughput = throughput_of_runs({8: [0.010, 0.011], 64: [0.024]}, [8, 16, 64])
        >>> f"{throughput.seconds_at(64):.3f}", f"{throughput.seconds_at(8):.4f}", 30 < throughput.knee.value < 60
        ('0.024', '0.0105', True)
        >>> one = throughput_of_runs({16: [0.02]}, [8, 16, 32])
        >>> {size: f"{times.value:.3f} [{times.low:.3f}, {times.high:.3f}]" for size, times in one.seconds.items()}
        {8: '0.015 [0.010, 0.020]', 16: '0.020 [0.015, 0.027]', 32: '0.030 [0.020, 0.040]'}
    """
    logs = {size: np.log([one for one in seconds[size] if one > 0 and math.isfinite(one)]) for size in sorted(seconds)}
    logs = {size: values for size, values in logs.items() if len(values)}
    if not logs:
        raise ValueError("seconds holds no time of an update: give looks their seconds, or leave them None, and they are counted.")
    means, counts = {size: float(np.exp(values.mean())) for size, values in logs.items()}, {size: len(values) for size, values in logs.items()}
    freedom = _PRIOR_RUNS + sum(counts.values()) - len(counts)
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in logs.values())
    pooled = math.sqrt((_PRIOR_RUNS * _PRIOR_SPREAD**2 + squares) / freedom)
    reach = float(stats.t.ppf(0.975, freedom)) * pooled
    times = {size: _around(means[size], math.exp(reach / math.sqrt(counts[size])), counts[size]) for size in means}
    if len(means) == 1:
        return _bounded(*next(iter(times.items())), batch_sizes)
    sizes = list(means)
    medians, random = np.array(list(means.values())), np.random.default_rng(0)
    off = pooled / np.sqrt(list(counts.values())) * random.standard_t(freedom, (_DRAWS, len(sizes)))
    line, drawn = line_through(sizes, medians), line_through(sizes, medians * np.exp(np.clip(off, -20, 20)))
    ends = np.quantile(drawn, [0.025, 0.975], axis=1, method="closest_observation").T
    parts = [around(float(part), min(float(low), float(part)), max(float(high), float(part)), len(sizes)) for part, (low, high) in zip(line, ends)]
    alpha, beta, knee = parts
    return Throughput(alpha, beta, knee, times, float(np.abs((line[0] + line[1] * np.array(sizes)) / medians - 1).max()))


def _around(mean: float, reach: float, count: int) -> Interval:
    return around(mean, mean / reach, mean * reach, count)


def _bounded(size: int, seconds: Interval, batch_sizes: Sequence[int]) -> Throughput:
    """The times of all sizes where one was run: an update on more examples takes at least as long, and at most in proportion longer."""

    def between(other: int) -> Interval:
        if other == size:
            return seconds
        low, high = sorted((seconds.value, seconds.value * other / size))
        return around((low + high) / 2, low, high, 0)

    half = seconds.value / 2
    alpha, beta = around(half, 0.0, seconds.value, 1), around(half / size, 0.0, seconds.value / size, 1)
    times = {other: between(other) for other in sorted({*batch_sizes, size})}
    return Throughput(alpha, beta, around(float(size), 0.0, math.inf, 1), times, 0.0)
