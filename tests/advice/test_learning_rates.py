"""Tuning the learning rate of a batch size: against runs of fit one by one, against closed forms, and killed in between."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb

RATES, SEEDS = (0.03, 0.3, 1.2, 3.0), (0, 5)


def regression(flip=1.0):
    """Linear regression on random data; ``flip=-1`` measures the negative loss, of which more is better."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(96, 3)), jnp.float32)
    y = x @ jnp.array([1.0, -2.0, 0.5])
    loss_fn = lambda w, batch: 0.5 * (batch[0] @ w - batch[1]) ** 2
    metrics_fn = lambda w, batch: {"score": flip * loss_fn(w, batch)}
    return jb.Task(lambda key: jax.random.normal(key, (3,)), loss_fn, metrics_fn, (x[:64], y[:64]), (x[64:], y[64:]))


def tuned(task, goal, **settings):
    return list(
        jb.tune_learning_rate(
            task, optax.sgd, RATES, batch_size=16, seeds=SEEDS, duration=jb.epochs(4), goal=goal, evaluations_per_epoch=4, **settings
        )
    )


def one_by_one(task, goal):
    """The slow twin: every run by itself, with :func:`jaxbatch.fit_to_target` for the goal and :func:`jaxbatch.fit` for the end."""
    updates, ends = np.full((len(RATES), len(SEEDS)), np.nan), np.full((len(RATES), len(SEEDS)), np.nan)
    for place in np.ndindex(updates.shape):
        config = jb.FitConfig(optax.sgd(RATES[place[0]]), 16, jb.epochs(4), seed=SEEDS[place[1]], evaluations_per_epoch=4)
        *_, last = jb.fit_to_target(task, config, goal)
        updates[place] = last["updates"] if last["reached"] else np.nan
        *_, last = jb.fit(task, config)
        ends[place] = np.nan if last["diverged"] else last["test_score"]
    return updates, ends


@pytest.mark.parametrize(("flip", "goal"), [(1.0, "score<0.05"), (-1.0, "score>-0.05")])
def test_every_run_is_that_of_fit(flip, goal):
    task = regression(flip)
    result = tuned(task, goal)[-1]["result"]
    updates, ends = one_by_one(task, goal)
    np.testing.assert_array_equal(result.updates_to_goal, updates)
    np.testing.assert_allclose(result.metric, ends, rtol=1e-5)
    assert result.learning_rates == RATES and (result.best, result.best_rate) == (2, 1.2) and result.is_inside
    assert np.isnan(updates[0]).all() and np.isfinite(updates[1]).all()


def test_a_run_that_diverges_never_reaches_the_goal():
    task = regression()._replace(metrics_fn=lambda w, batch: {"score": jnp.zeros(len(batch[1]))})  # the goal, whatever w is
    settings = {"batch_size": 64, "seeds": [0], "duration": jb.epochs(9), "goal": "score<1", "evaluations_per_epoch": 1}
    *_, last = jb.tune_learning_rate(task, lambda rate: optax.sgd(1e12 * rate), RATES, **settings)
    assert last["result"].diverged.all() and np.isnan(last["result"].metric).all()
    assert (last["diverged_at_batch"] > 0).all() and (last["result"].updates_to_goal == 1).all()  # reached before
    *_, last = jb.tune_learning_rate(task, lambda rate: optax.sgd(1e38 * (1e3 * rate)), RATES, **settings)
    assert np.isnan(last["result"].updates_to_goal).all() and last["result"].best is None and last["result"].best_rate is None


@pytest.mark.parametrize("cut", [1, 7, 15])
def test_it_goes_on_to_the_bit(cut):
    task = regression()
    whole = tuned(task, "score<0.05")
    kept = {key: whole[cut - 1][key] for key in ("batches", "diverged_at_batch", "updates_to_goal", "state")}
    rest = tuned(task, "score<0.05", after=kept)
    assert len(rest) == len(whole) - cut and not tuned(task, "score<0.05", after=whole[-1])
    for one, other in zip(whole[cut:], rest, strict=True):
        for name in ("test_score", "loss", "updates_to_goal", "diverged_at_batch"):
            np.testing.assert_array_equal(one[name], other[name])
        assert all(map(np.array_equal, jax.tree.leaves(one["state"]), jax.tree.leaves(other["state"])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rates": []}, r"learning_rates=\[\] must hold at least one number, each above 0"),
        ({"learning_rates": [0.1, -1.0]}, r"learning_rates=\[0.1, -1.0\]"),
        ({"goal": "accuracy>0.9"}, "the task's metrics are score"),
        ({"goal": "score"}, "goal='score' must name a metric, a direction and a number"),
        ({"seeds": []}, "settings must have the leading axis of seeds, 0"),
    ],
)
def test_what_is_refused(changes, message):
    settings = {"learning_rates": [0.1], "goal": "score<1", "seeds": [0], "batch_size": 16, "duration": jb.epochs(1)}
    with pytest.raises(ValueError, match=message):
        list(jb.tune_learning_rate(regression(), optax.sgd, **(settings | changes)))


def made_up(best, rates, goal=jb.Goal("loss", 0.4, above=False), spread=1.0, seed=0):
    """A result whose updates grow with the distance from the best rate."""
    random = np.random.default_rng(seed)
    updates = np.array([[100 * (1 + abs(math.log(rate / best))) + spread * random.normal() for _ in range(3)] for rate in rates])
    return jb.RateResult(goal, tuple(rates), updates, np.zeros_like(updates), np.zeros(updates.shape, bool))


@pytest.mark.parametrize("power", [1.0, 0.5, 0.0])
def test_the_exponent_is_found(power):
    rates = [10.0 ** (n / 4) for n in range(-16, 5)]
    results = {size: made_up(0.001 * size**power, rates, seed=size) for size in (1, 10, 100, 1000)}
    found = jb.rate_exponent(results)
    assert abs(found.value - power) < 0.06 and found.low < power < found.high and found.high - found.low < 0.3 and found.n == 4


def test_sizes_whose_best_rate_is_on_the_edge_are_left_out():
    rates = (0.001, 0.01, 0.1, 1.0)
    results = {size: made_up(0.001 * size, rates) for size in (1, 10, 100, 1000)}
    assert [result.is_inside for result in results.values()] == [False, True, True, False]
    found = jb.rate_exponent(results)
    assert found.n == 2 and found.value == pytest.approx(1.0)
    assert math.isnan(jb.rate_exponent({1: results[1], 10: results[10]}).value)


def test_runs_that_did_not_arrive_have_no_exponent():
    """They had p = 0.00 [-0.38, 0.38] where none of them had reached the goal."""
    rates = (0.001, 0.01, 0.1, 1.0, 10.0)
    results = {size: made_up(0.01 * size, rates) for size in (1, 10, 100)}
    ends = np.array([[0.9] * 3, [0.5] * 3, [0.7] * 3, [0.8] * 3, [0.9] * 3])  # the best is inside the grid
    lost = {size: result._replace(updates_to_goal=np.full((5, 3), np.nan), metric=ends) for size, result in results.items()}
    assert all(result.is_inside and not result.arrived for result in lost.values()) and all(result.arrived for result in results.values())
    assert math.isnan(jb.rate_exponent(lost).value)
    without = jb.rate_exponent({**results, 100: lost[100]})  # a size that did not arrive changes nothing
    assert without[:4] == jb.rate_exponent({size: results[size] for size in (1, 10)})[:4] and (without.n, without.left_out) == (2, 1)
    assert math.isnan(jb.rate_exponent({1: results[1], 10: lost[10], 100: lost[100]}).value)


def test_the_best_of_runs_that_miss_the_goal_follows_the_direction():
    ends, missed = np.array([[0.5, 0.7], [0.2, np.nan], [0.9, 0.9]]), np.full((3, 2), np.nan)
    result = jb.RateResult(jb.Goal("loss", 0.1, above=False), (1.0, 2.0, 3.0), missed, ends, np.isnan(ends))
    assert (result.best, result._replace(goal=jb.Goal("accuracy", 0.99)).best) == (0, 2)  # a diverged seed loses, either way
