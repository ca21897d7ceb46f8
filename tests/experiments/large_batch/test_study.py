"""The huge-batch study as a user runs it, and its report on records with a known answer."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from experiments.large_batch import __main__ as large_batch
from experiments.large_batch.records import best_rate, has_gap, pairs, parts, rule_rate, standing
from experiments.large_batch.report import draw_figure, print_tables, verdict
from jaxbatch.results.records import read_records
from tests.experiments.test_command_line import ended
from tests.experiments.test_user_task import write

CONFIG = SimpleNamespace(
    dataset="digits", model="mlp", task=None, batch_size=600, small_batch_size=24, epochs=30, seeds=3, tune_seeds=2,
    learning_rates=(0.01, 0.1, 1.0), metric="accuracy>",
)  # fmt: skip
CHANCE = np.array([-0.001, 0.0, 0.001])  # the same for all arms: pairs cancel it


def tune(arm, by_rate):
    rows = []
    for rate, values in by_rate.items():
        for seed, value in enumerate(values):
            loss = None if value is None else 1 - value
            rows.append({"kind": "tune", "arm": arm, "learning_rate": rate, "seed": seed, "validation_accuracy": value, "validation_loss": loss})
    return rows


def runs(arm, accuracy, train_loss=0.1, gap=0.05, updates=60, rate=0.1, lost=0):
    rows = []
    for seed in range(3):
        own = {"test_accuracy": accuracy + CHANCE[seed], "train_loss": train_loss, "test_loss": train_loss + gap}
        row = {name: None if seed < lost else value for name, value in own.items()}
        rows.append({"kind": "run", "arm": arm, "learning_rate": rate, "seed": 1000 + seed, "updates": updates, "seconds": 0.5, **row})
    return rows


RECORDS = [
    {"kind": "left_out", "arm": "ghost batch norm", "reason": "the model has no batch statistics"},
    *runs("small", 0.98, 0.02, 0.06, updates=1500),
    *runs("plain", 0.90, 0.30, 0.04),
    *runs("linear rule", 0.50, rate=2.5, lost=1),
    *runs("cosine", 0.94, rate=1.0),
    *[row | {"test_accuracy": row["test_accuracy"] + 0.01 * (row["seed"] - 1001)} for row in runs("warmup", 0.901)],
    *runs("noise", 0.85),
    *runs("growth", 0.98, updates=500),
]  # fmt: skip


def test_the_best_rate_loses_the_fewest_runs_then_has_the_best_metric_then_the_lowest_loss():
    assert best_rate(CONFIG, tune("plain", {0.01: [0.8, 0.9], 0.1: [0.9, 0.9], 1.0: [0.99, None]}), "plain") == 0.1
    tied = tune("plain", {0.01: [0.9, 0.9], 0.1: [0.9, 0.9]})
    tied[2]["validation_loss"] = 0.05
    assert best_rate(CONFIG, tied, "plain") == 0.1
    assert best_rate(CONFIG, tune("plain", {0.1: [None, None]}), "plain") is None
    lower = SimpleNamespace(**{**vars(CONFIG), "metric": "loss<"})
    assert best_rate(lower, tune("plain", {0.01: [0.8, 0.8], 0.1: [0.9, 0.9]}), "plain") == 0.1  # the loss of 0.9 is 0.1


def test_the_rules_scale_the_rate_of_the_small_batch():
    records = tune("small", {0.01: [0.9, 0.9], 0.1: [0.8, 0.8]})
    assert rule_rate(CONFIG, records, "linear rule") == pytest.approx(0.25)
    assert rule_rate(CONFIG, records, "linear rule, warmup") == pytest.approx(0.25)
    assert rule_rate(CONFIG, records, "square-root rule") == pytest.approx(0.05)
    assert rule_rate(CONFIG, [], "linear rule") is None


def test_pairs_are_of_the_best_of_each_kind_on_the_validation_part():
    records = [
        *tune("warmup", {0.1: [0.9, 0.9]}), *tune("cosine", {0.1: [0.8, 0.8], 1.0: [0.95, 0.93]}),
        *tune("lars", {0.1: [0.9, None]}), *tune("lamb", {0.1: [0.7, 0.7]}), *tune("growth", {0.1: [0.9, 0.9]}),
    ]  # fmt: skip
    assert pairs(CONFIG, records) == ["cosine + lamb", "cosine + growth", "lamb + growth"]
    assert pairs(CONFIG, tune("cosine", {0.1: [0.8, 0.8]})) == []


def test_an_arm_against_plain_and_the_small_batch():
    assert has_gap(CONFIG, RECORDS)
    half = standing(CONFIG, RECORDS, "cosine")
    assert (half.kind, half.lost) == ("helps", 0) and half.closed.value == pytest.approx(0.5) and half.gap.value == pytest.approx(-0.04)
    assert half.gain[:3] == pytest.approx((0.04, 0.04, 0.04))  # what the arms share of a seed cancels
    assert standing(CONFIG, RECORDS, "growth").closed.value == pytest.approx(1.0)
    assert standing(CONFIG, RECORDS, "warmup").kind == "nothing"
    assert standing(CONFIG, RECORDS, "noise").kind == "harms"
    assert (standing(CONFIG, RECORDS, "linear rule").kind, standing(CONFIG, RECORDS, "linear rule").lost) == ("lost", 1)


def test_the_two_parts_of_the_gap_make_its_whole():
    found = parts(CONFIG, RECORDS, "plain")
    assert found.optimization.value == pytest.approx(0.28) and found.generalization.value == pytest.approx(-0.02)
    assert found.optimization.value + found.generalization.value == pytest.approx(0.34 - 0.08)


def test_the_interval_is_student_s():
    rows = [row | {"test_accuracy": value} for row, value in zip(runs("cosine", 0.9), (0.90, 0.92, 0.94), strict=True)]
    level = [row | {"test_accuracy": 0.9} for row in runs("plain", 0.9)]
    found = standing(CONFIG, [*runs("small", 0.98), *level, *rows], "cosine").gain
    half = 4.302653 * 0.02 / np.sqrt(3)
    assert found[:3] == pytest.approx((0.02, 0.02 - half, 0.02 + half)) and found.n == 3


def test_the_verdict_says_what_closes_what_does_nothing_and_what_harms():
    told = verdict(CONFIG, RECORDS)
    assert "ends -8.00 [-8.00, -8.00] points of test accuracy away from B = 24: that is the gap to close" in told[0]
    assert "+0.28 [+0.28, +0.28] is optimization" in told[0] and "-0.02 [-0.02, -0.02] generalization" in told[0]
    assert told[1].startswith("Closes this part of the gap: growth (100 [100, 100]%, 8.33 times the updates); cosine (50 [50, 50]%)")
    assert told[2].startswith("No difference from plain shows, in points: warmup (+0.10 [")
    assert told[3] == "Worse than plain, in points: noise (-5.00 [-5.00, -5.00])."
    assert told[4].startswith("Loses runs that plain does not: linear rule (") and "1 runs diverged, by rule" in told[4]
    assert told[5] == "Arms for which the intervals show no gap to the small batch: growth."
    assert told[6] == "Not defined here: ghost batch norm (the model has no batch statistics)."
    assert told[7].startswith("Arms whose best rate lies on the edge of the grid: cosine.")
    assert told[8].startswith("5 arms were compared with n = 3 seeds; by chance alone about 0.2 intervals")


def test_without_a_gap_there_is_nothing_to_close():
    told = verdict(CONFIG, [*runs("small", 0.90), *runs("plain", 0.90), *runs("cosine", 0.95)])
    assert "no gap shows, so there is nothing to close" in told[0]
    assert told[1] == "Better than plain: cosine (+5.00 [+5.00, +5.00])." and told[2] == "Worse than plain, in points: none."
    assert verdict(CONFIG, runs("small", 0.9))[0].startswith("No verdict")


def test_a_metric_that_should_be_low():
    config = SimpleNamespace(**{**vars(CONFIG), "metric": "mse<"})
    rows = [row | {"test_mse": 1 - row["test_accuracy"], "train_mse": 0.01} for row in RECORDS if row["kind"] == "run" and row["test_accuracy"]]
    rows = [{name: value for name, value in row.items() if not name.endswith("loss")} for row in rows]
    assert standing(config, rows, "cosine").kind == "helps" and standing(config, rows, "noise").kind == "harms"
    assert "of test mse away from B = 24 (below 0 is worse): that is the gap to close. Of the difference in test mse, " in verdict(config, rows)[0]


def test_table_and_figure_hold_every_arm(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    provenance = {"device": "a processor", "num_cores": 2, "jax": "0.10.1"}
    print_tables(console, CONFIG, RECORDS, provenance)
    out = console.file.getvalue()
    for arm in ("small", "plain", "linear rule", "cosine", "warmup", "noise", "growth"):
        assert arm in out
    assert "closes 50 [50, 50]%" in out and "closes 100 [100, 100]%" in out and "no difference shows" in out and " harms" in out
    assert "2.5 (rule)" in out and "1 (edge)" in out and "1 of 3 diverged" in out and "nan" not in out and "loses runs" in out
    assert draw_figure(CONFIG, RECORDS, tmp_path).stat().st_size > 20_000
    without = [row for row in RECORDS if row["arm"] != "small"]  # every rate diverged
    print_tables(console, CONFIG, without, provenance)
    assert draw_figure(CONFIG, without, tmp_path).exists() and "No verdict" in verdict(CONFIG, without)[0]


TINY = ["--learning-rates", "0.01", "0.1", "--seeds", "2", "--tune-seeds", "1", "--epochs", "2"]


def test_the_study_answers_and_goes_on(tmp_path, capsys):
    arms = ["--arms", "linear rule", "cosine", "growth", "ghost batch norm"]
    flags = ["--task", write(tmp_path), *TINY, *arms, "--output-dir", str(tmp_path / "results")]
    large_batch.main(flags)
    out = capsys.readouterr().out
    assert "linear.py:make_task, B = 72 against 8, 2 epochs" in out and "cosine + growth" in out and "Not defined here: ghost" in out
    assert "train loss" in out and "is optimization" in out and "Figure:" in out and "nan" not in out.lower()
    (path,) = (tmp_path / "results").glob("large_batch/*")
    records = read_records(path)
    tuned, ended_runs = ([row for row in records if row["kind"] == kind] for kind in ("tune", "run"))
    arms = ["small", "plain", "cosine", "growth", "cosine + growth"]
    assert sorted({(row["arm"], row["learning_rate"], row["seed"]) for row in tuned}) == sorted((a, r, 0) for a in arms for r in (0.01, 0.1))
    assert {row["examples"] for row in (*tuned, *ended_runs)} == {288}
    assert {(row["arm"], row["seed"]) for row in ended_runs} == {(arm, seed) for arm in (*arms, "linear rule") for seed in (1000, 1001)}
    assert all("test_loss" not in row for row in tuned)  # the test set is for the end
    large_batch.main(flags)
    assert "Continuing from" in capsys.readouterr().out and read_records(path) == records


@pytest.mark.slow  # half a minute
def test_the_quick_study_of_the_digits(tmp_path, capsys):
    large_batch.main(["--quick", "--output-dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert "digits, mlp, B = 600 against 24, 2 epochs" in out and "cosine + growth" in out and "split" in out and "nan" not in out.lower()


@pytest.mark.slow  # a minute of compiling
def test_ghost_batch_norm_of_a_residual_network(tmp_path, capsys):
    flags = ["--quick", "--model", "resnet20", "--examples", "48", "--arms", "ghost batch norm", "--learning-rates", "0.01", "--no-pairs"]
    large_batch.main([*flags, "--output-dir", str(tmp_path)])
    assert "ghost batch norm  " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "151"], "--batch-size 151 is larger than the 150 training examples that are left."),
        (["--batch-size", "60", "--small-batch-size", "7"], "--small-batch-size 7 does not divide --batch-size 60; the nearest that does is 6."),
        (["--batch-size", "60", "--num-groups", "7"], "--num-groups 7 does not divide --batch-size 60"),
        (["--metric", "accuracy>"], "--metric accuracy> must be one of loss, with > if larger values are better, else <, as 'loss<'."),
        (["--metric", "loss"], "--metric loss must be one of loss"),
        (["--arms", "adam"], "--arms adam must be among linear rule, "),
        (["--longest", "0"], "--longest 0.0 must be above 0"),
        (["--examples", "151"], "--examples 151 must be between 1 and 150."),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, capsys, flags, message):
    assert message in ended(large_batch.main, ["--task", write(tmp_path), *flags, "--output-dir", str(tmp_path / "results")], capsys)
