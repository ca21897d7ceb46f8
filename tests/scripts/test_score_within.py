"""Scoring advice for runs of a fixed length: regret in data, what is promised, and its stages on a task that takes no time."""

import doctest
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import score_within
import within_cases
import within_curve
import within_exponents
import within_table

SPREAD = np.linspace(-0.002, 0.002, 10)


def ends_of(value, spread=SPREAD):
    return list(value + spread)


def power_law(power=0.5):
    """A best setting that ends with length^-power at the best of three rates, three seeds each."""
    return {part: {rate: [part**-power + worse] * 3 for rate, worse in ((0.1, 0.0), (0.2, 0.1), (0.05, 0.3))} for part in score_within.PARTS}


REGRETS = within_curve.Regrets(power_law(), ends_of(1.0))


def test_examples():
    outcome = doctest.testmod(within_curve)
    assert doctest.testmod(within_exponents).failed == 0
    assert outcome.attempted and not outcome.failed


@pytest.mark.parametrize("more", [0.75, 1.0, 1.1, 1.5, 4.0])
def test_regret_is_the_shift_along_the_curve(more):
    found = REGRETS.regret(ends_of(more**0.5))
    assert found.value == pytest.approx(more, rel=0.06)  # straight lines between lengths
    assert found.low <= found.value <= found.high and found.high - found.low < 0.06 * found.value


def test_regret_beyond_the_curve_and_without_an_end():
    assert np.isinf(REGRETS.regret(ends_of(9.0**0.5)).value)
    assert np.isinf(REGRETS.regret([*ends_of(1.0)[1:], None]).value)
    assert REGRETS.regret(ends_of(0.1)).value == pytest.approx(1 / 3)
    assert REGRETS.regret(ends_of(1.0))[:3] == (1.0, 1.0, 1.0)
    assert np.isnan(within_curve.Regrets(power_law(), [None]).regret(ends_of(1.0)).value)


def test_what_one_seed_chooses_is_judged_by_the_others():
    ends = {(8, 0.1): {0: 0.9, 1: 2.0**0.5, 2: 2.0**0.5}, (16, 0.1): {0: 1.0, 1: 1.0, 2: 1.0}, (16, 0.2): {0: 0.5, 1: None, 2: 3.0}}
    # Seed 0 takes a setting of which another run diverged; seeds 1 and 2 take the best.
    assert REGRETS.of_one_seed(ends) == [np.inf, pytest.approx(1, rel=0.01), pytest.approx(1, rel=0.01)]
    del ends[16, 0.2]
    assert REGRETS.of_one_seed(ends)[0] == pytest.approx(2, rel=0.06)


def test_what_longer_runs_lose_by_overfitting_does_not_count():
    overfits = {part: {0.1: [part**-0.5 if part <= 1 else part**0.5] * 3} for part in score_within.PARTS}
    assert within_curve.Regrets(overfits, ends_of(1.0)).regret(ends_of(2.0**0.5)).value == pytest.approx(2, rel=0.06)


def scored(fixed=1.0, best=1.0, largest=1.0, sign=1.0):
    choices = [{"batch_size": 8, "value": [1.0, 0.9, 1.1, 2, 0], "next_run": [1.0, 0.999, 1.1, 2, 0]}]
    advice = {"batch_size": 8, "learning_rate": 0.1, "best_size": [8, 4, 16, 9, 0], "choices": choices, "largest_in_noise": 32, "cost_in_runs": 8.0}
    ends = {"best": ends_of(best), "fixed": ends_of(fixed), "fixed within noise": ends_of(largest)}
    settings = {"best": (16, 0.2), "fixed": (8, 0.1), "fixed within noise": (32, 0.3)}
    regrets = {name: REGRETS.regret(values) for name, values in ends.items()}
    return within_table.Scored("case", False, sign, settings, ends, regrets, {"fixed": advice, "horizon": advice}, 90, np.ones(4))


def test_promises_are_held_against_the_judged_runs():
    deviation = float(np.std(SPREAD, ddof=1))
    assert scored(largest=1 + 1.9 * deviation).is_within_noise("fixed") and not scored(largest=1 + 2.1 * deviation).is_within_noise("fixed")
    assert not scored(fixed=0.99, largest=1 + 1.9 * deviation).is_within_noise("fixed"), "the better of the two counts"
    assert scored().is_within_noise("horizon") is None
    assert scored().promised("fixed", "value") == [True] and scored(fixed=1.2).promised("fixed", "value") == [False]
    assert sum(scored().promised("fixed", "next_run")) == 8 - 1  # of ten from 0.998 to 1.002
    assert scored().holds_best("fixed") and not scored()._replace(settings={"best": (32, 0.1)}).holds_best("fixed")


def test_tables_are_printed(capsys):
    within_table.print_score([scored(fixed=1.5**0.5)._replace(one_seed=[1.25, 2.0, 1.5]), scored()._replace(building=True)])
    printed = capsys.readouterr().out
    assert "| case (building) |" in printed and "advice for the length: median regret 1.4" in printed and "over 1 scored cases" in printed
    assert "judged by its other seeds: median regret 1.50, worst 2.00; the least worst case of a seed 1.25" in printed
    assert "fixed: the interval of the best size holds the sweep's in 1 of 1" in printed


def mean_task():
    """The mean of numbers, whose spread makes runs differ."""
    data = jnp.asarray(np.random.default_rng(0).normal(1.0, 0.5, 256), jnp.float32)
    loss_fn = lambda w, x: 0.5 * (x - w) ** 2
    return jb.Task(lambda key: jnp.array(0.0), loss_fn, lambda w, x: {"excess": (w - 1.0) ** 2 * jnp.ones_like(x)}, data, data[:1])


CASE = within_cases.Case(mean_task, optax.sgd, "linear", "excess<", 8, (0.1, 0.3, 0.5), (16, 32))


def test_a_run_of_the_sweep_is_the_run_of_fit():
    ends = score_within.end_values(CASE, mean_task(), 1 / 4, 32, [(0.1, 1), (0.3, 1)])
    *_, last = jb.fit(mean_task(), jb.FitConfig(CASE.make_optimizer(0.3, 16), 32, jb.steps(16), seed=1))
    assert ends[1] == pytest.approx(float(last["test_excess"]), rel=1e-4) and ends[0] != ends[1]


def law(case, task, part, size, runs):
    """What runs end with, by a law whose best rate is 0.1 at 16 and 0.3 at 32; the largest rate diverges at the smaller size."""
    best = {16: 0.1, 32: 0.3}.get(size, 0.3)
    value = lambda rate, seed: part**-0.5 * (1 + abs(np.log(rate / best))) + 0.001 * (seed % 7) + (size > 16)
    return [None if (size, rate) == (16, 0.5) else float(value(rate, seed)) for rate, seed in runs]


def test_stages_skip_what_they_find(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(within_cases, "CASES", {"mean": CASE})
    monkeypatch.setattr(score_within, "end_values", law)
    folder = score_within.Folder(str(tmp_path), "mean")
    score_within.sweep(folder)
    sweep, curve = folder.read("sweep"), folder.read("curve")
    assert len(sweep) == 2 * 2 * 3 * 3 and len(curve) == len(score_within.PARTS) * 3 * 3
    for question in ("fixed", "horizon"):
        advice = scored().advice["fixed"] | {"question": question, "batch_size": 32, "learning_rate": 0.3, "largest_within": [None, 16, 32]}
        rows = [advice["choices"][0] | {"batch_size": size, "learning_rate": rate} for size, rate in ((16, 0.1), (32, 0.3))]
        folder.append("advice", advice | {"choices": rows})
    assert not score_within.is_judged(folder)
    score_within.judge(folder)
    assert score_within.is_judged(folder)
    judged = folder.read("judged")
    score_within.sweep(folder)
    score_within.judge(folder)
    assert (folder.read("sweep"), folder.read("curve"), folder.read("judged")) == (sweep, curve, judged)
    result = score_within.score(folder)
    assert result.settings["best"] == result.settings["short best"] == result.settings["horizon within 2%"] == (16, 0.1)
    assert result.settings["Step Law"] == (round(16 * 8**0.571), pytest.approx(0.1 * 8**0.307)) and result.settings["linear"] == (32, 0.3)
    assert result.regret("best") == 1.0 and result.regret("fixed") == pytest.approx(4, rel=0.05) and result.runs == 18
    within_table.print_score([result])
    assert "| mean |" in capsys.readouterr().out


def test_intervals_of_exponents_hold_known_powers():
    """Ends with a known best size and rate, and noise; the sizes and rates are a grid, and so are the powers."""
    random, inside = np.random.default_rng(0), []
    for _ in range(60):
        rows = [
            {"part": part, "batch_size": size, "learning_rate": rate, "value": cost + 0.1 * random.standard_normal()}
            for part, best_size, best_rate in ((1 / 8, 8, 0.4), (1, 16, 0.2))
            for size in (2, 4, 8, 16, 32, 64)
            for rate in (0.05, 0.1, 0.2, 0.4, 0.8)
            for cost in [0.1 * np.log2(size / best_size) ** 2 + 0.2 * np.log2(rate / best_rate) ** 2]
            for _ in range(3)
        ]
        found = within_exponents.exponents(rows, 1 / 8, 1.0)
        inside.append([of.low - 1e-9 <= truth <= of.high + 1e-9 for of, truth in zip(found, (1 / 3, -1 / 3, -1 / 3), strict=True)])
    assert (np.mean(inside, 0) >= 0.9).all(), np.mean(inside, 0)


def test_a_setting_that_diverged_is_not_the_best():
    rows = [
        {"part": part, "batch_size": size, "learning_rate": 0.1 * size, "value": None if size == 4 and seed == 0 else float(size != 2)}
        for part in (1 / 8, 1)
        for size in (2, 4)
        for seed in range(3)
    ]
    assert within_exponents.exponents(rows, 1 / 8, 1.0).size.value == 0


def test_a_setting_as_good_as_the_best_is_judged_about_one_and_worse_the_more_runs_differ():
    def draws(spread):
        best = list(1 + spread * np.random.default_rng(0).standard_normal(10))
        return within_curve.Regrets({0.5: {0.1: [2.0] * 3}, 2.0: {0.1: [0.5] * 3}}, best).of_an_equal()

    quiet, noisy = draws(0.01), draws(0.1)
    assert np.median(quiet) == pytest.approx(1, abs=0.01) and np.median(noisy) == pytest.approx(1, abs=0.05)
    assert len(quiet) == within_curve.DRAWS and np.quantile(quiet, 0.95) < 1.02 < np.quantile(noisy, 0.95)
    assert np.isnan(within_curve.Regrets({0.5: {0.1: [2.0]}}, [1.0, None]).of_an_equal()).all()
