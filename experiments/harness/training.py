"""Runs that a study records epoch by epoch and continues where it was stopped."""

import json
import math
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jaxbatch as jb
from experiments.harness.resuming import is_whole
from jaxbatch.results.records import RunFolder
from jaxbatch.training.checkpoints import checkpointed
from jaxbatch.training.run_programs import RunPrograms

KEPT = ("batch_size", "updates", "loss", "diverged", "train_seconds", "compile_seconds", "stall_seconds")


def train_into(
    run: RunFolder,
    shared: RunPrograms,
    config: jb.FitConfig,
    identity: dict[str, Any],
    show: Callable[..., None],
    *,
    judged_on: str = "test",
) -> None:
    """Trains and writes one record per epoch, unless the run folder already has all of them.

    An epoch in which the batch size changes has ``updates_by_size`` too, with the updates at each size; its ``batch_size`` is the last one.

    Args:
        run: where the records go; the state is kept beside them until the last epoch.
        shared: what to train, and the optimizer, with programs that serve all seeds.
        config: how to train, for whole epochs.
        identity: what identifies this run in the study, such as arm and seed.
        show: called after each epoch with the number of epochs done since the last call, and with ``examples_per_second``.
        judged_on: what the task's test data are, as ``"validation"``: their metrics are recorded under that name.
    """
    total = int(config.duration.amount)
    rows = run.find(kind="epoch", **identity)
    known = {record["epoch"] for record in rows}
    if is_whole(rows, epoch=range(1, total + 1)) or any(record["diverged"] for record in rows):
        show(total)
        return
    folder = run.path / "in_flight" / "_".join(f"{value:g}" if isinstance(value, float) else str(value) for value in identity.values())
    before, beside = 0, folder.parent / f"{folder.name}.json"
    for record in checkpointed(shared, config, folder):
        epoch = math.ceil(record["epoch"])
        kept = {name: record[name] for name in KEPT}
        kept |= {name.replace("test_", f"{judged_on}_", 1): value for name, value in record.items() if name.startswith("test_")}
        parts = [part for part in _read_parts(beside, epoch) if part["updates"] < record["updates"]] + [kept]
        if record["epoch"] < epoch and not record["diverged"]:  # the batch size has changed within the epoch
            beside.write_text(json.dumps({"epoch": epoch, "parts": parts}), encoding="utf-8")
            continue
        if epoch not in known:
            first = max((row["updates"] for row in run.find(kind="epoch", **identity) if row["epoch"] < epoch), default=0)
            run.append({"kind": "epoch", **identity, "epoch": epoch} | join_parts(parts, first))
        show(epoch - before, examples_per_second=shared.task.num_examples / sum(part["train_seconds"] for part in parts))
        before = epoch
    show(total - before)  # the epochs that a diverged run leaves out
    shutil.rmtree(folder, ignore_errors=True)
    beside.unlink(missing_ok=True)


def join_parts(parts: list[dict[str, Any]], updates: int) -> dict[str, Any]:
    """One record of an epoch from those of its parts, of which each has one batch size.

    Args:
        parts: records in order.
        updates: those before the epoch.

    A part in which nothing counts has no loss, and is left out of the epoch's; a part that diverged makes it what it is.

    Example:
        >>> part = {"diverged": False, "train_seconds": 1.0, "compile_seconds": 0.0, "stall_seconds": 0.0}
        >>> small, large = part | {"batch_size": 2, "updates": 13, "loss": 4.0}, part | {"batch_size": 4, "updates": 14, "loss": 8.0}
        >>> epoch = join_parts([small, large], 10)
        >>> epoch["loss"], epoch["train_seconds"], epoch["batch_size"], epoch["updates_by_size"]
        (5.0, 2.0, 4, {'2': 3, '4': 1})
    """
    if len(parts) == 1:
        return parts[0]
    ends = [updates, *(part["updates"] for part in parts)]
    counts = [end - start for start, end in zip(ends, ends[1:])]
    summed = {name: sum(part[name] for part in parts) for name in ("train_seconds", "compile_seconds", "stall_seconds")}
    weights = {n: count for n, (part, count) in enumerate(zip(parts, counts, strict=True)) if math.isfinite(part["loss"]) or part["diverged"]}
    loss = sum(parts[n]["loss"] * count for n, count in weights.items()) / sum(weights.values()) if weights else math.nan
    by_size: dict[str, int] = {}
    for part, count in zip(parts, counts, strict=True):
        by_size[str(part["batch_size"])] = by_size.get(str(part["batch_size"]), 0) + count
    return parts[-1] | summed | {"loss": loss, "updates_by_size": by_size}


def _read_parts(file: pathlib.Path, epoch: int) -> list[dict[str, Any]]:
    """The parts of an epoch that an earlier call, too, may have trained."""
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there is none, or it was not completely written
        return []
    return written["parts"] if written["epoch"] == epoch else []
