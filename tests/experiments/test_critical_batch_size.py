"""The study of the three ways to the critical batch size: from the command line, and its numbers against closed forms."""

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest

from experiments.critical_batch_size.report import noise_between, of_branches, verdict, ways
from jaxbatch.advice.full_sweep import best_rates
from jaxbatch.results.records import read_records

CONFIG = SimpleNamespace(base_batch_size=8, tolerance=0.05, target="loss<0.1")


def run(*flags):
    return subprocess.run([sys.executable, "-m", "experiments.critical_batch_size", *flags], capture_output=True, text=True)


def swept(size, rate, updates):
    return [{"kind": "sweep", "batch_size": size, "learning_rate": rate, "seed": n, "updates": u, "ran": u or 99} for n, u in enumerate(updates)]


LAW = [row for size in (8, 32, 128) for row in swept(size, 0.1, [round(1000 * (1 + 64 / size))] * 2)]


def noise(progress, signal=1.0, trace=60.0):
    return [{"kind": "noise", "seed": n, "progress": progress, "signal": signal + 0.01 * n, "trace": trace, "measurements": 3} for n in range(3)]


def branches(losses):
    found = []
    for factor, loss in losses.items():
        place = {"kind": "branch", "stage": 0.5, "batch_size": 8 * factor, "metric": "loss", "above": False}
        found += [place | {"seed": n, "value": loss, "examples": 100} for n in range(2)]
    return found


def test_the_best_rate_is_the_one_that_every_seed_reaches_soonest():
    rows = [*swept(8, 0.1, [50, 60]), *swept(8, 0.2, [10, None]), *swept(8, 0.3, [40, 45]), *swept(16, 0.1, [None, None])]
    assert best_rates(rows) == {8: (0.3, [40, 45])}


def test_three_ways_that_agree():
    records = [*LAW, *noise(0.1), *noise(0.5), *noise(0.9), *branches({1: 1.0, 2: 1.01, 4: 1.02, 8: 1.03, 16: 2.0})]
    records += [{"kind": "run", "seed": 0, "learning_rate": 0.1, "updates": 900}]
    found = {way.name: way for way in ways(CONFIG, records)}
    assert found["updates to the target, 3 sizes"].critical_batch_size.value == pytest.approx(64, rel=0.01)
    assert found["noise, 0 to 33% of the way"].critical_batch_size.value == pytest.approx(60, rel=0.02)
    assert found["branches at 50% of the way"].critical_batch_size[:3] == (64, 64, 128)
    assert found["branches at 50% of the way"].examples == 1000
    assert verdict(CONFIG, records)[1] == "All agree with the fit within a factor of 2."


def test_a_way_that_does_not_agree_is_named():
    told = verdict(CONFIG, [*LAW, *branches({1: 1.0, 2: 2.0})])
    assert told[1] == "These differ from the fit by more than a factor of 2: branches at 50% of the way."


def test_without_three_sizes_there_is_no_fit():
    assert "Fewer than three sizes" in verdict(CONFIG, [*swept(8, 0.1, [5, 6]), *noise(0.5)])[1]
    assert "None of the three ways gives a number" in verdict(CONFIG, swept(8, 0.1, [None]))[0]


def test_noise_without_signal_is_not_sure():
    rows = [{**row, "signal": (-1.0) ** row["seed"] * 0.1} for row in noise(0.5)]
    assert noise_between(rows, 0, 1)[0].high == math.inf


def test_a_branch_that_diverged_does_not_hold():
    assert of_branches(CONFIG, branches({1: 1.0, 2: None}))[:3] == (8, 0, 16)


@pytest.mark.slow  # a minute
def test_the_study_answers_and_goes_on(tmp_path):
    flags = ("--quick", "--model", "mlp", "--target", "accuracy>0.85", "--output-dir", str(tmp_path))
    done = run(*flags)
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("Updates to accuracy>0.85", "The critical batch size", "branches at 100% of the way", "Figure:"):
        assert part in done.stdout
    (path,) = tmp_path.glob("critical_batch_size/*/records.jsonl")
    kinds = {record["kind"] for record in read_records(path.parent)}
    assert kinds == {"sweep", "noise", "branch", "run"}
    before = path.read_text()
    assert "Continuing from" in run(*flags).stdout
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base-batch-size", "12"], "--base-batch-size 12"),
        (["--examples", "0"], "--examples 0"),
        (["--batch-sizes", "16", "5000"], "5000"),
        (["--tolerance", "0"], "--tolerance 0"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, flags, message):
    done = run("--model", "mlp", *flags, "--output-dir", str(tmp_path))
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
