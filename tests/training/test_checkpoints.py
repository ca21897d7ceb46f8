"""Runs that are killed end in the same bits; damaged checkpoints are passed over, unreadable ones are errors."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.training import checkpoints
from jaxbatch.training.checkpoints import Checkpoints
from tests.conftest import ROOT
from tests.gradients.test_moments import batch_norm_task
from tests.training.test_train import task  # noqa: F401 (a fixture)

# Five epochs of digits, the batch doubling at each: 45, 22, 11, 5 and 2 updates, two evaluations an epoch.
RUN = """
import hashlib, json, sys, time
import jax, numpy as np, optax
import jaxbatch as jb
from jaxbatch.augment import crop_and_flip

task = jb.classification_task(jb.MLP((32,)), jb.load_dataset("digits"), augment=lambda k, x: crop_and_flip(k, x, padding=2, flip=False))
schedule = jb.adabatch_schedule(batch_size=32, growth=2, every=1)
rate = jb.coupled_learning_rate(schedule, init=0.1, decay=0.75, num_examples=task.num_examples, num_epochs=5, warmup=jb.examples(700))
config = jb.FitConfig(optax.adamw(rate), schedule, jb.epochs(5), seed=3, evaluations_per_epoch=2)
for record in jb.fit_with_checkpoints(task, config, sys.argv[1]):
    leaves = jax.tree.leaves(record.pop("state"))
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()
    kept = {k: v for k, v in record.items() if not k.endswith("seconds")}
    print(json.dumps(kept | {"digest": digest}), flush=True)
"""


def start(folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", RUN, str(folder)], env=environment, stdout=subprocess.PIPE, text=True)


def finish(folder):
    process = start(folder)
    out, _ = process.communicate()
    assert process.returncode == 0
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.slow
def test_kills_around_changes_of_batch_size_leave_no_trace(tmp_path):
    whole = finish(tmp_path / "whole")
    assert [record["batch_size"] for record in whole] == [32, 32, 64, 64, 128, 128, 256, 256, 512, 512]
    seen = []
    for records in (1, 1, 3):  # before the first change; right after it; two changes later
        process = start(tmp_path / "killed")
        for _ in range(records):
            seen.append(json.loads(process.stdout.readline()))
        time.sleep(0.01 * records)
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate()
        seen += [json.loads(line) for line in rest.splitlines() if line.endswith("}")]
    seen += finish(tmp_path / "killed")
    by_place = {record["batches"]: record for record in seen}
    assert all(record == by_place[record["batches"]] for record in seen)  # what came twice came alike
    assert list(by_place.values()) == whole  # records and the digest of every bit of the state
    assert finish(tmp_path / "killed") == []  # nothing is left to do


def run(task, folder, **changes):
    config = jb.FitConfig(optax.sgd(0.01, 0.9), 8, jb.epochs(4), seed=1)._replace(**changes)
    return list(jb.fit_with_checkpoints(task, config, folder, every=2, keep=2))


def test_cadence_and_what_stays(task, tmp_path):
    run(task, tmp_path, duration=jb.epochs(7))
    state = jb.init_state(task, optax.sgd(0.01, 0.9), 1)
    assert Checkpoints(tmp_path, json.loads((tmp_path / "about.json").read_text())).steps() == [18, 21]  # of 6, 12, 18, 21
    latest = Checkpoints(tmp_path, json.loads((tmp_path / "about.json").read_text())).latest(state)
    assert int(latest.step) == 21


@pytest.mark.parametrize("damage", ["empty", "truncated", "gone", "garbled"])
def test_a_damaged_checkpoint_is_passed_over(task, tmp_path, damage):
    whole = run(task, tmp_path / "whole")
    run(task, tmp_path / "broken")
    newest = tmp_path / "broken" / "step_12"
    for path in [path for path in newest.rglob("*") if path.is_file()]:
        if damage == "gone":
            path.unlink()
        elif damage == "garbled":
            path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "truncated" else 0])
    with pytest.warns(UserWarning, match="broken/step_12 is a damaged checkpoint and is skipped"):
        again = run(task, tmp_path / "broken")
    assert [record["batches"] for record in again] == [9, 12]  # from the one before, 6
    jax.tree.map(np.testing.assert_array_equal, again[-1]["state"], whole[-1]["state"])


def unreadable(path, how, monkeypatch):
    """Something in the way of reading that holds for every user, root included."""
    if how == "file":  # a link to itself: "too many levels", as a share that is not mounted would say something else
        file = max((one for one in path.rglob("*") if one.is_file()), key=lambda one: one.stat().st_size)
        file.unlink()
        file.symlink_to(file)
    elif how == "folder":
        shutil.rmtree(path)
        path.symlink_to(path)
    else:
        error = {"permission": PermissionError(errno.EACCES, "Permission denied"), "disk": OSError(errno.EIO, "Input/output error")}[how]

        def load(_):
            try:
                raise error
            except OSError as cause:
                raise ExceptionGroup("several", [ValueError("wrapped")]) from cause

        monkeypatch.setattr(checkpoints, "_orbax", lambda: types.SimpleNamespace(load=load, save=None))


@pytest.mark.parametrize("how", ["file", "folder", "permission", "disk"])
def test_a_checkpoint_that_cannot_be_read_is_an_error(task, tmp_path, how, monkeypatch):
    run(task, tmp_path)
    unreadable(tmp_path / "step_12", how, monkeypatch)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="/step_12 cannot be read .*make it readable"):
        run(task, tmp_path)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("what", ["step_12", "about.json", ""])
def test_without_permission(task, tmp_path, what):
    run(task, tmp_path)
    (tmp_path / what).chmod(0)
    try:
        with pytest.raises(ValueError, match="cannot be read"):
            run(task, tmp_path)
    finally:
        (tmp_path / what).chmod(0o755)
    assert run(task, tmp_path) == []


def test_all_damaged_begins_anew_and_keeps_what_it_writes(task, tmp_path):
    whole = run(task, tmp_path)
    for step in ("step_6", "step_12"):
        shutil.rmtree(tmp_path / step)
        (tmp_path / step).mkdir()
    config = jb.FitConfig(optax.sgd(0.01, 0.9), 8, jb.epochs(4), seed=1)
    with pytest.warns(UserWarning, match="damaged") as warned:
        records = jb.fit_with_checkpoints(task, config, tmp_path, every=1, keep=1)
        assert next(records)["batches"] == 3 and next(records)["batches"] == 6  # and the first is on disk
    assert len(warned) == 2
    records.close()
    with pytest.warns(UserWarning, match="damaged"):
        *_, last = jb.fit_with_checkpoints(task, config, tmp_path, every=1, keep=1)
    jax.tree.map(np.testing.assert_array_equal, last["state"], whole[-1]["state"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["about.json", "step_12"]


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe"])
def test_what_the_folder_is_about_is_damaged_or_unreadable(task, tmp_path, text):
    run(task, tmp_path)
    (tmp_path / "about.json").write_bytes(text)
    with pytest.raises(ValueError, match="about.json is damaged.*Take another folder"):
        run(task, tmp_path)
    (tmp_path / "about.json").unlink()
    (tmp_path / "about.json").symlink_to(tmp_path / "about.json")
    with pytest.raises(ValueError, match="about.json cannot be read"):
        run(task, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file' cannot be made"):
        run(task, tmp_path / "file")


def test_what_is_half_written_is_not_a_checkpoint(task, tmp_path):
    run(task, tmp_path)
    (tmp_path / "step_99.orbax-checkpoint-tmp").mkdir()
    assert run(task, tmp_path) == []


def test_running_moments_are_kept(tmp_path):
    task = batch_norm_task()
    config = jb.FitConfig(optax.sgd(0.1, 0.9), 8, jb.epochs(3), seed=1)
    whole = list(jb.fit(task, config))
    stream = jb.fit_with_checkpoints(task, config, tmp_path)
    next(stream), next(stream)
    stream.close()
    *_, last = rest = list(jb.fit_with_checkpoints(task, config, tmp_path))
    assert [record["epoch"] for record in rest] == [2, 3]  # the second comes again
    jax.tree.map(np.testing.assert_array_equal, last["state"], whole[-1]["state"])
