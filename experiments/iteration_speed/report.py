"""Tables, figure and verdict of the speed study, from its records alone."""

import pathlib
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from experiments.harness.speed import has_loading, rounds_of, times
from experiments.harness.study import describe_setting, setting_of, size_cell
from jaxbatch.intervals import Interval, interval
from jaxbatch.results import plots
from jaxbatch.results.records import Record
from jaxbatch.results.report import print_table


def ratio(records: Sequence[Record], batch_size: int, above: str, below: str) -> Interval:
    """One time ÷ another of the same round, median over the rounds."""
    return interval([r[f"{above}_ms"] / r[f"{below}_ms"] for r in rounds_of(records, batch_size)], np.median, scale="log")


def shares(records: Sequence[Record], batch_size: int) -> tuple[float, float, float]:
    """Shares of forward, backward and the rest (update, fetching the batch) in a resident step; they sum to 1."""
    step, forward, gradient = (times(records, batch_size, name).value for name in ("resident", "forward", "gradient"))
    forward, gradient = min(forward, step), min(max(gradient, forward), step)
    return forward / step, (gradient - forward) / step, (step - gradient) / step


def iterations_per_epoch(records: Sequence[Record]) -> dict[int, int]:
    """Maps batch size to the number of whole batches in an epoch."""
    return {record["batch_size"]: record["iterations_per_epoch"] for record in records if record["kind"] == "compile"}


def loading_decides_from(config, records: Sequence[Record]) -> float | None:
    """The batch size at which loading alone takes as long as computation alone, on a line between the measured sizes.

    None if loading never takes longer at the larger sizes; the smallest size if it always takes longer.
    """
    sizes = np.array(config.batch_sizes, float)
    logs = np.log([ratio(records, size, "loading", "compute").value for size in config.batch_sizes])
    above = logs > 0
    if above.all():
        return float(sizes[0])
    last_below = np.flatnonzero(~above)[-1]
    if last_below == len(sizes) - 1:
        return None
    part = -logs[last_below] / (logs[last_below + 1] - logs[last_below])
    return float(np.exp(np.log(sizes[last_below]) + part * np.log(sizes[last_below + 1] / sizes[last_below])))


def print_tables(console: Console, config, records: Sequence[Record], provenance: Record) -> None:
    """Prints the times of epochs and iterations, and the parts of an iteration."""
    describe_setting(console, config, provenance, f"{config.rounds} rounds")
    per_epoch, compiles, loaded = iterations_per_epoch(records), {}, has_loading(records)
    for record in records:
        if record["kind"] == "compile":
            compiles.setdefault(record["batch_size"], record["seconds"])  # the first: nothing was cached yet
    epochs, parts = [], []
    for size in config.batch_sizes:
        names = ("resident", "streamed", "compute") if loaded else ("resident",)
        seconds = {name: times(records, size, name).times(per_epoch[size] / 1e3) for name in names}
        rate = interval([1e3 * size / record["resident_ms"] for record in rounds_of(records, size)], np.median, scale="log")
        epochs.append(
            [size_cell(config, size), f"{per_epoch[size]:,}", *(f"{seconds[name]:.2f}" for name in names), f"{rate:,.0f}", f"{compiles[size]:.1f}"]
        )
        parts.append(
            [
                size_cell(config, size),
                *(f"{times(records, size, name):.3g}" for name in (*names, *["loading"] * loaded)),
                *([f"{ratio(records, size, 'loading', 'compute'):.2f}"] if loaded else []),
                " / ".join(f"{100 * part:.0f}" for part in shares(records, size)),
            ]
        )
    columns = ["B", "iterations", "resident, s", *["with loading, s", "its computation alone, s"] * loaded, "resident examples/s", "compile, s"]
    print_table(console, "An epoch (scaled up from the timed stretch)", columns, epochs)
    columns = ["with loading", "computation", "loading", "loading ÷ computation"] * loaded
    columns = ["B", "resident", *columns, "forward / backward / rest, %"]
    print_table(console, "An iteration, ms; shares of a resident step", columns, parts)


def verdict(config, records: Sequence[Record]) -> list[str]:
    """The sentences that the intervals allow, and no others."""
    sizes, per_epoch, loaded = config.batch_sizes, iterations_per_epoch(records), has_loading(records)
    sentences = _loading_sentences(config, records) if loaded else []
    if len(sizes) > 1:
        for name, what in (("resident", "on the device"), ("streamed", "with loading"))[: 1 + loaded]:
            epoch = {size: times(records, size, name).value * per_epoch[size] for size in sizes}
            best = min(epoch, key=epoch.get)
            sentences.append(
                f"With the data {what}, an epoch is shortest at B = {best} and takes {epoch[sizes[0]] / epoch[best]:.3g} times as "
                f"long at B = {sizes[0]}."
                if name == "resident"
                else f"{what.capitalize()} it is shortest at B = {best}; B = {sizes[0]} takes {epoch[sizes[0]] / epoch[best]:.3g} times as long."
            )
    return sentences


def _loading_sentences(config, records: Sequence[Record]) -> list[str]:
    sizes, crossover = config.batch_sizes, loading_decides_from(config, records)
    costs = [times(records, size, "loading").value / size for size in sizes]
    clearly = [size for size in sizes if ratio(records, size, "loading", "compute").low > 1]
    host = f"the host needs {1e3 * costs[-1]:.0f} microseconds an example at B = {sizes[-1]}"
    surely = f" (the interval says so at B = {', '.join(map(str, clearly))})" if clearly else ""
    if crossover is None:
        return [f"Loading is hidden behind the computation up to B = {sizes[-1]}."]
    if crossover == sizes[0]:
        return [f"Loading is slower than the computation at every size: {host}, and the step needs less{surely}."]
    return [f"Above a batch size of about {crossover:.2g}, loading is slower than the computation: {host}, and the step needs less{surely}."]


def draw_figure(config, records: Sequence[Record], folder: pathlib.Path) -> pathlib.Path:
    """Epoch time, loading against computation, and the shares of a step, by batch size."""
    sizes, loaded = config.batch_sizes, has_loading(records)
    widths = (1, 1, 0.8) if loaded else (1, 0.8)
    figure, (left, *middle, right) = plots.subplots(1, len(widths), figsize=(5 * len(widths), 4.6), width_ratios=widths)
    _draw_epochs(left, config, records)
    if loaded:
        _draw_loading(middle[0], config, records)
    for axes in (left, *middle):
        plots.log_values(axes.yaxis)
        plots.size_ticks(axes, sizes)
        axes.legend()
    _draw_shares(right, sizes, records)
    figure.suptitle(f"{setting_of(config)}, median of {config.rounds} rounds with 95% intervals")
    return plots.save(figure, folder)


def _draw_epochs(axes, config, records: Sequence[Record]) -> None:
    sizes, per_epoch = config.batch_sizes, iterations_per_epoch(records)
    lines = (
        ("resident", "data on the device", plots.COLORS[0], "o-"),
        ("streamed", "with loading", plots.COLORS[1], "s-"),
        ("compute", "its computation alone", plots.COLORS[1], "s:"),
    )
    for name, label, color, dash in lines if has_loading(records) else lines[:1]:
        seconds = [times(records, size, name).times(per_epoch[size] / 1e3) for size in sizes]
        _line(axes, sizes, seconds, dash, color=color, label=label)
    axes.set(ylabel="seconds an epoch", title="An epoch")


def _draw_loading(axes, config, records: Sequence[Record]) -> None:
    for name, label, color, dash in (
        ("loading", "loading alone", plots.COLORS[3], "^-"),
        ("compute", "computation alone", plots.COLORS[1], "s:"),
        ("streamed", "both, overlapped", plots.COLORS[1], "s-"),
    ):
        _line(axes, config.batch_sizes, [times(records, size, name) for size in config.batch_sizes], dash, color=color, label=label)
    if (crossover := loading_decides_from(config, records)) is not None:
        axes.axvline(crossover, color="grey", lw=1, ls="--", label=f"loading is slower from {crossover:.2g} on")
    axes.set(ylabel="ms an iteration", title="An iteration with loading")


def _draw_shares(axes, sizes: Sequence[int], records: Sequence[Record]) -> None:
    bottom = np.zeros(len(sizes))
    parts = np.array([shares(records, size) for size in sizes]).T * 100
    for part, label, color in zip(parts, ("forward", "backward", "update and rest"), (plots.COLORS[5], plots.COLORS[0], "#BBBBBB"), strict=True):
        axes.bar(range(len(sizes)), part, bottom=bottom, color=color, label=label, width=0.7)
        for index, (height, base) in enumerate(zip(part, bottom, strict=True)):
            if height >= 8:
                axes.text(index, base + height / 2, f"{height:.0f}", ha="center", va="center", color="white" if color == plots.COLORS[0] else "black")
        bottom += part
    axes.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    axes.set(xlabel="batch size", ylabel="% of a step", title="What a step is made of", ylim=(0, 118))
    axes.grid(axis="x", visible=False)
    axes.legend(ncols=3, loc="upper center", fontsize=9, columnspacing=1, handlelength=1)


def _line(axes, sizes, intervals, dash, *, color, label):
    plots.band(axes, sizes, intervals, color=color, label=label, marker=dash[0], ls=dash[1:])
