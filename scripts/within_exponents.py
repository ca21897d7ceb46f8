"""By which powers of the length the best batch size and the best rate of a sweep change, beside the published ones.

A sweep was made at an eighth of the length and at the whole. If the best size is b at the one and c at the other, it grows as the
length to the power log(c / b) / log 8. An interval holds 95% of draws, in which the mean of every setting is moved by as much as the
mean of its seeds may be off by chance.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxbatch.intervals import Interval, around

DRAWS = 2000
NEAR = 12  # settings of a length, from which the noise is taken: those that end best
PUBLISHED = {
    "size": {"Step Law": 0.571, "Power Lines": 0.383},
    "rate": {"Step Law": 0.307},
    "rate of a size": {"Bjorck et al.": -0.32},
}


class Exponents(NamedTuple):
    """Powers of the length."""

    size: Interval  # of the best size
    rate: Interval  # of the rate of the best setting
    rate_of_size: Interval  # of the best rate of a size, as a mean over the sizes that learn at both lengths


class Ends(NamedTuple):
    """What runs of one length end with; settings of which a run diverged are infinitely bad."""

    sizes: np.ndarray
    rates: np.ndarray
    means: np.ndarray  # sizes by rates
    error: float  # the standard error of such a mean

    def draw(self, random: np.random.Generator) -> np.ndarray:
        """The means, moved by chance."""
        return self.means + self.error * random.standard_normal((DRAWS, *self.means.shape))


def ends_of(rows: Iterable[dict], part: float, sign: float) -> Ends:
    """The ends of one length.

    Args:
        rows: of a sweep.
        part: the length, in whole ones.
        sign: -1 for a metric that shall rise.
    """
    values: dict[tuple[int, float], list] = {}
    for row in rows:
        if row["part"] == part:
            values.setdefault((row["batch_size"], row["learning_rate"]), []).append(row["value"])
    kept = {cell: sign * np.array(of, float) for cell, of in values.items() if None not in of}
    sizes, rates = (sorted({cell[axis] for cell in values}) for axis in (0, 1))
    means = np.array([[kept[size, rate].mean() if (size, rate) in kept else math.inf for rate in rates] for size in sizes])
    best = sorted(kept.values(), key=np.mean)[:NEAR]
    error = math.sqrt(np.mean([of.var(ddof=1) for of in best]) / len(best[0]))
    return Ends(np.array(sizes, float), np.array(rates), means, error)


def exponents(rows: Iterable[dict], short: float, sign: float) -> Exponents:
    """The powers from the sweeps of two lengths.

    Args:
        rows: of a sweep, with ``part``, ``batch_size``, ``learning_rate`` and ``value``, which is None where a run diverged.
        short: the shorter length, in whole ones.
        sign: -1 for a metric that shall rise.

    Example:
        >>> cost = lambda part, size, rate: math.log(size / 8 / part) ** 2 + math.log(rate / 0.1 * part) ** 2 / 9
        >>> grid = [(part, size, rate) for part in (0.25, 1) for size in (1, 2, 4, 8, 16) for rate in (0.1, 0.2, 0.4, 0.8)]
        >>> rows = [dict(zip(("part", "batch_size", "learning_rate"), at), value=cost(*at)) for at in grid for _ in range(3)]
        >>> [round(of.value, 2) for of in exponents(rows, 0.25, 1.0)]
        [1.0, -1.0, -1.0]
    """
    rows, random = list(rows), np.random.default_rng(0)
    lengths = [ends_of(rows, part, sign) for part in (short, 1.0)]
    sizes, rates, by_size = [], [], []
    for ends in lengths:
        for drawn in (ends.means[None], ends.draw(random)):
            best = drawn.reshape(len(drawn), -1).argmin(1)
            sizes.append(np.log(ends.sizes[best // len(ends.rates)]))
            rates.append(np.log(ends.rates[best % len(ends.rates)]))
            by_size.append(np.log(ends.rates[drawn.argmin(2)]))
    most = 4 * math.exp(sizes[0][0])
    common = [size for size in lengths[0].sizes if size in lengths[1].sizes and size <= most]
    picked = [np.isin(ends.sizes, common) for ends in lengths]
    rates_of = [by_size[number][:, picked[number // 2]].mean(1) for number in range(4)]
    return Exponents(*(_interval(of, short) for of in (sizes, rates, rates_of)))


def _interval(of: list[np.ndarray], short: float) -> Interval:
    value, drawn = float((of[2] - of[0])[0]), of[3] - of[1]
    low, high = np.quantile(drawn, [0.025, 0.975])
    scale = -math.log(short)
    return around(value / scale, min(float(low), value) / scale, max(float(high), value) / scale, DRAWS)


def print_exponents(exponents: dict[str, Exponents]) -> None:
    """A table in Markdown, and how many intervals hold each published power.

    Args:
        exponents: by case.
    """
    print("\n| case | best size grows as length to the power | rate of the best setting | best rate of a size |\n|---|---|---|---|")
    for case, of in exponents.items():
        print(f"| {case} | " + " | ".join(f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]" for one in of) + " |")
    print()
    for (what, published), field in zip(PUBLISHED.items(), Exponents._fields, strict=True):
        intervals = [getattr(of, field) for of in exponents.values()]
        for name, power in published.items():
            inside = sum(one.low <= power <= one.high for one in intervals)
            print(f"power of the {what}: {power} ({name}) lies in the interval of {inside} of {len(intervals)} cases")
        print(f"power of the {what}: {np.median([one.value for one in intervals]):.2f} (median of the cases)")
