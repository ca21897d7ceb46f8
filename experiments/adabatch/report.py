"""Tables, figure, arrays and verdict of the AdaBatch study, from its records alone.

Axes: S seeds, E epochs.
"""

import io
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from rich.console import Console

from experiments.harness.arms import JUDGES, PARTS, STYLES, draw_throughput, errors, judged_by, speed_up, table_of
from experiments.harness.optimizers import optimizer_words
from experiments.harness.sentences import compare_errors
from experiments.harness.study import data_of, describe_setting, size_cell
from jaxbatch.intervals import interval
from jaxbatch.results import plots
from jaxbatch.results.records import Record, RunFolder
from jaxbatch.results.report import print_table

KEYS = ("loss", "test_loss", "test_accuracy", "test_bits_per_token", "batch_size", "train_seconds", "compile_seconds", "stall_seconds")


def arms(config) -> dict[str, str]:
    """The arms and their names in tables and figures; ``adaptive_<N>`` runs on N devices."""
    grows = f"{config.batch_size} to {config.max_batch_size}"
    return {
        "small": f"(a) small, {config.batch_size}",
        "adaptive": f"(b) adaptive, {grows}",
        **{f"adaptive_{count}": f"(b) on {count} devices" for count in config.devices if count > 1},
        "large": f"(c) large, {config.max_batch_size}",
        "tuned": f"(d) small, tuned rate, {config.batch_size}",
    }


def devices_of(arm: str) -> int:
    """The number of devices of an arm.

    Example:
        >>> devices_of("adaptive_4"), devices_of("large")
        (4, 1)
    """
    return int(arm.partition("_")[2] or 1)


def is_network(config) -> bool:
    """Whether the passes of a network for images were timed, without the loss."""
    return config.task is None and config.model != "transformer"


def best_rate(records: Sequence[Record]) -> float:
    """The rate whose run ends with the best validation accuracy (or loss), among the runs that choose; diverged runs do not count."""
    metric, ends = judged_by(records), {}
    sign, nothing = (1, -1.0) if metric == "accuracy" else (-1, -np.inf)
    for record in records:
        if record["kind"] == "epoch" and record["arm"] == "tune":
            value = record[f"validation_{metric}"]
            ends[record["learning_rate"]] = nothing if record["diverged"] or value is None else sign * value
    return max(ends, key=ends.get)


def rate_of(records: Sequence[Record], arm: str) -> float:
    """The starting rate of an arm's runs."""
    return next(record["learning_rate"] for record in records if record["kind"] == "epoch" and record["arm"] == arm)


def cost_seconds(config, records: Sequence[Record], arm: str, part: str) -> Float[np.ndarray, "rounds"]:
    """Seconds of ``forward`` or ``backward`` in a whole run of an arm, by round: steps × the time at each batch size."""
    rounds: dict[int, dict[int, float]] = {}
    for record in records:
        if record["kind"] == "cost" and record["devices"] == devices_of(arm):
            rounds.setdefault(record["round"], {})[record["batch_size"]] = record[f"{part}_ms"]
    steps: dict[int, int] = {}
    before = 0
    rows = [record for record in records if record["kind"] == "epoch" and record["arm"] == arm]
    for record in sorted((row for row in rows if row["seed"] == 0), key=lambda row: row["epoch"]):
        for size, count in record.get("updates_by_size", {record["batch_size"]: record["updates"] - before}).items():
            steps[int(size)] = steps.get(int(size), 0) + count
        before = record["updates"]
    return np.array([sum(count * rounds[number][size] for size, count in steps.items()) / 1e3 for number in sorted(rounds)])


def cost_by_size(records: Sequence[Record], num_devices: int) -> dict[int, Float[np.ndarray, "2 rounds"]]:
    """Milliseconds of the two passes by round, for every batch size that was timed on this number of devices."""
    costs: dict[int, list] = {}
    for record in records:
        if record["kind"] == "cost" and record["devices"] == num_devices:
            costs.setdefault(record["batch_size"], []).append([record[f"{part}_ms"] for part in PARTS])
    return {size: np.array(costs[size]).T for size in sorted(costs)}


def save_arrays(config, run: RunFolder) -> None:
    """``arrays.npz``: every value by seed and epoch, named ``<arm>_<key>``; the costs by size and round; the setting."""
    held = {name for record in run.find(kind="epoch") for name in record}
    arrays = {f"{arm}_{key}": table_of(config, run.records, arm, key) for arm in arms(config) for key in KEYS if key in held}
    for count in config.devices:
        cost = cost_by_size(run.records, count)
        arrays[f"cost_{count}_batch_sizes"] = np.array(list(cost))
        for number, part in enumerate(PARTS):
            arrays[f"cost_{count}_{part}_ms"] = np.array([times[number] for times in cost.values()])
    about = {name: getattr(config, name) for name in ("epochs", "every", "batch_size", "max_batch_size", "seeds", "devices")}
    about |= {"model": config.model if config.task is None else data_of(config), "dataset": data_of(config)}
    about |= {"num_examples": config.num_examples, "dtype": config.dtype, "arms": arms(config)}
    about |= {"rates": {arm: rate_of(run.records, arm) for arm in arms(config)}}
    arrays |= {f"{arm}_{part}_seconds": cost_seconds(config, run.records, arm, part) for arm in arms(config) for part in PARTS}
    file = io.BytesIO()
    np.savez_compressed(file, about=np.array(json.dumps(about)), **arrays)
    run.write("arrays.npz", file.getvalue())


def print_tables(console: Console, config, records: Sequence[Record], provenance: Record) -> None:
    """Errors, seconds and speed-ups of the arms; the cost of an example at each batch size."""
    setting = f"{optimizer_words(config)}, {config.epochs} epochs, a change every {config.every}"
    describe_setting(console, config, provenance, *([] if config.task else [config.dtype]), setting)
    what, unit = JUDGES[judged_by(records)]
    everything = arms(config).items()
    rows = []
    for arm, name in everything:
        error = errors(config, records, arm)
        rows.append([name, f"{rate_of(records, arm):g}", format(interval(error[:, -1]), ".2f" if unit else ".4g")])
    print_table(console, f"Test {what} after the last epoch{unit}", ["arm", "rate", f"test {what}"], rows)
    rows = [[name, *(f"{interval(cost_seconds(config, records, arm, part), np.median):.1f}" for part in PARTS)] for arm, name in everything]
    passes = "the network's passes" if is_network(config) else "the loss and its gradient"
    print_table(console, f"Seconds of {passes} in a run", ["arm", *PARTS], rows)
    rows = []
    for arm, name in everything:
        times = (table_of(config, records, arm, f"{kind}_seconds") for kind in ("train", "compile", "stall"))
        rows.append([name, *(f"{interval(table.sum(1)):.1f}" for table in times)])
    print_table(console, "Seconds of a run", ["arm", "training", "compiling", "waited for programs"], rows)
    rows = []
    for count in config.devices:
        for size, times in cost_by_size(records, count).items():
            rows.append([size_cell(config, size), str(count), *(f"{interval(1e3 * part / size, np.median):.1f}" for part in times)])
    print_table(console, "Microseconds an example", ["B", "devices", "forward", "backward"], rows)


def verdict(config, records: Sequence[Record]) -> list[str]:
    """The sentences that the intervals allow, and no others."""
    several = [arm for arm in arms(config) if devices_of(arm) > 1]
    last = {arm: errors(config, records, arm)[:, -1] for arm in arms(config)}
    others = [("small", "(a) small"), ("large", "(c) large"), ("tuned", "(d) tuned")]
    sentences, what = [], JUDGES[judged_by(records)][0]
    for other, name in others + [(arm, f"itself on {devices_of(arm)} devices") for arm in several]:
        sentences.append(compare_errors("(b) adaptive", name, interval(last["adaptive"] - last[other], scale="linear"), "(b)", what))
    rates, best = sorted(config.tuned_rates), rate_of(records, "tuned")
    if len(rates) > 1 and best in (rates[0], rates[-1]):
        edge = "lowest" if best == rates[0] else "highest"
        sentences.append(f"The rate of (d), {best:g}, is the {edge} that was tried: a better one may lie beyond.")
    for arm in ("adaptive", *several):
        forward, backward = (tuple(cost_seconds(config, records, who, part) for who in (arm, "small")) for part in PARTS)
        ups = [speed_up(*forward), speed_up(*backward), speed_up(*(forward[n] + backward[n] for n in (0, 1)))]
        where = f" on {devices_of(arm)} devices" if devices_of(arm) > 1 else ""
        few = ups[2].n < 3
        conclusion = (
            "too few rounds to tell"
            if few
            else "no difference shows"
            if not ups[2].excludes(1)
            else "it is slower"
            if ups[2].value < 1
            else "it is faster"
        )
        # The backward time is a difference of two times; on a tiny network the noise can be larger than it.
        back = f"{ups[1]:.2f}" if min(map(np.min, backward)) > 0 else "lost in the noise"
        sentences.append(f"Speed-up of (b){where} over (a): forward {ups[0]:.2f}, backward {back}, both {ups[2]:.2f} times; {conclusion}.")
    waited = interval(table_of(config, records, "adaptive", "stall_seconds")[:, 1:].sum(1))
    sentences.append(f"After the first epoch (b) waited {waited:.2f} seconds for programs to be compiled.")
    return sentences


def draw_figure(config, records: Sequence[Record], folder: pathlib.Path) -> pathlib.Path:
    """Draws training loss and test error by epoch, and examples per second by batch size."""
    figure, (left, middle, right) = plots.subplots(1, 3, figsize=(15, 4.6), width_ratios=(1, 1, 0.8))
    epochs = np.arange(1, config.epochs + 1).tolist()
    for (arm, name), color, dash in zip(arms(config).items(), plots.COLORS, STYLES, strict=False):
        for axes, table in ((left, table_of(config, records, arm, "loss")), (middle, errors(config, records, arm))):
            plots.band(axes, epochs, [interval(table[:, n]) for n in range(config.epochs)], color=color, ls=dash, label=name)
    for axes in (left, middle):
        for change in range(config.every, config.epochs, config.every) if isinstance(config.every, int) else ():
            axes.axvline(change + 0.5, color="grey", lw=0.6, ls=":")
        axes.set(xlabel="epoch")
    left.set(ylabel="training loss", title="Loss")
    what, unit = JUDGES[judged_by(records)]
    middle.set(ylabel=f"test {what}{unit}", title=f"Test {what}")
    middle.legend()
    cost = {count: cost_by_size(records, count) for count in config.devices}
    draw_throughput(right, cost)
    right.set(title="Throughput of the network's passes" if is_network(config) else "Throughput of the loss and its gradient")
    title = f"{config.model} on {config.dataset}" if config.task is None else data_of(config)
    figure.suptitle(f"{title}, {config.seeds} seeds; dotted: changes")
    return plots.save(figure, folder)
