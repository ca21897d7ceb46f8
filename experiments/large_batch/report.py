"""Table, figure and verdict of the huge-batch study, from its records alone."""

import pathlib
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from experiments.harness.goal_words import heading, is_share, scale
from experiments.harness.schedules import schedule_words
from experiments.harness.study import describe_setting, setting_of
from experiments.large_batch.arms import ARMS, find_arm
from experiments.large_batch.records import Standing, best_rate, ends, goal_of, has_gap, is_inside, loss_of, mean, parts, reported, standing
from jaxbatch.intervals import Interval
from jaxbatch.results import plots
from jaxbatch.results.records import Record
from jaxbatch.results.report import print_table

KIND_COLORS = {"helps": plots.COLORS[2], "nothing": plots.COLORS[0], "harms": plots.COLORS[1], "lost": plots.COLORS[1]}
PART_COLORS = (plots.COLORS[4], plots.COLORS[3])
KIND_WORDS = {"helps": "helps", "nothing": "no difference shows", "harms": "harms", "lost": "loses runs"}


def shown(config, estimate: Interval, signed: bool = False) -> str:
    """The metric, or a difference of it, as a table shows it."""
    goal = goal_of(config)
    form = ("+" if signed else "") + (".2f" if is_share(goal) else ".3g")
    return format(estimate.times(scale(goal)), form)


def updates_of(records: Sequence[Record], arm: str) -> int:
    """Updates in a run."""
    return int(ends(records, arm, "updates")[0])


def print_tables(console: Console, config, records: Sequence[Record], provenance: Record) -> None:
    """Every arm with its rate, its result, and its gap to the small batch; then the arms that are left out."""
    goal, loss = goal_of(config), loss_of(config, records)
    sizes = f"B = {config.batch_size:,} against {config.small_batch_size:,}, {config.epochs} epochs"
    describe_setting(console, config, provenance, sizes, *schedule_words(config), f"rates chosen with {config.tune_seeds} other seeds")
    rows = []
    for arm in reported(records):
        against, split = standing(config, records, arm), parts(config, records, arm)
        rate, metric = ends(records, arm, "learning_rate")[0], mean(ends(records, arm, f"test_{goal.metric}"))
        edge = "" if is_inside(config, rate) else " (edge)"
        own = arm == "small"
        rows.append(
            [
                arm,
                f"{rate:.3g}" + (" (rule)" if find_arm(arm).rule else edge),
                shown(config, metric) + (f", {against.lost} of {config.seeds} diverged" if against.lost else ""),
                "" if own else shown(config, against.gap, signed=True),
                "" if own else f"{split.optimization:+.3g}",
                "" if own else f"{split.generalization:+.3g}",
                f"{updates_of(records, arm):,}",
                f"{np.median(ends(records, arm, 'seconds')):.2g}",
                "" if arm in ("small", "plain") else against_plain(config, records, against),
            ]
        )
    losses = [f"train {loss}", f"test − train {loss}"]
    columns = ["arm", "rate", heading(goal, "test {}"), "minus small", *losses, "updates", "s per run", "against plain"]
    print_table(console, "Each arm at its best rate; differences are from the small batch, paired by seed", columns, rows)


def against_plain(config, records: Sequence[Record], outcome: Standing) -> str:
    """What an arm does, as the table shows it: the part of the gap that it closes, where there is one."""
    return f"closes {percent(outcome.closed):.0f}%" if outcome.kind == "helps" and has_gap(config, records) else KIND_WORDS[outcome.kind]


def percent(share: Interval) -> Interval:
    """A share in percent."""
    return share._replace(value=100 * share.value, low=100 * share.low, high=100 * share.high)


def named(config, records: Sequence[Record], arm: str, outcome: Standing) -> str:
    """An arm in a sentence, with the number that says how much it does."""
    more = updates_of(records, arm) / updates_of(records, "plain")
    notes = [f"{more:.3g} times the updates"] if more != 1 else []
    notes += [f"{outcome.lost} runs diverged"] if outcome.lost else []
    notes += ["by rule"] if find_arm(arm).rule else []
    if outcome.kind == "helps" and has_gap(config, records):
        return f"{arm} ({', '.join([f'{outcome.closed.times(100):.0f}%', *notes])})"
    return f"{arm} ({', '.join([shown(config, outcome.gain, signed=True), *notes])})"


def verdict(config, records: Sequence[Record]) -> list[str]:
    """The sentences that the intervals allow, and no others."""
    arms, goal = reported(records), goal_of(config)
    if not {"small", "plain"} <= set(arms):
        return ["No verdict: every rate diverged with the small batch or with plain training."]
    against = {arm: standing(config, records, arm) for arm in arms}
    unit, loss = " points" if is_share(goal) else "", loss_of(config, records)
    split, gap = parts(config, records, "plain"), against["plain"].gap
    what = f"Plain training at B = {config.batch_size:,} ends {shown(config, gap, signed=True)}{unit} of test {goal.metric} away from B = "
    what += f"{config.small_batch_size:,}" + ("" if goal.above else " (below 0 is worse)")
    sentences = [
        f"{what}: {'that is the gap to close' if has_gap(config, records) else 'no gap shows, so there is nothing to close'}. "
        f"Of the difference in test {loss}, {split.optimization:+.3g} is optimization (the training {loss} at the end) and "
        f"{split.generalization:+.3g} generalization (test less training)."
    ]
    groups = {kind: [arm for arm in arms if arm not in ("small", "plain") and against[arm].kind == kind] for kind in KIND_WORDS}
    groups["helps"].sort(key=lambda arm: -against[arm].gain.value)
    words = {
        "helps": "Closes this part of the gap: " if has_gap(config, records) else "Better than plain: ",
        "nothing": f"No difference from plain shows{unit and ', in points'}: ",
        "harms": f"Worse than plain{unit and ', in points'}: ",
        "lost": "Loses runs that plain does not: ",
    }
    for kind, members in groups.items():
        members_text = "; ".join(named(config, records, arm, against[arm]) for arm in members) or "none"
        sentences += [f"{words[kind]}{members_text}."] if members or kind in ("helps", "harms") else []
    level = [arm for arm in groups["helps"] if not (against[arm].gap.excludes(0) and against[arm].gap.value < 0)]
    if has_gap(config, records):
        sentences.append(f"Arms for which the intervals show no gap to the small batch: {', '.join(level) or 'none'}.")
    left = [f"{record['arm']} ({record['reason']})" for record in records if record["kind"] == "left_out"]
    lost = [arm for arm in ARMS if any(r["kind"] == "tune" and r["arm"] == arm for r in records) and best_rate(config, records, arm) is None]
    sentences += [f"Not defined here: {'; '.join(left)}."] if left else []
    sentences += [f"Diverged at every rate: {', '.join(lost)}."] if lost else []
    edges = [arm for arm in arms if find_arm(arm).rule is None and not is_inside(config, ends(records, arm, "learning_rate")[0])]
    sentences += [f"Arms whose best rate lies on the edge of the grid: {', '.join(edges)}. A better one may lie beyond."] if edges else []
    count = len(arms) - 2
    sentences.append(
        f"{count} arms were compared with n = {config.seeds} seeds; by chance alone about {0.05 * count:.1f} intervals would show a difference."
    )
    return sentences


def draw_figure(config, records: Sequence[Record], folder: pathlib.Path) -> pathlib.Path:
    """Draws the gap of every arm to the small batch, and its two parts."""
    arms = [arm for arm in reported(records) if arm != "small"]
    goal, loss, positions = goal_of(config), loss_of(config, records), np.arange(len(arms), dtype=float)
    figure, (left, right) = plots.subplots(1, 2, figsize=(13, 2 + 0.34 * len(arms)), sharey=True)
    against = {arm: standing(config, records, arm) for arm in arms}
    gaps = [outcome.gap.times(scale(goal)) for outcome in against.values()]
    _bars(left, gaps, positions, ["black" if arm == "plain" else KIND_COLORS[outcome.kind] for arm, outcome in against.items()], "o")
    split = [parts(config, records, arm) for arm in arms]
    colors = [color for color in PART_COLORS for _ in arms]
    _bars(right, [one[part] for part in (0, 1) for one in split], np.concatenate([positions - 0.15, positions + 0.15]), colors, "s")
    left.set_yticks(positions, [f"{arm} ({updates_of(records, arm):,})" for arm in arms])
    left.invert_yaxis()
    unit = ", points" if is_share(goal) else " (below 0 is worse)"
    left.set(title="Gap to the small batch, 95% intervals", xlabel=f"test {goal.metric} less that of B = {config.small_batch_size:,}{unit}")
    right.set(title="The gap as a sum of two", xlabel=f"{loss} less that of B = {config.small_batch_size:,}")
    kinds = [kind for kind in KIND_COLORS if any(outcome.kind == kind for arm, outcome in against.items() if arm != "plain")]
    for kind in kinds:
        left.plot([], [], "o", color=KIND_COLORS[kind], label=f"{KIND_WORDS[kind]} (against plain)")
    for color, label in zip(PART_COLORS, (f"optimization: training {loss}", "generalization: test less training"), strict=True):
        right.plot([], [], "s", color=color, label=label)
    for axes in (left, right):
        axes.axvline(0, color="black", lw=1)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14 if len(arms) > 8 else -0.4), ncols=2)
    figure.suptitle(f"{setting_of(config)}, B = {config.batch_size:,}, {config.epochs} epochs, {config.seeds} seeds; updates in brackets")
    return plots.save(figure, folder)


def _bars(axes, estimates: Sequence[Interval], positions: Sequence[float], colors: Sequence[str], marker: str) -> None:
    """Values with their intervals; one far beyond the others is written at the edge, with an arrow, so that the others can be told apart."""
    known = [one for one in estimates if np.isfinite(one.value)]
    reach = {position: np.nanmax(np.abs(one[:3])) for position, one in zip(positions, estimates, strict=True) if np.isfinite(one.value)}
    most = 5 * np.median(list(reach.values())) if known else 1.0
    within = [value for one in known for value in one[:3] if np.isfinite(value) and np.nanmax(np.abs(one[:3])) <= most]
    low, high = min([*within, 0.0]), max([*within, 0.0])
    margin = 0.06 * (high - low) or 1.0
    axes.set_xlim(low - 2 * margin, high + 2 * margin)
    for one, position, color in zip(estimates, positions, colors, strict=True):
        if reach.get(position, np.inf) <= most:
            ends = [[one.value - one.low], [one.high - one.value]] if np.isfinite(one[:3]).all() else None
            axes.errorbar([one.value], [position], xerr=ends, fmt=marker, color=color, capsize=3, ms=5)
        elif position in reach:
            edge, side, align = (low - margin, "<", "left") if one.value < 0 else (high + margin, ">", "right")
            axes.plot([edge], [position], side, color=color, ms=7)
            away = 8 if side == "<" else -8
            axes.annotate(f"{one.value:+.3g}", (edge, position), (away, 0), textcoords="offset points", ha=align, va="center", fontsize=8.5)
