"""Tables, figure and verdict of the ImageNet study, from its records alone."""

import pathlib
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from experiments.harness.arms import errors, table_of
from experiments.harness.sentences import compare_errors
from experiments.harness.study import describe_setting
from jaxbatch.intervals import interval
from jaxbatch.results import plots
from jaxbatch.results.records import Record
from jaxbatch.results.report import print_table


def name_of(growth: float) -> str:
    """The name of a growth's arm in the records.

    Example:
        >>> name_of(8.0)
        'growth_8'
    """
    return f"growth_{growth:g}"


def print_tables(console: Console, config, records: Sequence[Record], provenance: Record) -> None:
    """Prints batch sizes, updates and errors of the arms, and the throughput (with loading) at each batch size."""
    setting = f"ResNet-50 at {config.image_size} pixels, {config.dtype}, {config.epochs} epochs, a change every {config.every}"
    describe_setting(console, config, provenance, setting)
    rows = []
    for growth in config.growths:
        arm = name_of(growth)
        sizes, error = table_of(config, records, arm, "batch_size"), errors(config, records, arm)
        updates, seconds = (table_of(config, records, arm, key) for key in ("updates", "train_seconds"))
        reached = " → ".join(f"{int(size):,}" for size in dict.fromkeys(sizes[0][~np.isnan(sizes[0])].tolist()))
        ends = (interval(table[:, -1]) for table in (updates, error))
        rows.append([f"{growth:g}", reached, *(f"{end:,.5g}" for end in ends), f"{interval(seconds.sum(1)):,.0f}"])
    print_table(console, "By growth", ["growth", "batch sizes", "updates", "last error, %", "training, s"], rows)
    rates: dict[int, list[float]] = {}
    before: dict[tuple, int] = {}
    for record in records:
        updates = record["updates"] - before.get((record["arm"], record["seed"]), 0)
        before[record["arm"], record["seed"]] = record["updates"]
        rates.setdefault(record["batch_size"], []).append(updates * record["batch_size"] / record["train_seconds"])
    rows = [[f"{size:,}", f"{interval(speeds, np.median, scale='log'):,.0f}"] for size, speeds in sorted(rates.items())]
    print_table(console, "Examples a second, loading included", ["B", "median of the epochs"], rows)


def verdict(config, records: Sequence[Record]) -> list[str]:
    """The sentences that the intervals allow, and no others."""
    least, *others = config.growths
    last = {growth: errors(config, records, name_of(growth))[:, -1] for growth in config.growths}
    sentences = []
    for growth in others:
        sentences.append(compare_errors(f"Growth {growth:g}", f"{least:g}", interval(last[growth] - last[least], scale="linear")))
    return sentences


def draw_figure(config, records: Sequence[Record], folder: pathlib.Path) -> pathlib.Path:
    """Training loss and test error by epoch, one line for each growth."""
    figure, panels = plots.subplots(1, 2, figsize=(11, 4.6))
    epochs = np.arange(1, config.epochs + 1).tolist()
    for growth, color in zip(config.growths, plots.COLORS, strict=False):
        arm = name_of(growth)
        for axes, table in zip(panels, (table_of(config, records, arm, "loss"), errors(config, records, arm)), strict=True):
            label = f"batch × {growth:g}"
            plots.band(axes, epochs, [interval(table[:, n]) for n in range(config.epochs)], color=color, label=label)
    for axes, title, label in zip(panels, ("Loss", "Test error"), ("training loss", "test error, %"), strict=True):
        for change in range(config.every, config.epochs, config.every):
            axes.axvline(change + 0.5, color="grey", lw=0.6, ls=":")
        axes.set(xlabel="epoch", title=title, ylabel=label)
    panels[1].legend()
    figure.suptitle(f"ResNet-50 on {config.dataset}, {config.seeds} seeds; dotted: changes")
    return plots.save(figure, folder)
