"""Tables and verdict of the convergence study, from its records alone."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Console

from experiments.iteration_speed_report import times
from experiments.study import describe_setting
from jaxbatch.gradients.noise import GradientStatistics, gradient_noise_scale
from jaxbatch.intervals import Interval, interval, resampled
from jaxbatch.results.records import Record
from jaxbatch.results.report import print_table

NAMES = {"same": "the same rate for all", "tuned": "rate tuned for each size"}
STRETCHES = (0.0, 0.9, 0.95, 0.97, 1.0)  # bounds of validation accuracy; the noise scale is given between each two


def rate_of(records: Sequence[Record], table: str, batch_size: int) -> float | None:
    """The rate of a size in a table: the one recorded last, because a new run of the grid may have found another rate."""
    noted = [r for r in records if r["kind"] == "rate" and r["table"] == table and r["batch_size"] == batch_size]
    return noted[-1]["learning_rate"] if noted else None


def runs_of(records: Sequence[Record], table: str, batch_size: int) -> list[Record]:
    """The finished runs of one table and size at the size's rate, sorted by seed."""
    rate = rate_of(records, table, batch_size)
    rows = [r for r in records if r["kind"] == "run" and r["table"] == table and r["batch_size"] == batch_size]
    return sorted((r for r in rows if r["learning_rate"] == rate), key=lambda r: r["seed"])


def sizes_of(records: Sequence[Record], table: str) -> list[int]:
    """The batch sizes for which a table has runs."""
    return sorted({r["batch_size"] for r in records if r["kind"] == "run" and r["table"] == table})


def is_lost(run: Record) -> bool:
    """Whether a run has diverged, or has collapsed (ends below half of its best accuracy)."""
    return run["diverged"] or run["validation_accuracy"] < 0.5 * run["best_validation_accuracy"]


def to_target(rows: Sequence[Record], key: str) -> Interval:
    """``updates``, ``epochs``, ``examples`` or ``compute_seconds`` of the runs that reached the target."""
    return interval([row[key] for row in rows if row["reached"]])


def all_reached(records: Sequence[Record], table: str) -> list[int]:
    """The sizes of which every run reached the target; the others are censored (only a lower bound is known)."""
    return [size for size in sizes_of(records, table) if all(row["reached"] for row in runs_of(records, table, size))]


def seconds(records: Sequence[Record], rows: Sequence[Record], name: str) -> Interval:
    """Seconds to the target: updates × the time of an iteration, ``resident`` or ``streamed`` (with loading).

    The iterations of all sizes are timed side by side; the time in a run's own record also depends on whatever else the
    machine did in those minutes.
    """
    updates = to_target(rows, "updates")
    if updates.n == 0:
        return updates
    factor = times(records, rows[0]["batch_size"], name).value / 1e3
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
    """The gradient noise scale over all evaluations of a size (or of all sizes), within an interval of validation accuracy."""
    rows = [r for r in records if r["kind"] == "noise" and low <= r["validation_accuracy"] < high]
    rows = [r for r in rows if batch_size in (None, r["batch_size"])]
    now = {size: rate_of(records, "tuned", size) for size in {r["batch_size"] for r in rows}}
    rows = [r for r in rows if r["learning_rate"] == now[r["batch_size"]]]
    if not rows:
        return Interval(math.nan, math.nan, math.nan, 0)
    signal, trace = (np.array([math.nan if r[key] is None else r[key] for r in rows]) for key in ("signal", "trace"))
    return gradient_noise_scale(GradientStatistics(signal, trace))


def stretches(records: Sequence[Record]) -> dict[tuple[float, float], Interval]:
    """The noise scale within each interval of validation accuracy that has measurements."""
    found = {ends: noise_scale(records, None, *ends) for ends in zip(STRETCHES, STRETCHES[1:])}
    return {ends: scale for ends, scale in found.items() if scale.n}


def print_tables(console: Console, config, records: Sequence[Record], provenance: Record) -> None:
    """Prints both tables on reaching the target, then the noise scale."""
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
                row += [f"{seconds(records, runs, 'resident'):.1f}", f"{seconds(records, runs, 'streamed'):.1f}"]
            else:
                row += [f"> {max(run['updates'] for run in runs):,}", f"> {max(run['epochs'] for run in runs):.0f}", *[""] * 3]
            row.append(f"{interval([100 * run['best_validation_accuracy'] for run in runs]):.2f}")
            row.append(f"{interval([100 * run['test_accuracy'] for run in runs if run['test_accuracy'] is not None]):.2f}")
            row.append(f"{sum(is_lost(run) for run in runs)}/{len(runs)}")
            rows.append(row)
        columns = ["B", "rate", "reached", "updates", "epochs", "examples", "computation, s", "with loading, s"]
        columns += ["best validation accuracy, %", "test accuracy at the end, %", "lost"]
        title = f"To {target} validation accuracy, {name} (means of the runs that reach it; seconds: updates × an iteration, timed "
        title += "side by side; the end: at the target, or of the budget; lost: diverged, or fell below half of its best)"
        print_table(console, title, columns, rows)
    rows = [[f"{100 * low:g} to {100 * high:g}%", f"{found:,.0f}", str(found.n)] for (low, high), found in stretches(records).items()]
    print_table(console, "Gradient noise scale on the way, examples (tuned runs)", ["validation accuracy", "scale", "places"], rows)


def verdict(config, records: Sequence[Record]) -> list[str]:
    """The sentences that the intervals allow, and no others."""
    target, sentences = f"{100 * config.target_accuracy:g}%", []
    for table, name in NAMES.items():
        reached = all_reached(records, table)
        missed = [size for size in sizes_of(records, table) if size not in reached]
        text = f"With {name}, "
        if reached:
            runs = {size: runs_of(records, table, size) for size in reached}
            fewest = min(reached, key=lambda size: to_target(runs[size], "examples").value)
            soonest, loaded = (min(reached, key=lambda size: seconds(records, runs[size], name).value) for name in ("resident", "streamed"))
            text += f"B = {fewest} needs the fewest examples to {target} validation accuracy, B = {soonest} the least computation, "
            text += f"B = {loaded} the least time with loading"
        else:
            text += f"no size always reaches {target} validation accuracy"
        if missed:
            told = [f"{size} ({sum(run['reached'] for run in runs_of(records, table, size))} of {config.seeds})" for size in missed]
            text += f"; not always within the budget: B = {', '.join(told)}"
        sentences.append(text + ".")
        for size in missed:
            lost = [run for run in runs_of(records, table, size) if is_lost(run)]
            if lost:
                best, end = (interval([100 * run[key] for run in lost]) for key in ("best_validation_accuracy", "validation_accuracy"))
                sentences.append(
                    f"B = {size} at rate {lost[0]['learning_rate']:g} is lost in {len(lost)} of {config.seeds} runs: from {best:.1f}% at "
                    f"best to {end:.1f}% at the end."
                )
    both = sorted(set(all_reached(records, "same")) & set(all_reached(records, "tuned")))
    if both:
        gains = {
            size: to_target(runs_of(records, "same", size), "updates").value / to_target(runs_of(records, "tuned", size), "updates").value
            for size in both
        }
        most = max(gains, key=gains.get)
        sentences.append(
            f"Tuning the rate saves most at B = {most}: {gains[most]:.3g} times fewer updates, of the sizes that reach {target} both ways."
        )
    found = fit_critical(records, "tuned")
    if found is None:
        sentences.append("No critical batch size: fewer than three sizes always reach the target at their tuned rates.")
    else:
        sentences.append(
            f"Tuned, updates fit S = S_min (1 + B_crit / B) with S_min = {found.min_updates:,.0f} and B_crit = "
            f"{found.critical_batch_size:,.0f}, over {len(all_reached(records, 'tuned'))} sizes."
        )
    scales = [scale for scale in stretches(records).values() if scale.n > 1]
    if scales:
        first, last = scales[0], scales[-1]
        text = f"The gradient noise scale is {first:,.0f} examples at first"
        if len(scales) > 1:
            text += f" and {last:,.0f} at the end"
        if found is not None:
            low, high = min(scale.low for scale in scales), max(scale.high for scale in scales)
            critical = found.critical_batch_size
            where = "below" if critical.high < low else "above" if critical.low > high else "within"
            text += f"; the critical batch size lies {where} what it goes through"
        sentences.append(text + ".")
    return sentences
