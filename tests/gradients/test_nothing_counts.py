"""What «nothing» is worth: a batch in which nothing counts has no loss, a test set in which nothing counts has no metric."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from experiments.gradient_smoothness.report import jump
from experiments.harness.training import join_parts
from jaxbatch.gradients.updates import update

X = jnp.ones(32)


def test_a_part_of_an_epoch_in_which_nothing_counts_is_left_out_of_the_epoch():
    part = {"batch_size": 2, "diverged": False, "train_seconds": 1.0, "compile_seconds": 0.0, "stall_seconds": 0.0}
    parts = lambda *losses: [part | {"updates": 2 * n, "loss": loss} for n, loss in enumerate(losses, 1)]
    assert join_parts(parts(4.0, np.nan, 8.0), 0)["loss"] == 6.0
    assert np.isnan(join_parts(parts(np.nan, np.nan), 0)["loss"])
    lost = parts(4.0, np.nan)
    lost[-1]["diverged"] = True
    assert np.isnan(join_parts(lost, 0)["loss"])


def test_an_iteration_without_a_loss_leaves_the_jump_of_the_others():
    assert jump(np.array([9.0] * 5 + [1.0, 2.0, np.nan, 5.0, 2.0])) == 2.0  # of 1 and 3
    assert np.isnan(jump(np.array([1.0, 2.0, 1.0, np.nan])))


def masked_task(counting, **fields):
    """Every loss that counts is 1; of the examples, so many count."""
    loss_fn = lambda w, batch: jb.Weighted(batch[0] + w, batch[1])
    data = X, (jnp.arange(32) < counting).astype(jnp.float32)
    return jb.Task(lambda key: jnp.zeros(()), loss_fn, lambda w, b: {"loss": loss_fn(w, b)}, data, data, **fields)


def in_pieces(task):
    conv = lambda x: jax.lax.conv(x[:, None, None], jnp.ones((1, 1, 1)), (1,), "VALID")[:, 0, 0]
    loss_fn = task.loss_fn
    return task._replace(loss_fn=lambda w, b: jb.Weighted(conv(loss_fn(w, b).total), loss_fn(w, b).weight))


WAYS = {
    "plain": lambda task, **settings: list(jb.fit(task, jb.FitConfig(optax.sgd(0.0), **settings))),
    "monitor": lambda task, **settings: list(jb.fit(task, jb.FitConfig(optax.sgd(0.0), monitor=jb.NoiseMonitor(), **settings))),
    "groups": lambda task, **settings: list(jb.fit(task, jb.FitConfig(optax.sgd(0.0), num_groups=2, **settings))),
    "microbatches": lambda task, **settings: list(jb.fit(task, jb.FitConfig(optax.sgd(0.0), microbatch_size=1, **settings))),
    "pieces": lambda task, **settings: list(jb.fit(in_pieces(task), jb.FitConfig(optax.sgd(0.0), microbatch_size=1, **settings))),
    "stream": lambda task, **settings: list(
        jb.fit(task._replace(train_data=jb.ArrayStream(task.train_data)), jb.FitConfig(optax.sgd(0.0), **settings))
    ),
    "sweep in threads": lambda task, batch_size, **settings: list(
        jb.sweep(task, optax.sgd, jnp.zeros(1), [0], batch_size=batch_size, duration=jb.epochs(1), runs="threads", **settings)
    ),
    "sweep by vmap": lambda task, batch_size, **settings: list(
        jb.sweep(task, optax.sgd, jnp.zeros(1), [0], batch_size=batch_size, duration=jb.epochs(1), runs="vmap", **settings)
    ),
}


def diverged(record):
    return bool(record["diverged"]) if "diverged" in record else bool(np.any(record["diverged_at_batch"] >= 0))


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_in_which_nothing_counts_is_left_out_of_the_record(way):
    (record,) = WAYS[way](masked_task(3), batch_size=2)
    np.testing.assert_allclose(record["loss"], 1.0)  # as zeros, 13 of 16 batches would make it 0.19
    np.testing.assert_allclose(record["test_loss"], 1.0)
    assert not diverged(record)
    records = WAYS[way](masked_task(1)._replace(test_data=None), batch_size=2, evaluations_per_epoch=16)
    losses = np.array([np.squeeze(record["loss"]) for record in records])
    assert sorted(np.isnan(losses)) == [False] + [True] * 15 and not any(map(diverged, records)) and len(records) == 16


@pytest.mark.parametrize("way", ["plain", "sweep in threads", "sweep by vmap"])
def test_a_test_set_in_which_nothing_counts_reaches_no_goal(way):
    empty = masked_task(0)
    for task in (empty, empty._replace(test_data=jb.ArrayStream(empty.test_data))) if way == "plain" else (empty,):
        (record,) = WAYS[way](task._replace(train_data=masked_task(3).train_data), batch_size=2)
        assert np.isnan(record["test_loss"]) and record["loss"] == 1 and not diverged(record)
    *_, last = jb.fit_to_target(empty, jb.FitConfig(optax.sgd(0.0), 2), "loss<0.5")
    assert not last["reached"] and np.isnan(last["loss"]) and not last["diverged"]


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_that_is_no_number_is_found_beside_them(way):
    task = masked_task(3)
    weights = task.train_data[1].at[7].set(-1.0)  # which makes the mean NaN
    records = WAYS[way](task._replace(train_data=(X, weights)), batch_size=2)
    assert diverged(records[-1])


def test_of_nothing_there_is_no_curvature_and_no_line():
    task = masked_task(0)
    assert np.isnan(jb.hessian_vector_product(task.loss_fn, jnp.zeros(()), jnp.ones(()), task.train_data))
    assert np.isnan(jb.hessian_eigenvalues(task.loss_fn, jnp.zeros(()), task.train_data, key=jax.random.key(0), num_steps=1).largest).all()
    assert np.isnan(jb.hessian_trace(task.loss_fn, jnp.zeros(()), task.train_data, 2, key=jax.random.key(0)).value)
    assert np.isnan(jb.loss_along_line(task.loss_fn, jnp.zeros(()), jnp.ones(()), task.train_data, [0.0, 1.0], microbatch_size=16)).all()


@pytest.mark.parametrize("settings", [{}, {"num_groups": 2}, {"microbatch_size": 1}])
@pytest.mark.parametrize("cut", [lambda task: task, in_pieces])
def test_an_optimizer_that_uses_the_loss_does_not_take_nothing_for_the_best(settings, cut):
    plateau = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1))
    (record,) = jb.fit(cut(masked_task(3)), jb.FitConfig(plateau, 2, **settings))
    state = record["state"].opt_state[1]
    assert float(state.best_value) > 0.2 and int(record["state"].step) == 16 * settings.get("num_groups", 1)


def test_other_optimizers_see_a_gradient_of_zero():
    params, momentum = jnp.array(1.0), optax.sgd(0.1, 0.9)
    moved, state = update(momentum, jnp.array(1.0), momentum.init(params), params, jnp.array(1.0), jnp.array(True))
    assert update(momentum, jnp.array(0.0), state, moved, jnp.array(0.0), jnp.array(False))[0] < moved  # its velocity goes on
