"""The studies of batch size as a user runs them, in small: what they find, how they go on, what they refuse."""

import contextlib
import functools
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

from experiments.batch_shape import __main__ as batch_shape
from experiments.convergence import __main__ as convergence
from experiments.gradient_smoothness import __main__ as gradient_smoothness
from experiments.iteration_speed import __main__ as iteration_speed
from experiments.learning_rate_grid import __main__ as learning_rate_grid
from experiments.nose_game import __main__ as nose_game
from jaxbatch.results.records import RunFolder
from tests.conftest import ROOT

SMALL = ["--quick", "--model", "mlp", "--batch-sizes", "60", "600", "--epochs", "1"]  # of the networks the one that compiles fast
GRID = [*SMALL, "--learning-rates", "0.01", "0.1", "1e20", "--seeds", "2"]
ARGUMENTS = {
    "iteration_speed": ["--quick", "--model", "mlp", "--batch-sizes", "60", "600", "--rounds", "2"],
    "gradient_smoothness": ["--quick", "--model", "mlp", "--batch-sizes", "60", "600", "--iterations", "60"],
    "learning_rate_grid": GRID,
    "convergence": [*SMALL, "--tuned-rates", "0.1", "0.1", "--target", "accuracy>0.9999"],
    "batch_shape": ["--quick", "--models", "mlp", "--rounds", "3"],
    "nose_game": ["--quick"],
}
MODULES = {
    module.__name__.split(".")[1]: module
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
    assert records_in(folder, study) == records and "Continuing from" in capsys.readouterr().out


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
    written = RunFolder.append
    count = 0

    def stop_after(folder, record):
        nonlocal count
        count += 1
        if count == 9:  # within the second evaluation of the first size
            raise KeyboardInterrupt
        written(folder, record)

    monkeypatch.setattr(RunFolder, "append", stop_after)
    with pytest.raises(SystemExit) as stopped:
        learning_rate_grid.main([*GRID, "--output-dir", str(broken)])
    assert stopped.value.code == 130 and len(records_in(broken, "learning_rate_grid")) == 8
    monkeypatch.setattr(RunFolder, "append", written)
    learning_rate_grid.main([*GRID, "--output-dir", str(broken)])
    in_order = lambda records: sorted(json.dumps(record, sort_keys=True) for record in records)
    assert in_order(records_in(broken, "learning_rate_grid")) == in_order(records_in(whole, "learning_rate_grid"))


@pytest.mark.parametrize(
    ("study", "arguments", "message"),
    [
        ("convergence", ["--batch-sizes", "0"], "--batch-sizes 0 must be at least 1."),
        ("iteration_speed", ["--batch-sizes", "-6"], "--batch-sizes -6 must be at least 1."),
        ("gradient_smoothness", ["--batch-sizes", "1443"], "--batch-sizes 1443 is larger than the data set (1442 training examples)."),
        ("convergence", ["--target", "accuracy>98"], "--target accuracy>98: for an accuracy, write > and a number between 0 and 1"),
        ("convergence", ["--tuned-rates", "0.1"], "--tuned-rates: 1 rates for 4 batch sizes. Give one rate for each."),
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
