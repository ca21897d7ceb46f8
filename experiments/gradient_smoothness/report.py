"""Tables, figures and verdict of the smoothness study, from its records alone.

Axes: T iterations.
"""

import math
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from rich.console import Console

from experiments.harness.optimizers import optimizer_words
from experiments.harness.study import data_of, describe_setting, setting_of, size_cell, size_label
from jaxbatch.interval_ends import Scale
from jaxbatch.intervals import Interval, interval, unknown
from jaxbatch.results import plots
from jaxbatch.results.records import Record
from jaxbatch.results.report import print_table
from jaxbatch.separate_groups import log_combination

PLATE = {"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1.5}  # background of text that lies over curves
STAGES = {"start": "at the start", "trained": "after training"}


def curves(records: Sequence[Record], batch_size: int, key: str) -> list[Float[np.ndarray, "T"]]:
    """``loss``, ``cosine`` or ``norm`` of every seed's run; NaN where it was not finite."""
    rows = [record for record in records if record["kind"] == "curve" and record["batch_size"] == batch_size]
    return [np.array(record[key], float) for record in sorted(rows, key=lambda record: record["seed"])]


def errors(records: Sequence[Record], batch_size: int, stage: str, key: str) -> list[float]:
    """``error`` or ``cosine`` relative to the full gradient, for all batches and seeds."""
    rows = [r for r in records if r["kind"] == "error" and r["batch_size"] == batch_size and r["place"] == stage]
    return [math.nan if value is None else value for record in rows for value in record[key]]


def jump(loss: Float[np.ndarray, "T"]) -> float:
    """Mean size of the change of the loss from one iteration to the next, over the second half of the run; NaN if no two in turn are finite.

    Example:
        >>> jump(np.array([9.0, 5.0, 1.0, 2.0, 1.0, 2.0]))
        1.0
    """
    changes = np.abs(np.diff(loss[len(loss) // 2 :]))
    return float(changes[np.isfinite(changes)].mean()) if np.isfinite(changes).any() else math.nan


def second_half(values: Float[np.ndarray, "T"]) -> float:
    """Mean of the finite values in the second half of a run; NaN if there are none.

    Example:
        >>> second_half(np.array([9.0, 9.0, 1.0, np.nan]))
        1.0
    """
    tail = values[len(values) // 2 :]
    return float(tail[np.isfinite(tail)].mean()) if np.isfinite(tail).any() else math.nan


def fate(records: Sequence[Record], batch_size: int) -> str:
    """How the runs ended: learned, diverged (not finite), or no better than a guess, or than the start where no guess is known."""
    rows = [record for record in records if record["kind"] == "curve" and record["batch_size"] == batch_size]
    diverged = [record["diverged_at_iteration"] for record in rows if record["diverged_at_iteration"] >= 0]
    if diverged:
        return f"{len(diverged)} of {len(rows)} diverged, first at iteration {min(diverged):,}"
    of_runs = [np.array(record["loss"], float) for record in rows]
    of_runs = [loss[np.isfinite(loss)] for loss in of_runs]  # a batch in which nothing counts has no loss
    lost = sum(not_learning(loss, record.get("guess_loss")) for loss, record in zip(of_runs, rows, strict=True))
    than = "a guess" if "guess_loss" in rows[0] else "at the start"
    return f"{lost} of {len(rows)} no better than {than}" if lost else "learned"


def not_learning(loss: Float[np.ndarray, "T"], guess_loss: float | None) -> bool:
    """Whether the mean loss over the last tenth is no better than that of a guess (all classes equally likely).

    None: what is learned may have no classes, and the mean over the first tenth takes the place of a guess.
    """
    tenth = max(1, len(loss) // 10)
    if len(loss) == 0 or not np.isfinite(loss).all():
        return True
    return bool(loss[-tenth:].mean() > (loss[:tenth].mean() if guess_loss is None else 0.98 * guess_loss))


def error_slope(config, records: Sequence[Record], stage: str) -> Interval:
    """Slope of log(relative squared error) against log(B); theory: -1."""
    groups = [errors(records, size, stage, "error") for size in config.batch_sizes]
    left_out = sum(not math.isfinite(value) for group in groups for value in group)
    groups = [np.array(group)[np.isfinite(group)] for group in groups]
    if len(groups) < 2 or min(map(len, groups)) == 0 or not all(group.mean() > 0 for group in groups):
        return unknown(left_out)
    sizes = np.log(config.batch_sizes) - np.mean(np.log(config.batch_sizes))
    return log_combination(groups, sizes / (sizes**2).sum())._replace(left_out=left_out)


def _each(records, batch_size: int, key: str, number: Callable) -> Interval:
    scale: Scale = "linear" if key == "cosine" else "any"
    return interval([number(values) for values in curves(records, batch_size, key)], scale=scale)


def print_tables(console: Console, config, records: Sequence[Record], provenance: Record) -> None:
    """Prints jumps of the loss, angles between gradients, and errors relative to the full gradient."""
    setting = f"{optimizer_words(config)} at rate {config.learning_rate:g}, {config.iterations:,} iterations"
    describe_setting(console, config, provenance, setting)
    rows = []
    for size in config.batch_sizes:
        rows.append(
            [
                size_cell(config, size),
                f"{_each(records, size, 'loss', second_half):.3f}",
                f"{_each(records, size, 'loss', jump):.4f}",
                f"{_each(records, size, 'cosine', second_half):.3f}",
                fate(records, size),
            ]
        )
    columns = ["B", "mean loss", "jump of the loss", "cosine of successive gradients", "runs"]
    print_table(console, "Second half of the run", columns, rows)
    rows = []
    for size in config.batch_sizes:
        row = [size_cell(config, size)]
        for stage in STAGES:
            error = interval(errors(records, size, stage, "error"))
            row += [f"{error:.3g}", f"{interval(errors(records, size, stage, 'cosine'), scale='linear'):.3f}"]
        rows.append(row)
    rows.append(["slope", *(cell for stage in STAGES for cell in (f"{error_slope(config, records, stage):.3f}", ""))])
    columns = ["B", *(f"{what}, {where}" for where in STAGES.values() for what in ("relative squared error", "cosine"))]
    print_table(console, "A batch's gradient against the full one, and the slope of log error by log B (theory: -1)", columns, rows)


def verdict(config, records: Sequence[Record]) -> list[str]:
    """The sentences that the intervals allow, and no others."""
    sentences = []
    lost = {size: fate(records, size) for size in config.batch_sizes if fate(records, size) != "learned"}
    for size, what in lost.items():
        sentences.append(f"B = {size} at rate {config.learning_rate:g}: {what}.")
    kept = [size for size in config.batch_sizes if size not in lost]
    if len(kept) > 1:
        jumps = [_each(records, size, "loss", jump) for size in kept]
        pairs = list(zip(jumps, jumps[1:]))
        falls = all(a.value > b.value for a, b in pairs)
        clear = all(a.low > b.high for a, b in pairs if a.n > 1 and b.n > 1) and jumps[0].n > 1
        sentences.append(
            f"From B = {kept[0]} to {kept[-1]} the loss jumps {jumps[0].value / jumps[-1].value:.3g} times less between iterations; "
            + (
                "the jump falls at every increase of the size, and the intervals do not overlap."
                if falls and clear
                else "the jump falls at every increase of the size."
                if falls
                else "the jump does not fall at every increase of the size."
            )
        )
    for size in kept[-1:]:
        turn = _each(records, size, "cosine", second_half)
        if turn.n and (turn.high if turn.n > 1 else turn.value) < 0:
            sentences.append(
                f"At B = {size} successive gradients point against each other in the second half (cosine {turn:.2f}): the steps cross a "
                "steep direction back and forth."
            )
    for stage, where in STAGES.items():
        slope = error_slope(config, records, stage)
        if slope.n:
            holds = "the interval contains the theory's -1" if not slope.excludes(-1) else "the interval does not contain the theory's -1"
            sentences.append(f"The squared error of a batch's gradient {where} is proportional to B^{slope:.3f}: {holds}.")
    return sentences


def draw_figure(config, records: Sequence[Record], folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws all curves over each other, one panel per size on the same scale, and errors relative to the full gradient."""
    return [
        _draw_overlaid(config, records, folder),
        _draw_panels(config, records, folder),
        _draw_errors(config, records, folder),
    ]


def _colors(config) -> dict[int, str]:
    return dict(zip(config.batch_sizes, plots.COLORS * (1 + len(config.batch_sizes) // 7)))


def _limits(config, records) -> tuple[float, float]:
    """One scale of the loss for all pictures, which holds nearly all values; curves that jump higher end at its edge."""
    finite = [loss[np.isfinite(loss)] for size in config.batch_sizes for loss in curves(records, size, "loss")]
    low, top = (pick((np.percentile(loss, part) for loss in finite if len(loss)), default=1.0) for pick, part in ((min, 1), (max, 99)))
    if getattr(config, "task", None):  # its loss may have any size
        return min(0.0, float(low)), float(top + 0.05 * abs(top))
    return 0.0, float(np.clip(top * 1.05, 0.5, 5.0))


def _draw_overlaid(config, records, folder) -> pathlib.Path:
    figure, axes = plots.subplots(figsize=(9, 5))
    for size, color in _colors(config).items():
        loss = curves(records, size, "loss")[0]
        axes.plot(np.arange(1, len(loss) + 1), loss, color=color, lw=0.8, label=f"B = {size:,}")
    axes.set(xlabel="iteration", ylabel="loss of the batch", ylim=_limits(config, records), xlim=(0, config.iterations))
    axes.set_title(f"{data_of(config)}, {optimizer_words(config)} at rate {config.learning_rate:g}, one seed")
    legend = axes.legend(loc="upper right", frameon=True, framealpha=0.9)
    for line in legend.get_lines():
        line.set_linewidth(3)
    return plots.save(figure, folder, "overlaid")


def _draw_panels(config, records, folder) -> pathlib.Path:
    count = len(config.batch_sizes)
    figure, panels = plots.subplots(2, count, figsize=(3.1 * count, 5.6), sharex=True, sharey="row", squeeze=False)
    for (upper, lower), (size, color) in zip(panels.T, _colors(config).items(), strict=True):
        for row, key in ((upper, "loss"), (lower, "cosine")):
            values = curves(records, size, key)[0]
            row.plot(np.arange(1, len(values) + 1), values, color=color, lw=0.6)
        upper.set_title(f"B = {size_label(size)}")
        loss_jump = _each(records, size, "loss", jump)
        upper.text(0.97, 0.95, f"jump {loss_jump.value:.2g}", transform=upper.transAxes, ha="right", va="top", fontsize=10, bbox=PLATE)
        mean = _each(records, size, "cosine", second_half).value
        lower.axhline(0, color="grey", lw=0.8)
        lower.text(0.97, 0.05, f"mean {mean:.2f}", transform=lower.transAxes, ha="right", va="bottom", fontsize=10, bbox=PLATE)
        what = fate(records, size)
        if what != "learned":
            style = {"ha": "center", "va": "center", "color": "black", "fontsize": 10, "bbox": PLATE}
            upper.text(0.5, 0.5, what.replace(", ", "\n").replace(" than", "\nthan"), transform=upper.transAxes, **style)
    panels[0][0].set(ylabel="loss of the batch", ylim=_limits(config, records))
    panels[1][0].set(ylabel="cosine with the\ngradient before", ylim=(-1.05, 1.05))
    figure.supxlabel("iteration", fontsize=11)
    figure.suptitle(
        f"{setting_of(config)}, {optimizer_words(config)} at rate {config.learning_rate:g}, one seed; numbers: second half, {config.seeds} seeds"
    )
    return plots.save(figure, folder, "figure")


def _draw_errors(config, records, folder) -> pathlib.Path:
    figure, (left, right) = plots.subplots(1, 2, figsize=(11, 4.4))
    sizes = np.array(config.batch_sizes)
    for (stage, where), color, marker in zip(STAGES.items(), plots.COLORS, "os"):
        squared_errors = [interval(errors(records, size, stage, "error")) for size in sizes]
        slope = error_slope(config, records, stage)
        plots.band(left, config.batch_sizes, squared_errors, color=color, marker=marker, label=f"{where}, slope {slope:.2f}")
        cosines = [interval(errors(records, size, stage, "cosine"), scale="linear") for size in sizes]
        plots.band(right, config.batch_sizes, cosines, color=color, marker=marker, label=where)
        if np.isfinite(squared_errors[0].value):
            left.plot(sizes, squared_errors[0].value * sizes[0] / sizes, ":", color="grey", lw=1.2)
    left.plot([], [], ":", color="grey", label="theory, slope -1")
    left.set(ylabel="relative squared error", title="Error of a batch's gradient")
    right.set(ylabel="cosine with the full gradient", title="Direction of a batch's gradient", ylim=(None, 1.03))
    plots.log_values(left.yaxis)
    for axes in (left, right):
        plots.size_ticks(axes, config.batch_sizes)
        axes.legend()
    return plots.save(figure, folder, "errors")
