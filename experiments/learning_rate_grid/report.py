"""Tables, figure and verdict of the learning-rate grid, from its records alone."""

import pathlib
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from experiments.harness.goal_words import heading, in_short, in_words, is_share, show
from experiments.harness.rate_grid import best_rates, results
from experiments.harness.schedules import rate_words
from experiments.harness.sentences import BETWEEN
from experiments.harness.study import describe_setting, setting_of, size_cell, size_label
from experiments.harness.target import bound_words
from jaxbatch.advice.learning_rates import rate_exponent
from jaxbatch.intervals import interval
from jaxbatch.results import plots
from jaxbatch.results.records import Record
from jaxbatch.results.report import print_table
from jaxbatch.training.goals import as_goal


def print_tables(console: Console, config, records: Sequence[Record], provenance: Record) -> None:
    """Prints the best rate of each size, its results, and the rates at which a run diverged."""
    describe_setting(console, config, provenance, f"{rate_words(config)}, {bound_words(config)}")
    rows, goal = [], as_goal(config.target)
    for size, result in results(config, records).items():
        rate = result.best
        if rate is None:
            rows.append([size_cell(config, size), "all diverged", "", "", "", ""])
            continue
        updates = interval(result.updates_to_goal[rate], scale="log")
        rows.append(
            [
                size_cell(config, size),
                f"{config.learning_rates[rate]:g}" + ("" if result.is_inside else " (edge)"),
                f"{np.isfinite(result.updates_to_goal[rate]).sum()}/{config.seeds}",
                f"{updates:,.0f}" if updates.n else "not reached",
                show(goal, result.metric[rate]),
                ", ".join(f"{r:g}" for r, d in zip(config.learning_rates, result.diverged, strict=True) if d.any()) or "none",
            ]
        )
    title = f"The best rate at each batch size, by updates to {in_words(goal)}"
    columns = ["B", "rate", "reached", "updates to target", heading(goal, "validation {} at the end"), "diverged at"]
    print_table(console, title, columns, rows)


def verdict(config, records: Sequence[Record]) -> list[str]:
    """The sentences that the intervals allow, and no others."""
    rate_results, goal = results(config, records), as_goal(config.target)
    chosen = {size: result.best for size, result in rate_results.items()}
    sentences = []
    edges = [size for size, result in rate_results.items() if not result.is_inside]
    if edges:
        sentences.append(
            f"Warning: the best rate lies on the edge of the grid at B = {', '.join(map(str, edges))}; those sizes are left "
            "out of the fit. Widen --learning-rates."
        )
    p = rate_exponent(rate_results)
    if not np.isfinite(p.value):
        none = not any(result.arrived for result in rate_results.values())
        few = "fewer than two batch sizes have a best rate that lies inside the grid and reaches the target"
        return [*sentences, f"No exponent: {f'no run reaches {in_words(goal)} within the budget' if none else few}."]
    within = {"linear (1)": not p.excludes(1), "square root (0.5)": not p.excludes(0.5), "none (0)": not p.excludes(0)}
    allowed = [name for name, holds in within.items() if holds]
    sentences.append(
        f"The best rate grows as B^p with p = {p:.2f} over {p.n} batch sizes: "
        + (f"the interval contains {' and '.join(allowed)}" if allowed else "the interval contains neither linear, square root nor none")
        + f" (it covers seeds and the spacing of the grid, n = {config.seeds} seeds)."
    )
    rates = {size: config.learning_rates[rate] for size, rate in chosen.items() if rate is not None}
    arrived = [size for size in rates if rate_results[size].arrived]
    steps = [f"{a} to {b}: {np.log(rates[b] / rates[a]) / np.log(b / a):.2f}" for a, b in zip(arrived, arrived[1:], strict=False)]
    sentences.append(f"On this grid, the exponent between neighbouring sizes is {', '.join(steps)}.")
    unreached = [size for size in rates if size not in arrived]
    high, low = ("highest", "lowest") if goal.above else ("lowest", "highest")
    if unreached:
        sentences.append(
            f"No rate reaches {in_words(goal)} within the budget at B = {', '.join(map(str, unreached))}; there, the best rate is the one "
            f"that ends {high}, and it is left out of the fit."
        )
    ends = {size: rate_results[size].metric[rate] for size, rate in chosen.items() if rate is not None}
    order = sorted(ends, key=lambda size: interval(ends[size]).value, reverse=goal.above)
    best, worst = (show(goal, ends[size]) for size in (order[0], order[-1]))
    at = (f"{best}% validation accuracy", f"{worst}%") if is_share(goal) else (f"a validation {goal.metric} of {best}", worst)
    sentences.append(f"At its own best rate B = {order[0]} ends {high}, at {at[0]}, and B = {order[-1]} {low}, at {at[1]}.")
    return [*sentences, BETWEEN]


def draw_figure(config, records: Sequence[Record], folder: pathlib.Path) -> pathlib.Path:
    """Draws final accuracy and updates to the target as heat maps, and the best rate by batch size."""
    rate_results, goal = results(config, records), as_goal(config.target)
    figure, (left, middle, right) = plots.subplots(1, 3, figsize=(15, 5), width_ratios=(1, 1, 0.9))
    sizes, rates = list(rate_results), config.learning_rates
    ends = np.array([_mean(rate_results[size].metric) for size in sizes]).T
    updates = np.array([_mean(rate_results[size].updates_to_goal) for size in sizes]).T
    lost = np.array([rate_results[size].diverged.any(1) for size in sizes]).T
    if is_share(goal):  # colours show the error on a logarithmic scale: from 98% to 99% is as large a step as from 60% to 80%
        plots.heat_map(left, 100 - 100 * ends, lambda v: f"{100 - v:.1f}", lost, log=True, reverse=True, label="validation error, %")
    else:
        log = bool((ends[np.isfinite(ends)] > 1e-3).all())  # the scale's lowest value
        plots.heat_map(left, ends, lambda v: f"{v:.3g}", lost, log=log, reverse=not goal.above, label=f"validation {goal.metric}")
    plots.heat_map(middle, updates, _short, lost, log=True, reverse=True, label="updates")
    for axes, title in ((left, heading(goal, "Validation {} at the end")), (middle, f"Updates to {in_short(goal)}")):
        axes.set(title=title, xlabel="batch size", ylabel="learning rate")
        axes.set_xticks(range(len(sizes)), [size_label(size) for size in sizes])
        axes.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        for column, size in enumerate(sizes):
            if (best := rate_results[size].best) is not None:
                plots.frame_cell(axes, column, best)
    best = best_rates(config, records)
    inside = [size for size in best if rate_results[size].is_inside and rate_results[size].arrived]
    right.plot(
        list(best), list(best.values()), "o", color=plots.COLORS[0], mfc="white", ms=9, label="best, on the grid's edge or short of the target"
    )
    right.plot(inside, [best[size] for size in inside], "o", color=plots.COLORS[0], ms=9, label="best")
    p = rate_exponent(rate_results)
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
    figure.suptitle(f"{setting_of(config)}, {rate_words(config)}, mean of {config.seeds} seeds; × diverged, framed: best")
    return plots.save(figure, folder)


def _mean(table):
    """Mean over the seeds; NaN unless all are finite."""
    return np.where(np.isfinite(table).all(1), np.nan_to_num(table).mean(1), np.nan)


def _short(value: float) -> str:
    return f"{value:.0f}" if value < 1000 else f"{value / 1000:.3g}k"
