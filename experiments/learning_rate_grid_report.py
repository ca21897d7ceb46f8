"""Tables, figure and verdict of the learning-rate grid, from its records alone.

Axes: R rates, S seeds.
"""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from rich.console import Console

from experiments.study import describe_setting, size_label
from jaxbatch.intervals import Interval, around, interval
from jaxbatch.results import plots
from jaxbatch.results.records import Record
from jaxbatch.results.report import print_table


class SizeResult(NamedTuple):
    """All runs at one batch size; NaN if a run did not reach the target, or diverged."""

    to_target: Float[np.ndarray, "R S"]  # updates
    accuracy: Float[np.ndarray, "R S"]  # at the end, on the validation part
    diverged: Float[np.ndarray, "R S"]  # 1 or 0


def results(config, records: Sequence[Record]) -> dict[int, SizeResult]:
    """The results of each batch size; sizes whose runs have not all finished are left out."""
    finished = {record["batch_size"] for record in records if record["kind"] == "size"}
    curves: dict[tuple, list[Record]] = {}
    for record in records:
        if record["kind"] == "run" and record["batch_size"] in finished:
            key = (record["batch_size"], record["learning_rate"], record["seed"])
            curves.setdefault(key, []).append(record)
    found = {}
    for size in sorted(finished):
        shape = (len(config.learning_rates), config.seeds)
        to_target, accuracy, diverged = (np.full(shape, np.nan) for _ in range(3))
        for place in np.ndindex(shape):
            rows = sorted(curves[size, config.learning_rates[place[0]], place[1]], key=lambda row: row["updates"])
            hits = [row["updates"] for row in rows if (row["validation_accuracy"] or 0) >= config.target_accuracy]
            to_target[place] = hits[0] if hits else np.nan
            diverged[place] = rows[-1]["diverged_at_update"] >= 0
            accuracy[place] = np.nan if diverged[place] else rows[-1]["validation_accuracy"]
        found[size] = SizeResult(to_target, accuracy, diverged)
    return found


def best_rate(result: SizeResult) -> int | None:
    """Index of the best rate: most seeds reach the target, then fewest updates; where none does, the best accuracy.

    None where no run is finite.

    Example:
        >>> nan = np.nan
        >>> ends = np.full((3, 2), 0.9)
        >>> best_rate(SizeResult(np.array([[50.0, 60.0], [20.0, 25.0], [10.0, nan]]), ends, 0 * ends))
        1
        >>> best_rate(SizeResult(np.full((3, 2), nan), ends + np.array([[0.0], [0.0], [0.05]]), 0 * ends))
        2
    """
    finite = np.isfinite(result.to_target)
    reached = finite.sum(1)
    if reached.max() > 0:  # without nanmean: the exponent's interval calls this ten thousands of times
        updates = np.where(finite, result.to_target, 0).sum(1)
        return int(np.argmin(np.where(reached == reached.max(), updates, np.inf)))
    mean = np.where(np.isnan(result.accuracy), -1.0, result.accuracy).mean(1)
    return int(np.argmax(mean)) if np.isfinite(result.accuracy).any() else None


def is_edge(config, rate: int | None) -> bool:
    """Whether the best rate is the grid's first or last, or there is none: the true best rate may be outside the grid."""
    return rate is None or rate in (0, len(config.learning_rates) - 1)


def best_rates(config, records: Sequence[Record]) -> dict[int, float]:
    """Maps batch size to its best rate; sizes at which every run diverged are left out."""
    chosen = {size: best_rate(result) for size, result in results(config, records).items()}
    return {size: config.learning_rates[rate] for size, rate in chosen.items() if rate is not None}


def rate_exponent(config, found: dict[int, SizeResult], *, resamples: int = 2000, seed: int = 0) -> Interval:
    """p of rate ∝ B^p over the sizes whose best rate is inside the grid, with a 95% interval.

    The interval covers the choice of seeds, which are resampled for every size, and the spacing of the grid: a best rate may
    lie anywhere within half a spacing of the one found.

    Returns:
        p, with n the number of sizes; NaN with fewer than 2.
    """
    inside = {size: best_rate(result) for size, result in found.items()}
    inside = {size: rate for size, rate in inside.items() if not is_edge(config, rate)}
    if len(inside) < 2:
        return Interval(np.nan, np.nan, np.nan, len(inside))
    logs, random = np.log(config.learning_rates), np.random.default_rng(seed)
    sizes = np.log(list(inside))

    def slope(rates):
        return np.polyfit(sizes, rates, 1)[0]

    draws = []
    for _ in range(resamples):
        rates = []
        for size in inside:
            members = random.integers(0, config.seeds, config.seeds)
            rate = best_rate(SizeResult(*(table[:, members] for table in found[size])))
            rate = inside[size] if is_edge(config, rate) else rate
            rates.append(random.uniform((logs[rate - 1] + logs[rate]) / 2, (logs[rate] + logs[rate + 1]) / 2))
        draws.append(slope(rates))
    value = slope([logs[rate] for rate in inside.values()])
    return around(value, *np.percentile(draws, [2.5, 97.5]), len(inside))


def print_tables(console: Console, config, records: Sequence[Record], provenance: Record) -> None:
    """Prints the best rate of each size, its results, and the rates at which a run diverged."""
    describe_setting(console, config, provenance, f"momentum {config.momentum:g}, up to {config.epochs} epochs")
    rows = []
    for size, result in results(config, records).items():
        rate = best_rate(result)
        if rate is None:
            rows.append([f"{size:,}", "all diverged", "", "", "", ""])
            continue
        updates = interval(result.to_target[rate])
        accuracy = interval(100 * result.accuracy[rate])
        rows.append(
            [
                f"{size:,}",
                f"{config.learning_rates[rate]:g}" + (" (edge)" if is_edge(config, rate) else ""),
                f"{np.isfinite(result.to_target[rate]).sum()}/{config.seeds}",
                f"{updates:,.0f}" if updates.n else "not reached",
                f"{accuracy:.2f}",
                ", ".join(f"{r:g}" for r, d in zip(config.learning_rates, result.diverged, strict=True) if d.any()) or "none",
            ]
        )
    title = f"The best rate at each batch size, by updates to {100 * config.target_accuracy:g}% validation accuracy"
    print_table(console, title, ["B", "rate", "reached", "updates to target", "validation accuracy at the end, %", "diverged at"], rows)


def verdict(config, records: Sequence[Record]) -> list[str]:
    """The sentences that the intervals allow, and no others."""
    found = results(config, records)
    chosen = {size: best_rate(result) for size, result in found.items()}
    sentences = []
    edges = [size for size, rate in chosen.items() if is_edge(config, rate)]
    if edges:
        sentences.append(
            f"Warning: the best rate lies on the edge of the grid at B = {', '.join(map(str, edges))}; those sizes are left "
            "out of the fit. Widen --learning-rates."
        )
    p = rate_exponent(config, found)
    if not np.isfinite(p.value):
        return [*sentences, "No exponent: fewer than two batch sizes have their best rate inside the grid."]
    within = {"linear (1)": not p.excludes(1), "square root (0.5)": not p.excludes(0.5), "none (0)": not p.excludes(0)}
    allowed = [name for name, holds in within.items() if holds]
    sentences.append(
        f"The best rate grows as B^p with p = {p:.2f} over {p.n} batch sizes: "
        + (f"the interval holds {' and '.join(allowed)}" if allowed else "the interval holds neither linear, square root nor none")
        + f" (seeds and the spacing of the grid counted, n = {config.seeds} seeds)."
    )
    rates = {size: config.learning_rates[rate] for size, rate in chosen.items() if rate is not None}
    steps = [f"{a} to {b}: {np.log(rates[b] / rates[a]) / np.log(b / a):.2f}" for a, b in zip(rates, list(rates)[1:], strict=False)]
    sentences.append(f"Between neighbouring sizes the exponent is, on this grid, {', '.join(steps)}.")
    unreached = [size for size in rates if not np.isfinite(found[size].to_target).any()]
    if unreached:
        sentences.append(
            f"No rate reaches {100 * config.target_accuracy:g}% validation accuracy within the budget at B = "
            f"{', '.join(map(str, unreached))}; its best is the one that ends highest."
        )
    tops = {size: interval(100 * found[size].accuracy[rate]) for size, rate in chosen.items() if rate is not None}
    best, worst = max(tops, key=lambda s: tops[s].value), min(tops, key=lambda s: tops[s].value)
    sentences.append(
        f"At its own best rate B = {best} ends highest, at {tops[best]:.2f}% validation accuracy, and B = {worst} lowest, at {tops[worst]:.2f}%."
    )
    return sentences


def draw_figure(config, records: Sequence[Record], folder: pathlib.Path) -> pathlib.Path:
    """Draws final accuracy and updates to the target as heat maps, and the best rate by batch size."""
    found = results(config, records)
    figure, (left, middle, right) = plots.subplots(1, 3, figsize=(15, 5), width_ratios=(1, 1, 0.9))
    sizes, rates = list(found), config.learning_rates
    error = 100 - 100 * np.array([_mean(found[size].accuracy) for size in sizes]).T
    updates = np.array([_mean(found[size].to_target) for size in sizes]).T
    lost = np.array([found[size].diverged.any(1) for size in sizes]).T
    # Colours show the error on a logarithmic scale: from 98% to 99% is as large a step as from 60% to 80%.
    plots.heat_map(left, error, lambda v: f"{100 - v:.1f}", lost, log=True, reverse=True, label="validation error, %")
    plots.heat_map(middle, updates, _short, lost, log=True, reverse=True, label="updates")
    for axes, title in (
        (left, "Validation accuracy at the end, %"),
        (middle, f"Updates to {100 * config.target_accuracy:g}%"),
    ):
        axes.set(title=title, xlabel="batch size", ylabel="learning rate")
        axes.set_xticks(range(len(sizes)), [size_label(size) for size in sizes])
        axes.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        for column, size in enumerate(sizes):
            if (best := best_rate(found[size])) is not None:
                plots.frame_cell(axes, column, best)
    best = best_rates(config, records)
    inside = [size for size in best if not is_edge(config, rates.index(best[size]))]
    right.plot(list(best), list(best.values()), "o", color=plots.COLORS[0], mfc="white", ms=9, label="best, on the grid's edge")
    right.plot(inside, [best[size] for size in inside], "o", color=plots.COLORS[0], ms=9, label="best")
    p = rate_exponent(config, found)
    if np.isfinite(p.value):
        centre, level = np.mean(np.log(inside)), np.mean(np.log([best[size] for size in inside]))
        x = np.geomspace(min(sizes), max(sizes), 50)
        for slope, dash, name in ((p.value, "-", f"p = {p:.2f}"), (1.0, "--", "linear, p = 1"), (0.5, ":", "square root, p = 0.5")):
            color = plots.COLORS[1] if dash == "-" else "grey"
            right.plot(x, np.exp(level + slope * (np.log(x) - centre)), dash, color=color, label=name)
    right.set(xscale="log", yscale="log", xlabel="batch size", ylabel="best learning rate", title="rate ∝ B^p")
    right.set_ylim(min(rates) / 3, max(rates) * 3)
    plots.size_ticks(right, sizes)
    right.legend(loc="upper left", fontsize=9)
    figure.suptitle(
        f"{config.dataset}, {config.model}, SGD with momentum {config.momentum:g}, mean of {config.seeds} seeds; × diverged, framed: best"
    )
    return plots.save(figure, folder)


def _mean(table):
    """Mean over the seeds; NaN unless all are finite."""
    return np.where(np.isfinite(table).all(1), np.nan_to_num(table).mean(1), np.nan)


def _short(value: float) -> str:
    return f"{value:.0f}" if value < 1000 else f"{value / 1000:.3g}k"
