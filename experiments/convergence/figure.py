"""The figure of the convergence study, from its records alone."""

import math
import pathlib
from collections.abc import Sequence

import numpy as np

from experiments.convergence.report import NAMES, fit_critical, runs_of, seconds, sizes_of, stretch_in_words, stretches, to_target
from experiments.harness.goal_words import in_words, is_share
from experiments.harness.schedules import rate_words
from experiments.harness.speed import has_loading, times
from experiments.harness.study import setting_of
from jaxbatch.advice.critical import CriticalFit
from jaxbatch.results import plots
from jaxbatch.results.records import Record
from jaxbatch.training.goals import Goal, as_goal


def draw_figure(config, records: Sequence[Record], folder: pathlib.Path) -> pathlib.Path:
    """Updates and seconds to the target by batch size, and the noise scale by the validation metric."""
    goal, fit = as_goal(config.target), fit_critical(records, "tuned")
    figure, (left, middle, right) = plots.subplots(1, 3, figsize=(15, 4.8))
    for (table, name), color, marker in zip(NAMES.items(), plots.COLORS, "os"):
        _draw_table(left, middle, records, table, name, color, marker)
    sizes = sorted({size for table in NAMES for size in sizes_of(records, table)})
    if fit is not None and fit.min_updates.value > 0:
        x = np.geomspace(min(sizes), max(sizes), 100)
        curve = fit.min_updates.value * (1 + fit.critical_batch_size.value / x)
        left.plot(x, curve, "--", color="grey", lw=1.2, label=f"fit: B_crit = {fit.critical_batch_size:,.0f}")
    left.set(ylabel="updates", title=f"Updates to {in_words(goal)}")
    middle.set(ylabel="seconds", title=f"Time to {in_words(goal)}")
    for axes in (left, middle):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.45)  # room for the legend
        plots.log_values(axes.yaxis)
        plots.size_ticks(axes, sizes)
        axes.legend(fontsize=9, loc="upper right")
    _draw_noise(right, records, goal, fit)
    figure.suptitle(f"{setting_of(config)}, {rate_words(config)}, {config.seeds} seeds, 95% intervals")
    return plots.save(figure, folder)


def _draw_table(left, middle, records: Sequence[Record], table: str, name: str, color: str, marker: str) -> None:
    """Updates and seconds of a table's sizes; hollow triangles for those that no run reaches the target with."""
    reached = [size for size in sizes_of(records, table) if any(row["reached"] for row in runs_of(records, table, size))]
    missed = [size for size in sizes_of(records, table) if size not in reached]
    rows = {size: runs_of(records, table, size) for size in (*reached, *missed)}
    style = {"color": color, "marker": marker}
    plots.band(left, reached, [to_target(rows[s], "updates") for s in reached], label=name, **style)
    plots.band(middle, reached, [seconds(records, rows[s], "resident") for s in reached], label=f"{name}: computation", **style)
    if has_loading(records):
        loaded = [seconds(records, rows[s], "streamed") for s in reached]
        plots.band(middle, reached, loaded, label=f"{name}: with loading", ls=":", mfc="white", **style)
    spent = [max(row["updates"] for row in rows[size]) for size in missed]
    label = f"{name}: not reached by here" if missed else None
    left.plot(missed, spent, "^", color=color, mfc="white", ms=9, label=label)
    spent = [n * times(records, size, "resident").value / 1e3 for n, size in zip(spent, missed, strict=True)]
    middle.plot(missed, spent, "^", color=color, mfc="white", ms=9)


def _draw_noise(axes, records: Sequence[Record], goal: Goal, fit: CriticalFit | None) -> None:
    """The noise scale by stretches of the way to the target, and the fit's critical batch size."""
    positions, labels = [], []
    for (low, high), scale in stretches(records, goal).items():
        if np.isfinite(scale.value) and scale.value > 0:
            top = scale.high if np.isfinite(scale.high) else scale.value * 10
            bottom = max(scale.low, scale.value / 100) if np.isfinite(scale.low) else scale.value
            error = [[scale.value - bottom], [top - scale.value]] if scale.n > 1 else None
            axes.errorbar(len(positions), scale.value, error, fmt="o", color=plots.COLORS[2], capsize=4, ms=7)
            positions.append(len(positions))
            stretch = stretch_in_words(goal, low, high, "–" if is_share(goal) else " to\n")
            labels.append(f"{stretch}\nn = {scale.n}")
    if fit is not None and math.isfinite(fit.critical_batch_size.value):
        axes.axhline(fit.critical_batch_size.value, color="grey", ls="--", label="critical batch size of the fit")
        if math.isfinite(fit.critical_batch_size.high):
            axes.axhspan(fit.critical_batch_size.low, fit.critical_batch_size.high, color="grey", alpha=0.2, lw=0)
        axes.legend()
    axes.set_xticks(positions, labels)
    axes.margins(x=0.2)
    plots.log_values(axes.yaxis)
    axes.set(xlabel=f"validation {goal.metric}", ylabel="examples", title="Gradient noise scale on the way")
