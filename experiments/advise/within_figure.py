"""The figure of advice for runs of a fixed length, from its records alone."""

import pathlib
from collections.abc import Sequence

import numpy as np

from experiments.advise.figure import draw_runs
from experiments.advise.within_report import read_advice
from experiments.harness.schedules import rate_words
from experiments.harness.study import setting_of
from jaxbatch.advice.end_advice import EndAdvice, in_words
from jaxbatch.advice.ending import Ending
from jaxbatch.results import plots
from jaxbatch.results.records import Record


def draw_figure(config, records: Sequence[Record], folder: pathlib.Path) -> pathlib.Path:
    """What runs end with by batch size, with the band of what loses nothing; by length; the data that a size needs; rates."""
    return draw_advice(read_advice(config, records), f"{setting_of(config)}, {rate_words(config)}", folder)


def draw_advice(advice: EndAdvice, setting: str, folder: pathlib.Path) -> pathlib.Path:
    """The figure of an advice; ``setting`` says what is trained."""
    figure, ((value, length), (data, rates)) = plots.subplots(2, 2, figsize=(12, 8.5))
    _draw_values(value, advice)
    _draw_lengths(length, advice)
    _draw_data(data, advice)
    _draw_rates(rates, advice)
    sizes = [choice.batch_size for choice in advice.choices] or sorted({ending.batch_size for ending in advice.endings})
    for axes in (value, data, rates):
        plots.size_ticks(axes, sizes)
        axes.tick_params(axis="x", labelsize=9)
    for axes in (value, length, data, rates):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=9)
    answer = "no advice" if advice.batch_size is None else f"advised: B = {advice.batch_size}, rate {advice.learning_rate:.3g}"
    asked = in_words(advice.within if advice.horizon is None else advice.horizon)
    figure.suptitle(f"{setting}, {asked}; {answer}")
    return plots.save(figure, folder)


def _columns(advice: EndAdvice, name: str) -> tuple[np.ndarray, np.ndarray]:
    values = [getattr(choice, name) for choice in advice.choices]
    errors = [[max(one.value - one.low, 0), max(one.high - one.value, 0)] for one in values]
    return np.array([one.value for one in values]), np.array(errors).T


def _draw_values(axes, advice: EndAdvice) -> None:
    asked = in_words(advice.within if advice.horizon is None else advice.horizon)
    axes.set(title=f"What a run of {asked} ends with, at each size's best rate", ylabel=advice.metric.name)
    if advice.batch_size is None:
        return
    sizes = [choice.batch_size for choice in advice.choices]
    values, errors = _columns(advice, "value")
    axes.errorbar(sizes, values, errors, fmt="o-", color=plots.COLORS[0], capsize=3, label="mean over runs, expected; 95% interval")
    advised = advice.choice
    axes.axhspan(advised.next_run.low, advised.next_run.high, color=plots.COLORS[2], alpha=0.15, label="95% of runs of the advised setting")
    if advice.horizon is None:
        whole = [ending for ending in advice.endings if ending.ended and ending.num_steps == advice.at(ending.batch_size).num_steps]
        shown = [ending for ending in whole if ending.learning_rate == advice.at(ending.batch_size).learning_rate]
        axes.plot([one.batch_size for one in shown], [one.value for one in shown], "o", color=plots.COLORS[1], mfc="none", label="a whole run")
    axes.plot([advised.batch_size], [advised.value.value], "*", color=plots.COLORS[6], ms=15, label="advised", zorder=4)


def _draw_lengths(axes, advice: EndAdvice) -> None:
    axes.set(title="Runs by their length", xlabel="examples", ylabel=advice.metric.name, xscale="log")
    ended = [ending for ending in advice.endings if ending.ended]
    if not ended:
        return
    for number, size in enumerate(sorted({ending.batch_size for ending in ended})):
        best: dict[int, Ending] = {}
        pick = max if advice.metric.above else min
        for ending in (one for one in ended if one.batch_size == size):
            best[ending.num_steps] = pick(best.get(ending.num_steps, ending), ending, key=lambda one: one.value)
        lengths = [best[steps].examples for steps in sorted(best)]
        axes.plot(lengths, [best[steps].value for steps in sorted(best)], "o-", color=plots.COLORS[number % 7], ms=5, label=f"B = {size}, best rate")
    if advice.batch_size is not None and advice.horizon is not None:
        choice = advice.choice
        error = [[max(choice.value.value - choice.value.low, 0)], [max(choice.value.high - choice.value.value, 0)]]
        at = choice.num_steps * choice.batch_size
        axes.errorbar([at], [choice.value.value], error, fmt="*", color=plots.COLORS[6], ms=13, capsize=3, label="horizon, by the law")


def _draw_data(axes, advice: EndAdvice) -> None:
    axes.set(title="How many times the data a size needs to end where the best setting does", ylabel="data ÷ data of the best setting")
    if advice.batch_size is None:
        return
    sizes = [choice.batch_size for choice in advice.choices]
    values, errors = _columns(advice, "more_data")
    axes.errorbar(sizes, values, errors, fmt="o-", color=plots.COLORS[0], capsize=3, label="expected, 95% interval")
    axes.axhspan(1, 1.05, color=plots.COLORS[2], alpha=0.3, label="5% more data")
    for size, label, color in (
        (advice.largest_in_noise, "largest in the noise", plots.COLORS[1]),
        (advice.largest_within[-1], "largest within 5% more data", plots.COLORS[2]),
    ):
        if size is not None:
            axes.axvline(size, color=color, ls="--", label=f"{label}: {size}")
    axes.set(yscale="log", ylim=(0.8, min(max(4.0, 1.5 * float(np.nanmax(values))), 1e4)))
    plots.log_values(axes.yaxis)


def _draw_rates(axes, advice: EndAdvice) -> None:
    groups = {
        "to the end": [ending for ending in advice.endings if ending.ended],
        "ended early": [ending for ending in advice.endings if not ending.ended and not ending.diverged],
        "diverged": [ending for ending in advice.endings if ending.diverged],
    }
    draw_runs(axes, groups, advice.choices)
    axes.set(title="Runs of all lengths, and the best rate at the length asked for", ylabel="learning rate", yscale="log")
