"""The figure of the study that advises, from its records alone."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.advise.records import read_advice
from experiments.harness.schedules import rate_words
from experiments.harness.study import setting_of
from jaxbatch.advice.advice import Advice, cost_of_update
from jaxbatch.results import plots
from jaxbatch.results.records import Record


def draw_figure(config, records: Sequence[Record], folder: pathlib.Path) -> pathlib.Path:
    """Cost by batch size, updates with their law, the time of an update with its knee, and the rates that were tried."""
    setting = f"{setting_of(config)}, {rate_words(config)}"
    return draw_advice(read_advice(records), setting, folder)


def draw_advice(advice: Advice, setting: str, folder: pathlib.Path) -> pathlib.Path:
    """The figure of an advice; ``setting`` says what is trained."""
    figure, ((cost, updates), (seconds, rates)) = plots.subplots(2, 2, figsize=(12, 8.5))
    _draw_cost(cost, advice)
    _draw_updates(updates, advice)
    _draw_seconds(seconds, advice)
    _draw_rates(rates, advice)
    sizes = [choice.batch_size for choice in advice.choices] or sorted(advice.throughput.seconds)
    for axes in (cost, updates, seconds, rates):
        plots.size_ticks(axes, sizes)
        axes.tick_params(axis="x", labelsize=9)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=9)
    answer = "no advice" if advice.batch_size is None else f"advised: B = {advice.batch_size}, rate {advice.learning_rate:.3g}"
    figure.suptitle(f"{setting}, to {advice.goal}, objective {advice.objective}; {answer}")
    return plots.save(figure, folder)


def _columns(advice: Advice, name: str) -> tuple[np.ndarray, np.ndarray]:
    values = [getattr(choice, name) for choice in advice.choices]
    return np.array([value.value for value in values]), np.array([[value.value - value.low, value.high - value.value] for value in values]).T


def _draw_cost(axes, advice: Advice) -> None:
    axes.set(title=f"Cost to {advice.goal} ({advice.objective}), relative to the advised setting", ylabel="cost ÷ advised")
    if advice.batch_size is None:
        return
    sizes = [choice.batch_size for choice in advice.choices]
    values, errors = _columns(advice, "relative_cost")
    axes.axvspan(
        min(advice.close_sizes) / 2**0.5, max(advice.close_sizes) * 2**0.5, color=plots.COLORS[2], alpha=0.15, label="within 10% of the best"
    )
    axes.errorbar(sizes, values, errors, fmt="o-", color=plots.COLORS[0], capsize=3, label="expected, 95% interval")
    unit = cost_of_update(advice.objective, advice.throughput, sizes)
    advised = float(advice.choice.updates) * unit[advice.batch_size]
    for reached, marker, label in ((True, "o", "a run that reached the goal"), (False, "^", "a run that ended early (its cost is at least this)")):
        some = [probe for probe in advice.probes if probe.reached == reached and not probe.diverged]
        costs = [(probe.updates if reached else probe.more_than) * unit[probe.batch_size] / advised for probe in some]
        axes.plot([probe.batch_size for probe in some], costs, marker, color=plots.COLORS[1], mfc="none", ms=6, alpha=0.7, label=label)
    axes.plot([advice.batch_size], [1], "*", color=plots.COLORS[6], ms=15, label="advised", zorder=4)
    axes.set_yscale("log")
    axes.set_ylim(0.3, max(20, 1.5 * values.max()))
    plots.log_values(axes.yaxis)


def _draw_updates(axes, advice: Advice) -> None:
    axes.set(title="Updates, and the law S = S_min (1 + B_crit ÷ B)", ylabel="updates to the goal")
    if advice.batch_size is None:
        return
    sizes = [choice.batch_size for choice in advice.choices]
    values, errors = _columns(advice, "updates")
    axes.errorbar(sizes, values, errors, fmt="o-", color=plots.COLORS[0], capsize=3, label="mean over runs, expected at the best rate")
    critical = advice.critical_batch_size
    if critical.n:
        axes.axvspan(max(critical.low, sizes[0]), min(critical.high, sizes[-1]), color="grey", alpha=0.15)
        axes.axvline(min(max(critical.value, sizes[0]), sizes[-1]), color="grey", ls="--", label=f"critical batch size {critical:,.0f}")
    axes.set_yscale("log")
    plots.log_values(axes.yaxis)


def _draw_seconds(axes, advice: Advice) -> None:
    throughput = advice.throughput
    sizes = np.array(sorted(throughput.seconds))
    if not len(sizes):
        return
    values = np.array([throughput.seconds[size].value for size in sizes])
    x = np.geomspace(sizes[0], sizes[-1], 100)
    line = float(throughput.seconds_per_update) + float(throughput.seconds_per_example) * x
    axes.plot(sizes, 1e3 * values, "o", color=plots.COLORS[0], label="bound" if throughput.bound else "timed")
    axes.plot(x, 1e3 * line, "-", color=plots.COLORS[1], label="α + β B")
    knee = throughput.knee.value
    if sizes[0] <= knee <= sizes[-1]:
        axes.axvline(knee, color="grey", ls="--", label=f"knee {throughput.knee:,.0f}")
    axes.set(title="Time of an update", ylabel="milliseconds", yscale="log")
    plots.log_values(axes.yaxis)


def _draw_rates(axes, advice: Advice) -> None:
    groups = {
        "reached the goal": [probe for probe in advice.probes if probe.reached],
        "ended before": [probe for probe in advice.probes if not probe.reached and not probe.diverged],
        "diverged": [probe for probe in advice.probes if probe.diverged],
    }
    draw_runs(axes, groups, advice.choices)
    axes.set(title="Runs, and the best rate", ylabel="learning rate", yscale="log")


def draw_runs(axes, groups: Mapping[str, Sequence[Any]], choices: Sequence[Any]) -> None:
    """Batch size and rate of all runs in three groups, that arrived, ended early or diverged, and each size's best rate."""
    styles = (("o", plots.COLORS[0], plots.COLORS[0]), ("o", plots.COLORS[0], "white"), ("x", plots.COLORS[1], plots.COLORS[1]))
    for (label, some), (marker, edge, fill) in zip(groups.items(), styles, strict=True):
        axes.plot([run.batch_size for run in some], [run.learning_rate for run in some], marker, color=edge, mfc=fill, ms=7, label=label, ls="none")
    if choices:
        rates = [choice.learning_rate for choice in choices]
        axes.plot([choice.batch_size for choice in choices], rates, "-", color="grey", label="best rate, expected")
