"""Tasks: models that would train without an error and not as meant are refused; metrics are those of each example."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jaxbatch as jb
from jaxbatch.augment import example_keys
from jaxbatch.batches import epoch_order
from jaxbatch.layers import BatchNorm

IMAGES = np.random.default_rng(0).integers(0, 256, (24, 4, 4, 1), dtype=np.uint8)
DATASET = jb.Dataset("r", IMAGES, np.arange(24, dtype=np.int32) % 3, IMAGES, np.arange(24, dtype=np.int32) % 3, 3, (0.5,), (0.25,))


class WithDropout(nn.Module):
    rate: float = 0.5

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3)(nn.Dropout(self.rate, deterministic=not train)(x.reshape(x.shape[0], -1)))


class WithFlagOfItsOwn(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=deterministic)(x.reshape(x.shape[0], -1)))


class WithNoise(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(3)(x + jax.random.normal(self.make_rng("noise"), x.shape) if train else x)


class WithStockBatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(x.reshape(x.shape[0], -1)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (WithDropout(), "WithDropout: its dropout needs random numbers.*jaxbatch.Task"),
        (WithFlagOfItsOwn(), "its dropout needs random numbers"),
        (WithNoise(), "WithNoise needs random numbers"),
        (WithStockBatchNorm(), "averages the running moments itself.*jaxbatch.layers.BatchNorm"),
        (nnx.Linear(16, 3, rngs=nnx.Rngs(0)), "model=Linear is not a flax.linen module"),
    ],
)
def test_a_model_that_would_train_wrongly_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        jb.classification_task(model, DATASET)


def test_dropout_of_rate_zero_is_none():
    assert jb.classification_task(WithDropout(rate=0.0), DATASET).num_examples == 24


def test_batch_norm_says_what_it_takes():
    with pytest.raises(ValueError, match=r"takes \(B, H, W, C\) and got shape \(2, 5\)"):
        BatchNorm().init(jax.random.key(0), jnp.ones((2, 5)), train=True)


LOSS = lambda w, x: 0.5 * (x - w) ** 2


def make_task(metrics_fn):
    return jb.Task(lambda key: jnp.array(0.0), LOSS, metrics_fn, jnp.arange(8.0), jnp.arange(501.0))


def test_a_mean_among_the_metrics_is_refused():
    task = make_task(lambda w, x: {"loss": LOSS(w, x), "accuracy": (x > w).mean()})
    with pytest.raises(ValueError, match=r"'accuracy' has shape \(\). Leave out the mean"):
        next(jb.fit(task, jb.FitConfig(optax.sgd(0.1), 4)))


def test_metrics_have_any_names():
    task = make_task(lambda w, x: {"error": jnp.abs(x - w)})
    (record,) = jb.fit(task, jb.FitConfig(optax.sgd(0.0), 4))
    assert record["test_error"] == 250.0 and "test_loss" not in record
    (record,) = jb.sweep(task, optax.sgd, jnp.array([0.0, 0.0]), [0, 1], batch_size=4, duration=jb.epochs(1))
    assert record["test_error"].tolist() == [250.0, 250.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_devices": 0}, "num_devices=0 must be a whole number of at least 1"),
        ({"parallel": "mpi"}, "parallel='mpi' must be"),
        ({"batch_size": [16, 32]}, r"batch_size=\[16, 32\] must be a whole number"),
        ({"batch_size": 2.5}, "batch_size=2.5 must be a whole number"),
        ({"optimizer": 0.1}, "optimizer=0.1 must be one of optax's"),
    ],
)
def test_a_configuration_that_means_nothing_is_refused(changes, message):
    task = make_task(lambda w, x: {"loss": LOSS(w, x)})
    with pytest.raises(ValueError, match=message):
        next(jb.fit(task, jb.FitConfig(optax.sgd(0.1), 4)._replace(**changes)))


def test_keys_for_dropout_ride_in_the_prepared_batch():
    noise = lambda keys: jax.vmap(jax.random.uniform)(keys)
    loss_fn = lambda w, batch: 0.5 * (batch[0] + noise(batch[1]) - w) ** 2
    x = jnp.arange(8.0)
    task = jb.Task(lambda key: jnp.array(0.0), loss_fn, lambda w, x: {"loss": LOSS(w, x)}, x, x, prepare=lambda keys, x: (x, keys))

    def by_hand(groups=1):
        w = 0.0
        for epoch in range(2):
            for index in np.asarray(epoch_order(5, epoch, 8)).reshape(2, 4):
                w += 0.1 * groups * float((x[index] + noise(example_keys(5, epoch, jnp.asarray(index))) - w).mean())
        return w

    config = jb.FitConfig(optax.sgd(0.1), 4, jb.epochs(2), seed=5)
    for changes in ({}, {"microbatch_size": 2}):
        *_, last = jb.fit(task, config._replace(**changes))
        np.testing.assert_allclose(last["state"].params, by_hand(), rtol=1e-6)
    *_, last = jb.fit(task, config._replace(num_groups=2))  # without momentum: twice the rate
    np.testing.assert_allclose(last["state"].params, by_hand(groups=2), rtol=1e-6)
    *_, last = jb.sweep(task, optax.sgd, jnp.array([0.1, 0.1]), [5, 6], batch_size=4, duration=jb.epochs(2))
    np.testing.assert_allclose(last["state"].params[0], by_hand(), rtol=1e-6)


TRACES = {  # the step; before it whole and in parts, to compare them, and once for its convolutions; with a monitor its weights
    "plain": (1, {}),
    "microbatches": (4, {"microbatch_size": 4}),
    "groups": (2, {"num_groups": 2}),
    "a monitor": (5, {"monitor": jb.NoiseMonitor()}),
    "a monitor of microbatches": (5, {"monitor": jb.NoiseMonitor(), "microbatch_size": 4}),
}


@pytest.mark.parametrize("name", TRACES)
def test_a_fit_traces_a_loss_no_more_than_it_must(name):
    expected, settings = TRACES[name]
    calls = []
    loss_fn = lambda w, x: (calls.append(x.shape), (x - w) ** 2)[1]
    task = jb.Task(lambda key: jnp.array(0.0), loss_fn, None, np.arange(16.0, dtype=np.float32), None)
    for _ in jb.fit(task, jb.FitConfig(optax.sgd(0.1), 8, jb.steps(4), evaluations_per_epoch=1, **settings)):
        pass
    assert len(calls) == expected
    if settings.get("monitor"):  # what has passed is not looked at again
        next(jb.fit(task, jb.FitConfig(optax.sgd(0.1), 8, jb.steps(2), **settings)))
        assert len(calls) == 2 * expected - 2


@pytest.mark.parametrize("num_groups", [1, 2])
def test_a_state_that_nothing_is_returned_for_is_refused(num_groups):
    loss_fn = lambda w, x: ((w * x) ** 2, {})
    task = jb.Task(lambda key: (jnp.ones(()), jnp.zeros(())), loss_fn, None, jnp.ones(8), None, update_model_state=lambda old, aux: old)
    with pytest.raises(ValueError, match="update_model_state needs the aux"):
        next(jb.fit(task, jb.FitConfig(optax.sgd(0.1), 4, jb.epochs(1), num_groups=num_groups)))


def test_a_finer_cut_to_measure_is_refused_where_it_would_change_the_state():
    with pytest.raises(ValueError, match="cut_to_measure=2 would change how often"):
        jb.make_train_step(lambda w, x: w * x, optax.sgd(0.1), 4, cut_to_measure=2, update_model_state=lambda old, aux: old)
