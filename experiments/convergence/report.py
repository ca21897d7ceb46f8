"""Tables and verdict of the convergence study, from its records alone."""

import math
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from experiments.harness.goal_words import has_collapsed, heading, in_short, in_words, is_share, show
from experiments.harness.schedules import rate_words
from experiments.harness.sentences import between_looks
from experiments.harness.speed import has_loading, times
from experiments.harness.study import describe_setting, size_cell
from experiments.harness.target import bound_words
from jaxbatch.advice.critical import CriticalFit, critical_batch_size
from jaxbatch.advice.full_sweep import reached_at
from jaxbatch.gradients.noise import GradientStatistics, gradient_noise_scale
from jaxbatch.intervals import Interval, interval, unknown
from jaxbatch.results.records import Record
from jaxbatch.results.report import print_table
from jaxbatch.separate_groups import product
from jaxbatch.training.goals import Goal, as_goal

NAMES = {"same": "the same rate for all", "tuned": "a rate tuned for each size"}
STRETCHES = (0.0, 0.9, 0.95, 0.97, 1.0)  # bounds of validation accuracy; the noise scale is given between each two
PARTS = 4  # stretches of a metric that is no accuracy, which has no bounds of its own


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


def is_lost(goal: Goal, run: Record) -> bool:
    """Whether a run has diverged, or has collapsed (ends below half of its best accuracy)."""
    return run["diverged"] or has_collapsed(goal, run[f"validation_{goal.metric}"], run[f"best_validation_{goal.metric}"])


def to_target(rows: Sequence[Record], key: str) -> Interval:
    """``updates``, ``epochs`` or ``examples`` of the runs that reached the target, when they did; the others are left out, and counted."""
    return interval([row[key] * reached_at(row) / row["updates"] if row["reached"] else None for row in rows], scale="log")


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
    return product(updates, times(records, rows[0]["batch_size"], name).times(1e-3))


def fit_critical(records: Sequence[Record], table: str) -> CriticalFit | None:
    """The critical batch size over the sizes that always reach the target; None with fewer than 3 of them."""
    sizes = all_reached(records, table)
    if len(sizes) < 3:
        return None
    return critical_batch_size({size: [reached_at(row) for row in runs_of(records, table, size)] for size in sizes})


def noise_scale(records: Sequence[Record], goal: Goal, batch_size: int | None = None, low: float = 0.0, high: float = 1.0) -> Interval:
    """The gradient noise scale over all evaluations of a size (or of all sizes), within an interval of the validation metric."""
    rows = [r for r in _noise_rows(records) if low <= (_measured(goal, r)) < high and batch_size in (None, r["batch_size"])]
    if not rows:
        return unknown()
    signal, trace = (np.array([math.nan if r[key] is None else r[key] for r in rows]) for key in ("signal", "trace"))
    return gradient_noise_scale(GradientStatistics(signal, trace))


def _noise_rows(records: Sequence[Record]) -> list[Record]:
    """The measurements of the noise at the rates that the sizes have now."""
    rows = [r for r in records if r["kind"] == "noise"]
    now = {size: rate_of(records, "tuned", size) for size in {r["batch_size"] for r in rows}}
    return [r for r in rows if r["learning_rate"] == now[r["batch_size"]]]


def _measured(goal: Goal, row: Record) -> float:
    value = row[f"validation_{goal.metric}"]
    return math.nan if value is None else value


def stretches(records: Sequence[Record], goal: Goal) -> dict[tuple[float, float], Interval]:
    """The noise scale within each stretch of the validation metric that has measurements, from the start of training on.

    The stretches of an accuracy are fixed; those of another metric hold equally many measurements.
    """
    if is_share(goal):
        pairs = list(zip(STRETCHES, STRETCHES[1:]))
    else:
        values = [value for row in _noise_rows(records) if math.isfinite(value := _measured(goal, row))]
        ends = np.quantile(values, np.linspace(0, 1, PARTS + 1)).tolist() if values else []
        ends[-1:] = [math.nextafter(end, math.inf) for end in ends[-1:]]  # the last value belongs to the last stretch
        pairs = list(zip(ends, ends[1:]))[:: 1 if goal.above else -1]
    scales = {ends: noise_scale(records, goal, None, *ends) for ends in pairs}
    return {ends: scale for ends, scale in scales.items() if scale.n}


def print_tables(console: Console, config, records: Sequence[Record], provenance: Record) -> None:
    """Prints both tables on reaching the target, then the noise scale."""
    setting = f"{rate_words(config)}, {bound_words(config)}"
    describe_setting(console, config, provenance, setting)
    goal, loaded = as_goal(config.target), has_loading(records)
    for table, name in NAMES.items():
        rows = []
        for size in sizes_of(records, table):
            runs = runs_of(records, table, size)
            row = [size_cell(config, size), f"{runs[0]['learning_rate']:g}", f"{sum(run['reached'] for run in runs)}/{len(runs)}"]
            if any(run["reached"] for run in runs):
                numbers = to_target(runs, "updates"), to_target(runs, "epochs"), to_target(runs, "examples")
                row += [f"{numbers[0]:,.0f}", f"{numbers[1]:.2f}", f"{numbers[2]:,.0f}"]
                row += [f"{seconds(records, runs, mode):.1f}" for mode in ("resident", "streamed")[: 1 + loaded]]
            else:
                row += [f"> {max(run['updates'] for run in runs):,}", f"> {max(run['epochs'] for run in runs):.0f}", *[""] * (2 + loaded)]
            row.append(show(goal, [run[f"best_validation_{goal.metric}"] for run in runs]))
            row.append(show(goal, [run[f"test_{goal.metric}"] for run in runs]))
            row.append(f"{sum(is_lost(goal, run) for run in runs)}/{len(runs)}")
            rows.append(row)
        columns = ["B", "rate", "reached", "updates", "epochs", "examples", "computation, s", *["with loading, s"] * loaded]
        columns += [heading(goal, "best validation {}"), heading(goal, "test {} at the end"), "lost"]
        title = f"To {in_words(goal)}, with {name} (means over the runs that reach it; seconds: updates × the time of an iteration, timed side "
        title += "by side; the end is at the target, or where the budget is used up; lost: diverged"
        title += f"{', or fell below half of its best' if is_share(goal) else ''})"
        print_table(console, title, columns, rows)
    rows = [[stretch_in_words(goal, *ends), f"{scale:,.0f}", str(scale.n)] for ends, scale in stretches(records, goal).items()]
    if rows:
        print_table(console, "Gradient noise scale on the way, examples (tuned runs)", [f"validation {goal.metric}", "scale", "places"], rows)


def stretch_in_words(goal: Goal, low: float, high: float, to: str = " to ") -> str:
    """A stretch of the metric, from where training comes."""
    if is_share(goal):
        return f"{100 * low:g}{to}{100 * high:g}%"
    return to.join(f"{end:.3g}" for end in ((low, high) if goal.above else (high, low)))


def verdict(config, records: Sequence[Record]) -> list[str]:
    """The sentences that the intervals allow, and no others."""
    fit = fit_critical(records, "tuned")
    sentences = [sentence for table in NAMES for sentence in _on_sizes(config, records, table)]
    between = between_looks([record for record in records if record["kind"] == "run"])
    return [*sentences, *_on_tuning(config, records), _on_fit(records, fit), *_on_noise(config, records, fit), *between]


def _on_sizes(config, records: Sequence[Record], table: str) -> list[str]:
    """Which sizes need the least, which miss the target, and which lose what they had reached."""
    goal, name, reached = as_goal(config.target), NAMES[table], all_reached(records, table)
    missed = [size for size in sizes_of(records, table) if size not in reached]
    text = f"With {name}, "
    if reached:
        runs, kinds = {size: runs_of(records, table, size) for size in reached}, ("resident", "streamed")[: 1 + has_loading(records)]
        fewest = min(reached, key=lambda size: to_target(runs[size], "examples").value)
        soonest, *slowed = (min(reached, key=lambda size: seconds(records, runs[size], kind).value) for kind in kinds)
        text += f"B = {fewest} needs the fewest examples to {in_words(goal)}, B = {soonest} the least computation"
        text += "".join(f", B = {size} the least time with loading" for size in slowed)
    else:
        text += f"no size always reaches {in_words(goal)}"
    if missed:
        shares = [f"{size} ({sum(run['reached'] for run in runs_of(records, table, size))} of {config.seeds})" for size in missed]
        text += f"; not every run reaches it within the budget at B = {', '.join(shares)}"
    sentences = [text + "."]
    for size in missed:
        lost = [run for run in runs_of(records, table, size) if is_lost(goal, run)]
        if lost:
            keys = [f"{part}validation_{goal.metric}" for part in ("best_", "")]
            best, end = (show(goal, [run[key] for run in lost], ".1f") + "%" * is_share(goal) for key in keys)
            sentences.append(
                f"B = {size} at rate {lost[0]['learning_rate']:g} is lost in {len(lost)} of {config.seeds} runs: from {best} at "
                f"best to {end} at the end."
            )
    return sentences


def _on_tuning(config, records: Sequence[Record]) -> list[str]:
    """What a rate of its own saves a size, where the size reaches the target with both rates."""
    both = sorted(set(all_reached(records, "same")) & set(all_reached(records, "tuned")))
    if not both:
        return []
    updates = {(table, size): to_target(runs_of(records, table, size), "updates").value for table in ("same", "tuned") for size in both}
    gains = {size: updates["same", size] / updates["tuned", size] for size in both}
    most = max(gains, key=gains.get)
    reach = f"Of the sizes that reach {in_short(as_goal(config.target))} both ways"
    return [f"{reach}, B = {most} gains most from tuning the rate: {gains[most]:.3g} times fewer updates."]


def _on_fit(records: Sequence[Record], fit: CriticalFit | None) -> str:
    if fit is None:
        return "No critical batch size: fewer than three sizes always reach the target at their tuned rates."
    return (
        f"With tuned rates, the updates fit S = S_min (1 + B_crit / B) with S_min = {fit.min_updates:,.0f} and B_crit = "
        f"{fit.critical_batch_size:,.0f}, over {len(all_reached(records, 'tuned'))} sizes."
    )


def _on_noise(config, records: Sequence[Record], fit: CriticalFit | None) -> list[str]:
    """The gradient noise scale on the way, and where the critical batch size lies to it."""
    scales = [scale for scale in stretches(records, as_goal(config.target)).values() if scale.n > 1]
    if not scales:
        if getattr(config, "task", None) and not any(record["kind"] == "noise" for record in records):
            return ["No gradient noise scale: an example's loss depends on the others in its batch, so it has no gradient of its own."]
        return []
    text = f"The gradient noise scale is {scales[0]:,.0f} examples at first"
    if len(scales) > 1:
        text += f" and {scales[-1]:,.0f} at the end"
    if fit is not None:
        low, high = min(scale.low for scale in scales), max(scale.high for scale in scales)
        critical = fit.critical_batch_size
        where = "below" if critical.high < low else "above" if critical.low > high else "within"
        text += f"; the critical batch size lies {where} the range of this scale"
    return [text + "."]
