"""The arms of the huge-batch study: their rates, batches, optimizers and noise, by numbers."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from experiments.large_batch.arms import (
    ARMS,
    GHOST,
    Arm,
    batch_sizes,
    find_arm,
    make_optimizer,
    num_epochs,
    num_updates,
    random_weights,
    rate_by_update,
    task_of,
    why_undefined,
    with_noise,
)
from experiments.large_batch.training import make_judge, train
from tests.conftest import make_weighted
from tests.gradients.test_gradients import assert_close
from tests.gradients.test_moments import batch_norm_task
from tests.training.test_train import task  # noqa: F401 (a fixture)

CONFIG = SimpleNamespace(batch_size=12, small_batch_size=3, num_groups=4, epochs=4, longest=3.0, momentum=0.9)


def rates(name, epochs=6):
    """Of every update of a run with two updates an epoch."""
    config = SimpleNamespace(**{**vars(CONFIG), "batch_size": 600, "small_batch_size": 24, "epochs": epochs})
    found = jax.vmap(rate_by_update(config, find_arm(name), 1200))(jnp.arange(2 * epochs))
    return np.asarray(found)


def test_the_rates_along_a_run():
    part = np.arange(12) / 12
    np.testing.assert_allclose(rates("cosine"), 0.5 * (1 + np.cos(np.pi * part)), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(rates("step decay"), np.repeat([1, 0.1, 0.01], 4), rtol=1e-5)
    np.testing.assert_allclose(rates("cyclic"), np.tile([0.1, 0.55, 1, 0.55], 3), rtol=1e-5)
    start = 24 / 600  # a tenth of the run is 1.2 updates
    np.testing.assert_allclose(rates("warmup")[:3], [start, start + (1 - start) / 1.2, 1], rtol=1e-5)
    assert (rates("warmup")[2:] == 1).all() and (rates("plain") == 1).all() and (rates("linear rule, warmup") == rates("warmup")).all()


def test_every_arm_but_the_longer_one_sees_as_many_examples():
    for name in [*ARMS, "cosine + growth"]:
        arm = find_arm(name)
        sizes = batch_sizes(CONFIG, arm)
        ends = [*list(sizes)[1:], num_epochs(CONFIG, arm)]
        seen = sum((end - start) * (24 // size) * size for (start, size), end in zip(sizes.items(), ends, strict=True))
        assert seen == (3 if name == "longer" else 1) * 4 * 24, name
    assert {name: num_updates(CONFIG, ARMS[name], 24) for name in ("small", "plain", "growth", "split", "longer")} == {
        "small": 32, "plain": 8, "growth": 8 + 6 + 4 + 2, "split": 32, "longer": 24,
    }  # fmt: skip


def alone(task, name, rate, seed):
    """The arm's run by ``jb.fit``."""
    arm = find_arm(name)
    schedule = jb.milestone_schedule(batch_sizes(CONFIG, arm))
    groups, optimizer = CONFIG.num_groups if arm.split else None, make_optimizer(CONFIG, arm, task.num_examples)(rate)
    config = jb.FitConfig(optimizer, schedule, jb.epochs(num_epochs(CONFIG, arm)), num_groups=groups, seed=seed)
    return list(jb.fit(task_of(CONFIG, arm, task), config))[-1]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("cosine + growth", "longer")]


@pytest.mark.parametrize("name", ["growth", "split", "noise", *SLOW])
def test_an_arm_trains_as_fit_does(task, name):
    seeds, tried = [3, 5], [0.004, 0.01]  # two runs, so that none takes the other's place
    trained = train(task, CONFIG, name, tried, seeds)
    for place, (rate, seed) in enumerate(zip(tried, seeds, strict=True)):
        expected = alone(task, name, rate, seed)
        mine = jax.tree.map(lambda leaf: leaf[place], trained.state)
        assert_close(mine.params, expected["state"].params, rtol=1e-4, atol=1e-6)
        row = trained.records[place]
        assert row["updates"] == int(mine.step) == expected["updates"]
        assert (row["learning_rate"], row["seed"], row["diverged"]) == (rate, seed, False)
        assert row["validation_loss"] == pytest.approx(expected["test_loss"], rel=1e-4)


def test_a_run_that_diverges_has_no_numbers(task):
    trained = train(task, CONFIG, "growth", [0.01, 1e20], [0, 0])
    assert [row["diverged"] for row in trained.records] == [False, True]
    assert trained.records[1]["validation_loss"] is None
    fine, lost = make_judge(task, task.test_data)(trained)
    assert lost["test_loss"] is None and lost["train_accuracy"] is None
    params = jax.tree.map(lambda leaf: leaf[0], trained.state.params)
    assert fine["train_loss"] == pytest.approx(float(task.loss_fn(params, task.train_data).mean()), rel=1e-5)
    assert fine["test_loss"] == pytest.approx(fine["validation_loss"], rel=1e-5)  # the same data here


def test_lars_is_the_paper_s_at_a_thousandth_of_its_rate_and_lamb_s_update_is_as_long_as_rate_times_parameters():
    random = np.random.default_rng(0)
    params, gradient = ({"w": jnp.asarray(random.normal(size=(4, 3))), "b": jnp.asarray(random.normal(size=3))} for _ in range(2))

    def step(optimizer):
        return optimizer.update(gradient, optimizer.init(params), params)[0]

    mine = step(make_optimizer(CONFIG, ARMS["lars"], 24)(0.02))
    assert_close(mine, step(optax.lars(20.0, trust_coefficient=0.001, momentum=0.9)), rtol=1e-5)
    for found, rate in ((mine, 0.02), (step(make_optimizer(CONFIG, ARMS["lamb"], 24)(0.03)), 0.03)):
        for name in params:
            assert float(jnp.linalg.norm(found[name])) == pytest.approx(rate * float(jnp.linalg.norm(params[name])), rel=1e-4)


def test_random_weights_give_the_covariance_of_a_small_batch():
    size, small, draws = 30, 6, 40_000
    gradients = jnp.asarray(np.random.default_rng(0).normal(size=(size, 3)) @ np.array([[2, 1, 0], [0, 1, 0], [0, 0, 0.3]]) + 1.0)
    weights = jax.vmap(lambda key: random_weights(jax.random.split(key, size), size, small))(jax.random.split(jax.random.key(0), draws))
    np.testing.assert_allclose(weights.sum(1), size, rtol=1e-4)
    noisy = weights @ gradients / size
    picks = jax.vmap(lambda key: gradients[jax.random.permutation(key, size)[:small]].mean(0))(jax.random.split(jax.random.key(1), draws))
    exact = (1 / small - 1 / size) * np.cov(gradients, rowvar=False)
    for found in (noisy, picks):
        error = np.abs(np.cov(np.asarray(found), rowvar=False) - exact)
        bound = 5 * np.sqrt((np.outer(np.diag(exact), np.diag(exact)) + exact**2) / draws)  # five standard errors of a covariance
        assert (error < bound).all()
        np.testing.assert_allclose(found.mean(0), gradients.mean(0), atol=5 * np.sqrt(np.diag(exact).max() / draws))


def test_noise_is_in_training_alone_and_keeps_what_the_task_prepares(task):
    doubled = task._replace(prepare=lambda keys, batch: {**batch, "x": 2 * batch["x"]})
    noisy = with_noise(doubled, 8, 2)
    batch, keys = jax.tree.map(lambda leaf: leaf[:8], task.train_data), jax.random.split(jax.random.key(0), 8)
    prepared, weights = noisy.prepare(keys, batch)
    params = jb.init_state(task, optax.sgd(0.1), 0).params
    np.testing.assert_allclose(noisy.loss_fn(params, (prepared, weights)), weights * task.loss_fn(params, {**batch, "x": 2 * batch["x"]}), rtol=1e-6)
    assert noisy.metrics_fn is task.metrics_fn and float(weights.std()) > 0.5
    other, _ = noisy.prepare(jax.random.split(jax.random.key(1), 8), batch)
    assert_close(other, prepared)  # the prepared batch has keys of its own


def test_noise_of_weighted_losses_and_of_models_with_a_state():
    loss_fn, _, params, batch = make_weighted(8, np.float32)
    weights = jnp.arange(8.0)
    noisy = with_noise(jb.Task(lambda key: params, loss_fn, None, batch, None), 8, 2)
    mine, plain = noisy.loss_fn(params, (batch, weights)), loss_fn(params, batch)
    np.testing.assert_allclose(mine.total, weights * plain.total)
    assert (mine.weight == plain.weight).all()
    stateful = batch_norm_task()
    first = jax.tree.map(lambda leaf: leaf[:8], stateful.train_data)
    start = jb.init_state(stateful, optax.sgd(0.1), 0).params
    losses, aux = with_noise(stateful, 8, 2).loss_fn(start, (first, weights))
    expected, moments = stateful.loss_fn(start, first)
    np.testing.assert_allclose(losses, weights * expected, rtol=1e-6)
    assert_close(aux, moments)


def test_ghost_batch_norm_takes_the_statistics_of_groups(task):
    assert why_undefined(task, GHOST) == "the model has no batch statistics" and why_undefined(task, "noise") is None
    stateful = batch_norm_task()
    assert why_undefined(stateful, GHOST) is None
    assert "over 4 examples" in why_undefined(stateful._replace(microbatch_size=4), GHOST)
    config = SimpleNamespace(**{**vars(CONFIG), "epochs": 1})
    ghost, plain = (train(stateful, config, name, [0.1], [0]).state for name in (GHOST, "plain"))
    # Each group of 3 has a loss of its own, with its own moments; the update is that of their mean.
    state = jb.init_state(stateful, optax.sgd(0.1, 0.9), 0)
    params, opt_state, optimizer = state.params, state.opt_state, optax.sgd(0.1, 0.9)
    of_a_part = jax.jit(jax.grad(lambda params, part: stateful.loss_fn(params, part)[0].mean()))
    for index in jb.epoch_batches(0, 0, 24, 12).indices:
        found = [of_a_part(params, jax.tree.map(lambda leaf: leaf[part], stateful.train_data)) for part in index.reshape(4, 3)]
        change, opt_state = optimizer.update(jax.tree.map(lambda *leaves: sum(leaves) / 4, *found), opt_state, params)
        params = optax.apply_updates(params, change)
    assert_close(jax.tree.map(lambda leaf: leaf[0], ghost.params), params, rtol=1e-4, atol=1e-6)
    apart = [float(abs(one - other).max()) for one, other in zip(*map(jax.tree.leaves, (ghost.params, plain.params)), strict=True)]
    assert max(apart) > 1e-4


def test_a_pair_has_what_both_change():
    assert find_arm("cosine + lamb") == Arm("cosine", "lamb") and find_arm("lamb + growth") == Arm(optimizer="lamb", grows=True)
