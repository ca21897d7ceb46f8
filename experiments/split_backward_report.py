"""Tables, figure and verdict of the split-backward study, from its records alone."""

import pathlib
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from jaxbatch import plots
from jaxbatch.intervals import Interval, interval
from jaxbatch.records import Record
from jaxbatch.report import print_table
from jaxbatch.split import largest_stable_curvature

ARMS = ("one", "split", "scaled", "small")
SAME_UPDATE = 1e-3  # of a step: far above rounding, far below what any other difference makes


def arm_names(num_groups: int) -> dict[str, str]:
    """The arms as a reader sees them."""
    return {
        "one": "(a) one update",
        "split": f"(b) split in {num_groups}",
        "scaled": f"(c) {num_groups} × the rate",
        "small": f"(d) {num_groups} small",
    }


def curve(records: Sequence[Record], arm: str, seed: int) -> list[Record]:
    """The evaluations of one arm and seed, in order."""
    rows = [r for r in records if r["kind"] == "curve" and r["arm"] == arm and r["seed"] == seed]
    return sorted(rows, key=lambda row: row["segment"])


def seeds_of(records: Sequence[Record]) -> list[int]:
    """The seeds that have measurements."""
    return sorted({r["seed"] for r in records if r["kind"] == "curve"})


def final(records: Sequence[Record], arm: str, key: str) -> list[float]:
    """A value at each seed's last evaluation; NaN for a diverged run."""
    lasts = [curve(records, arm, seed)[-1] for seed in seeds_of(records)]
    return [float("nan") if last["diverged"] else last[key] for last in lasts]


def is_lost(rows: Sequence[Record]) -> bool:
    """Whether a run has diverged, or has collapsed: ends below half of the best accuracy it had."""
    return rows[-1]["diverged"] or rows[-1]["test_accuracy"] < 0.5 * max(row["test_accuracy"] for row in rows)


def to_target(records: Sequence[Record], arm: str, key: str, target: float) -> list[float]:
    """``examples``, ``updates`` or ``seconds`` at the first evaluation at the target; NaN where not reached."""
    found = []
    for seed in seeds_of(records):
        hits = (row[key] for row in curve(records, arm, seed) if row["test_accuracy"] >= target)
        found.append(next(hits, float("nan")))
    return found


def paired(records: Sequence[Record], a: str, b: str, values, *args) -> Interval:
    """Interval of the difference ``a − b``, seed by seed."""
    return interval(np.subtract(values(records, a, *args), values(records, b, *args)))


def cost_ratio(records: Sequence[Record], name: str) -> Interval:
    """Time of a kind of step ÷ time of one ordinary step, median over rounds."""
    rounds = [r for r in records if r["kind"] == "cost"]
    return interval([r[f"{name}_ms"] / r["one_ms"] for r in rounds], np.median)


def print_tables(console: Console, config, records: Sequence[Record], provenance: Record) -> None:
    """Accuracy, way to the target, cost of a step, distances. Every interval is a 95% bootstrap interval."""
    names, target, seeds = arm_names(config.num_groups), config.target_accuracy, seeds_of(records)
    where = f"{provenance['device']}, {provenance['num_cores']} cores, jax {provenance['jax']}"
    console.print(
        f"\n{config.dataset}, {config.model}, B = {config.batch_size}, K = {config.num_groups}, {config.optimizer} at rate "
        f"{config.learning_rate:g}"
        + (f", momentum {config.momentum:g}" if config.optimizer == "sgd" else "")
        + f", {config.epochs} epochs, {len(seeds)} seeds; {where}",
        soft_wrap=True,
    )
    ends, ways = [], []
    for arm in ARMS:
        reached = np.isfinite(to_target(records, arm, "examples", target)).sum()
        lost = sum(is_lost(curve(records, arm, seed)) for seed in seeds)
        accuracy = interval(np.multiply(final(records, arm, "test_accuracy"), 100))
        loss = interval(final(records, arm, "test_loss"))
        worst = f"{100 * np.nanmin([*final(records, arm, 'test_accuracy'), np.inf]):.2f}"
        ends.append([names[arm], f"{accuracy:.2f}", worst, f"{loss:.3f}", f"{lost}/{len(seeds)}"])
        way = {key: interval(to_target(records, arm, key, target)) for key in ("updates", "seconds")}
        thousands = interval(np.divide(to_target(records, arm, "examples", target), 1000))
        ways.append(
            [
                names[arm],
                f"{reached}/{len(seeds)}",
                f"{thousands:.1f}",
                f"{way['updates']:,.0f}",
                f"{way['seconds']:.2f}",
            ]
        )
    print_table(console, "At the end (lost: diverged, or below half of its own best accuracy)", ["arm", "accuracy, %", "worst", "test loss", "lost"], ends)
    title = f"To {100 * target:g}% test accuracy, mean over the seeds that reach it"
    print_table(console, title, ["arm", "reached", "examples / 1000", "updates", "seconds"], ways)
    rounds = [r for r in records if r["kind"] == "cost"]
    kinds = {
        "one": "ordinary step",
        "split": "split step",
        "small": f"{config.num_groups} small steps",
        "naive": f"naive split: {config.num_groups} masked backwards",
    }
    print_table(
        console,
        f"Cost of one batch, median of {len(rounds)} rounds side by side",
        ["", "ms", "÷ ordinary step"],
        [
            [label, f"{interval([r[f'{kind}_ms'] for r in rounds], np.median):.2f}", f"{cost_ratio(records, kind):.2f}"]
            for kind, label in kinds.items()
        ],
    )
    distances = [r for r in records if r["kind"] == "distance"]
    last = [max((r for r in distances if r["seed"] == seed), key=lambda r: r["segment"], default=None) for seed in seeds]
    rows = []
    for other, label in (("scaled", "(b) from (c)"), ("small", "(b) from (d)")):
        batch = interval([r[f"batch_split_{other}"] for r in distances])
        run = interval([r[f"run_split_{other}"] for r in last if r])
        rows.append([label, f"{batch:.3f}", f"{run:.3f}"])
    title = "Distance in parameter space ÷ distance moved by (b)"
    print_table(console, title, ["", "one batch, same start", "whole run"], rows)
    exact = sorted((r for r in records if r["kind"] == "exactness"), key=lambda r: r["num_groups"])
    print_table(
        console,
        "SGD without momentum: split step from one step at K × the rate",
        ["K", "relative distance", "float32 rounding"],
        [[str(r["num_groups"]), *(_tiny(r[key]) for key in ("relative_error", "rounding"))] for r in exact],
    )


def _tiny(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.0e}"


def verdict(config, records: Sequence[Record]) -> list[str]:
    """The sentences that the intervals allow, and no others."""
    k, target, n = config.num_groups, config.target_accuracy, len(seeds_of(records))
    split_cost, small_cost, naive_cost = (cost_ratio(records, kind) for kind in ("split", "small", "naive"))
    sentences = [
        f"Cost: a split step takes {split_cost:.2f} times an ordinary step; {k} small steps {small_cost:.2f}; "
        f"the naive way {naive_cost:.2f}."
    ]
    names = arm_names(k)
    standing, texts = {}, {}
    for other in ("one", "scaled", "small"):
        standing[other], texts[other] = _against(records, other, names[other], target)
    distances = [r for r in records if r["kind"] == "distance"]
    if distances and max(r["batch_split_scaled"] for r in distances) < SAME_UPDATE:
        standing["scaled"] = "identical"
        texts["scaled"] = (
            f"(b) and {names['scaled']} are the same update to rounding (a batch takes them apart by at most "
            f"{_tiny(max(r['batch_split_scaled'] for r in distances))} of the step), so whatever their runs differ by is "
            "chance: " + texts["scaled"].partition(": ")[2].rpartition(": ")[0] + "."
        )
    sentences += texts.values()
    if distances:
        scaled = interval([r["batch_split_scaled"] for r in distances])
        other = interval([r["batch_split_small"] for r in distances])
        sentences.append(
            f"From the same state, one batch takes (b) and (c) apart by {100 * scaled.value:.1f}% of the step, (b) and "
            f"(d) by {100 * other.value:.1f}%."
        )
    if config.optimizer == "sgd" and config.momentum > 0:
        split_limit = largest_stable_curvature(config.learning_rate, config.momentum, k)
        scaled_limit = largest_stable_curvature(k * config.learning_rate, config.momentum)
        sentences.append(
            f"Theory: on a quadratic loss (b) is stable up to curvature {split_limit:.3g}, (c) up to {scaled_limit:.3g}."
        )
    helps = {
        "better": "helps against one update per batch",
        "worse": "harms against one update per batch",
        "unstable": "is faster than one update per batch and then loses runs",
        "same": "makes no difference that shows against one update per batch",
    }[standing["one"]]
    only = {
        "identical": f"it is a {k} times larger learning rate and nothing else",
        "same": f"nothing tells it from a {k} times larger learning rate",
        "better": f"it does better than a {k} times larger learning rate",
        "worse": f"it does worse than a {k} times larger learning rate",
        "unstable": f"it is faster than a {k} times larger learning rate and then loses runs",
    }[standing["scaled"]]
    dear = interval([r["small_ms"] / r["split_ms"] for r in records if r["kind"] == "cost"], np.median)
    small = {
        "same": "do as well as far as the intervals tell",
        "better": "do worse",
        "worse": "do better",
        "unstable": "are slower and steadier",
    }[standing["small"]]
    sentences.append(
        f"Verdict: splitting {helps}; {only}; {k} ordinary small batches {small}, at {dear:.2f} times its cost "
        f"(n = {n} seeds)."
    )
    if n < 10:
        sentences.append(f"n = {n}: bootstrap intervals of so few seeds are too narrow; take --seeds 10 to rely on them.")
    return sentences


def _against(records: Sequence[Record], other: str, name: str, target: float) -> tuple[str, str]:
    """How (b) stands to another arm, and the sentence that says why.

    ``better``, ``worse`` or ``same`` by examples to the target, else by final accuracy, where an interval says so;
    ``unstable`` where (b) would be better but loses more runs.
    """
    mine, theirs = (np.asarray(to_target(records, arm, "examples", target)) for arm in ("split", other))
    missed = [int(np.isnan(values).sum()) for values in (mine, theirs)]
    lost = [sum(is_lost(curve(records, arm, seed)) for seed in seeds_of(records)) for arm in ("split", other)]
    accuracy = paired(records, "split", other, final, "test_accuracy")
    ratio = interval(mine / theirs)
    points = Interval(*(100 * v for v in accuracy[:3]), accuracy.n)
    text = f"Against {name}: final accuracy differs by {points:+.2f} points"
    if ratio.n:
        text += f", examples to {100 * target:g}% by a factor of {ratio:.2f}"
    n = len(mine)
    if any(missed):
        text += f"; target reached in {n - missed[0]} of {n} runs against {n - missed[1]}"
    if any(lost):
        text += f"; runs lost: {lost[0]} against {lost[1]}"
    if missed[0] != missed[1]:
        standing = "better" if missed[0] < missed[1] else "worse"
    elif ratio.excludes(1):
        standing = "better" if ratio.value < 1 else "worse"
    elif accuracy.excludes(0):
        standing = "better" if accuracy.value > 0 else "worse"
    else:
        standing = "same"
    if lost[0] > lost[1]:
        standing = "unstable" if standing == "better" else "worse"
    elif lost[0] < lost[1] and standing == "same":
        standing = "better"
    told = {
        "better": "(b) is ahead",
        "worse": "(b) is behind",
        "same": "the intervals hold no difference",
        "unstable": "(b) is ahead and then loses runs",
    }[standing]
    return standing, f"{text}: {told}."


def draw_figure(config, records: Sequence[Record], folder: pathlib.Path) -> pathlib.Path:
    """Accuracy by examples for the four arms, and the cost of a step as bars."""
    names, seeds = arm_names(config.num_groups), seeds_of(records)
    figure, (left, right) = plots.subplots(1, 2, figsize=(11, 4.4), width_ratios=(3, 2))
    for arm, color, dash in zip(ARMS, plots.COLORS, ("-", "-", "--", "-.")):
        rows = [{r["examples"]: r["test_accuracy"] for r in curve(records, arm, seed)} for seed in seeds]
        places = sorted(set().union(*rows))
        values = [[row.get(place, np.nan) for row in rows] for place in places]
        bands = [interval(v) for v in values]
        left.plot(places, [b.value * 100 for b in bands], dash, color=color, label=names[arm], lw=2)
        low, high = ([100 * (end if b.n > 1 else b.value) for b, end in zip(bands, ends)] for ends in
                     ([b.low for b in bands], [b.high for b in bands]))
        left.fill_between(places, low, high, color=color, alpha=0.18, lw=0)
    left.axhline(100 * config.target_accuracy, color="grey", lw=1, ls=":")
    left.set(
        xlabel="examples seen",
        ylabel="test accuracy, %",
        title=f"{config.dataset}, {config.model}, B = {config.batch_size}, K = {config.num_groups}, {len(seeds)} seeds",
    )
    left.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
    left.legend(loc="best")
    kinds = {"one": "ordinary\nstep", "split": "split\nstep", "small": f"{config.num_groups} small\nsteps", "naive": "naive\nsplit"}
    for place, kind in enumerate(kinds):
        ratio = cost_ratio(records, kind)
        color = plots.COLORS[ARMS.index(kind)] if kind in ARMS else "#999999"
        right.bar(place, ratio.value, color=color, width=0.65)
        if ratio.n > 1:
            right.errorbar(place, ratio.value, [[ratio.value - ratio.low], [ratio.high - ratio.value]], color="black", capsize=4)
        right.annotate(f"{ratio.value:.2f}", (place, max(ratio.value, ratio.high if ratio.n > 1 else 0)), (0, 4),
                       textcoords="offset points", ha="center")
    right.set_xticks(range(len(kinds)), kinds.values())
    right.set(ylabel="time ÷ ordinary step", title="Cost of one batch")
    right.set_axisbelow(True)
    right.grid(axis="x", visible=False)
    right.margins(y=0.12)
    return plots.save(figure, folder)
