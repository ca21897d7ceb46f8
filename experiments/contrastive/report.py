"""Tables, figure and verdict of the contrastive study, from its records alone."""

import pathlib
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from experiments.harness.study import describe_setting
from experiments.harness.tuned_runs import best_rate, points_between, points_in_words, reported_runs, student
from jaxbatch.intervals import Interval, interval, ratio_of_means
from jaxbatch.results import plots
from jaxbatch.results.records import Record, as_number
from jaxbatch.results.report import print_table

MEASURES = {"knn": "20 nearest neighbours", "probe": "linear probe"}


def chosen_rate(records: Sequence[Record], batch_size: int, group: int) -> float | None:
    """The rate with the best probe on the held-out part; training moves the probe more than the neighbours, which are good before any."""
    return best_rate(records, {"batch_size": batch_size, "group": group}, "probe")


def reported(records: Sequence[Record], batch_size: int, group: int) -> dict[int, Record]:
    """The reported runs of a size and a way, at the chosen rate, by seed."""
    return reported_runs(records, {"batch_size": batch_size, "group": group}, chosen_rate(records, batch_size, group))


def difference(records: Sequence[Record], one: tuple[int, int], other: tuple[int, int], measure: str) -> Interval:
    """How many points of accuracy the first size and way is above the other, over seeds."""
    return points_between(reported(records, *one), reported(records, *other), measure)


def arms_in(config, records: Sequence[Record]) -> list[tuple[int, int]]:
    """Sizes and groups of which there are reported runs."""
    arms = {(row["batch_size"], row["group"]) for row in records if row["kind"] == "run" and row["part"] == "test"}
    return sorted(arms, key=lambda arm: (arm[1] == config.group, arm))


def print_tables(console: Console, config, records: Sequence[Record], provenance: Record) -> None:
    """What is reached at each size, with negatives from the batch and from groups; time and memory."""
    runs = [row for row in records if row["kind"] == "run"]
    seen = runs[0]["updates"] * runs[0]["batch_size"] if runs else 0
    describe_setting(console, config, provenance, f"every run sees {seen:,} examples", f"temperature {config.temperature:g}")
    rows = []
    for size, group in arms_in(config, records):
        arm_rows, rates = list(reported(records, size, group).values()), config.learning_rates
        if not arm_rows:
            continue
        rate = arm_rows[0]["learning_rate"]
        accuracies = [f"{student([100 * row[name] for row in arm_rows]):.2f}" for name in MEASURES]
        losses = [f"{interval([row[name] for row in arm_rows]).value:.3f}" for name in ("loss_in_groups", "loss")]
        edge = " (edge)" if rate in (rates[0], rates[-1]) else ""
        rows.append([f"{size:,}", f"{2 * group - 2:,}", f"{arm_rows[0]['updates']:,}", f"{rate:g}{edge}", *accuracies, *losses])
    for name in ("pixels", "untrained"):
        baselines = [row for row in records if row["kind"] == "baseline" and row["name"] == name]
        if baselines:
            rows.append([name, "", "", "", *(f"{student([100 * as_number(row[measure]) for row in baselines]):.2f}" for measure in MEASURES), "", ""])
    columns = [
        "B",
        "negatives",
        "updates",
        "rate",
        *(f"{name}, %" for name in MEASURES.values()),
        f"loss in groups of {config.group}",
        "training loss",
    ]
    print_table(console, "Accuracy on the test set", columns, rows)
    costs = [row for row in records if row["kind"] == "cost"]
    rows, variants = [], ("cached", "plain")
    for size in sorted({row["batch_size"] for row in costs}):
        of = [row for row in costs if row["batch_size"] == size]
        times = [
            f"{interval([row[f'{variant}_ms'] for row in of], np.median):,.0f}" if f"{variant}_ms" in of[0] else "not run" for variant in variants
        ]
        memory = [f"{of[0][f'{variant}_bytes'] / 2**20:,.0f}" for variant in variants]
        ratio = ratio_of_means([row["cached_ms"] for row in of], [row["plain_ms"] for row in of]) if "plain_ms" in of[0] else None
        rows.append([f"{size:,}", *memory, *times, f"{ratio:.2f}" if ratio else ""])
    if rows:
        columns = ["B", "cached, MiB", "in one piece, MiB", "cached, ms", "in one piece, ms", "time, cached / in one piece"]
        print_table(console, f"The gradient of a batch, microbatches of {config.microbatch_size}", columns, rows)


def verdict(config, records: Sequence[Record]) -> list[str]:
    """The sentences that the intervals allow, and no others."""
    arms, sentences = arms_in(config, records), []
    edges = [f"B = {size:,}" for size, group in arms for row in reported(records, size, group).values() if row["learning_rate"] in _ends(config)]
    if edges:
        sentences.append(f"Warning: the best rate lies on the edge of the grid at {', '.join(dict.fromkeys(edges))}; widen --learning-rates.")
    sizes = sorted({size for size, _ in arms})
    if len(sizes) < 2:
        return [*sentences, "One batch size alone does not answer the question. Give at least two --batch-sizes."]
    small, large = sizes[0], sizes[-1]
    for name, words in MEASURES.items():
        whole = difference(records, (large, large), (small, small), name)
        more = difference(records, (large, large), (large, config.group), name)
        fewer = difference(records, (large, config.group), (small, config.group), name)
        sentences.append(f"By {words}: B = {large:,} against {small:,} at equal examples: {points_in_words(whole, 2)}.")
        sentences.append(
            f"    More negatives alone, at B = {large:,}: {points_in_words(more, 2)}. Fewer, less noisy updates alone: {points_in_words(fewer, 2)}."
        )
    differences = {
        size: difference(records, (size, size), (size, config.group), "probe")
        for size in sizes
        if (size, config.group) in arms and size != config.group
    }
    better, worse = ([size for size, d in differences.items() if d.excludes(0) and sign * d.value > 0] for sign in (1, -1))
    for part, word in ((better, "help"), (worse, "hurt")):
        if part:
            sentences.append(f"More negatives {word} the probe at B = {', '.join(f'{size:,}' for size in part)}.")
    if not better and not worse:
        sentences.append("More negatives do not change the accuracy of the probe by more than seeds do, at any size.")
    return sentences


def _ends(config) -> tuple[float, float]:
    return config.learning_rates[0], config.learning_rates[-1]


def draw_figure(config, records: Sequence[Record], folder: pathlib.Path) -> pathlib.Path:
    """Accuracy by batch size with negatives from the whole batch and from groups; memory of both gradients."""
    figure, axes = plots.subplots(1, 3, figsize=(15, 4.6))
    arms = arms_in(config, records)
    sizes = sorted({size for size, _ in arms})
    for panel, (name, words) in zip(axes[:2], MEASURES.items(), strict=True):
        for color, label, whole in ((0, "negatives from the batch", True), (1, f"from groups of {config.group}", False)):
            there = sorted((size, group) for size, group in arms if group == (size if whole else config.group))
            accuracies = [student([100 * row[name] for row in reported(records, *arm).values()]) for arm in there]
            plots.band(panel, [size for size, _ in there], accuracies, color=plots.COLORS[color], label=label, marker="o")
        pixels = [row for row in records if row["kind"] == "baseline" and row["name"] == "pixels"]
        if pixels:
            panel.axhline(100 * as_number(pixels[0][name]), color="grey", ls=":", label="pixels")
        panel.set(ylabel="test accuracy, %", title=words)
        plots.size_ticks(panel, sizes)
    axes[0].legend()
    costs = [row for row in records if row["kind"] == "cost" and row["round"] == 0]
    for color, variant, label in ((0, "cached", f"cached, microbatches of {config.microbatch_size}"), (1, "plain", "in one piece")):
        axes[2].plot(
            [row["batch_size"] for row in costs], [row[f"{variant}_bytes"] / 2**30 for row in costs], "o-", color=plots.COLORS[color], label=label
        )
    axes[2].set(ylabel="memory of a gradient, GiB", title="Memory")
    if costs:
        plots.size_ticks(axes[2], [row["batch_size"] for row in costs])
        plots.log_values(axes[2].yaxis)
    axes[2].legend()
    figure.suptitle(f"{config.dataset}, NT-Xent, equal examples, {config.seeds} seeds, 95% intervals")
    return plots.save(figure, folder)
