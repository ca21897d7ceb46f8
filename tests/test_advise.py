"""Advice against known laws of updates, in simulation; real runs, resumed ones, and everything that it must refuse or confess."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.advice import updates_model
from jaxbatch.advice.advice import cost_of_update
from jaxbatch.advice.probes import Probe, Prober, make_start, with_rate_in_state
from jaxbatch.advice.search import race, search
from jaxbatch.advice.updates_model import fit_updates, predict_log_updates
from tests.simulated import EPOCHS, NUM_EXAMPLES, RATES, Law, SimulatedProber, random_law, space, true_costs


def quadratic_task(num_examples=400, noise=1.0, start=0.0):
    """The gradient of an example is w - x, with x around 3."""
    x = 3 + noise * jax.random.normal(jax.random.key(0), (num_examples, 4))
    loss_fn = lambda w, x: 0.5 * ((x - w[None]) ** 2).sum(-1)
    metrics_fn = lambda w, x: {"distance": jnp.full(len(x), 0.5) * ((w - 3) ** 2).sum()}
    return jb.Task(lambda key: jnp.full(4, start), loss_fn, metrics_fn, x, x[:20])


FLAT = jb.fit_throughput({size: [1e-3 + 1e-5 * size] * 3 for size in (2, 32, 200)})
QUICK = {"optimizer": optax.sgd, "throughput": FLAT, "longest": jb.epochs(40), "max_probes": 16, "batch_sizes": (2, 8, 32, 128)}


def advise_quadratic(**settings):
    return jb.advise(quadratic_task(), "distance<0.1", **{**QUICK, **settings})


# The model


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


@pytest.mark.parametrize("objective", ["time", "examples"])
def test_advice_on_simulated_tasks_is_good_and_cheap(objective):
    regrets, _, _, spent = np.array([row for row in (simulate(seed, objective, max_probes=18) for seed in range(3)) if row], float).T
    assert np.median(regrets) <= 1.2  # with few runs; the slow test below makes as many as users do
    assert regrets.max() <= 1.5
    assert np.median(spent) <= 40  # a sweep of 9 sizes, 7 rates and 3 seeds costs hundreds


@pytest.mark.slow  # ten minutes
@pytest.mark.parametrize("objective", ["time", "examples"])
def test_intervals_hold_the_truth_as_often_as_they_say(objective):
    rows = [row for row in (simulate(seed, objective) for seed in range(100, 200)) if row]
    regrets, critical, size, _ = np.array(rows, float).T
    assert len(rows) >= 90
    assert critical.mean() >= 0.85  # of 90% intervals
    assert size.mean() >= 0.85  # the sizes that cannot be told from the best hold the true best
    assert np.median(regrets) <= 1.1


# The runs


def test_a_rate_in_the_state_changes_no_number():
    task = quadratic_task()
    plain = list(jb.fit(task, jb.FitConfig(optax.adam(0.3), 8, jb.steps(5))))[-1]["state"]
    optimizer = with_rate_in_state(optax.adam)
    state = jb.init_state(task, optimizer, 0)
    state = state._replace(opt_state=state.opt_state._replace(learning_rate=jnp.asarray(0.3)))
    adjustable = list(jb.fit(task, jb.FitConfig(optimizer, 8, jb.steps(5)), state=state))[-1]["state"]
    np.testing.assert_array_equal(plain.params, adjustable.params)


def test_a_probe_counts_updates_to_the_goal():
    task, optimizer = quadratic_task(), with_rate_in_state(optax.sgd)
    prober = Prober(task, optimizer, make_start(task, optimizer), jb.as_goal("distance<0.1"), jb.epochs(10), 50)
    *_, last = prober.run(8, 0.1, 0)
    *_, record = jb.fit_to_target(prober.task, jb.FitConfig(optax.sgd(0.1), 8, jb.epochs(10), evaluations_per_epoch=50), "distance<0.1")
    assert (last.updates, last.reached) == (record["updates"], True)


def test_the_race_ends_with_the_first_that_reaches_the_goal():
    runs = list(race(SimulatedProber(Law(), 0.0, 0), space("time"), 64, 0))
    assert [probe.learning_rate for probe in runs] == list(RATES[::2])
    soonest = min(probe.updates for probe in runs if probe.reached)
    assert all(probe.updates <= 2 * soonest for probe in runs)
    assert sum(probe.updates for probe in runs) < 5 * soonest  # ten rates, most of which end early


# Advice


def test_advice_on_a_quadratic_is_near_the_best_of_a_sweep():
    advice = advise_quadratic()
    assert {advice.batch_size} <= set(advice.candidates)
    assert advice.choice.updates.low <= advice.choice.updates.value <= advice.choice.updates.high
    goal, task, unit = jb.as_goal("distance<0.1"), quadratic_task(), cost_of_update("time", FLAT, (2, 8, 32, 128))

    def cost(size, rate):
        config = jb.FitConfig(optax.sgd(rate), size, jb.epochs(40), seed=77, evaluations_per_epoch=50)
        *_, last = jb.fit_to_target(task, config, goal)
        return last["updates"] * unit[size] if last["reached"] else math.inf

    best = min(cost(size, rate) for size in unit for rate in (0.01, 0.0316, 0.1, 0.316, 1.0))
    assert cost(advice.batch_size, advice.learning_rate) <= 1.6 * best  # one seed each
    assert advice.cost_examples == sum(probe.updates * probe.batch_size for probe in advice.probes)


def test_objectives_differ_where_they_must():
    few = advise_quadratic(objective="examples")
    fast = advise_quadratic(throughput=jb.fit_throughput({size: [1e-3] * 3 for size in (2, 200)}))
    assert few.batch_size < fast.batch_size  # if examples cost no time, a larger batch is faster


def test_advice_continues_from_known_runs_and_gives_the_same():
    seen = []
    whole = advise_quadratic(on_probe=lambda probe, number: seen.append(probe))
    again = []
    resumed = advise_quadratic(known=seen[:12], on_probe=lambda probe, number: again.append((probe, number)))
    assert [number for _, number in again] == list(range(12, len(seen)))
    assert resumed == whole


def test_the_answer_in_words_and_code():
    advice = advise_quadratic()
    text = "\n".join(advice.sentences())
    told = "cannot be told" if len(advice.candidates) > 1 else "No other size"
    for part in (f"batch size {advice.batch_size}", "updates", "The device is busy from", told):
        assert part in text
    names = {"jb": jb, "optax": optax}
    exec(advice.snippet("optax.sgd"), names)
    assert names["config"].batch_size == advice.batch_size


def test_rules_name_what_the_optimizer_has():
    advice = advise_quadratic(optimizer=optax.adamw, max_probes=10)
    assert [rule.partition(":")[0] for rule in advice.rules] == ["β₂", "Weight decay of AdamW", "Warmup", "An average of the weights"]


# What it must refuse or confess


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rates": (0.1, 0.2)}, "learning_rates"),
        ({"learning_rates": (0.1, 0.2, -1.0)}, "learning_rates"),
        ({"batch_sizes": (8,)}, "batch_sizes=\\[8\\]"),
        ({"batch_sizes": (8, 10_000)}, "400 examples"),
        ({"memory": "1B", "batch_sizes": (2, 8)}, "budget|memory"),
        ({"target": "h1000"}, "h1000"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        advise_quadratic(**settings)


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="objective='money'"):
        cost_of_update.__wrapped__("money", FLAT, (2, 8))  # past the run-time check of types


def test_a_goal_that_is_no_metric_or_already_reached_is_refused():
    with pytest.raises(ValueError, match="metrics are distance"):
        jb.advise(quadratic_task(), "accuracy>0.9", **QUICK)
    with pytest.raises(ValueError, match="reached before training"):
        jb.advise(quadratic_task(start=3.0), "distance<0.1", **QUICK)


def test_data_that_are_not_finite_are_refused():
    task = quadratic_task()
    with pytest.raises(ValueError, match="train_data holds NaN or infinite numbers in 1 of 400"):
        jb.advise(task._replace(train_data=task.train_data.at[3].set(jnp.nan)), "distance<0.1", **QUICK)


def refused(task, goal="distance<0.1", **settings):
    advice = jb.advise(task, goal, **{**QUICK, "longest": jb.epochs(2), **settings})
    assert advice.batch_size is None
    assert advice.snippet().startswith("# no advice")
    return " ".join(advice.sentences())


def test_divergence_at_every_rate_is_confessed():
    assert "diverged at every learning rate from 100 to 1e+04" in refused(quadratic_task(), learning_rates=(1e2, 1e3, 1e4), longest=jb.epochs(10))


def test_a_metric_that_never_moves_is_confessed():
    task = quadratic_task()._replace(metrics_fn=lambda w, x: {"distance": jnp.ones(len(x))})
    assert "distance never moved from 1" in refused(task)


def test_a_goal_that_is_too_far_is_confessed():
    assert "No run reached distance<1e-08: the best came to" in refused(quadratic_task(), "distance<1e-8")


def test_one_class_is_refused_or_confessed():
    """With one class every answer is right from the start, or after the first look."""
    images = jb.load_dataset("digits")
    dataset = images._replace(train_labels=0 * images.train_labels, test_labels=0 * images.test_labels)
    task = jb.classification_task(jb.MLP((8,), num_classes=10), dataset)
    advice = jb.advise(task, "accuracy>0.99", **{**QUICK, "batch_sizes": (32, 64, 128), "max_probes": 11})
    assert any("reached within" in doubt for doubt in advice.doubts)


def test_updates_that_do_not_fall_with_the_batch_are_confessed():
    advice = jb.advise(quadratic_task(noise=0.0), "distance<0.1", **{**QUICK, "max_probes": 24, "evaluations_per_epoch": 400})
    assert any("hardly fall" in doubt or "Fewer than three" in doubt for doubt in advice.doubts)
    assert advice.critical_batch_size.low < 8


def test_a_small_data_set_is_confessed():
    advice = jb.advise(quadratic_task(num_examples=8), "distance<0.3", **{**QUICK, "batch_sizes": None, "longest": jb.epochs(200)})
    assert any("allows only 2 batch sizes" in doubt for doubt in advice.doubts)


def test_few_probes_leave_a_wide_interval():
    advice = advise_quadratic(max_probes=10)
    assert len(advice.probes) == 10
    assert advice.critical_batch_size.high > 5 * advice.critical_batch_size.low
    assert len(advice.candidates) > 1


def test_a_budget_ends_the_search():
    assert len(advise_quadratic(budget=0.0).probes) == 10  # the race alone


def test_a_large_model_is_told_what_memory_holds():
    task = jb.classification_task(jb.MLP((64,)), jb.load_dataset("digits"), microbatch_size=10**6)
    momentum = functools.partial(optax.sgd, momentum=0.9)
    memory = jb.memory_profile(task, [256], optimizer=momentum(0.1))[256].total / 0.94  # a margin of 5% is left free
    settings = {"optimizer": momentum, "throughput": FLAT, "max_probes": 10, "longest": jb.epochs(3)}
    advice = jb.advise(task, "accuracy>0.5", memory=memory, **settings)
    assert max(choice.batch_size for choice in advice.choices) == 256 <= advice.largest_batch_size < 512
    assert f"Memory holds {advice.largest_batch_size:,} at most" in " ".join(advice.sentences())
