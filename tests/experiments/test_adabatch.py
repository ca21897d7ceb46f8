"""The AdaBatch study in small: what it writes, how it goes on, what its report makes of known records."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import types

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.adabatch import __main__ as adabatch
from experiments.adabatch.arms import make_schedule
from experiments.adabatch.report import best_rate, cost_seconds, verdict
from experiments.adabatch_figures import __main__ as adabatch_figures
from experiments.harness.arms import errors, speed_up
from tests.conftest import ROOT

ARGUMENTS = ["--quick", "--model", "mlp", "--epochs", "3", "--num-examples", "200", "--batch-size", "10", "--max-batch-size", "30", "--seeds", "1"]


SIZES = {"small": [10] * 3, "adaptive": [10, 20, 30], "large": [30] * 3, "tuned": [10] * 3}


def records_in(folder):
    (file,) = folder.glob("adabatch/*/records.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def without_times(records):
    rows = [{k: v for k, v in r.items() if not k.endswith("seconds")} for r in records if r["kind"] == "epoch"]
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


@functools.cache
def finished():
    folder, out = pathlib.Path(tempfile.mkdtemp(prefix="jaxbatch-test-")), io.StringIO()
    with contextlib.redirect_stdout(out):
        adabatch.main([*ARGUMENTS, "--output-dir", str(folder)])
    return folder, out.getvalue()


def test_records_arrays_and_figure(capsys):
    folder, out = finished()
    records = records_in(folder)
    rows = [r for r in records if r["kind"] == "epoch"]
    sizes = {arm: [r["batch_size"] for r in rows if r["arm"] == arm] for arm in SIZES}
    assert sizes == SIZES
    assert {r["learning_rate"] for r in rows if r["arm"] == "tune"} == {0.01, 0.0316}
    for record in rows:  # what chooses is judged on the validation part, what is shown on the test set
        assert ("validation_accuracy" in record, "test_accuracy" in record) == (record["arm"] == "tune", record["arm"] != "tune")
    (path,) = folder.glob("adabatch/*")
    with np.load(path / "arrays.npz") as arrays:
        assert arrays["adaptive_batch_size"].tolist() == [[10, 20, 30]] and arrays["cost_1_forward_ms"].shape == (3, 2)
        expected = [r["test_accuracy"] for r in rows if r["arm"] == "large"]
        np.testing.assert_array_equal(arrays["large_test_accuracy"][0], expected)
    assert (path / "figure.png").exists() and not (path / "in_flight").exists()
    assert "Speed-up of (b) over (a)" in out and "too few seeds to tell" in out
    adabatch.main([*ARGUMENTS, "--output-dir", str(folder)])
    assert records_in(folder) == records and "Continuing from" in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_study_ends_in_the_same_numbers(tmp_path, monkeypatch):
    written, count = adabatch.RunFolder.append, 0

    def stop_in_the_adaptive_arm(folder, record):
        nonlocal count
        count += record.get("arm") == "adaptive"
        if count == 2:
            raise KeyboardInterrupt
        written(folder, record)

    monkeypatch.setattr(adabatch.RunFolder, "append", stop_in_the_adaptive_arm)
    with pytest.raises(SystemExit) as stopped:
        adabatch.main([*ARGUMENTS, "--output-dir", str(tmp_path)])
    assert stopped.value.code == 130
    monkeypatch.setattr(adabatch.RunFolder, "append", written)
    adabatch.main([*ARGUMENTS, "--output-dir", str(tmp_path)])
    assert without_times(records_in(tmp_path)) == without_times(records_in(finished()[0]))


def test_the_arms_of_the_paper():
    config = adabatch.resolve(adabatch.Config(dataset="cifar10", model="resnet20"), 50_000)
    assert (config.epochs, config.every, config.batch_size, config.max_batch_size, config.augment) == (100, 20, 128, 2048, True)
    alexnet = adabatch.resolve(dataclasses.replace(config, model="alexnet", batch_size=None, max_batch_size=None), 50_000)
    assert (alexnet.batch_size, alexnet.max_batch_size) == (256, 4096)
    assert [make_schedule(config, "adaptive")(e) for e in (0, 20, 40, 60, 80)] == [128, 256, 512, 1024, 2048]
    assert make_schedule(config, "large")(0) == 2048
    # One parameter at 1 with gradient 0: the first update is -rate * weight_decay.
    for arm, epoch, rate in (("small", 20, 0.00375), ("adaptive", 20, 0.0075), ("large", 99, 0.01 * 0.375**4), ("adaptive", 99, 0.01 * 0.75**4)):
        fit_config = adabatch.make_fit_config(config, arm, 0.01, 0, 50_000)
        steps = sum(50_000 // fit_config.batch_size(e) for e in range(epoch))
        state = fit_config.optimizer.init(jnp.ones(()))
        moved = [leaf._replace(count=jnp.array(steps)) if isinstance(leaf, optax.ScaleByScheduleState) else leaf for leaf in state[1]]
        updates, _ = fit_config.optimizer.update(jnp.zeros(()), (state[0], tuple(moved)), jnp.ones(()))
        np.testing.assert_allclose(-updates, rate * 5e-4, rtol=1e-4)


def known_records(apart):
    for arm in SIZES:
        for seed in range(5):
            for epoch in (1, 2):
                accuracy = 0.8 + 0.001 * seed + (apart if arm == "adaptive" else 0)
                size, updates = (20, 10 + 5 * (epoch - 1)) if arm == "adaptive" and epoch == 2 else (10, 10 * epoch)
                yield {
                    "kind": "epoch", "arm": arm, "seed": seed, "epoch": epoch, "learning_rate": 0.1, "diverged": False,
                    "test_accuracy": accuracy, "loss": 1.0, "test_loss": 1.0, "batch_size": size, "updates": updates,
                    "train_seconds": 1.0, "compile_seconds": 0.5, "stall_seconds": 0.0,
                }  # fmt: skip
    for number, size, ms in ((0, 10, 100.0), (0, 20, 150.0), (1, 20, 300.0), (1, 10, 200.0), (2, 10, 100.0), (2, 20, 150.0)):
        yield {"kind": "cost", "round": number, "devices": 1, "batch_size": size, "forward_ms": ms, "backward_ms": 2 * ms}


@pytest.mark.parametrize(("apart", "told"), [(0.05, "(b) is better"), (-0.05, "(b) is worse"), (0.0, "no difference shows")])
def test_the_report_on_known_records(apart, told):
    config, records = (
        types.SimpleNamespace(seeds=5, epochs=2, devices=(1,), tuned_rates=(0.01, 0.1), batch_size=10, max_batch_size=20),
        list(known_records(apart)),
    )
    np.testing.assert_allclose(errors(config, records, "small")[:, -1], [20.0, 19.9, 19.8, 19.7, 19.6])
    told_all = verdict(config, records)
    assert sum(told in text for text in told_all) == 3
    assert any("0.1, is the highest that was tried" in text for text in told_all)  # the records' rate
    # 20 steps of 10 against 10 of 10 and 5 of 20.
    assert cost_seconds(config, records, "adaptive", "forward") == pytest.approx([1.75, 3.5, 1.75])  # 10 × 100 + 5 × 150 ms, and a slow round
    backward = (cost_seconds(config, records, arm, "backward") for arm in ("adaptive", "small"))
    assert speed_up(*backward) == pytest.approx((2000 / 1750, 2000 / 1750, 2000 / 1750, 3, 0))  # all rounds tell the same
    assert any("both 1.14 [1.14, 1.14] times; it is faster" in text for text in told_all)
    two = [record for record in records if record.get("round") != 2]
    assert any("times; too few rounds to tell" in text for text in verdict(config, two))
    negative = [record | {"backward_ms": 10.0 - 15 * record["round"]} if record["kind"] == "cost" else record for record in records]
    assert any("backward lost in the noise, both" in text for text in verdict(config, negative))


def test_the_rate_is_chosen_by_the_last_accuracy_and_never_a_diverged_run():
    def row(rate, epoch, accuracy, diverged=False):
        return {"kind": "epoch", "arm": "tune", "learning_rate": rate, "epoch": epoch, "validation_accuracy": accuracy, "diverged": diverged}

    rows = [row(0.01, 1, 0.9), row(0.01, 2, 0.5), row(0.1, 1, 0.6), row(0.1, 2, 0.7), row(1.0, 1, 0.99, True)]
    assert best_rate(rows) == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-examples", "5"], "--num-examples 5 must be from 10 to 1442."),
        (["--max-batch-size", "8"], "max_batch_size=8 is below batch_size=16."),
        (["--max-batch-size", "5000"], "is larger than the data set"),
        (["--growth", "0.5"], "growth=0.5 must be at least 1"),
        (["--devices", "64"], "64 devices were asked for, but JAX finds"),
        (["--devices", "0"], "--devices 0 must be above 0"),
        (["--warmup-epochs", "-1"], "--warmup-epochs -1.0 must be at least 0."),
        (["--warmup-epochs", "100"], "--warmup-epochs 100 is more than the 25 epochs of the run."),
        (["--small"], "--small is for the larger data sets"),
        (["--weight-decay", "-1"], "--weight-decay -1.0 must be at least 0"),
        (["--model", "resnet"], "resnet"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        adabatch.main([*arguments, "--output-dir", str(tmp_path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1


def test_the_networks_side_by_side_come_from_their_arrays(tmp_path, capsys):
    folder, _ = finished()
    (source,) = folder.glob("adabatch/*/arrays.npz")
    for place, model in (("one", "alexnet"), ("two", "resnet20")):
        (tmp_path / "adabatch" / place).mkdir(parents=True)
        with np.load(source) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays.pop("about"))) | {"model": model}
        np.savez(tmp_path / "adabatch" / place / "arrays.npz", about=np.array(json.dumps(about)), **arrays)
    adabatch_figures.main(["--dataset", "digits", "--output-dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert "alexnet" in out and out.index("resnet20") < out.index("alexnet")  # in the paper's order
    for key in ("loss", "test_error", "throughput"):
        assert (tmp_path / "adabatch" / f"digits_{key}.png").exists() and (tmp_path / "adabatch" / f"digits_{key}.pdf").exists()
    with pytest.raises(SystemExit) as stopped:
        adabatch_figures.main(["--dataset", "cifar10", "--output-dir", str(tmp_path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "no finished run on cifar10" in error and error.count("\n") == 1


@pytest.mark.slow
def test_several_devices_train_as_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments.adabatch", *ARGUMENTS, "--devices", "1,2", "--output-dir", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    records = records_in(tmp_path)
    one, two = ([r for r in records if r.get("arm") == arm] for arm in ("adaptive", "adaptive_2"))
    assert [r["batch_size"] for r in two] == [10, 20, 30]
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose([a["loss"], a["test_loss"]], [b["loss"], b["test_loss"]], rtol=1e-4)
    assert {r["batch_size"] for r in records if r["kind"] == "cost" and r["devices"] == 2} == {10, 20, 30}
    assert "Speed-up of (b) on 2 devices over (a)" in done.stdout


def test_the_protocol_in_small_has_the_ratios_of_the_paper():
    for model, start in (("resnet20", 16), ("alexnet", 32)):
        config = adabatch.resolve(adabatch.shrink(adabatch.Config(dataset="cifar10", model=model, small=True)), 2500)
        assert (config.num_examples, config.epochs, config.every, config.batch_size, config.max_batch_size) == (2500, 10, 2, start, 16 * start)


def test_warmup_brings_the_large_arm_to_its_own_rate():
    config = adabatch.resolve(adabatch.Config(dataset="cifar10", model="resnet20", warmup_epochs=5), 50_000)
    rates = []
    for step in (0, 60, 120, 20 * 24):  # 24 updates an epoch
        fit_config = adabatch.make_fit_config(config, "large", 0.01, 0, 50_000)
        state = fit_config.optimizer.init(jnp.ones(()))
        moved = [leaf._replace(count=jnp.array(step)) if isinstance(leaf, optax.ScaleByScheduleState) else leaf for leaf in state[1]]
        updates, _ = fit_config.optimizer.update(jnp.zeros(()), (state[0], tuple(moved)), jnp.ones(()))
        rates.append(-float(updates) / 5e-4)
    np.testing.assert_allclose(rates, [0.01, (0.01 + 0.16) / 2, 0.16, 0.16 * 0.375], rtol=1e-4)
