"""Table, figure and verdict of the three ways to the critical batch size, from the study's records alone."""

import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Console

import jaxbatch as jb
from experiments.harness.schedules import rate_words
from experiments.harness.sentences import between_looks
from experiments.harness.study import describe_setting, setting_of, size_cell
from jaxbatch.advice.branches import critical_of_branches
from jaxbatch.advice.full_sweep import best_rates
from jaxbatch.intervals import Interval, interval, unknown
from jaxbatch.results import plots
from jaxbatch.results.records import Record
from jaxbatch.results.report import print_table

THIRDS = ((0.0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.01))  # of the updates to the target, over which the noise is averaged


class Estimate(NamedTuple):
    """One measurement of the critical batch size."""

    name: str
    critical_batch_size: Interval
    examples: int  # its cost


def sweep_of(records: Sequence[Record]) -> list[Record]:
    """The rows of the sweep."""
    return [record for record in records if record["kind"] == "sweep"]


def ways(config, records: Sequence[Record]) -> list[Estimate]:
    """All measurements that the records allow."""
    estimates, best = [], best_rates(sweep_of(records))
    swept = sum(record["ran"] * record["batch_size"] for record in sweep_of(records))
    if len(best) >= 3:
        fit = jb.critical_batch_size({size: updates for size, (_, updates) in best.items()})
        estimates.append(Estimate(f"updates to the target, {len(best)} sizes", fit.critical_batch_size, swept))
    runs = sum(record["updates"] for record in records if record["kind"] == "run")
    for low, high in THIRDS:
        scale, _ = noise_between(records, low, high)
        if scale.n:
            estimates.append(
                Estimate(
                    f"noise, {100 * low:.0f} to {min(100, 100 * high):.0f}% of the way",
                    scale,
                    round(runs * config.base_batch_size * (min(high, 1) - low)),
                )
            )
    for stage in sorted({record["stage"] for record in records if record["kind"] == "branch"}):
        rows = [record for record in records if record["kind"] == "branch" and record["stage"] == stage]
        estimates.append(Estimate(f"branches at {100 * stage:.0f}% of the way", of_branches(config, rows), sum(row["examples"] for row in rows)))
    return estimates


def noise_between(records: Sequence[Record], low: float, high: float) -> tuple[Interval, float]:
    """The noise scale over a stretch of the way, and the middle of the stretch."""
    rows = [record for record in records if record["kind"] == "noise" and low <= record["progress"] < high]
    if not rows:
        return unknown(), math.nan
    statistics = jb.GradientStatistics(*(np.array([row[name] for row in rows], float) for name in ("signal", "trace")))
    return jb.gradient_noise_scale(statistics), float(np.mean([row["progress"] for row in rows]))


def of_branches(config, rows: Sequence[Record]) -> Interval:
    """The critical batch size of the branches from one stage, over seeds."""
    sizes, seeds, above = sorted({row["batch_size"] for row in rows}), sorted({row["seed"] for row in rows}), rows[0]["above"]
    worst = -math.inf if above else math.inf  # a branch that diverged
    values = {(row["batch_size"], row["seed"]): worst if row["value"] is None else row["value"] for row in rows}
    metrics = {size: tuple(values[size, seed] for seed in seeds) for size in sizes}
    tolerance = config.tolerance * abs(float(np.mean(metrics[sizes[0]])))
    return critical_of_branches(metrics, tolerance if math.isfinite(tolerance) else 0.0, above=above)


def print_tables(console: Console, config, records: Sequence[Record], provenance: Record) -> None:
    """The updates of each size at its best rate, then the three ways."""
    describe_setting(console, config, provenance, rate_words(config), f"to {config.target}")
    rows, best = [], best_rates(sweep_of(records))
    for size in sorted({record["batch_size"] for record in records if record["kind"] == "sweep"}):
        if size in best:
            rate, updates = best[size]
            rows.append([size_cell(config, size), f"{rate:.3g}", f"{interval(updates, scale='log'):,.0f}", f"{size * np.mean(updates):,.0f}"])
        else:  # a size that no rate brings there within four times the fewest examples of another size is given up
            rows.append([size_cell(config, size), "", "not reached with every seed", ""])
    print_table(console, f"Updates to {config.target} at each size's best rate", ["B", "rate", "updates", "examples"], rows)
    rows = [[estimate.name, f"{estimate.critical_batch_size:,.0f}", f"{estimate.examples:,}"] for estimate in ways(config, records)]
    print_table(console, "The critical batch size", ["way", "B_crit, with its 95% interval", "cost, examples"], rows)


def verdict(config, records: Sequence[Record]) -> list[str]:
    """Whether the ways agree within a factor of 2."""
    estimates, between = ways(config, records), between_looks(sweep_of(records))
    if not estimates:
        return [f"None of the three ways gives a number: fewer than three sizes reached {config.target} with every seed."]
    values = {estimate.name: estimate.critical_batch_size.value for estimate in estimates if math.isfinite(estimate.critical_batch_size.value)}
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    factor = values[high] / values[low] if values[low] > 0 else math.inf
    sentence = f"The smallest is {values[low]:,.0f} ({low}), the largest {values[high]:,.0f} ({high}): a factor of {factor:.1f}."
    fit = estimates[0].critical_batch_size if estimates[0].name.startswith("updates") else None
    if fit is None:
        return [sentence, "Fewer than three sizes reached the target with every seed, so there is no fit to compare with.", *between]
    disagreeing = [estimate.name for estimate in estimates[1:] if not 0.5 <= estimate.critical_batch_size.value / fit.value <= 2]
    agreement = "All agree with the fit within a factor of 2."
    if disagreeing:
        agreement = f"These differ from the fit by more than a factor of 2: {', '.join(disagreeing)}."
    return [sentence, agreement, *between]


def draw_figure(config, records: Sequence[Record], folder: pathlib.Path) -> pathlib.Path:
    """Updates by size with the fit, and the three ways along the run."""
    figure, (left, right) = plots.subplots(1, 2, figsize=(12, 4.8))
    best = dict(sorted(best_rates(sweep_of(records)).items()))
    left.plot(list(best), [np.mean(updates) for _, updates in best.values()], "o", color=plots.COLORS[0], label="mean over seeds")
    if len(best) >= 3:
        fit = jb.critical_batch_size({size: updates for size, (_, updates) in best.items()})
        x = np.geomspace(min(best), max(best), 100)
        critical = fit.critical_batch_size
        left.plot(x, float(fit.min_updates) * (1 + float(critical) / x), "-", color=plots.COLORS[1], label=f"fit, B_crit = {critical:,.0f}")
        right.axhspan(critical.low, critical.high, color=plots.COLORS[1], alpha=0.15)
        right.axhline(critical.value, color=plots.COLORS[1], label="updates to the target")
    left.set(title=f"Updates to {config.target}", ylabel="updates", yscale="log")
    if best:
        plots.size_ticks(left, list(best))
        plots.log_values(left.yaxis)
    edges = np.linspace(0, 1, 9)
    noise = [noise_between(records, low, high + (0.01 if high == 1 else 0)) for low, high in zip(edges, edges[1:], strict=False)]
    known = [(scale, middle) for scale, middle in noise if scale.n]
    _bars(right, [100 * middle for _, middle in known], [scale for scale, _ in known], plots.COLORS[0], "o-", "noise scale")
    stages = sorted({record["stage"] for record in records if record["kind"] == "branch"})
    branches = [of_branches(config, [r for r in records if r["kind"] == "branch" and r["stage"] == stage]) for stage in stages]
    _bars(right, [100 * stage for stage in stages], branches, plots.COLORS[2], "s", "branches")
    right.set(title="The critical batch size by three ways", xlabel="% of the updates to the target", ylabel="examples", yscale="log")
    plots.log_values(right.yaxis)
    for axes in (left, right):
        axes.legend(fontsize=9)
    figure.suptitle(f"{setting_of(config)}, {rate_words(config)}, {config.seeds} seeds")
    return plots.save(figure, folder)


def _bars(axes, positions: Sequence[float], intervals: Sequence[Interval], color: str, style: str, label: str) -> None:
    """Values with their intervals; an end that is not finite or not above 0 is drawn at the edge of a decade."""
    shown = [(position, one) for position, one in zip(positions, intervals, strict=True) if math.isfinite(one.value) and one.value > 0]
    if not shown:
        return
    values = np.array([one.value for _, one in shown])
    lows = np.array([one.low if math.isfinite(one.low) and one.low > 0 else one.value / 10 for _, one in shown])
    highs = np.array([one.high if math.isfinite(one.high) else one.value * 10 for _, one in shown])
    axes.errorbar([position for position, _ in shown], values, [values - lows, highs - values], fmt=style, color=color, capsize=3, label=label)
