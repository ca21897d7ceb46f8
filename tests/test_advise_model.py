"""The model of updates and the search that uses it, against known laws of updates, in simulation."""

import itertools
import math

import numpy as np
import pytest

from jaxbatch.advice import updates_model
from jaxbatch.advice.probes import Probe
from jaxbatch.advice.search import race, search
from jaxbatch.advice.updates_model import fit_updates, predict_log_updates
from tests.simulated import EPOCHS, NUM_EXAMPLES, RATES, Law, SimulatedProber, random_law, space, true_costs


def probes_of(law, settings, sigma=0.0, seed=0):
    random = np.random.default_rng(seed)
    for number, (size, rate) in enumerate(settings):
        updates = max(1, round(law.updates(size, rate) * math.exp(sigma * random.standard_normal())))
        yield Probe(size, rate, number, updates, True, False, updates, 0.0, 0.0, 0.0)


def test_the_model_is_the_law():
    law, draws = Law(), np.array([[math.log(60), math.log(64), math.log(0.1), 0.8, math.log(0.8), math.log(2), 0]])
    found = updates_model._log_updates(draws, np.array([4.0, 64.0, 1024.0]), np.array([0.01, 0.3, 0.1]))[0]
    np.testing.assert_allclose(np.exp(found), [law.updates(4, 0.01), law.updates(64, 0.3), law.updates(1024, 0.1)], rtol=1e-12)


def test_exact_runs_give_the_law_back():
    law, settings = Law(), list(itertools.product((4, 16, 64, 256, 1024), (0.003, 0.01, 0.03, 0.1, 0.3)))
    posterior = fit_updates(list(probes_of(law, settings)))
    assert np.median(posterior.critical_batch_size) == pytest.approx(64, rel=0.2)
    assert np.median(posterior.min_updates) == pytest.approx(60, rel=0.1)
    between = np.exp(np.median(predict_log_updates(posterior, [32], [0.05]), 0))
    assert between.item() == pytest.approx(law.updates(32, 0.05), rel=0.05)


def test_a_run_that_ended_early_is_known_to_need_more():
    known = list(probes_of(Law(), [(64, 0.03), (16, 0.03), (64, 0.1)]))
    ended = Probe(1024, 0.1, 9, 150, False, False, 150, 0.0, 0.0, 0.0)
    without, given = (np.median(predict_log_updates(fit_updates(probes), [1024], [0.1])) for probes in (known, [*known, ended]))
    assert without < math.log(110)
    assert given > without + 0.2


def test_the_model_needs_a_run_that_reached_the_goal():
    with pytest.raises(ValueError, match="none of 1 has reached"):
        fit_updates([Probe(8, 0.1, 0, 5, False, False, 5, 0.0, 0.0, 0.0)])


def simulate(seed, objective, sigma=0.25, max_probes=30):
    """Regret, whether the intervals hold the truth, and the cost in units of the best run."""
    law, settings = random_law(np.random.default_rng(seed)), space(objective)
    prober = SimulatedProber(law, sigma, seed + 10_000)
    prefer = "smaller" if objective == "time" else "larger"
    outcome = search(prober, settings, first_size=64, max_probes=max_probes, tolerance=0.05, prefer=prefer, seed=0)
    truth = true_costs(law, settings)
    if outcome.estimate is None:  # the goal is too far for every rate of the race
        assert min(law.updates(64, rate) for rate in RATES[::2]) > 0.5 * EPOCHS * NUM_EXAMPLES / 64
        return None
    found, low, high = outcome.estimate, *np.quantile(outcome.estimate.posterior.critical_batch_size, [0.05, 0.95])
    by_size = found.log_cost.min(2)
    chance = (by_size - by_size.min(1, keepdims=True) <= math.log(1.1)).mean(0)
    spent = sum(probe.updates * settings.cost_of_update[probe.batch_size] for probe in outcome.probes)
    return truth[found.best] / truth.min(), low <= law.critical <= high, chance[truth.min(1).argmin()] >= 0.1, spent / truth.min()


@pytest.mark.parametrize("objective", ["time", pytest.param("examples", marks=pytest.mark.slow)])
def test_advice_on_simulated_tasks_is_good_and_cheap(objective):
    regrets, _, _, spent = np.array([row for row in (simulate(seed, objective, max_probes=18) for seed in range(3)) if row], float).T
    assert np.median(regrets) <= 1.2  # with few runs; the slow test below makes as many as users do
    assert regrets.max() <= 1.5
    assert np.median(spent) <= 40  # a sweep of 9 sizes, 7 rates and 3 seeds costs hundreds


@pytest.mark.slow  # ten minutes
def test_intervals_hold_the_truth_as_often_as_they_say():
    tables = [[row for row in (simulate(seed, objective) for seed in range(100, 200)) if row] for objective in ("time", "examples")]
    regrets, critical, size, _ = np.array([*tables[0], *tables[1]], float).T
    assert len(regrets) >= 190
    assert critical.mean() >= 0.85  # of 90% intervals; for examples alone fewer, because small batches say little about it
    assert size.mean() >= 0.85  # the sizes that cannot be told from the best hold the true best
    assert np.median(regrets) <= 1.1


def test_the_race_ends_with_the_first_that_reaches_the_goal():
    runs = list(race(SimulatedProber(Law(), 0.0, 0), space("time"), 64, 0))
    assert [probe.learning_rate for probe in runs] == list(RATES[::2])
    soonest = min(probe.updates for probe in runs if probe.reached)
    assert all(probe.updates <= 2 * soonest for probe in runs)
    assert sum(probe.updates for probe in runs) < 5 * soonest  # ten rates, most of which end early
