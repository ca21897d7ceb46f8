"""The studies of batch size as a user runs them, in small: what they find, how they go on, what they refuse."""

import contextlib
import functools
import io
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import types

import numpy as np
import pytest

from experiments import (
    batch_shape,
    convergence,
    gradient_smoothness,
    iteration_speed,
    learning_rate_grid,
    nose_game,
)
from experiments.batch_shape_report import effect, window
from experiments.convergence_report import fit_critical, noise_scale, runs_of
from experiments.convergence_report import verdict as convergence_verdict
from experiments.gradient_smoothness_report import error_slope, fate
from experiments.iteration_speed_report import loading_decides_from
from experiments.learning_rate_grid_report import best_rates, rate_exponent, results
from experiments.learning_rate_grid_report import verdict as grid_verdict
from tests.conftest import ROOT

SMALL = ["--quick", "--model", "mlp", "--batch-sizes", "60", "600", "--epochs", "1"]  # of the networks the one that compiles fast
GRID = [*SMALL, "--learning-rates", "0.01", "0.1", "1e20", "--seeds", "2"]
ARGUMENTS = {
    "iteration_speed": ["--quick", "--model", "mlp", "--batch-sizes", "60", "600", "--rounds", "2"],
    "gradient_smoothness": ["--quick", "--model", "mlp", "--batch-sizes", "60", "600", "--iterations", "60"],
    "learning_rate_grid": GRID,
    "convergence": [*SMALL, "--tuned-rates", "0.1", "0.1", "--target-accuracy", "0.9999"],
    "batch_shape": ["--quick", "--models", "mlp", "--rounds", "3"],
    "nose_game": ["--quick"],
}
MODULES = {
    module.__name__.partition(".")[2]: module
    for module in (batch_shape, convergence, gradient_smoothness, iteration_speed, learning_rate_grid, nose_game)
}


def records_in(folder, study):
    (file,) = folder.glob(f"{study}/*/records.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@functools.cache
def finished(study):
    """A run of a study in small, once a process: its output folder and what it printed."""
    folder, out = pathlib.Path(tempfile.mkdtemp(prefix="jaxbatch-test-")), io.StringIO()
    with contextlib.redirect_stdout(out):
        MODULES[study].main([*ARGUMENTS[study], "--output-dir", str(folder)])
    return folder, out.getvalue()


@pytest.mark.parametrize("study", ARGUMENTS)
def test_each_study_ends_in_records_figures_and_sentences(study, capsys):
    folder, out = finished(study)
    (path,) = folder.glob(f"{study}/*")
    records = records_in(folder, study)
    assert len(records) >= 4 and (path / "config.json").exists()
    names = {file.name for file in path.iterdir()}
    assert {"figure.png", "figure.pdf"} <= names and not [name for name in names if name.startswith("in_flight")]
    assert "Figure" in out and "nan" not in out.lower()
    MODULES[study].main([*ARGUMENTS[study], "--output-dir", str(folder)])  # nothing is measured again
    assert records_in(folder, study) == records and "Going on from" in capsys.readouterr().out


def test_an_unreachable_target_is_a_result():
    folder, out = finished("convergence")
    assert "no size always reaches 99.99% validation accuracy" in out and "B = 60 (0 of 2), 600 (0 of 2)" in out
    assert "0/2" in out and "> 20" in out  # censored: 20 updates were made
    assert not any(record["reached"] for record in records_in(folder, "convergence") if record["kind"] == "run")


def test_a_diverging_rate_leaves_the_grid_and_the_others_alone():
    folder, _ = finished("learning_rate_grid")
    runs = [record for record in records_in(folder, "learning_rate_grid") if record["kind"] == "run"]
    assert {(r["learning_rate"], r["seed"]) for r in runs} == {(rate, seed) for rate in (0.01, 0.1, 1e20) for seed in (0, 1)}
    for record in (r for r in runs if r["epoch"] == 1):  # the very first batch is finite
        assert (record["diverged_at_update"] >= 0) == (record["learning_rate"] == 1e20)


def test_the_grid_goes_on_after_an_interruption(tmp_path, monkeypatch):
    whole, broken = finished("learning_rate_grid")[0], tmp_path
    written = learning_rate_grid.RunFolder.append
    count = 0

    def stop_after(folder, record):
        nonlocal count
        count += 1
        if count == 9:  # within the second evaluation of the first size
            raise KeyboardInterrupt
        written(folder, record)

    monkeypatch.setattr(learning_rate_grid.RunFolder, "append", stop_after)
    with pytest.raises(SystemExit) as stopped:
        learning_rate_grid.main([*GRID, "--output-dir", str(broken)])
    assert stopped.value.code == 130 and len(records_in(broken, "learning_rate_grid")) == 8
    monkeypatch.setattr(learning_rate_grid.RunFolder, "append", written)
    learning_rate_grid.main([*GRID, "--output-dir", str(broken)])
    in_order = lambda records: sorted(json.dumps(record, sort_keys=True) for record in records)
    assert in_order(records_in(broken, "learning_rate_grid")) == in_order(records_in(whole, "learning_rate_grid"))


@pytest.mark.parametrize(
    ("study", "arguments", "message"),
    [
        ("convergence", ["--batch-sizes", "0"], "--batch-sizes 0 must be at least 1."),
        ("iteration_speed", ["--batch-sizes", "-6"], "--batch-sizes -6 must be at least 1."),
        ("gradient_smoothness", ["--batch-sizes", "1443"], "--batch-sizes 1443 is larger than the data set (1442 training examples)."),
        ("convergence", ["--target-accuracy", "98"], "--target-accuracy 98.0 must be between 0 and 1, as 0.98."),
        ("convergence", ["--tuned-rates", "0.1"], "--tuned-rates: 1 rates for 4 batch sizes."),
        ("learning_rate_grid", ["--learning-rates", "0.1", "-1"], "--learning-rates -1.0 must be above 0 and finite."),
        ("learning_rate_grid", ["--momentum", "1"], "--momentum 1.0 must be at least 0 and below 1."),
        ("batch_shape", ["--centres", "100"], "--centres 100 must be a power of two of at least 32."),
        ("batch_shape", ["--models", "resnet"], "--models resnet: choose from simple_cnn, mlp."),
        ("nose_game", ["--batch-sizes", "13"], "--batch-sizes 13 is more than there are helpers (12)."),
        ("nose_game", ["--num-stepz", "3"], "num-stepz"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(study, arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        MODULES[study].main([*arguments, "--output-dir", str(tmp_path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_full_disk_is_one_line_and_keeps_what_is_finished(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": ""}
    study = f"{sys.executable} -m experiments.nose_game --quick --output-dir {tmp_path} --no-keep-compiled"
    command = ["bash", "-c", f"ulimit -f 20; exec {study}"]  # KiB a file: the records fit, the figure does not
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert len(records_in(tmp_path, "nose_game")) == 15


# What the reports make of records, on records whose answer is known.


def grid_records(config, best, spread=1.0):
    """Runs that reach the target soonest at ``best[size]``, later the farther the rate is from it."""
    random = np.random.default_rng(0)
    for size in config.batch_sizes:
        for rate in config.learning_rates:
            for seed in range(config.seeds):
                updates = 100 * (1 + abs(math.log(rate / best[size]))) + spread * random.normal()
                place = {"kind": "run", "batch_size": size, "learning_rate": rate, "seed": seed, "diverged_at_update": -1}
                yield {**place, "updates": 10, "validation_accuracy": 0.5}
                yield {**place, "updates": round(updates), "validation_accuracy": 0.99}
        yield {"kind": "size", "batch_size": size}


def grid_config(rates):
    return types.SimpleNamespace(batch_sizes=(1, 10, 100, 1000), learning_rates=rates, seeds=3, target_accuracy=0.98)


@pytest.mark.parametrize(("power", "holds"), [(1.0, "linear (1)"), (0.5, "square root (0.5)"), (0.0, "none (0)")])
def test_the_exponent_is_found(power, holds):
    config = grid_config(tuple(10.0 ** (n / 4) for n in range(-16, 5)))
    best = {size: min(config.learning_rates, key=lambda r: abs(math.log(r / (0.001 * size**power)))) for size in config.batch_sizes}
    records = list(grid_records(config, best))
    assert best_rates(config, records) == best
    p = rate_exponent(config, results(config, records))
    assert abs(p.value - power) < 0.06 and p.low < power < p.high and p.high - p.low < 0.3
    (sentence,) = (text for text in grid_verdict(config, records) if "grows as" in text)
    assert sentence.count(holds) == 1 and sum(name in sentence for name in ("linear", "square root", "none")) == 1


def test_an_edge_of_the_grid_is_told_and_left_out():
    config = grid_config((0.001, 0.01, 0.1, 1.0))
    records = list(grid_records(config, {1: 0.001, 10: 0.01, 100: 0.1, 1000: 1.0}))
    assert any("edge of the grid at B = 1, 1000;" in text for text in grid_verdict(config, records))
    p = rate_exponent(config, results(config, records))
    assert p.n == 2 and abs(p.value - 1) < 1e-6


def convergence_records(critical, least, seeds=4, sizes=(1, 6, 60, 600)):
    random = np.random.default_rng(0)
    for size in sizes:
        yield {"kind": "speed", "batch_size": size, "round": 0, "resident_ms": 0.1 + 0.01 * size, "streamed_ms": 0.2 + 0.02 * size}
    for table in ("same", "tuned"):
        for size in sizes:
            yield {"kind": "rate", "table": table, "batch_size": size, "learning_rate": 0.1}
            for seed in range(seeds):
                updates = least * (1 + critical / size) * math.exp(0.03 * random.normal())
                yield {
                    "kind": "run", "table": table, "batch_size": size, "seed": seed, "learning_rate": 0.1, "reached": True,
                    "updates": updates, "epochs": 1.0, "examples": size * updates, "compute_seconds": 1.0,
                    "best_validation_accuracy": 0.985, "validation_accuracy": 0.985, "test_accuracy": 0.98, "diverged": False,
                }  # fmt: skip


def test_the_critical_batch_size_is_found():
    records = list(convergence_records(critical=40.0, least=200.0))
    found = fit_critical(records, "tuned")
    assert found.critical_batch_size.low < 40 < found.critical_batch_size.high
    assert abs(found.critical_batch_size.value / 40 - 1) < 0.15 and abs(found.min_updates.value / 200 - 1) < 0.1
    place = {"kind": "noise", "table": "tuned", "batch_size": 6, "learning_rate": 0.1}
    noise = [
        {**place, "validation_accuracy": 0.5, "signal": 1.0 + 0.1 * (-1) ** n, "trace": scale} for n, scale in enumerate([38.0, 42.0, 41.0, 39.0])
    ]
    assert abs(noise_scale(records + noise).value - 40) < 1e-9
    of_another_rate = {**noise[0], "learning_rate": 0.2, "trace": 1e6}
    assert noise_scale([*records, of_another_rate, *noise]) == noise_scale(records + noise)
    config = types.SimpleNamespace(target_accuracy=0.98, seeds=4)
    assert any("lies within what it goes through" in text for text in convergence_verdict(config, records + noise))
    far = [{**record, "trace": 100 * record["trace"]} for record in noise]
    assert any("lies below" in text for text in convergence_verdict(config, records + far))
    both = [*noise, *({**record, "validation_accuracy": 0.99} for record in far)]
    assert any("40 [" in text and "and 4,000 [" in text and "within" in text for text in convergence_verdict(config, records + both))


def test_a_size_that_misses_the_target_is_left_out_of_the_fit():
    records = list(convergence_records(critical=40.0, least=200.0))
    for record in records:
        if record["kind"] == "run" and record["batch_size"] == 600 and record["seed"] == 0:
            record |= {"reached": False, "best_validation_accuracy": 0.8, "validation_accuracy": 0.1}
    config = types.SimpleNamespace(target_accuracy=0.98, seeds=4)
    told = " ".join(convergence_verdict(config, records))
    assert "600 (3 of 4)" in told and "B = 600 at rate 0.1 is lost in 1 of 4 runs: from 80.0% at best to 10.0% at the end" in told
    two = [record for record in records if record["batch_size"] in (6, 60)]
    assert fit_critical(two, "tuned") is None


def test_a_size_whose_rate_was_chosen_anew_is_told_at_that_rate_alone():
    records = list(convergence_records(critical=40.0, least=200.0))
    again = [{**r, "learning_rate": 0.2, "updates": 7.0} for r in records if r["kind"] == "run" and r["table"] == "tuned"]
    rate = {"kind": "rate", "table": "tuned", "batch_size": 6}
    there = [*records, {**rate, "learning_rate": 0.2}, *(r for r in again if r["batch_size"] == 6)]
    assert {r["updates"] for r in runs_of(there, "tuned", 6)} == {7.0} and 7.0 not in {r["updates"] for r in runs_of(there, "same", 6)}
    back = [*there, {**rate, "learning_rate": 0.1}]  # nothing is measured again, and the first rate's runs count
    assert runs_of(back, "tuned", 6) == runs_of(records, "tuned", 6)


def test_where_loading_decides():
    def records(loading):
        for size, ms in zip((1, 10, 100), loading, strict=True):
            for number in range(3):
                yield {"kind": "speed", "batch_size": size, "round": number, "loading_ms": ms, "compute_ms": 1.0}

    config = types.SimpleNamespace(batch_sizes=(1, 10, 100))
    assert loading_decides_from(config, list(records([0.1, 0.1, 10.0]))) == pytest.approx(10**1.5)
    assert loading_decides_from(config, list(records([0.1, 0.2, 0.9]))) is None
    assert loading_decides_from(config, list(records([2.0, 2.0, 9.0]))) == 1


def test_the_effect_of_a_shape_is_told_from_that_of_size():
    config = types.SimpleNamespace(centres=(64, 512), models=("mlp",), dtypes=("float32",), rounds=12)
    random = np.random.default_rng(0)
    records = []
    for size, kind in {**window(64), **window(512)}.items():
        for number in range(12):
            factor = {"power": 0.9, "eight": 0.95}.get(kind, 1.0) * math.exp(0.005 * random.normal())
            records.append({"kind": "time", "model": "mlp", "dtype": "float32", "batch_size": size, "round": number, "ms": (3 + 0.1 * size) * factor})
    for kind, expected in (("power", 0.9), ("eight", 0.95), ("round", 1.0)):
        found = effect(config, records, "mlp", "float32", kind)
        assert abs(found.value - expected) < 0.01 and (expected == 1 or found.high < 0.98)


def test_the_slope_of_the_error_and_a_run_that_is_lost():
    random = np.random.default_rng(0)
    config = types.SimpleNamespace(batch_sizes=(1, 10, 100))
    records = [
        {"kind": "error", "place": "start", "batch_size": size, "seed": 0, "cosine": [0.5],
         "error": list(random.chisquare(20, 200) / 20 * 30 / size)}
        for size in config.batch_sizes
    ]  # fmt: skip
    slope = error_slope(config, records, "start")
    assert abs(slope.value + 1) < 0.03 and not slope.excludes(-1)
    curve = {"kind": "curve", "batch_size": 1, "seed": 0, "guess_loss": math.log(10), "diverged_at_iteration": -1}
    assert fate([{**curve, "loss": [2.3, 0.5, 0.2, 0.1] * 5}], 1) == "learned"
    assert fate([{**curve, "loss": [2.3] * 20}], 1) == "1 of 1 no better than a guess"
    bad = {**curve, "loss": [2.3, None], "diverged_at_iteration": 1}
    assert fate([bad], 1) == "1 of 1 diverged, first at iteration 1"


def test_a_path_of_everyone_is_straight_and_that_of_one_is_not():
    config = nose_game.Config()
    lengths = {}
    for size in (1, 12):
        paths = [nose_game.play(config, seed, size) for seed in range(5)]
        lengths[size] = np.mean([nose_game.describe_path(path, nose_game.target(nose_game.make_helpers(config, seed)))["length"]
                                 for seed, path in enumerate(paths)])  # fmt: skip
    assert lengths[1] > 1.3 * lengths[12]
    one = nose_game.make_helpers(config, 0)
    full = nose_game.play(nose_game.Config(num_steps=400), 0, 12)
    np.testing.assert_allclose(full[-1], nose_game.target(one), atol=1e-4)
