"""The first study as a user runs it: its command line, its resumption, and the sentences that it allows itself."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments.split_backward import __main__ as split_backward
from experiments.split_backward.records import chosen_rate, curve, rate_of
from jaxbatch.training.goals import as_goal
from tests.conftest import ROOT

ARGUMENTS = ["--quick", "--epochs", "2", "--batch-size", "32", "--num-groups", "4"]
FAST = [*ARGUMENTS, "--model", "mlp"]  # compiles fast
AS_USERS = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}


def run(*arguments, cwd, check=True, module="experiments.split_backward"):
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=cwd, env=AS_USERS, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def records_of(folder):
    (file,) = pathlib.Path(folder).glob("results/split_backward/*/records.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def results_only(records):
    """Records without the times, which no two runs share."""
    return [{k: v for k, v in r.items() if k != "seconds" and not k.endswith("_ms")} for r in records]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return folder, run(*ARGUMENTS, cwd=folder)


def test_quick_run(finished):
    folder, done = finished
    records = records_of(folder)
    assert {r["kind"] for r in records} == {"exactness", "cost", "curve", "distance", "end", "tune"}
    arms = {"original": split_backward.ARMS, "tuned": split_backward.OWN_RULES}
    everything = {(protocol, arm, seed) for protocol in arms for arm in arms[protocol] for seed in (0, 1)}
    for kind in ("curve", "end"):
        assert {(r["protocol"], r["arm"], r["seed"]) for r in records if r["kind"] == kind} == everything
    assert sum(r["kind"] == "end" for r in records) == len(everything)  # the test set is looked at once a run
    assert not any("test_accuracy" in r for r in records if r["kind"] != "end")
    for protocol in arms:
        for arm, updates in (("one", 74), ("split", 296), ("scaled", 74), ("small", 296)):
            last = curve(records, protocol, arm, 0)[-1]
            assert last["updates"] == updates and last["examples"] == 74 * 32  # equal examples, K times the updates
    rates = {(r["arm"], r["learning_rate"]) for r in records if r["kind"] == "tune"}
    assert rates == {(arm, rate) for arm in split_backward.OWN_RULES for rate in (0.00316, 0.0316, 0.316)}  # one grid for all
    assert min(r["seed"] for r in records if r["kind"] == "tune") > 1  # none of those that score
    for arm in split_backward.ARMS:
        assert rate_of(records, "tuned", arm) == chosen_rate(records, arm, as_goal("accuracy>0.95"))
    assert [rate_of(records, "original", arm) for arm in split_backward.ARMS] == [0.02, 0.02, 0.08, 0.02]
    for record in records:
        if record["kind"] == "exactness":
            assert record["relative_error"] < 10 * record["rounding"]
    (path,) = folder.glob("results/split_backward/*")
    assert {"config.json", "figure.png", "figure.pdf", "records.jsonl"} <= {p.name for p in path.iterdir()}
    assert (path / "figure.png").stat().st_size > 20_000
    assert "Verdict at one rate: splitting" in done.stdout and "Verdict with each arm at its best rate: splitting" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_finished_run_is_not_measured_again(finished):
    folder, _ = finished
    before = records_of(folder)
    started = time.time()
    again = run(*ARGUMENTS, cwd=folder)
    assert time.time() - started < 20 and "Continuing from" in again.stdout
    assert records_of(folder) == before


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_numbers(finished, tmp_path):
    folder, _ = finished
    command = [sys.executable, "-m", "experiments.split_backward", *ARGUMENTS]
    process = subprocess.Popen(command, cwd=tmp_path, env=AS_USERS, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while time.time() < deadline:  # as soon as the first seed's first evaluation is on disk
        files = list(tmp_path.glob("results/split_backward/*/records.jsonl"))
        if files and files[0].read_text().count('"curve"') >= 4:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(records_of(tmp_path))
    assert 0 < kept < len(records_of(folder))
    run(*ARGUMENTS, cwd=tmp_path)

    def sorted_results(folder):
        return sorted(results_only(records_of(folder)), key=lambda r: json.dumps(r, sort_keys=True))

    assert sorted_results(tmp_path) == sorted_results(folder)


@pytest.mark.skipif(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, reason="started in the background of a shell, where Ctrl-C is ignored")
def test_ctrl_c_is_one_line(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "experiments.split_backward", *FAST[3:], "--epochs", "500", "--cost-rounds", "1"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.time() + 120
    while time.time() < deadline and not list(tmp_path.glob("results/split_backward/*/in_flight_original.msgpack")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.strip().splitlines()[-1].startswith("interrupted: finished measurements are kept")
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-groups", "5"], "num_groups=5 does not divide batch_size=64. Nearest that do: 4 and 8."),
        (["--batch-size", "2000", "--num-groups", "1"], "batch_size=2000 is larger than the data set"),
        (["--batch-size", "0"], "--batch-size 0 must be above 0"),
        (["--learning-rate", "-1"], "--learning-rate -1.0 must be above 0"),
        (["--learning-rates", "0.1", "0"], "--learning-rates 0.0 must be above 0"),
        (["--tune-seeds", "0"], "--tune-seeds 0 must be above 0"),
        (["--momentum", "1.5"], "--momentum 1.5"),
        (["--target", "accuracy>98"], "--target accuracy>98: for an accuracy, write > and a number between 0 and 1"),
        (["--dataset", "cifar-10"], "Did you mean 'cifar10'"),
        (["--dataset", "mnist", "--data-dir", "/no/such"], "data_dir='/no/such' is not a folder"),
        (["--batch-sizee", "3"], "--batch-sizee"),
        (["--batch-size", "many"], "many"),
        (["--optimizer", "sgdd"], "sgdd"),
        (["--output-dir", "/proc/nothing"], "/proc/nothing"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        split_backward.main(arguments)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line


def test_diverging_arms_are_results(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    split_backward.main([*FAST, "--seeds", "1", "--learning-rate", "1e30", "--cost-rounds", "1"])
    assert {r["arm"] for r in records_of(tmp_path) if r["kind"] == "curve" and r["diverged"]}
    assert "Traceback" not in capsys.readouterr().out


@pytest.mark.slow
def test_adam(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    split_backward.main([*FAST, "--seeds", "1", "--optimizer", "adam", "--learning-rate", "0.002"])
    assert "digits, mlp, B = 32, K = 4, Adam at rate 0.002 and at each arm's best rate" in capsys.readouterr().out


def test_without_tuning_only_the_one_rate_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    split_backward.main([*FAST, "--seeds", "1", "--cost-rounds", "1", "--no-tune"])
    out = capsys.readouterr().out
    assert "Verdict at one rate" in out and "best rate" not in out and "own rates" not in out
    assert not [r for r in records_of(tmp_path) if r["kind"] == "tune" or r.get("protocol") == "tuned"]


def test_list_of_studies(tmp_path):
    shown = run(cwd=tmp_path, module="experiments").stdout
    assert "split_backward: One forward, several backward" in shown
