"""The first study as a user runs it: its command line, its resumption, and the sentences that it allows itself."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from experiments import split_backward
from experiments.split_backward_records import chosen_rate, curve, rate_of
from experiments.split_backward_verdict import verdict
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
        assert rate_of(records, "tuned", arm) == chosen_rate(records, arm)
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
    assert time.time() - started < 20 and "Going on from" in again.stdout
    assert records_of(folder) == before


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
        (["--target-accuracy", "98"], "--target-accuracy 98.0 must be between 0 and 1"),
        (["--dataset", "cifar-10"], "Did you mean 'cifar10'"),
        (["--dataset", "mnist", "--data-dir", "/no/such"], "data_dir='/no/such' is no folder"),
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


def test_adam(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    split_backward.main([*FAST, "--seeds", "1", "--optimizer", "adam", "--learning-rate", "0.002"])
    assert "digits, mlp, B = 32, K = 4, adam at rate 0.002 and at each arm's best rate" in capsys.readouterr().out


def test_without_tuning_only_the_one_rate_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    split_backward.main([*FAST, "--seeds", "1", "--cost-rounds", "1", "--no-tune"])
    out = capsys.readouterr().out
    assert "Verdict at one rate" in out and "best rate" not in out and "own rates" not in out
    assert not [r for r in records_of(tmp_path) if r["kind"] == "tune" or r.get("protocol") == "tuned"]


def test_list_of_studies(tmp_path):
    shown = run(cwd=tmp_path, module="experiments").stdout
    assert "split_backward: One forward, several backward" in shown


# The verdict follows from the numbers: made-up curves with a known answer.
def made_up(accuracies, n=6, protocol="original", rates=None):
    """Records in which arm ``a`` reaches accuracy ``accuracies[a]`` at the end, passing 0.9 on the way if it can."""
    random, records = np.random.default_rng(0), []
    for seed in range(n):
        for arm, end in accuracies.items():
            place = {"protocol": protocol, "arm": arm, "seed": seed, "learning_rate": (rates or {}).get(arm, 0.02)}
            for segment in range(10):
                accuracy = end * (1 - 0.6 ** (segment + 1)) + random.normal(0, 0.002)
                records.append(
                    {"kind": "curve", **place, "segment": segment, "examples": 100 * (segment + 1),
                     "updates": segment, "validation_accuracy": accuracy, "validation_loss": 1.0, "seconds": 1.0, "diverged": False}
                )  # fmt: skip
            records.append({"kind": "end", **place, "test_accuracy": accuracy, "test_loss": 1.0})
        for number in range(3):
            records.append({"kind": "cost", "round": 3 * seed + number, "one_ms": 1.0, "split_ms": 1.1, "small_ms": 2.0, "naive_ms": 5.0})
    return records


CONFIG = types.SimpleNamespace(
    num_groups=4, target_accuracy=0.9, optimizer="sgd", momentum=0.5, learning_rate=0.02, learning_rates=(0.01, 0.1, 1.0), tune_seeds=2
)


@pytest.mark.parametrize(
    ("ends", "sentences"),
    [
        ({"one": 0.92, "split": 0.98, "scaled": 0.98, "small": 0.98}, ["splitting helps", "nothing tells it from a 4 times"]),
        ({"one": 0.98, "split": 0.98, "scaled": 0.93, "small": 0.99}, ["does better than a 4 times larger"]),
        ({"one": 0.98, "split": 0.93, "scaled": 0.98, "small": 0.98}, ["splitting harms", "does worse than a 4 times"]),
        ({"one": 0.97, "split": 0.97, "scaled": 0.97, "small": 0.97}, ["makes no difference that shows"]),
    ],
)
def test_verdict_follows_from_the_numbers(ends, sentences):
    text = " ".join(verdict(CONFIG, made_up(ends)))
    for sentence in sentences:
        assert sentence in text
    assert "a split step takes 1.10 [1.10, 1.10] times an ordinary step" in text


def test_a_collapsed_run_is_a_lost_run():
    records = made_up({"one": 0.97, "split": 0.97, "scaled": 0.97, "small": 0.97})
    for record in records:
        if record["kind"] == "curve" and record["arm"] == "split" and record["seed"] == 2 and record["segment"] == 9:
            record["validation_accuracy"] = 0.1
    text = " ".join(verdict(CONFIG, records))
    assert "runs lost: 1 against 0" in text and "does worse than a 4 times larger learning rate" in text


def test_the_same_update_is_called_so_whatever_chance_does():
    # Without momentum (b) and (c) are one rule; made-up runs that differ must not be told apart.
    records = made_up({"one": 0.92, "split": 0.98, "scaled": 0.93, "small": 0.98})
    distance = {"kind": "distance", "batch_split_scaled": 1e-5, "batch_split_small": 0.3}
    text = " ".join(verdict(CONFIG, [*records, distance]))
    assert "it is a 4 times larger learning rate and nothing else" in text and "is chance" in text
    text = " ".join(verdict(CONFIG, [*records, distance | {"batch_split_scaled": 0.5}]))
    assert "does better than a 4 times larger" in text


def test_verdict_of_few_seeds_says_so():
    ends = dict.fromkeys(split_backward.ARMS, 0.97)
    assert "too narrow" in verdict(CONFIG, made_up(ends, n=2))[-1]
    assert "too narrow" not in verdict(CONFIG, made_up(ends, n=10))[-1]


def test_each_protocol_has_a_verdict_of_its_own():
    one_rate = made_up({"one": 0.92, "split": 0.98, "scaled": 0.98, "small": 0.98})
    own = made_up({"one": 0.98, "split": 0.93, "small": 0.98}, protocol="tuned", rates={"one": 1.0, "split": 0.1, "small": 0.01})
    told = verdict(CONFIG, [*one_rate, *(record for record in own if record["kind"] != "cost")])
    first, second = (next(text for text in told if text.startswith(start)) for start in ("Verdict at one", "Verdict with each"))
    assert "splitting helps against one update" in first and "splitting harms against one update" in second
    text = " ".join(told)
    assert "(a) 1, (b) 0.1, (d) 0.01, of 3 tried with 2 other seeds" in text
    assert "The best rate of (a), 1, is the highest of the grid" in text and "The best rate of (d), 0.01, is the lowest" in text
    assert "best rate of (b)" not in text


def choosing(runs):
    """Choosing runs of one arm: rate to pairs of (examples to the target or None, accuracy at the end)."""
    for rate, pairs in runs.items():
        for seed, (examples, accuracy) in enumerate(pairs):
            place = {"kind": "tune", "arm": "one", "learning_rate": rate, "seed": 1000 + seed, "examples_to_target": examples}
            yield {**place, "validation_accuracy": accuracy, "best_validation_accuracy": 0.9, "diverged": accuracy == 0}


@pytest.mark.parametrize(
    ("runs", "chosen"),
    [
        ({0.01: [(500, 0.9), (700, 0.9)], 0.1: [(400, 0.9), (600, 0.9)]}, 0.1),  # the fewest examples
        ({0.01: [(500, 0.9), (700, 0.9)], 0.1: [(100, 0.99), (None, 0.99)]}, 0.01),  # all reach it, or it does not count
        ({0.01: [(None, 0.7), (None, 0.7)], 0.1: [(None, 0.6), (None, 0.7)]}, 0.01),  # none reaches it: the higher end
        ({0.01: [(None, 0.7), (None, 0.7)], 0.1: [(100, 0.9), (100, 0.2)]}, 0.01),  # a collapse loses
        ({0.01: [(None, 0.7), (None, 0.7)], 0.1: [(100, 0.9), (100, 0.0)]}, 0.01),  # so does a divergence
        ({0.01: [(400, 0.8), (400, 0.8)], 0.1: [(400, 0.9), (400, 0.9)]}, 0.1),  # equal: the higher end
    ],
)
def test_the_rate_is_the_one_that_the_choosing_runs_say(runs, chosen):
    records = list(choosing(runs))
    assert chosen_rate(records, "one") == chosen == chosen_rate(records, "scaled")  # (c) at a rate of its own is (a)
    assert chosen_rate([*records, *made_up({"one": 0.99}, rates={"one": 5.0})], "one") == chosen  # no scored run has a part
