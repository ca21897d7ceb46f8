"""Tables, figure, arrays and verdict of the AdaBatch study, from its records alone.

Axes: S seeds, E epochs.
"""

import io
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from rich.console import Console

from experiments.study import describe_setting
from jaxbatch import plots
from jaxbatch.intervals import Interval, interval
from jaxbatch.records import Record, RunFolder
from jaxbatch.report import print_table

ARMS = ("small", "adaptive", "large", "tuned")
KEYS = ("loss", "test_loss", "test_accuracy", "batch_size", "train_seconds", "compile_seconds", "stall_seconds")


def best_rate(records: Sequence[Record]) -> float:
    """The rate whose choosing run ends with the highest test accuracy; runs that diverged do not count."""
    ends = {}
    for record in records:
        if record["kind"] == "epoch" and record["arm"] == "tune":
            ends[record["learning_rate"]] = -1.0 if record["diverged"] else record["test_accuracy"]
    return max(ends, key=ends.get)


def rate_of(records: Sequence[Record], arm: str) -> float:
    """The starting rate of an arm's runs."""
    return next(record["learning_rate"] for record in records if record["kind"] == "epoch" and record["arm"] == arm)


def table_of(config, records: Sequence[Record], arm: str, key: str) -> Float[np.ndarray, "S E"]:
    """A number by seed and epoch; NaN where a run had diverged."""
    table = np.full((config.seeds, config.epochs), np.nan)
    for record in records:
        if record["kind"] == "epoch" and record["arm"] == arm and record[key] is not None:
            table[record["seed"], record["epoch"] - 1] = record[key]
    return table


def errors(config, records: Sequence[Record], arm: str) -> Float[np.ndarray, "S E"]:
    """Test error in percent."""
    return 100 * (1 - table_of(config, records, arm, "test_accuracy"))


def cost_seconds(config, records: Sequence[Record], arm: str, part: str) -> Interval:
    """Seconds of ``forward`` or ``backward`` in a whole run of an arm: steps × the time at each batch size, by round."""
    rounds: dict[int, dict[int, float]] = {}
    for record in records:
        if record["kind"] == "cost":
            rounds.setdefault(record["round"], {})[record["batch_size"]] = record[f"{part}_ms"]
    steps: dict[int, int] = {}
    before = 0
    rows = [record for record in records if record["kind"] == "epoch" and record["arm"] == arm]
    for record in sorted((row for row in rows if row["seed"] == 0), key=lambda row: row["epoch"]):
        steps[record["batch_size"]] = steps.get(record["batch_size"], 0) + record["updates"] - before
        before = record["updates"]
    return interval([sum(count * times[size] for size, count in steps.items()) / 1e3 for times in rounds.values()], np.median)


def speed_up(config, records: Sequence[Record], part: str) -> float:
    """Seconds of (a) ÷ seconds of (b)."""
    return cost_seconds(config, records, "small", part).value / cost_seconds(config, records, "adaptive", part).value


def save_arrays(config, run: RunFolder) -> None:
    """``arrays.npz``: every number by seed and epoch, named ``<arm>_<key>``, and the costs by round and size."""
    arrays = {f"{arm}_{key}": table_of(config, run.records, arm, key) for arm in ARMS for key in KEYS}
    cost = run.find(kind="cost")
    sizes = sorted({record["batch_size"] for record in cost})
    for part in ("forward_ms", "backward_ms"):
        arrays[f"cost_{part}"] = np.array([[r[part] for r in cost if r["batch_size"] == size] for size in sizes])
    file = io.BytesIO()
    np.savez_compressed(file, batch_sizes=np.array(sizes), **arrays)
    run.write("arrays.npz", file.getvalue())


def names(config) -> dict[str, str]:
    """The arms as a reader sees them."""
    return {
        "small": f"(a) small, {config.batch_size}",
        "adaptive": f"(b) adaptive, {config.batch_size} to {config.max_batch_size}",
        "large": f"(c) large, {config.max_batch_size}",
        "tuned": f"(d) small, tuned rate, {config.batch_size}",
    }


def print_tables(console: Console, config, records: Sequence[Record], provenance: Record) -> None:
    """Errors, seconds and speed-ups of the arms; the cost of an example at each batch size."""
    setting = f"SGD with momentum {config.momentum:g}, {config.epochs} epochs, a change every {config.every}"
    describe_setting(console, config, provenance, config.model, config.dtype, setting)
    rows = []
    for arm, name in names(config).items():
        error = errors(config, records, arm)
        last, best = interval(error[:, -1]), interval(_least(error))
        forward, backward = (cost_seconds(config, records, arm, part) for part in ("forward", "backward"))
        compiles = interval(np.nansum(table_of(config, records, arm, "compile_seconds"), 1))
        stalls = interval(np.nansum(table_of(config, records, arm, "stall_seconds"), 1))
        rows.append([name, f"{rate_of(records, arm):g}", f"{best:.2f}", f"{last:.2f}", f"{forward:.1f}", f"{backward:.1f}", f"{compiles:.1f}", f"{stalls:.1f}"])
    columns = ["arm", "rate", "best error, %", "last error, %", "forward, s", "backward, s", "compile, s", "waited, s"]
    print_table(console, "Test error by arm; seconds of the network's passes in a run", columns, rows)
    rows = []
    for size in sorted({record["batch_size"] for record in records if record["kind"] == "cost"}):
        row = [f"{size:,}"]
        for part in ("forward", "backward"):
            row.append(f"{interval([1e3 * r[f'{part}_ms'] / size for r in records if r['kind'] == 'cost' and r['batch_size'] == size], np.median):.1f}")
        rows.append(row)
    print_table(console, "Microseconds an example", ["B", "forward", "backward"], rows)


def _least(table: Float[np.ndarray, "S E"]) -> Float[np.ndarray, "S"]:
    return np.where(np.isnan(table).all(1), np.nan, np.nanmin(np.where(np.isnan(table), np.inf, table), 1))


def verdict(config, records: Sequence[Record]) -> list[str]:
    """The sentences that the intervals allow, and no others."""
    last = {arm: errors(config, records, arm)[:, -1] for arm in ARMS}
    sentences = []
    for other, name in (("small", "(a) small"), ("large", "(c) large"), ("tuned", "(d) tuned")):
        apart = interval(last["adaptive"] - last[other])
        if apart.n == 0:
            sentences.append(f"(b) adaptive against {name}: no seed of both ends finite.")
            continue
        told = "too few seeds to tell" if apart.n < 3 else "no difference shows" if not apart.excludes(0) else "(b) is worse" if apart.value > 0 else "(b) is better"
        sentences.append(f"(b) adaptive against {name}: last test error differs by {apart:+.2f} points; {told}.")
    ups = {part: speed_up(config, records, part) for part in ("forward", "backward")}
    sentences.append(f"Speed-up of (b) over (a): forward {ups['forward']:.2f} times, backward {ups['backward']:.2f} times.")
    waited = interval(np.nansum(table_of(config, records, "adaptive", "stall_seconds")[:, 1:], 1))
    sentences.append(f"After the first epoch (b) waited {waited:.2f} seconds for programs to be compiled.")
    return sentences


def draw_figure(config, records: Sequence[Record], folder: pathlib.Path) -> pathlib.Path:
    """Training loss and test error by epoch, and examples a second by batch size."""
    figure, (left, middle, right) = plots.subplots(1, 3, figsize=(15, 4.6), width_ratios=(1, 1, 0.8))
    epochs = np.arange(1, config.epochs + 1).tolist()
    for (arm, name), color, dash in zip(names(config).items(), plots.COLORS, ("-", "-", "-", "--"), strict=False):
        for axes, table in ((left, table_of(config, records, arm, "loss")), (middle, errors(config, records, arm))):
            plots.band(axes, epochs, [interval(table[:, n]) for n in range(config.epochs)], color=color, ls=dash, label=name)
    for axes in (left, middle):
        for change in range(config.every, config.epochs, config.every):
            axes.axvline(change + 0.5, color="grey", lw=0.6, ls=":")
        axes.set(xlabel="epoch")
    left.set(ylabel="training loss", title="Loss")
    middle.set(ylabel="test error, %", title="Test error")
    middle.legend()
    sizes = sorted({record["batch_size"] for record in records if record["kind"] == "cost"})
    for part, color, marker in (("forward", plots.COLORS[5], "o"), ("backward", plots.COLORS[0], "s")):
        rows = [[1e3 * size / r[f"{part}_ms"] for r in records if r["kind"] == "cost" and r["batch_size"] == size] for size in sizes]
        plots.band(right, sizes, [interval(row, np.median) for row in rows], color=color, marker=marker, label=part)
    right.set(ylabel="examples a second", title="Throughput of the network's passes", ylim=(0, None))
    plots.size_ticks(right, sizes)
    right.legend()
    figure.suptitle(f"{config.model} on {config.dataset}, {config.seeds} seeds; dotted: changes")
    return plots.save(figure, folder)
