"""Tables, figure and verdict of the study of very many classes, from its records alone."""

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


def chosen_rate(records: Sequence[Record], batch_size: int, loss: str) -> float | None:
    """The rate with the most true accepts of the identities for choosing."""
    return best_rate(records, {"batch_size": batch_size, "loss_name": loss}, "true_accepts")


def reported(records: Sequence[Record], batch_size: int, loss: str) -> dict[int, Record]:
    """The reported runs of a size and a loss, at the chosen rate, by seed."""
    return reported_runs(records, {"batch_size": batch_size, "loss_name": loss}, chosen_rate(records, batch_size, loss))


def difference(records: Sequence[Record], one: tuple[int, str], other: tuple[int, str]) -> Interval:
    """How many points of true accepts the first size and loss is above the other, over seeds."""
    return points_between(reported(records, *one), reported(records, *other), "true_accepts")


def memory_of(records: Sequence[Record], batch_size: int, identities: int) -> dict[str, int]:
    """Bytes of the gradient in chunks and by all logits, as far as they are known."""
    rows = [row for row in records if row["kind"] == "memory"]
    return {row["way"]: row["bytes"] for row in rows if (row["batch_size"], row["identities"]) == (batch_size, identities)}


def print_tables(console: Console, config, records: Sequence[Record], provenance: Record) -> None:
    """Verification by loss and batch size; time and memory in chunks and by all logits; the huge case."""
    runs = [row for row in records if row["kind"] == "run"]
    seen = runs[0]["updates"] * runs[0]["batch_size"] if runs else 0
    setting = f"{config.identities:,} identities", f"every run sees {seen:,} examples", f"scale {config.scale:g}, margin {config.margin:g}"
    describe_setting(console, config, provenance, *setting)
    rows = []
    for loss in config.losses:
        for size in config.batch_sizes:
            arm_rows, rates = list(reported(records, size, loss).values()), config.learning_rates
            if arm_rows:
                rate = arm_rows[0]["learning_rate"]
                edge = " (edge)" if rate in (rates[0], rates[-1]) else ""
                shares = [f"{student([100 * row[name] for row in arm_rows]):.1f}" for name in ("true_accepts", "accuracy")]
                rows.append([loss, f"{size:,}", f"{arm_rows[0]['updates']:,}", f"{rate:g}{edge}", *shares])
    for row in (row for row in records if row["kind"] == "untrained"):
        rows.append(["untrained", "", "", "", *(f"{100 * as_number(row[name]):.1f}" for name in ("true_accepts", "accuracy"))])
    columns = ["loss", "B", "updates", "rate", f"true accepts at {100 * config.false_accept_rate:g}% false, %", "verification accuracy, %"]
    print_table(console, f"Verification of {config.verified} identities that were not in training", columns, rows)
    rows = []
    for size, identities in sorted({(row["batch_size"], row["identities"]) for row in records if row["kind"] == "memory"}):
        held = memory_of(records, size, identities)
        times = [row["milliseconds"] for row in records if row["kind"] == "time" and row["batch_size"] == size and identities == config.identities]
        cells = [f"{held[variant] / 2**20:,.0f}" if variant in held else "" for variant in ("chunks", "all logits")]
        cells += [f"{interval([1e3 * row[variant] / size for row in times], np.median):.1f}" if times else "" for variant in ("chunks", "all logits")]
        ratio = ratio_of_means([row["chunks"] for row in times], [row["all logits"] for row in times]) if times else None
        rows.append([f"{size:,}", f"{identities:,}", *cells, f"{ratio:.2f}" if ratio else "not run"])
    columns = ["B", "C", "chunks, MiB", "all logits, MiB", "chunks, µs an example", "all logits, µs an example", "time, chunks / all"]
    print_table(console, f"The gradient of a batch, chunks of {config.chunk_size} classes; memory as compiled", columns, rows)
    for row in (row for row in records if row["kind"] == "huge"):
        each = row["seconds"] / row["updates"]
        console.print(
            f"B = {row['batch_size']:,}, C = {row['identities']:,}: {row['updates']} updates of {each:.1f} s, "
            f"{1e6 * each / row['batch_size']:.0f} µs an example; the process took at most {row['peak'] / 2**20:,.0f} MiB, "
            f"{row['peak_before'] / 2**20:,.0f} of them before the first update. "
            f"Losses {', '.join(f'{as_number(loss):.2f}' for loss in row['losses'])}.",
            soft_wrap=True,
        )


def verdict(config, records: Sequence[Record]) -> list[str]:
    """The sentences that the intervals allow, and no others."""
    sentences, ends = [], (config.learning_rates[0], config.learning_rates[-1])
    runs_by_arm = {(size, loss): reported(records, size, loss) for loss in config.losses for size in config.batch_sizes}
    edges = [f"{loss} at B = {size:,}" for (size, loss), runs in runs_by_arm.items() if any(row["learning_rate"] in ends for row in runs.values())]
    if edges:
        sentences.append(f"Warning: the best rate lies on the edge of the grid for {', '.join(edges)}; widen --learning-rates.")
    for loss in config.losses:
        if loss != "softmax" and "softmax" in config.losses:
            each = [f"{points_in_words(difference(records, (size, loss), (size, 'softmax')), 1)} at B = {size:,}" for size in config.batch_sizes]
            sentences.append(f"True accepts, {loss} against the plain softmax: {'; '.join(each)}.")
    small, large = config.batch_sizes[0], config.batch_sizes[-1]
    if small != large:
        each = [f"{loss} {points_in_words(difference(records, (large, loss), (small, loss)), 1)}" for loss in config.losses]
        sentences.append(f"B = {large:,} against {small:,} at equal examples: {'; '.join(each)}.")
    memory = [row for row in records if row["kind"] == "memory"]
    if memory:
        most = max(memory, key=lambda row: row["bytes"])
        held = memory_of(records, most["batch_size"], most["identities"])
        if len(held) == 2:
            sentences.append(
                f"With {most['batch_size']:,} examples and {most['identities']:,} classes a gradient takes "
                f"{held['chunks'] / 2**30:.2f} GiB in chunks, and {held['all logits'] / 2**30:.2f} GiB with all logits."
            )
    return sentences


def draw_figure(config, records: Sequence[Record], folder: pathlib.Path) -> pathlib.Path:
    """True accepts by batch size for each loss; memory of both gradients by the number of logits."""
    figure, (left, right) = plots.subplots(1, 2, figsize=(11, 4.6))
    for color, loss in enumerate(config.losses):
        there = [size for size in config.batch_sizes if reported(records, size, loss)]
        accept_rates = [student([100 * row["true_accepts"] for row in reported(records, size, loss).values()]) for size in there]
        plots.band(left, there, accept_rates, color=plots.COLORS[color], label=loss, marker="o")
    for row in (row for row in records if row["kind"] == "untrained"):
        left.axhline(100 * as_number(row["true_accepts"]), color="grey", ls=":", label="untrained")
    left.set(ylabel=f"true accepts at {100 * config.false_accept_rate:g}% false ones, %", title=f"{config.identities:,} identities, equal examples")
    plots.size_ticks(left, config.batch_sizes)
    left.legend()
    for color, variant in enumerate(("chunks", "all logits")):
        rows = sorted(
            (row for row in records if row["kind"] == "memory" and row["way"] == variant), key=lambda row: row["batch_size"] * row["identities"]
        )
        logits = [row["batch_size"] * row["identities"] for row in rows]
        right.plot(logits, [row["bytes"] / 2**30 for row in rows], "o-", color=plots.COLORS[color], label=variant)
    right.set(xlabel="B × C", ylabel="memory of a gradient, GiB", title="Memory, as compiled", xscale="log")
    plots.log_values(right.yaxis)
    right.legend()
    figure.suptitle(f"Verification, {config.seeds} seeds, 95% intervals")
    return plots.save(figure, folder)
