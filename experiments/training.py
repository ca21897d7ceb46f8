"""Runs that a study records epoch by epoch and continues where it was stopped."""

import shutil
from collections.abc import Callable
from typing import Any

import jaxbatch as jb
from experiments.resuming import is_whole
from jaxbatch.results.records import RunFolder

KEPT = ("batch_size", "updates", "loss", "diverged", "train_seconds", "compile_seconds", "stall_seconds")


def train_into(
    run: RunFolder, task: jb.Task, config: jb.FitConfig, identity: dict[str, Any], show: Callable[..., None], *, judged_on: str = "test"
) -> None:
    """Trains and writes one record per epoch, unless the run folder already has all of them.

    Args:
        run: where the records go; the state is kept beside them until the last epoch.
        task: what to train.
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
    before = 0
    for record in jb.fit_with_checkpoints(task, config, folder):
        epoch = round(record["epoch"])
        if epoch not in known:
            kept = {name: record[name] for name in KEPT}
            kept |= {name.replace("test_", f"{judged_on}_", 1): value for name, value in record.items() if name.startswith("test_")}
            run.append({"kind": "epoch", **identity, "epoch": epoch} | kept)
        show(epoch - before, examples_per_second=task.num_examples / record["train_seconds"])
        before = epoch
    show(total - before)  # the epochs that a diverged run leaves out
    shutil.rmtree(folder, ignore_errors=True)
