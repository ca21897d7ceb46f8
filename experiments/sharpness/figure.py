"""The figure of the sharpness study: curvature on the way, at the solutions, the line between them, further training."""

import pathlib
from collections.abc import Sequence

from experiments.harness.optimizers import optimizer_words
from experiments.harness.study import setting_of
from experiments.sharpness.report import held_out_metric, solutions, stability_limit, sweep_of, title_of
from jaxbatch.advice.full_sweep import best_rates
from jaxbatch.intervals import Interval, interval
from jaxbatch.results import plots
from jaxbatch.results.records import Record


def draw_figure(config, records: Sequence[Record], folder: pathlib.Path) -> pathlib.Path:
    """Four panels; all values are means over seeds with their intervals."""
    figure, ((eigenvalue, ends), (line, on)) = plots.subplots(2, 2, figsize=(13, 9))
    sizes = (config.small_batch_size, config.large_batch_size)
    _largest_eigenvalue(config, records, eigenvalue, sizes)
    _ends(config, records, ends, sizes)
    comparison = "loss" if solutions(records, "loss") else "epochs"
    _line(config, records, line, comparison)
    for color, begun, size in ((0, sizes[0], sizes[0]), (1, sizes[1], sizes[0]), (4, sizes[1], sizes[1])):
        wanted = {"kind": "continued", "comparison": comparison, "batch_size": begun, "with_batch_size": size}
        rows = [row for row in records if wanted.items() <= row.items()]
        _curve(on, _by(rows, "epoch", "loss"), plots.COLORS[color], f"from B = {begun:,}, with B = {size:,}")
    on.set(title=f"Training on from solutions\n{title_of(config, comparison)}", xlabel="epochs", ylabel="training loss")
    for axes in (eigenvalue, ends, line, on):
        if any(len(one.get_xdata()) for one in axes.lines):
            plots.log_values(axes.yaxis)
    for axes in (eigenvalue, ends, line, on):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=9, loc="center right" if axes is ends else "best")
    figure.suptitle(f"{setting_of(config)}, {optimizer_words(config)}, {config.seeds} seeds")
    return plots.save(figure, folder)


def _by(rows: Sequence[Record], field: str, name: str) -> dict[float, Interval]:
    groups: dict[float, list] = {}
    for row in rows:
        groups.setdefault(row[field], []).append(row[name])
    return {key: interval(values) for key, values in sorted(groups.items())}


def _curve(axes, values: dict[float, Interval], color: str, label: str, **style) -> None:
    known = {key: one for key, one in values.items() if one.n}
    if known:
        plots.band(axes, list(known), list(known.values()), color=color, label=label, **style)


def _largest_eigenvalue(config, records, axes, sizes) -> None:
    rates = {size: rate for size, (rate, _) in best_rates(sweep_of(records)).items()}
    for size, color in zip(sizes, plots.COLORS, strict=False):
        on_way = [row for row in records if row["kind"] == "way" and (row["batch_size"] == size or row["stage"] == 0)]
        ends = [row for row in records if row["kind"] == "solution" and row["batch_size"] == size and row["comparison"] == "epochs"]
        rows = [row | {"epoch": round(row["epoch"] * 4) / 4} for row in (*on_way, *ends)]
        _curve(axes, _by(rows, "epoch", "largest"), color, f"B = {size:,}", marker="o")
        limit = stability_limit(config, rates[size]) if size in rates else None
        if limit is not None:
            axes.axhline(limit, color=color, ls=":", label=f"2(1+β)/η at B = {size:,}")
    axes.set(title="Largest eigenvalue on the way", xlabel="epochs", ylabel="largest eigenvalue")


def _ends(config, records, axes, sizes) -> None:
    marks = (("largest", "o", "largest eigenvalue"), ("trace", "s", "trace"))
    for (name, mark, label), (size, color) in ((m, s) for m in marks for s in zip(sizes, plots.COLORS, strict=False)):
        xs, ys = [], []
        for number, comparison in enumerate(("epochs", "loss")):
            for pair in solutions(records, comparison):
                row = pair[sizes.index(size)]
                xs.append(number + (0.12 if size == sizes[1] else -0.12))
                ys.append(row[name])
        if ys and min(ys) > 0:
            axes.plot(xs, ys, mark, color=color, mfc="none" if name == "trace" else color, label=f"{label}, B = {size:,}")
    axes.set(title="At the solutions, each seed", ylabel="curvature", xlim=(-0.5, 2.4))
    axes.set_xticks([0, 1], [title_of(config, comparison) for comparison in ("epochs", "loss")])


def _line(config, records, axes, comparison: str) -> None:
    rows, metric = [row for row in records if row["kind"] == "line" and row["comparison"] == comparison], held_out_metric(records)
    _curve(axes, _by(rows, "point", "loss"), plots.COLORS[2], "training loss")
    _curve(axes, _by(rows, "point", f"validation_{metric}"), plots.COLORS[3], f"validation {metric}", ls="--")
    for position in (0, 1):
        axes.axvline(position, color="#999999", lw=0.8)
    axes.set(title=f"On the line between solutions {title_of(config, comparison)}", xlabel="0: small batch, 1: large batch", ylabel="loss")
