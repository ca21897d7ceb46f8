"""Tables, figure and verdict of the convergence study, from its records alone."""

import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Console

from experiments.iteration_speed_report import times
from experiments.study import describe_setting
from jaxbatch import plots
from jaxbatch.intervals import Interval, interval, resampled
from jaxbatch.noise import GradientStatistics, gradient_noise_scale
from jaxbatch.records import Record
from jaxbatch.report import print_table

NAMES = {"same": "the same rate for all", "tuned": "rate tuned for each size"}
STRETCHES = (0.0, 0.9, 0.95, 0.97, 1.0)  # of test accuracy, in which the noise scale is told apart


def runs_of(records: Sequence[Record], table: str, batch_size: int) -> list[Record]:
    """The finished runs of one table and size, by seed; of the rate measured last, should there be several."""
    rows = [r for r in records if r["kind"] == "run" and r["table"] == table and r["batch_size"] == batch_size]
    return sorted((r for r in rows if r["learning_rate"] == rows[-1]["learning_rate"]), key=lambda r: r["seed"])


def sizes_of(records: Sequence[Record], table: str) -> list[int]:
    """The batch sizes that a table has runs of."""
    return sorted({r["batch_size"] for r in records if r["kind"] == "run" and r["table"] == table})


def to_target(rows: Sequence[Record], key: str) -> Interval:
    """``updates``, ``epochs``, ``examples`` or ``compute_seconds`` of the runs that reached the target."""
    return interval([row[key] for row in rows if row["reached"]])


def all_reached(records: Sequence[Record], table: str) -> list[int]:
    """The sizes all of whose runs reached the target; the others are censored."""
    return [size for size in sizes_of(records, table) if all(row["reached"] for row in runs_of(records, table, size))]


def with_loading(records: Sequence[Record], rows: Sequence[Record]) -> Interval:
    """Seconds to the target if every batch is loaded: updates × the time of an iteration with loading."""
    updates = to_target(rows, "updates")
    if updates.n == 0:
        return updates
    factor = times(records, rows[0]["batch_size"], "streamed").value / 1e3
    return Interval(*(factor * part for part in updates[:3]), updates.n)


class CriticalFit(NamedTuple):
    """The fit of S = S_min (1 + B_crit / B)."""

    min_updates: Interval
    critical_batch_size: Interval


def fit_critical(records: Sequence[Record], table: str) -> CriticalFit | None:
    r"""Updates S to the target as :math:`S = S_\min (1 + B_\text{crit} / B)`, over the sizes that always reach it.

    Least squares of the relative error, which is linear in :math:`S_\min` and :math:`E_\min = S_\min B_\text{crit}`.
    Intervals over the seeds. None with fewer than 3 sizes.

    References:
        McCandlish et al., `An Empirical Model of Large-Batch Training <https://arxiv.org/abs/1812.06162>`_, 2018: eq. 2.7
        in one variable.
    """
    sizes = all_reached(records, table)
    if len(sizes) < 3:
        return None
    groups = [[row["updates"] for row in runs_of(records, table, size)] for size in sizes]

    def solve(drawn):
        rows = [(1 / value, 1 / (value * size)) for size, group in zip(sizes, drawn, strict=True) for value in group]
        (least, examples), *_ = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)
        return least, examples

    def critical(drawn):
        least, examples = solve(drawn)
        return examples / least if least > 0 else math.inf

    return CriticalFit(resampled(groups, lambda drawn: solve(drawn)[0]), resampled(groups, critical))


def noise_scale(records: Sequence[Record], batch_size: int | None = None, low: float = 0.0, high: float = 1.0) -> Interval:
    """The gradient noise scale over all evaluations of a size (or all), within a stretch of test accuracy."""
    rows = [r for r in records if r["kind"] == "noise" and low <= r["test_accuracy"] < high]
    rows = [r for r in rows if batch_size in (None, r["batch_size"])]
    if not rows:
        return Interval(math.nan, math.nan, math.nan, 0)
    signal, trace = (np.array([math.nan if r[key] is None else r[key] for r in rows]) for key in ("signal", "trace"))
    return gradient_noise_scale(GradientStatistics(signal, trace))


def print_tables(console: Console, config, records: Sequence[Record], provenance: Record) -> None:
    """The way to the target in both tables, then the noise scale."""
    setting = f"SGD with momentum {config.momentum:g}, up to {config.epochs} epochs or {config.max_updates:,} updates"
    describe_setting(console, config, provenance, setting)
    target = f"{100 * config.target_accuracy:g}%"
    for table, name in NAMES.items():
        rows = []
        for size in sizes_of(records, table):
            runs = runs_of(records, table, size)
            row = [f"{size:,}", f"{runs[0]['learning_rate']:g}", f"{sum(run['reached'] for run in runs)}/{len(runs)}"]
            if any(run["reached"] for run in runs):
                numbers = to_target(runs, "updates"), to_target(runs, "epochs"), to_target(runs, "examples")
                row += [f"{numbers[0]:,.0f}", f"{numbers[1]:.2f}", f"{numbers[2]:,.0f}"]
                row += [f"{to_target(runs, 'compute_seconds'):.1f}", f"{with_loading(records, runs):.1f}"]
            else:
                row += [f"> {max(run['updates'] for run in runs):,}", f"> {max(run['epochs'] for run in runs):.0f}", *[""] * 3]
            row.append(f"{interval([100 * run['best_accuracy'] for run in runs]):.2f}")
            rows.append(row)
        columns = ["B", "rate", "reached", "updates", "epochs", "examples", "computation, s", "with loading, s", "best accuracy, %"]
        print_table(console, f"To {target} test accuracy, {name} (means of the runs that reach it)", columns, rows)
    rows = [
        [f"{100 * low:g} to {100 * high:g}%", f"{found:,.0f}", str(found.n)]
        for low, high in zip(STRETCHES, STRETCHES[1:])
        if (found := noise_scale(records, None, low, high)).n
    ]
    print_table(console, "Gradient noise scale on the way, examples (tuned runs)", ["test accuracy", "scale", "places"], rows)


def verdict(config, records: Sequence[Record]) -> list[str]:
    """The sentences that the intervals allow, and no others."""
    target, sentences = f"{100 * config.target_accuracy:g}%", []
    for table, name in NAMES.items():
        reached = all_reached(records, table)
        missed = [size for size in sizes_of(records, table) if size not in reached]
        text = f"With {name}, "
        if reached:
            fewest, soonest = (
                min(reached, key=lambda size: to_target(runs_of(records, table, size), key).value)
                for key in ("examples", "compute_seconds")
            )
            text += f"B = {fewest} needs the fewest examples to {target} and B = {soonest} the least computation"
        else:
            text += f"no size always reaches {target}"
        if missed:
            told = [f"{size} ({sum(run['reached'] for run in runs_of(records, table, size))} of {config.seeds})" for size in missed]
            text += f"; not always within the budget: B = {', '.join(told)}"
        sentences.append(text + ".")
    both = sorted(set(all_reached(records, "same")) & set(all_reached(records, "tuned")))
    if both:
        gains = {
            size: to_target(runs_of(records, "same", size), "updates").value / to_target(runs_of(records, "tuned", size), "updates").value
            for size in both
        }
        most = max(gains, key=gains.get)
        sentences.append(f"Tuning the rate saves most at B = {most}: {gains[most]:.3g} times fewer updates, of the sizes that reach {target} both ways.")
    found = fit_critical(records, "tuned")
    if found is None:
        sentences.append("No critical batch size: fewer than three sizes always reach the target at their tuned rates.")
    else:
        sentences.append(
            f"Tuned, updates fit S = S_min (1 + B_crit / B) with S_min = {found.min_updates:,.0f} and B_crit = "
            f"{found.critical_batch_size:,.0f}, over {len(all_reached(records, 'tuned'))} sizes."
        )
    scale = noise_scale(records)
    if scale.n:
        text = f"The gradient noise scale on the way is {scale:,.0f} examples"
        if not math.isfinite(scale.high):
            text += ": its signal cannot be told from zero, record more places"
        elif found is not None:
            apart = scale.low > found.critical_batch_size.high or scale.high < found.critical_batch_size.low
            text += ", which the critical batch size's interval " + ("does not meet" if apart else "meets")
        sentences.append(text + ".")
    return sentences


def draw_figure(config, records: Sequence[Record], folder: pathlib.Path) -> pathlib.Path:
    """Updates and seconds to the target by batch size, and the noise scale by test accuracy."""
    figure, (left, middle, right) = plots.subplots(1, 3, figsize=(15, 4.8))
    for (table, name), color, marker in zip(NAMES.items(), plots.COLORS, "os"):
        reached = [size for size in sizes_of(records, table) if any(row["reached"] for row in runs_of(records, table, size))]
        missed = [size for size in sizes_of(records, table) if size not in reached]
        rows = {size: runs_of(records, table, size) for size in (*reached, *missed)}
        style = {"color": color, "marker": marker}
        plots.band(left, reached, [to_target(rows[s], "updates") for s in reached], label=name, **style)
        plots.band(middle, reached, [to_target(rows[s], "compute_seconds") for s in reached], label=f"{name}: computation", **style)
        plots.band(middle, reached, [with_loading(records, rows[s]) for s in reached], label=f"{name}: with loading", ls=":", mfc="white", **style)
        for axes, key in ((left, "updates"), (middle, "compute_seconds")):
            spent = [max(row[key] for row in rows[size]) for size in missed]
            label = f"{name}: not reached by here" if axes is left else None
            axes.plot(missed, spent, "^", color=color, mfc="white", ms=9, label=label if missed else None)
    sizes = sorted({size for table in NAMES for size in sizes_of(records, table)})
    found = fit_critical(records, "tuned")
    if found is not None and found.min_updates.value > 0:
        x = np.geomspace(min(sizes), max(sizes), 100)
        curve = found.min_updates.value * (1 + found.critical_batch_size.value / x)
        left.plot(x, curve, "--", color="grey", lw=1.2, label=f"fit: B_crit = {found.critical_batch_size:,.0f}")
    target = f"{100 * config.target_accuracy:g}%"
    left.set(ylabel="updates", title=f"Updates to {target}")
    middle.set(ylabel="seconds", title=f"Time to {target}")
    for axes in (left, middle):
        plots.log_values(axes.yaxis)
        plots.size_ticks(axes, sizes)
        axes.legend(fontsize=9)
    places, labels = [], []
    for low, high in zip(STRETCHES, STRETCHES[1:]):
        scale = noise_scale(records, None, low, high)
        if scale.n and np.isfinite(scale.value) and scale.value > 0:
            place = len(places)
            top = scale.high if np.isfinite(scale.high) else scale.value * 10
            bottom = max(scale.low, scale.value / 100) if np.isfinite(scale.low) else scale.value
            right.errorbar(place, scale.value, [[scale.value - bottom], [top - scale.value]] if scale.n > 1 else None, fmt="o",
                           color=plots.COLORS[2], capsize=4, ms=7)
            places.append(place)
            labels.append(f"{100 * low:g}–{100 * high:g}%\nn = {scale.n}")
    if found is not None and math.isfinite(found.critical_batch_size.value):
        right.axhline(found.critical_batch_size.value, color="grey", ls="--", label="critical batch size of the fit")
        if math.isfinite(found.critical_batch_size.high):
            right.axhspan(found.critical_batch_size.low, found.critical_batch_size.high, color="grey", alpha=0.2, lw=0)
        right.legend()
    right.set_xticks(places, labels)
    right.margins(x=0.2)
    plots.log_values(right.yaxis)
    right.set(xlabel="test accuracy", ylabel="examples", title="Gradient noise scale on the way")
    figure.suptitle(f"{config.dataset}, SimpleCNN, SGD with momentum {config.momentum:g}, {config.seeds} seeds, 95% intervals")
    return plots.save(figure, folder)
