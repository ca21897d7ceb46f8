"""How often do the 95% intervals hold a truth that is known? Every kind of interval of the library and of the studies' reports.

    python scripts/coverage.py                      about 10 minutes: the table of docs/intervals.md, 1,000 draws a cell
    python scripts/coverage.py --draws 200          about a minute

A cell is the share of draws whose interval holds the truth, on data that are normal or log-normal. The table needs no device.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

import jaxbatch as jb
from experiments.advise.verify import regret
from experiments.gradient_smoothness.report import error_slope
from experiments.large_batch.records import standing
from jaxbatch.advice.branches import critical_of_branches
from jaxbatch.advice.learning_rates import RateResult
from jaxbatch.gradients.part_norms import BatchNoise, NoiseMonitor, WithNoise
from jaxbatch.interval_ends import Scale
from jaxbatch.intervals import Interval
from jaxbatch.separate_groups import log_combination, product, ratio_of_separate_means
from jaxbatch.training.monitor import NoiseTrack

Family = Literal["normal", "log-normal"]
COUNTS = (2, 3, 5, 10)  # seeds, rounds or steps
SIZES = np.array([8, 32, 128, 512])


class Case(NamedTuple):
    """A kind of interval: what it is, who shows it, and the intervals of one draw with their truths."""

    name: str
    callers: str
    spread: float  # of the measurements, relative to their mean
    draw: Callable[[np.random.Generator, Family, float, int], Sequence[tuple[Interval, float]]]
    counts: tuple[int, ...] = COUNTS
    families: tuple[str, str] = ("normal", "log-normal")  # what the table calls them


def draw_values(random: np.random.Generator, family: Family, spread: float, shape, mean=1.0) -> np.ndarray:
    """Measurements with a mean and a spread relative to it; log-normal ones have the spread as that of their logarithms."""
    noise = random.normal(size=shape)
    return mean * (1 + spread * noise if family == "normal" else np.exp(spread * noise - spread**2 / 2))


def of_mean(scale: Scale):
    """The mean on a scale."""
    return lambda random, family, spread, n: [(jb.interval(draw_values(random, family, spread, n), scale=scale), 1.0)]


def of_median(scale: Scale):
    """The median on a scale."""

    def draw(random, family, spread, n):
        values = draw_values(random, family, spread, n)
        return [(jb.interval(values, np.median, scale=scale), 1.0 if family == "normal" else math.exp(-(spread**2) / 2))]

    return draw


def of_difference(random, family, spread, n):
    """The mean of differences in pairs, whose truth is zero."""
    one, other = draw_values(random, family, spread, (2, n))
    return [(jb.interval(one - other, scale="linear"), 0.0)]


def of_pairs(random, family, spread, n):
    """The ratio of means of pairs that share half of their variance, the denominators with a third of the spread."""
    shared, one, other = random.normal(size=(3, n))
    x, y = ((shared + own) / math.sqrt(2) * part for own, part in ((one, spread), (other, spread / 3)))
    values = (1 + x, 1 + y) if family == "normal" else (np.exp(x - spread**2 / 2), np.exp(y - spread**2 / 18))
    return [(jb.ratio_of_means(2 * values[0], values[1]), 2.0)]


def of_small_denominators(random, family, spread, n):
    """The ratio of means where denominators cannot be told from zero."""
    y = draw_values(random, family, spread, n) - 0.8
    return [(jb.ratio_of_means(0.6 + 0.3 * random.normal(size=n), y, nonnegative=True, scale="linear"), 3.0)]


def of_groups(random, family, spread, n):
    """The ratio of the means of two groups, and a regret."""
    x, y = draw_values(random, family, spread, n, 2.0), draw_values(random, family, spread / 3, n)
    rows = [[{"updates": value, "batch_size": 1} for value in group] for group in (x, y)]
    return [(ratio_of_separate_means(x, y), 2.0), (regret(rows[0], rows[1], {1: 0.5}), 2.0)]


def of_slope(random, family, spread, n):
    """The slope of log means by log size, from groups and from the records of the smoothness study."""
    groups = [draw_values(random, family, spread, n, 10 / size) for size in SIZES]
    logs = np.log(SIZES) - np.log(SIZES).mean()
    row = {"kind": "error", "place": "start"}
    records = [row | {"batch_size": size, "error": group.tolist()} for size, group in zip(SIZES.tolist(), groups, strict=True)]
    config = argparse.Namespace(batch_sizes=SIZES.tolist())
    return [(log_combination(groups, logs / (logs**2).sum()), -1.0), (error_slope(config, records, "start"), -1.0)]


def of_product(random, family, spread, n):
    """Updates times the median time of one."""
    updates = jb.interval(draw_values(random, family, spread, n, 300.0), scale="log")
    return [(product(updates, jb.interval(0.01 * np.exp(0.1 * random.normal(size=10)), np.median, scale="log")), 3.0)]


def of_standing(random, family, spread, n):
    """An arm's gain, gap and the part of the gap that it closes, from records of the huge-batch study."""
    shared = draw_values(random, family, spread, n)
    ends = {arm: 0.01 * shared + mean + 0.002 * random.normal(size=n) for arm, mean in (("small", 0.9), ("plain", 0.8), ("arm", 0.86))}
    row = {"kind": "run"}
    records = [row | {"arm": arm, "seed": n, "test_accuracy": value} for arm, values in ends.items() for n, value in enumerate(values.tolist())]
    outcome = standing(argparse.Namespace(metric="accuracy>"), records, "arm")
    return [(outcome.gain, 0.06), (outcome.gap, -0.04), (outcome.closed, 0.6)]


def of_critical(random, family, spread, n):
    """The three numbers of the fit of updates by batch size."""
    updates = {int(size): np.maximum(draw_values(random, family, spread, n, 200 * (1 + 64 / size)), 1.0) for size in SIZES}
    return list(zip(jb.critical_batch_size(updates), (200.0, 64.0, 12800.0), strict=True))


def of_exponent(random, family, spread, n):
    """The exponent of the best rate, whose logarithm the updates follow as a parabola."""
    truth, offset = random.uniform(0.3, 1), random.uniform()
    grid = math.log(2) * (np.arange(15) - 3 + offset)
    results = {}
    for size in SIZES.tolist():
        means = 150 * np.exp(0.2 * (grid - truth * math.log(size / SIZES[0])) ** 2)
        updates = np.maximum(draw_values(random, family, spread, (15, n), means[:, None]), 1.0)
        results[size] = RateResult(jb.Goal("accuracy", 0.9), tuple(np.exp(grid)), updates, np.ones((15, n)), np.zeros((15, n), bool))
    return [(jb.rate_exponent(results, resamples=500), truth)]


def of_branches(random, family, spread, n):
    """The critical size of branches; the truth counts as held up to below the first size that fails."""
    shared = draw_values(random, family, spread, n)
    losses = {8: 0.0, 16: 0.0, 32: 0.04, 64: 0.15, 128: 0.4}
    ends = {size: tuple(shared + loss + 0.3 * (draw_values(random, family, spread, n) - 1)) for size, loss in losses.items()}
    estimate = critical_of_branches(ends, 0.05)
    return [(estimate._replace(high=estimate.high * (1 - 1e-9)), 32.0)]


def of_throughput(random, family, spread, n):
    """The line of times by batch size, and the time of one size; a round slows all sizes."""
    machine = np.exp(spread * np.abs(random.normal(size=n)) if family == "log-normal" else 0.3 * spread * random.normal(size=n))
    rounds = {int(size): (3e-4 + 2e-6 * size) * machine * np.exp(0.03 * random.normal(size=n)) for size in SIZES}
    line, slow = jb.fit_throughput(rounds), math.exp(0.6744898 * spread) if family == "log-normal" else 1.0
    truths = (3e-4 * slow, 2e-6 * slow, 150.0, (3e-4 + 2e-6 * 512) * slow)
    return list(zip((*line[:3], line.seconds[512]), truths, strict=True))


def noise_of(random, family, spread, n) -> tuple[np.ndarray, np.ndarray]:
    """Signal and trace of n batches of 8 groups of 8 examples; noise has ``spread`` times the size of the signal, so its scale is spread²."""
    noise = draw_values(random, family, 0.5, (n, 8, 8, 16)) - 1  # n batches, 8 groups, 8 examples, 16 parameters
    size = 0.5 if family == "normal" else math.sqrt(math.expm1(0.25))
    groups = (1 + spread * noise / size).mean(2)
    total, squares = (groups.mean(1) ** 2).sum(-1), (groups**2).sum(-1).mean(1)
    return (8 * total - squares) / 7, 64 * (squares - total) / 7


def of_noise(random, family, spread, n):
    """The gradient noise scale of n steps."""
    return [(jb.gradient_noise_scale(jb.GradientStatistics(*noise_of(random, family, spread, n))), spread**2)]


def of_average(random, family, spread, n):
    """The running average of the noise scale after n batches."""
    track = NoiseTrack(NoiseMonitor(halflife=10.0), np.zeros(1))
    signal, trace = noise_of(random, family, spread, n)
    _, record = track.read(WithNoise(np.zeros(n), BatchNoise(signal[:, None], trace[:, None], np.ones(n, bool))))
    ends = (record[f"noise_scale_average{end}"] for end in ("", "_low", "_high"))
    return [(Interval(*ends, n), spread**2)]


def of_trace(random, family, spread, n):
    """The trace of a matrix by products with random signs; its eigenvalues fall with ``spread`` as the exponent."""
    values = np.arange(1.0, 65) ** (-spread if family == "normal" else -spread - 1)
    vectors, _ = np.linalg.qr(random.normal(size=(64, 64)))
    signs = random.choice([-1.0, 1.0], (n, 64))
    return [(jb.interval((signs @ vectors) ** 2 @ values), float(values.sum()))]


CASES = (
    Case("mean, scale not known", "`jb.interval`; losses, errors, norms and path lengths of all studies", 0.1, of_mean("any")),
    Case("mean, scale not known", "the same", 0.3, of_mean("any")),
    Case("mean, scale not known", "the same", 0.5, of_mean("any")),
    Case("mean, logarithmic scale", "updates, examples, epochs and seconds to a target; ratios of them", 0.3, of_mean("log")),
    Case("mean, logarithmic scale", "the same", 0.5, of_mean("log")),
    Case("mean, linear scale", "accuracies, cosines", 0.1, of_mean("linear")),
    Case("difference in pairs", "every «differs by» of a verdict: arms, sizes, growths, rates", 0.5, of_difference),
    Case("median", "`jb.interval(…, np.median)`; times and speed-ups of all studies, `scripts/bench.py`", 0.1, of_median("any")),
    Case("median, logarithmic scale", "the same", 0.5, of_median("log")),
    Case("ratio of means, pairs", "`jb.ratio_of_means`; times in chunks or cached, curvatures of two sizes", 0.1, of_pairs),
    Case("ratio of means, pairs", "the same", 0.5, of_pairs),
    Case("ratio with denominators near zero", "`jb.ratio_of_means`, `nonnegative=True`", 0.5, of_small_denominators),
    Case("ratio of two groups", "`experiments.advise --verify`: what the advised setting costs", 0.3, of_groups),
    Case("slope of log means", "gradient_smoothness: squared error by batch size", 0.3, of_slope),
    Case("updates × time of one", "convergence: seconds to the target", 0.3, of_product),
    Case("gain, gap, part closed", "large_batch: each arm", 0.3, of_standing),
    Case("critical batch size, updates, examples", "`jb.critical_batch_size`; convergence, critical_batch_size", 0.1, of_critical),
    Case("critical batch size, updates, examples", "the same", 0.3, of_critical),
    Case("exponent of the rate", "`jb.rate_exponent`; learning_rate_grid", 0.1, of_exponent),
    Case("exponent of the rate", "the same", 0.3, of_exponent),
    Case("critical batch size by branches", "`jb.branch`; critical_batch_size", 0.1, of_branches),
    Case("line of times, time of a size", "`jb.fit_throughput`, `jb.measure_throughput`; advise", 0.1, of_throughput),
    Case("gradient noise scale", "`jb.gradient_noise_scale`; records of `fit`, convergence, critical_batch_size, advise", 3.0, of_noise),
    Case("its running average", "`noise_scale_average` of `fit`", 3.0, of_average, (3, 5, 10, 30)),
    Case("trace of the Hessian", "`jb.hessian_trace`; sharpness", 1.0, of_trace, (3, 5, 10, 32), ("eigenvalues 1/i", "eigenvalues 1/i²")),
)


def coverage(case: Case, family: Family, n: int, draws: int, seed: int = 0) -> float:
    """The least share of draws whose interval holds the truth, over the numbers of a case."""
    random, hits = np.random.default_rng([seed, n]), []
    for _ in range(draws):
        hits.append([one.low <= truth <= one.high for one, truth in case.draw(random, family, case.spread, n)])
    return float(np.mean(hits, 0).min())


def rows(draws: int) -> Iterator[list[str]]:
    """The rows of the table."""
    for case in CASES:
        for family in ("normal", "log-normal"):
            measured = [f"{n}: {100 * coverage(case, family, n, draws):.1f}" for n in case.counts]
            name = case.families[family == "log-normal"]
            yield [case.name, case.callers, f"{name}, {case.spread:g}" if name == family else name, "95", *measured]


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000, help="data sets a cell")
    draws = parser.parse_args().draws
    if draws < 1:
        parser.error(f"--draws {draws} must be at least 1.")
    print("| interval | where it is shown | data, spread | nominal, % | n: measured, % | | | |\n|---|---|---|---|---|---|---|---|")
    for row in rows(draws):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
