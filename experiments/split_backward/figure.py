"""The figure of the split-backward study, from its records alone."""

import pathlib
from collections.abc import Sequence

import numpy as np

from experiments.harness.goal_words import heading, scale
from experiments.harness.study import setting_of
from experiments.split_backward.records import cost_ratio, curve, protocols_of, rate_of, seeds_of
from experiments.split_backward.steps import ARMS, OWN_RULES
from experiments.split_backward.verdict import arm_names
from jaxbatch.intervals import interval
from jaxbatch.results import plots
from jaxbatch.results.records import Record
from jaxbatch.training.goals import as_goal

TITLES = {"original": "one rate (c: {k} times as much)", "tuned": "each arm at its best rate"}


def draw_figure(config, records: Sequence[Record], folder: pathlib.Path) -> pathlib.Path:
    """Draws the validation metric by examples, one panel for each protocol, and the cost of a step as bars."""
    protocols = protocols_of(records)
    widths = (*[3] * len(protocols), 2)
    figure, panels = plots.subplots(1, len(widths), figsize=(1 + 1.9 * sum(widths), 4.4), width_ratios=widths)
    for axes, protocol in zip(panels, protocols, strict=False):
        _draw_curves(axes, config, records, protocol)
        if axes is not panels[0]:
            axes.sharey(panels[0])
            axes.set_ylabel("")
    _draw_cost(panels[-1], config, records)
    seeds = len(seeds_of(records, protocols[0]))
    figure.suptitle(f"{setting_of(config)}, B = {config.batch_size}, K = {config.num_groups}, {seeds} seeds, 95% intervals")
    return plots.save(figure, folder)


def _draw_curves(axes, config, records: Sequence[Record], protocol: str) -> None:
    names, seeds, goal = arm_names(config.num_groups), seeds_of(records, protocol), as_goal(config.target)
    factor = scale(goal)
    for arm, color, dash in zip(ARMS, plots.COLORS, ("-", "-", "--", "-."), strict=False):
        if protocol == "tuned" and arm not in OWN_RULES:
            continue
        rows = [{r["examples"]: r[f"validation_{goal.metric}"] for r in curve(records, protocol, arm, seed)} for seed in seeds]
        examples = sorted(set().union(*rows))
        bands = [interval([np.nan if row.get(count) is None else row[count] for row in rows]) for count in examples]
        also = " = (c)" if protocol == "tuned" and arm == "one" else ""
        label = f"{names[arm]}{also}, rate {rate_of(records, protocol, arm):.3g}"
        axes.plot(examples, [factor * band.value for band in bands], dash, color=color, label=label, lw=2)
        low = [factor * (band.low if band.n > 1 else band.value) for band in bands]
        high = [factor * (band.high if band.n > 1 else band.value) for band in bands]
        axes.fill_between(examples, low, high, color=color, alpha=0.18, lw=0)
    axes.axhline(factor * goal.value, color="grey", lw=1, ls=":")
    title = TITLES[protocol].format(k=config.num_groups)
    axes.set(xlabel="examples seen", ylabel=heading(goal), title=title[0].upper() + title[1:])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
    axes.legend(loc="best")


def _draw_cost(axes, config, records: Sequence[Record]) -> None:
    kinds = {"one": "ordinary\nstep", "split": "split\nstep", "small": f"{config.num_groups} small\nsteps", "naive": "naive\nsplit"}
    for position, kind in enumerate(kinds):
        ratio = cost_ratio(records, kind)
        color = plots.COLORS[ARMS.index(kind)] if kind in ARMS else "#999999"
        axes.bar(position, ratio.value, color=color, width=0.65)
        if ratio.n > 1:
            axes.errorbar(position, ratio.value, [[ratio.value - ratio.low], [ratio.high - ratio.value]], color="black", capsize=4)
        top = max(ratio.value, ratio.high if ratio.n > 1 else 0)
        axes.annotate(f"{ratio.value:.2f}", (position, top), (0, 4), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(kinds)), kinds.values())
    axes.set(ylabel="time ÷ ordinary step", title="Cost of one batch")
    axes.set_axisbelow(True)
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.12)
