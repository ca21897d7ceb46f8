"""scripts/score_against.py: tuners on tables, whose best setting is known."""

import json
import math
import sys

import numpy as np
import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import against_tables
import score_against
from against_tables import file_of
from within_building import append, read
from within_cases import CASES

NAME = "regression_sgd_cosine"
CASE = CASES[NAME]


def value_of(size, rate, part, seed, share=1.0):
    """Best at B = 16 and 0.1; shorter runs end worse, and so does a run at an earlier look."""
    off = 0.1 * math.log2(size / 16) ** 2 + 0.3 * (2 * math.log10(rate / 0.1)) ** 2
    return (0.01 + 0.02 * off) * (part * share) ** -0.5 * (1 + 0.02 * seed)


@pytest.fixture
def folder(tmp_path):
    append(tmp_path, file_of(NAME), {"start": 1.0, "num_examples": 4096, "tests": 100})
    for part in against_tables.PARTS:
        for size in CASE.batch_sizes:
            steps = CASE.num_steps(4096, size, part)
            if steps < against_tables.FEWEST:
                continue
            for rate in CASE.learning_rates:
                for seed in range(3):
                    looks = [[max(1, steps * n // 8), value_of(size, rate, part, seed, n / 8)] for n in range(1, 9)]
                    if rate > 1:
                        looks = [[steps // 8, None]]  # it diverged
                    append(tmp_path, file_of(NAME), {"part": part, "batch_size": size, "learning_rate": rate, "seed": seed, "looks": looks})
    rows = [
        {"part": part, "learning_rate": 0.1, "seed": seed, "value": value_of(16, 0.1, part, seed)} for part in (0.25, 0.5, 1, 2) for seed in range(3)
    ]
    (tmp_path / f"{NAME}.curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    judged = [{"batch_size": 16, "learning_rate": 0.1, "value": value_of(16, 0.1, 1, seed)} for seed in range(3)]
    (tmp_path / f"{NAME}.judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged), encoding="utf-8")
    return tmp_path


def test_regret_is_read_on_the_curve(folder):
    judge = score_against.Judge(folder, folder, NAME)
    assert judge.best == (16, 0.1) and judge.regret({"batch_size": 16, "learning_rate": 0.1}) == pytest.approx(1)
    # The value falls as length^-1/2, so one that is 1.2 times as large needs 1.44 times the data.
    assert judge.regret({"batch_size": 32, "learning_rate": 0.1}) == pytest.approx(1.2**2, rel=0.05)
    assert judge.regret({"batch_size": 16, "learning_rate": 1.78}) == math.inf
    answers = [{"spent": 1.0, "batch_size": 32, "learning_rate": 0.1}, {"spent": 5.0, "batch_size": 16, "learning_rate": 0.1}]
    assert score_against.regret_at(judge, answers, 0.4) == math.inf
    assert [round(score_against.regret_at(judge, answers, spent), 1) for spent in (1, 4, 5)] == [1.4, 1.4, 1.0]


def test_a_diverged_run_ends_and_a_run_of_another_length_is_the_nearest(folder):
    table = against_tables.Table(NAME, read(folder, file_of(NAME)))
    *_, lost = table.run(16, 1.78, table.steps[16], 0)
    *_, short = table.run(16, 0.1, table.steps[16] // 4 + 1, 4)
    assert lost.diverged and not short.diverged and short.updates == table.steps[16] // 4 + 1
    assert short.value == pytest.approx(value_of(16, 0.1, 0.25, 1), rel=1e-6) and table.mean(16, 1.78) == math.inf


def test_ours_finds_the_best_of_a_plain_table(folder):
    table, judge = against_tables.Table(NAME, read(folder, file_of(NAME))), score_against.Judge(folder, folder, NAME)
    answer = score_against.answers_of_ours(table, 0, 4.0)
    assert judge.regret(answer) < 1.5 and answer["spent"] < 5.1  # a setting beside the best has 1.44


def test_every_peer_spends_what_it_is_given_and_comes_near_the_best(folder):
    pytest.importorskip("optuna")
    from against_peers import PEERS

    table, judge = against_tables.Table(NAME, read(folder, file_of(NAME))), score_against.Judge(folder, folder, NAME)
    for name, tuner in PEERS.items():
        if name.startswith("GP"):
            continue  # it needs seconds
        answers = [answer._asdict() for answer in tuner(table, 0, 30.0)]
        assert 30 <= answers[-1]["spent"] < 31.1 and all(np.diff([answer["spent"] for answer in answers]) > 0), name
        assert score_against.regret_at(judge, answers, 30) < 2.5, name
