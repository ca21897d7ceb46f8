"""The study that advises, from the command line: its answer, its records, going on after a kill, and errors in one line."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest

import jaxbatch as jb
from experiments.advise import records as advise_records
from experiments.advise.records import read_setting, write_setting
from experiments.advise.verify import Verification, read_verification, regret
from jaxbatch.advice.doubts import why_none
from jaxbatch.advice.full_sweep import mean_costs
from jaxbatch.advice.probes import Probe
from jaxbatch.advice.settling import Setting, conclude
from jaxbatch.results.records import open_run, read_records

FLAGS = ("--quick", "--model", "mlp", "--target", "accuracy>0.85", "--batch-sizes", "8", "32", "128", "--learning-rates", "0.01", "0.1", "1")


def run(*flags):
    return subprocess.run([sys.executable, "-m", "experiments.advise", *flags], capture_output=True, text=True)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("advise")
    done = run(*FLAGS, "--verify", "--seeds", "1", "--epochs", "8", "--output-dir", str(folder))
    assert (done.returncode, done.stderr) == (0, "")
    (path,) = folder.glob("advise/*/records.jsonl")
    return path, done.stdout


def test_answer_table_figure_and_code(quick_run):
    path, text = quick_run
    for part in (
        "Train with batch size",
        "The device is busy from",
        "cost ÷ advised",
        "The full sweep",
        "The advised setting costs",
        "jb.FitConfig(",
    ):
        assert part in text
    assert (path.parent / "figure.png").stat().st_size > 10_000


def test_the_advice_follows_from_the_records(quick_run):
    path, text = quick_run
    records = read_records(path.parent)
    setting, throughput, probes = (
        read(records) for read in (advise_records.read_setting, advise_records.read_throughput, advise_records.read_probes)
    )
    advice = conclude(setting, throughput, probes)
    assert f"batch size {advice.batch_size} and learning rate {advice.learning_rate:.3g}" in text
    assert len(advice.probes) == sum(record["kind"] == "probe" for record in records)


def test_nothing_is_run_again(quick_run):
    path, _ = quick_run
    before = path.read_text()
    done = run(*FLAGS, "--verify", "--seeds", "1", "--epochs", "8", "--output-dir", str(path.parents[2]))
    assert "Continuing from" in done.stdout
    assert path.read_text() == before


@pytest.mark.slow
def test_a_killed_run_goes_on_and_answers(tmp_path):
    command = [sys.executable, "-m", "experiments.advise", *FLAGS, "--output-dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any("probe" in path.read_text() for path in tmp_path.glob("advise/*/records.jsonl")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (path,) = tmp_path.glob("advise/*/records.jsonl")
    kept = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    done = run(*FLAGS, "--output-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Train with batch size" in done.stdout
    assert path.read_text().startswith("".join(kept))
    numbers = [json.loads(line)["number"] for line in path.read_text().splitlines() if '"probe"' in line]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target", "accuracy"], "accuracy"),
        (["--target", "recall>0.5"], "metrics are accuracy, loss"),
        (["--target", "accuracy>0.001"], "reached before training"),
        (["--device", "h1000"], "h1000"),
        (["--memory", "much"], "much"),
        (["--objective", "money"], "money"),
        (["--batch-sizes", "5000", "8"], "1202 examples"),
        (["--learning-rates", "0.1"], "learning_rates"),
        (["--max-probes", "0"], "--max-probes 0"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, flags, message):
    done = run("--model", "mlp", *flags, "--output-dir", str(tmp_path))
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_target_that_is_too_far_is_said(tmp_path):
    flags = ("--quick", "--model", "mlp", "--batch-sizes", "32", "64", "--learning-rates", "0.001", "0.01", "0.1", "--epochs", "1")
    done = run(*flags, "--target", "accuracy>0.999", "--output-dir", str(tmp_path))
    assert done.returncode == 0
    assert "No advice." in done.stdout
    assert "No run reached accuracy>0.999" in done.stdout


# The sweep's numbers


def rows(size, rate, updates):
    return [{"batch_size": size, "learning_rate": rate, "seed": seed, "updates": value, "ran": 9} for seed, value in enumerate(updates)]


def test_a_setting_counts_only_if_every_seed_reaches_the_goal():
    assert mean_costs(rows(8, 0.1, [10, 20]) + rows(8, 0.2, [1, None]), {8: 2.0}) == {(8, 0.1): 30.0}


def test_regret_is_a_ratio_of_mean_costs():
    found = regret(rows(8, 0.1, [10, 20]), rows(16, 0.1, [5, 5]), {8: 1.0, 16: 2.0})
    assert found.value == pytest.approx(1.5)
    assert found.low <= 1.5 <= found.high
    assert regret(rows(8, 0.1, [10, None]), rows(16, 0.1, [5, 5]), {8: 1.0, 16: 2.0}).value == float("inf")


def test_without_verify_there_is_nothing_to_say(quick_run):
    path, _ = quick_run
    records = [record for record in read_records(path.parent) if record["kind"] not in ("sweep", "judged")]
    assert read_verification(None, records) is None
    assert Verification._fields == ("rows", "sentence")


def test_a_metric_that_is_not_a_number_before_training_is_read_back(tmp_path):
    setting = Setting(jb.Goal("loss", 0.5, above=False), "time", (8, 16), (0.1, 1.0), 2, 100, math.nan, None, ())
    run = open_run(tmp_path, "advise", {})
    run.append(write_setting(setting))
    again = read_setting(open_run(tmp_path, "advise", {}).records)
    assert math.isnan(again.start) and again._replace(start=0.0) == setting._replace(start=0.0)
    lost = Probe(8, 0.1, 0, 9, False, True, 9, math.nan, math.nan, math.nan)
    assert "diverged" in why_none([lost], again.goal, again.start)
    assert "nan" in why_none([lost._replace(diverged=False)], again.goal, again.start)
