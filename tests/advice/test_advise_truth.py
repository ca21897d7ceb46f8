"""Advice on linear regression, whose law of updates is known exactly: the critical batch size lies in its interval."""

import functools

import numpy as np
import optax
import pytest

import jaxbatch as jb
from scripts.advice_cases import LABEL_NOISE, NUM_FEATURES, regression_task

GOAL = 0.02


@functools.cache
def exact_updates(batch_size):
    """The updates of SGD at the best constant rate until the expected loss is within the goal, by its exact recursion.

    For independent normal features of variances h, the mean squares m of the error's components obey, per update,
    m <- m (1 - 2 eta h + eta^2 h^2 (1 + 1/B)) + eta^2 / B h (sum of h m + the noise of the labels).
    """
    rates = 10 ** np.linspace(-2, 0.3, 120)[:, None]
    h = np.arange(1.0, NUM_FEATURES + 1) ** -1.5
    m = np.full((len(rates), NUM_FEATURES), 1 / h.sum())
    for updates in range(1, 100_000):
        with np.errstate(over="ignore", invalid="ignore"):
            risk = (h * m).sum(1, keepdims=True)
            m = m * (1 - 2 * rates * h + rates**2 * h**2 * (1 + 1 / batch_size)) + rates**2 / batch_size * h * (risk + LABEL_NOISE)
        if np.nanmin(0.5 * (h * m).sum(1)) <= GOAL:
            return updates
    raise AssertionError("the goal is too far")


def test_training_follows_the_exact_recursion():
    task, rate = regression_task(), 0.5
    h = np.arange(1.0, NUM_FEATURES + 1) ** -1.5
    m = np.full(NUM_FEATURES, 1 / h.sum())
    for _ in range(20):
        m = m * (1 - 2 * rate * h + rate**2 * h**2 * (1 + 1 / 16)) + rate**2 / 16 * h * ((h * m).sum() + LABEL_NOISE)
    measured = []
    for seed in range(40):
        (record,) = jb.fit(task, jb.FitConfig(optax.sgd(rate), 16, jb.steps(20), seed=seed))
        measured.append(record["test_excess"])
    assert np.mean(measured) == pytest.approx(0.5 * (h * m).sum(), abs=4 * np.std(measured) / 40**0.5)


def test_the_law_holds_for_regression():
    sizes = (4, 8, 16, 32, 64, 128, 256)
    fit = jb.critical_batch_size({size: [exact_updates(size)] for size in sizes})
    for size in sizes:
        law = float(fit.min_updates) * (1 + float(fit.critical_batch_size) / size)
        assert law == pytest.approx(exact_updates(size), rel=0.06)


@pytest.mark.slow
def test_advice_knows_the_critical_batch_size_of_regression():
    sizes = (4, 16, 64, 256, 1024)
    truth = float(jb.critical_batch_size({size: [exact_updates(size)] for size in sizes}).critical_batch_size)
    flat = jb.fit_throughput({size: [1e-3 + 2e-5 * size] * 3 for size in (4, 1024)})  # the knee is 50
    rates = tuple(10 ** (quarter / 4) for quarter in range(-8, 2))
    settings = {"optimizer": optax.sgd, "batch_sizes": sizes, "learning_rates": rates, "throughput": flat, "evaluations_per_epoch": 100}
    advice = jb.advise(regression_task(), f"excess<{GOAL}", measure_noise=False, max_probes=24, **settings)
    assert advice.critical_batch_size.low <= truth <= advice.critical_batch_size.high
    cost = {size: exact_updates(size) * flat.seconds_at(size) for size in sizes}
    assert min(cost, key=cost.__getitem__) in advice.candidates
    assert cost[advice.batch_size] <= 1.4 * min(cost.values())
