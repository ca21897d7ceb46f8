"""The law of what runs end with: closed forms, and metrics on its scale."""

import math

import numpy as np
import pytest

from jaxbatch.advice import end_law
from jaxbatch.advice.end_law import NAMES, Scale, choose_scale

LAW = {"y0": -1.0, "log_slope": math.log(0.3), "bend": 0.3, "log_critical": math.log(100), "beta": 0.5, "log_rate": math.log(0.1), "gamma": 0.2}
LAW |= {
    "power": 0.8,
    "log_a": math.log(0.8),
    "log_c": math.log(1.5),
    "log_sigma": math.log(0.01),
    "cliff": 5.0,
    "log_small": -30.0,
    "log_early": -30.0,
}
DRAW = np.array([[LAW[name] for name in NAMES]])


def law_value(size, rate, length, start=9.0):
    settings = np.array([float(size)]), np.array([rate]), np.array([length])
    ratio = end_law.log_ratio(DRAW, *settings)
    return end_law.value_of(DRAW, end_law.log_effective(DRAW, settings[0], settings[2], ratio), start)[0, 0]


def best_rate(size, length):
    return 0.1 * math.exp(-0.2 * length) / (1 + 100 / size) ** 0.8


def test_at_the_critical_batch_size_a_run_is_worth_half_its_data():
    half = math.log(0.5)
    small, critical = law_value(1e-3, best_rate(1e-3, half), half), law_value(100, best_rate(100, 0.0), 0.0)
    assert critical == pytest.approx(small, abs=1e-4)


@pytest.mark.parametrize(("size", "length"), [(4, 0.0), (100, -1.0), (1000, 0.7)])
def test_the_best_rate_is_the_best(size, length):
    best = best_rate(size, length)
    assert law_value(size, best, length) < min(law_value(size, factor * best, length) for factor in (0.8, 0.9, 1.1, 1.25))


def test_short_runs_want_a_rate_that_falls_faster_with_the_length():
    draws = np.array([[(LAW | {"log_early": 3.0})[name] for name in NAMES]])
    settings = np.full(2, 1e6), np.full(2, 0.1)
    one, other = end_law.log_ratio(draws, *settings, np.array([-4.0, -5.0]))[0]
    assert one - other == pytest.approx(0.2 + 0.8, abs=1e-3)


def test_a_batch_as_small_as_the_small_size_is_worth_half_its_data():
    draws = np.array([[(LAW | {"log_small": math.log(8), "log_critical": 30.0})[name] for name in NAMES]])
    assert end_law.log_batch_cost(draws, np.array([8.0]), np.array([0.0]))[0, 0] == pytest.approx(math.log(2))


def test_no_run_is_worse_than_before_training():
    assert law_value(4, 1e-9, 0.0, start=0.5) == pytest.approx(0.5, abs=0.05)
    assert law_value(4, best_rate(4, 0.0), 0.0, start=0.5) == pytest.approx(law_value(4, best_rate(4, 0.0), 0.0), abs=1e-6)


@pytest.mark.parametrize("scale", [Scale("log", False), Scale("log missing", True, 0.01), Scale("linear", True, 3.0), Scale("linear", False, 2.0)])
def test_a_metric_is_read_as_it_was_written_and_less_is_better(scale):
    values = np.array([0.2, 0.5, 0.9])
    written = np.array([scale.write(value) for value in values])
    np.testing.assert_allclose(scale.read(written), values, rtol=1e-12)
    assert (np.diff(written) < 0).all() == scale.above
    assert scale.write(math.nan) == math.inf


def test_a_perfect_accuracy_is_finite():
    scale = choose_scale(True, 0.1, [], 50)
    assert math.isfinite(scale.write(1.0)) and scale.write(1.0) < scale.write(0.99)
