"""The study of sharpness: its report on known records, and as a user runs it."""

import math
import subprocess
import sys
from types import SimpleNamespace

import flax.serialization
import pytest

from experiments.sharpness.__main__ import append_new
from experiments.sharpness.report import barriers, further, is_no_minimum, ratio, solutions, stability_limit, verdict
from jaxbatch.results.records import open_run, read_records
from jaxbatch.states import unpack

CONFIG = SimpleNamespace(
    optimizer="momentum", target="accuracy>0.9", epochs=30, train_loss=0.02, small_batch_size=16, large_batch_size=1024, continue_epochs=5
)
SWEEP = [{"kind": "sweep", "batch_size": size, "learning_rate": 0.1, "seed": seed, "updates": 9, "ran": 9} for size in (16, 1024) for seed in (0, 1)]


def solved(size, seed, comparison="loss", **fields):
    usual = {"updates": 9, "loss": 0.02, "largest": 10.0, "smallest": -0.1, "trace": 50.0, "gradient_norm": 0.1, "loss_after_step": 0.019}
    return {
        "kind": "solution",
        "comparison": comparison,
        "batch_size": size,
        "seed": seed,
        **usual,
        "test_accuracy": 0.95,
        "test_loss": 0.1 * size**0.25,
    } | fields


def lines(seed, values, comparison="loss"):
    places = (-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
    return [{"kind": "line", "comparison": comparison, "seed": seed, "point": t, "loss": value} for t, value in zip(places, values, strict=True)]


def went_on(size, with_size, seed, losses):
    place = {"kind": "continued", "comparison": "loss", "batch_size": size, "with_batch_size": with_size, "seed": seed}
    return [place | {"epoch": epoch, "loss": loss} for epoch, loss in enumerate(losses)]


def records(large, last, count=3):
    found = list(SWEEP)
    for seed in range(count):
        found += [solved(16, seed, largest=10.0 + seed), solved(1024, seed, **large | {"largest": large["largest"] * (10 + seed)})]
        found += lines(seed, [9.0, 0.02, 0.05, 0.08, 0.05, 0.02, 9.0])
        found += [*went_on(16, 16, seed, [0.02, 0.01]), *went_on(1024, 16, seed, [0.02, 0.03, 0.015]), *went_on(1024, 1024, seed, [0.02, last])]
    return found


def test_a_sharper_minimum_that_is_none_is_told():
    told = verdict(CONFIG, records({"largest": 3.0}, 0.005))
    assert told[0].startswith("No seed reached both solutions after 30 epochs")
    assert "the largest eigenvalue at B = 1024 is 3.00 [3.00, 3.00] times that at B = 16 (sharper), and the trace is 1.00" in told[1]
    assert "test accuracy differs by +0.0000 [+0.0000, +0.0000], and the test loss is 2.83 [2.83, 2.83] times as large." in told[1]
    assert "is 0.29 [0.22, 0.36] at B = 16 and 0.87 [0.67, 1.09] at B = 1024" in told[1]  # of 38
    assert "negative curvature is proved at 3 of 3 solutions of B = 1024 and at 3 of B = 16" in told[2] and "by 5.0 [5.0, 5.0]%" in told[2]
    assert "rises by 0.06 [0.06, 0.06] above the straight line between its values at the ends, the higher of which is 0.02" in told[3]
    assert "After 30 more epochs with its own batch, the large batch's loss is 0.25 [0.25, 0.25] times what it was" in told[4]
    assert "it is 0.75 [0.75, 0.75] times, and 1.50 [1.50, 1.50] at its highest (it rises first); the small batch's own loss is then 0.50" in told[4]
    assert told[5].startswith("«Large batches fall into a local minimum» does not hold here: 3 of 3")


def test_a_flatter_one_that_is_a_local_minimum_is_told():
    told = verdict(CONFIG, records({"largest": 0.5, "smallest": 0.0, "loss_after_step": 0.02}, 0.025))
    assert "0.50 [0.50, 0.50] times that at B = 16 (flatter)" in told[1]
    assert told[-1].startswith("«Large batches fall into a local minimum» is not contradicted here: 0 of 3")


def test_something_between_and_too_few_seeds_are_no_verdict():
    assert "neither shown nor excluded" in verdict(CONFIG, records({"largest": 1.0}, 0.025))[-1]
    assert "no difference shows" in verdict(CONFIG, records({"largest": 1.0}, 0.025))[1]
    told = verdict(CONFIG, records({"largest": 3.0}, 0.005, count=2))
    assert "too few seeds to tell" in told[1] and "too few seeds for a verdict" in told[-1]


def test_what_was_not_reached_is_told():
    late = [row | {"updates": None} if row["batch_size"] == 1024 else row for row in SWEEP]
    assert verdict(CONFIG, late) == ["No rate reached accuracy>0.9 with every seed at B = 1024: nothing to compare. Raise --max-epochs."]
    told = verdict(CONFIG, [*SWEEP, {"kind": "trained", "batch_size": 16, "seed": 1, "diverged": True, "updates": 7}, solved(16, 0)])
    assert told[0] == "B = 16, seed 1 diverged after 7 updates." and len(told) == 3


def test_numbers_of_the_report():
    rows = records({"largest": 3.0}, 0.005)
    assert [pair[1]["batch_size"] for pair in solutions([*rows, solved(16, 7)], "loss")] == [1024] * 3
    assert ratio(solutions(rows, "loss"), "largest").value == pytest.approx(3)
    assert barriers(lines(0, [9.0, 1.0, 1.5, 3.0, 2.5, 2.0, 9.0]), "loss", "loss") == [1.5]  # the straight line has 1.5 in the middle
    assert barriers(lines(0, [9.0, 1.0, 0.5, 0.5, 0.5, 2.0, 9.0]), "loss", "loss") == [0.0]
    assert further([*went_on(16, 16, 0, [2.0, 3.0, 1.0]), *went_on(16, 16, 1, [2.0, None])], "loss", 16, 16) == [(1.5, 0.5), (float("inf"),) * 2]
    assert stability_limit(CONFIG, 0.1) == pytest.approx(38) and stability_limit(SimpleNamespace(optimizer="adam"), 0.1) is None
    assert stability_limit(SimpleNamespace(optimizer="sgd"), 0.1) == pytest.approx(20)
    assert not is_no_minimum(solved(16, 0, smallest=-1e-5, loss_after_step=0.02)) and is_no_minimum(solved(16, 0))


def test_rows_that_are_there_are_not_written_again(tmp_path):
    run = open_run(tmp_path, "sharpness", {})
    append_new(run, lines(0, [1.0] * 7)[:3])
    append_new(run, [*lines(0, [2.0] * 7), *lines(1, [1.0] * 7)])
    assert [row["loss"] for row in read_records(run.path)] == [1.0] * 3 + [2.0] * 4 + [1.0] * 7


def study(*flags):
    return subprocess.run([sys.executable, "-m", "experiments.sharpness", *flags], capture_output=True, text=True)


@pytest.mark.slow  # a minute
def test_the_study_answers_and_goes_on(tmp_path):
    flags = ("--quick", "--model", "mlp", "--output-dir", str(tmp_path))
    done = study(*flags)
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("Solutions after 4 epochs, 2 seeds", "Solutions at a training loss of 0.5, 2 seeds", "negative curvature is proved", "Figure:"):
        assert part in done.stdout
    (path,) = tmp_path.glob("sharpness/*/records.jsonl")
    found = read_records(path.parent)
    assert {record["kind"] for record in found} == {"sweep", "curve", "trained", "way", "solution", "line", "continued"}
    for row in found:
        if row["kind"] == "solution" and row["comparison"] == "loss":
            assert row["loss"] <= 0.5 and row["largest_residual"] < row["largest"] and row["trace_low"] <= row["trace"] <= row["trace_high"]
    for name, size in (("loss", 16), ("epochs", 1024)):  # lines begin and end at the solutions
        (row,) = (row for row in found if row["kind"] == "solution" and (row["comparison"], row["batch_size"], row["seed"]) == (name, size, 1))
        place = {"kind": "line", "comparison": name, "seed": 1, "point": float(size == 1024)}
        (end,) = (one for one in found if place.items() <= one.items())
        assert end["loss"] == pytest.approx(row["loss"], rel=1e-4)
    leaves = lambda name: unpack(flax.serialization.msgpack_restore((path.parent / f"{name}.msgpack").read_bytes())["state"])
    (row,) = (row for row in found if row["kind"] == "solution" and (row["comparison"], row["batch_size"], row["seed"]) == ("epochs", 16, 1))
    squares = sum(((end - start) ** 2).sum() for end, start in zip(leaves("epochs_16_1"), leaves("way_0_16_1"), strict=True))
    assert row["distance"] == pytest.approx(math.sqrt(squares), rel=1e-4)  # from the weights that the run began with
    before = path.read_text()
    assert "Continuing from" in study(*flags).stdout
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--large-batch-size", "5000"], "--large-batch-size 5000"),
        (["--small-batch-size", "64", "--large-batch-size", "64"], "--large-batch-size 64 must be above --small-batch-size 64"),
        (["--max-epochs", "3"], "--max-epochs 3 must be at least --epochs 30"),
        (["--points", "8"], "--points 8"),
        (["--train-loss", "0"], "--train-loss 0"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, capsys, flags, message):
    from experiments.sharpness import __main__ as sharpness

    with pytest.raises(SystemExit) as ended:
        sharpness.main(["--model", "mlp", *flags, "--output-dir", str(tmp_path)])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert message in told and len(told.strip().splitlines()) == 1
