"""The model of updates and the search that uses it, against known laws of updates, in simulation."""

import itertools
import math

import numpy as np
import pytest

from jaxbatch.advice import updates_model
from jaxbatch.advice.choices import draw_typical
from jaxbatch.advice.estimates import Space, make_estimate
from jaxbatch.advice.probes import Probe
from jaxbatch.advice.search import race, run_capped, search
from jaxbatch.advice.updates_model import fit_updates, predict_divergence, predict_log_updates
from tests.advice.simulated import RATES, SIZES, Law, SimulatedProber, Spread, random_law, space


def probes_of(law, settings, sigma=0.0, seed=0):
    random = np.random.default_rng(seed)
    for number, (size, rate) in enumerate(settings):
        updates = max(1, round(law.updates(size, rate) * math.exp(sigma * random.standard_normal())))
        yield Probe(size, rate, number, updates, True, False, updates, 0.0, 0.0, 0.0)


def test_the_model_is_the_law():
    law, draws = Law(), np.array([[math.log(60), math.log(64), math.log(0.1), 0.8, math.log(0.8), math.log(2), 0, 0]])
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


def test_a_run_is_known_to_its_grid_alone():
    """Runs that were looked at only after 64 updates may have reached the goal soon after they began."""
    late = [Probe(32, 0.05, seed, 64, True, False, 0, 0.0, 0.0, 0.0) for seed in range(5)]
    low, high = np.quantile(np.exp(predict_log_updates(fit_updates(late), [32], [0.05])), [0.025, 0.975])
    assert low < 25
    assert high < 100
    often = [probe._replace(more_than=62) for probe in late]
    low, high = np.quantile(np.exp(predict_log_updates(fit_updates(often), [32], [0.05])), [0.025, 0.975])
    assert 45 < low < 64 < high < 90


def test_old_records_of_runs_that_reached_the_goal_count_as_exact():
    low, high = updates_model._crossing_bounds([Probe(8, 0.1, 0, 50, True, False, 50, 0.0, 0.0, 0.0)])
    assert low == high == math.log(50)


def test_a_rate_at_which_runs_diverge_costs_more_than_its_lucky_run():
    steady = [Probe(32, 0.1, seed, 100, True, False, 95, 0.0, 0.0, 0.0) for seed in (0, 1)]
    lucky = Probe(32, 0.3, 2, 80, True, False, 75, 0.0, 0.0, 0.0)
    lost = [Probe(32, 0.3, seed, 20, False, True, 20, 0.0, 0.0, math.nan) for seed in (3, 4)]
    settings = Space((8, 32, 128), (0.03, 0.1, 0.3), {8: 1.0, 32: 1.0, 128: 1.0})
    alone, all_runs = (make_estimate([*steady, lucky, *others], settings, "smaller") for others in ([], lost))
    chance = predict_divergence(all_runs.posterior, (32,), (0.1, 0.3)).mean((0, 1))
    assert chance[0] < 0.25
    assert 0.4 < chance[1] < 0.9  # two of three
    assert (all_runs.log_cost - alone.log_cost.mean(0)).mean(0)[1, 2] > 0.5
    steady_cost, lucky_cost = all_runs.log_cost.mean(0)[1, 1:]
    assert steady_cost < lucky_cost


def test_the_model_needs_a_run_that_reached_the_goal():
    with pytest.raises(ValueError, match="none of 1 has reached"):
        fit_updates([Probe(8, 0.1, 0, 5, False, False, 5, 0.0, 0.0, 0.0)])


# Runs


@pytest.mark.parametrize("seed", range(12))
def test_no_bound_exceeds_the_truth(seed):
    random = np.random.default_rng(seed)
    settings, looks = space("time"), int(random.choice([1, 2, 12]))
    prober = SimulatedProber(random_law(random, rough=True), Spread(0.3), seed, looks)
    probes = list(race(prober, settings, 64, 0))
    for number in range(1, 40 if any(probe.reached for probe in probes) else 0):
        least = min(probe.updates * settings.cost_of_update[probe.batch_size] for probe in probes if probe.reached)
        probes.append(run_capped(prober, settings, int(random.choice(SIZES)), float(random.choice(RATES)), number, 1.5 * least))
    assert any(not probe.reached for probe in probes)
    for probe in probes:
        truth = prober.needed[probe.batch_size, probe.learning_rate, probe.seed]
        assert probe.more_than < truth
        assert probe.reached == (truth <= probe.updates)
        assert probe.more_than == probe.updates or probe.reached


@pytest.mark.parametrize(("patience", "reached"), [(1.5, True), (0.2, False)])
def test_a_run_is_not_compared_with_its_own_first_look(patience, reached):
    law, settings = Law(), space("examples")
    prober = SimulatedProber(law, Spread(0.0), 0, looks=1)  # the first look at 625 updates
    probe = run_capped(prober, settings, 8, 0.003, 1, patience * 8 * law.updates(8, 0.003))
    assert probe.reached == reached
    assert reached or probe.more_than == 625 < law.updates(8, 0.003)


def test_the_race_ends_with_the_first_that_reaches_the_goal():
    runs = list(race(SimulatedProber(Law(), Spread(0.0), 0), space("time"), 64, 0))
    assert [probe.learning_rate for probe in runs] == list(RATES[::2])
    soonest = min(probe.updates for probe in runs if probe.reached)
    assert all(probe.updates <= 2 * soonest for probe in runs)
    assert sum(probe.updates for probe in runs) < 5 * soonest  # ten rates, most of which end early


def test_rates_between_the_racers_are_tried_where_no_racer_reaches_the_goal():
    class OneRate(SimulatedProber):
        """Runs that reach the goal at one rate alone, between two that race; near it the loss is less."""

        def run(self, batch_size, learning_rate, seed):
            for probe in super().run(batch_size, learning_rate, seed):
                near = abs(math.log(learning_rate / RATES[9]))
                yield probe._replace(reached=probe.reached and near < 0.1, loss=near)
                if probe.reached and near < 0.1:
                    return

    outcome = search(
        OneRate(Law(largest_rate=RATES[9]), Spread(0.0), 0), space("time"), first_size=64, max_probes=14, tolerance=0.05, prefer="smaller", seed=0
    )
    assert RATES[9] not in RATES[::2]
    assert any(probe.reached and probe.learning_rate == RATES[9] for probe in outcome.probes)
    again = search(
        OneRate(Law(largest_rate=RATES[9]), Spread(0.0), 0),
        space("time"),
        first_size=64,
        max_probes=14,
        tolerance=0.05,
        prefer="smaller",
        seed=0,
        known=outcome.probes[:11],
    )
    assert [probe.learning_rate for probe in again.probes[:12]] == [probe.learning_rate for probe in outcome.probes[:12]]


def test_a_repeat_that_was_cut_short_says_little():
    """A run that a budget ends after a few updates must not look like one that is about to arrive."""
    law, rate = Law(least=60.0, critical=64.0), RATES[11]
    probes = list(probes_of(law, [(size, rate) for size in (8, 16, 32, 64, 128)] * 2))
    repeat = probes[3]._replace(repeat=True, seed=77)
    posterior = fit_updates([*probes, repeat])
    cut = repeat._replace(reached=False, updates=2, more_than=2, seed=78)
    alone, both = (np.median(draw_typical(posterior, (64, rate), repeats)[0]) for repeats in ([repeat], [repeat, cut]))
    assert abs(both - alone) < 0.15
