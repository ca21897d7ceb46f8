"""Arms of a study, which train for the same epochs: values by seed and epoch, errors, speed-ups, throughput, from records alone.

Axes: S seeds, E epochs.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from jaxbatch.intervals import Interval, interval
from jaxbatch.results import plots
from jaxbatch.results.records import Record

PARTS = ("forward", "backward")
STYLES = ("-", "-", "-", "--", ":", "-.")  # one for each arm, so that lines can be distinguished where they meet
JUDGES = {"bits_per_token": ("bits per token", ""), "accuracy": ("error", ", %"), "loss": ("loss", "")}  # metric: what tables call it, unit


def judged_by(records: Sequence[Record]) -> str:
    """The first of :data:`JUDGES` that the runs have: of a text bits per token, of images the accuracy."""
    names = {name.partition("_")[2] for record in records if record["kind"] == "epoch" for name in record}
    return next((metric for metric in JUDGES if metric in names), "loss")


def table_of(config, records: Sequence[Record], arm: str, key: str) -> Float[np.ndarray, "S E"]:
    """The value of ``key`` for every seed and epoch; NaN after a run has diverged."""
    table = np.full((config.seeds, config.epochs), np.nan)
    for record in records:
        if record["kind"] == "epoch" and record["arm"] == arm and record[key] is not None:
            table[record["seed"], record["epoch"] - 1] = record[key]
    return table


def errors(config, records: Sequence[Record], arm: str) -> Float[np.ndarray, "S E"]:
    """Test error in percent; or another metric, where :func:`judged_by` says so."""
    table = table_of(config, records, arm, f"test_{judged_by(records)}")
    return 100 * (1 - table) if judged_by(records) == "accuracy" else table


def speed_up(ours: Float[np.ndarray, "rounds"], theirs: Float[np.ndarray, "rounds"]) -> Interval:
    """Median of ``theirs ÷ ours`` within a round, because whatever slows a round down slows both.

    Example:
        >>> speed_up(np.array([1.0, 2.0, 1.0]), np.array([2.0, 4.0, 2.0])).value
        2.0
    """
    return interval(theirs / ours, np.median, scale="log")


def draw_throughput(axes, cost: Mapping[int, Mapping[int, Float[np.ndarray, "2 rounds"]]]) -> None:
    """Examples per second by batch size, for both passes; ``cost`` is :func:`cost_by_size` of each number of devices."""
    for (count, times), style in zip(cost.items(), STYLES, strict=False):
        for number, (part, color, marker) in enumerate(zip(PARTS, (plots.COLORS[5], plots.COLORS[0]), "os", strict=True)):
            rates = [interval(1e3 * size / of_size[number], np.median, scale="log") for size, of_size in times.items()]
            label = part if count == 1 else f"{part}, {count} devices"
            plots.band(axes, list(times), rates, color=color, marker=marker, ls=style, label=label)
    axes.set(ylabel="examples a second", ylim=(0, None))
    plots.size_ticks(axes, sorted({size for times in cost.values() for size in times}))
    axes.legend(fontsize=8)
