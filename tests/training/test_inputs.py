"""What users hand in by mistake is refused by name, before anything runs; what is allowed works everywhere alike."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import jaxbatch as jb
from jaxbatch.batches import check_seed

LOSS = lambda w, x: 0.5 * (x - w) ** 2
X = jnp.arange(8.0)
TASK = jb.Task(lambda key: jnp.array(0.0), LOSS, lambda w, x: {"loss": LOSS(w, x)}, X, X)
CONFIG = jb.FitConfig(optax.sgd(0.1), 4)
PAIR = lambda w, batch: LOSS(w, batch[0]) + 0 * batch[1]
PAIRS = jb.Task(lambda key: jnp.array(0.0), PAIR, lambda w, batch: {"loss": PAIR(w, batch)}, (X, X), (X, X))
SHORT = (jnp.ones(10), jnp.arange(6.0))


def first(task, **changes):
    return next(jb.fit(task, CONFIG._replace(**changes)))


def swept(task, seeds=(0, 1)):
    return next(jb.sweep(task, optax.sgd, jnp.full(len(seeds), 0.1), list(seeds), batch_size=4, duration=jb.epochs(1)))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: first(TASK._replace(train_data=[1.0, 2.0])), r"train_data\[0\] is a float, and train_data must be a pytree of arrays"),
        (lambda: first(TASK._replace(train_data=([[1.0], [2.0]], [0, 1]))), r"train_data\[0\]\[0\]\[0\] is a float"),
        (lambda: first(TASK._replace(test_data=[1.0, 2.0])), r"test_data\[0\] is a float"),
        (lambda: first(TASK._replace(train_data=None)), "train_data must be a pytree of arrays"),
        (lambda: first(TASK._replace(train_data=jnp.array(3.0))), "train_data is a single number"),
        (lambda: first(TASK._replace(train_data=jnp.ones(0))), "train_data is empty"),
        (lambda: swept(TASK._replace(train_data=[1.0, 2.0])), r"train_data\[0\] is a float"),
        (lambda: first(TASK._replace(metrics_fn=None)), "metrics_fn=None with test_data"),
        (lambda: first(TASK._replace(init=lambda key: {"w": jnp.array(0.0), "n": jnp.array(3)})), r"params\['n'\] is int32"),
        (lambda: swept(TASK._replace(init=lambda key: {"w": jnp.array(0.0), "n": jnp.array(3)})), r"params\['n'\] is int32"),
        (lambda: jb.per_example_gradients(LOSS, jnp.array(0), X), "params is int32"),
        (lambda: jb.group_gradients(LOSS, {"w": "a"}, X, 2), r"params\['w'\] is a str"),
        (lambda: jb.accumulated_gradient(LOSS, [0], X, 2), r"params\[0\] is a int"),
        (lambda: jb.gradient_statistics(LOSS, jnp.array(0), X), "params is int32"),
        (lambda: jb.per_example_gradients(LOSS, jnp.array(0.0), [1.0, 2.0]), r"batch\[0\] is a float"),
        (lambda: jb.per_example_gradients(lambda w, x: x > w, jnp.array(0.0), X), "floating-point losses, but returned bool"),
        (lambda: jb.per_example_gradients(lambda w, x: [w], jnp.array(0.0), X), "one loss per example"),
        (lambda: first(TASK, optimizer=None), "optimizer=None must be one of optax's"),
        (lambda: first(TASK, optimizer=optax.sgd), "optimizer=.* must be one of optax's"),
        (lambda: first(TASK, seed=1.5), "seed=1.5 must be a whole number"),
        (lambda: first(TASK, duration=3), "duration=3 has no unit"),
        (lambda: first(TASK, batch_size="8"), "batch_size='8' must be a whole number"),
    ],
)
def test_wrong_kinds_of_input(use, message):
    with pytest.raises(ValueError, match=message):
        use()


def test_no_test_data_means_no_test_metrics(tmp_path):
    task = TASK._replace(test_data=None, metrics_fn=None)
    (record,) = jb.fit(task, CONFIG)
    assert not any(name.startswith("test_") for name in record) and np.isfinite(record["loss"])
    for runs in ("vmap", "threads", "map"):
        (record,) = jb.sweep(task, optax.sgd, jnp.array([0.1]), [0], batch_size=4, duration=jb.epochs(1), runs=runs)
        assert not any(name.startswith("test_") for name in record)
    assert len(list(jb.fit_with_checkpoints(task, CONFIG, tmp_path))) == 1


@pytest.mark.parametrize(("groups", "microbatch_size"), [(None, None), (None, 2), (2, None)])
def test_a_number_as_aux(groups, microbatch_size):
    step = jb.make_train_step(
        lambda w, x: (LOSS(w, x), 1.5),
        optax.sgd(0.1),
        4,
        num_groups=groups,
        microbatch_size=microbatch_size,
        update_model_state=lambda old, new: old + new,
    )
    start = jb.TrainState(jnp.array(0.0), optax.sgd(0.1).init(0.0), jnp.array(0), jnp.array(0.0))
    state, _ = step(start, X[:4])
    assert float(state.model_state) == 1.5 * (groups or (2 if microbatch_size else 1))


def test_an_aux_that_holds_nothing():
    task = TASK._replace(
        init=lambda key: (jnp.array(0.0), ()),
        loss_fn=lambda w, x: (LOSS(w, x), ()),
        update_model_state=lambda old, new: old,
        metrics_fn=None,
        test_data=None,
    )
    with pytest.raises(ValueError, match="the aux that loss_fn returns, but it holds no array"):
        first(task)


@pytest.mark.parametrize("method", ["map", "vmap", "unroll"])
def test_a_number_as_aux_of_groups(method):
    _, aux = jb.group_gradients(lambda w, x: (LOSS(w, x), 7), jnp.array(0.0), X, 2, has_aux=True, method=method)
    assert aux.tolist() == [7, 7]


def test_updates_counts_the_calls_of_the_optimizer():
    (record,) = jb.fit(TASK, jb.FitConfig(optax.MultiSteps(optax.sgd(0.1), 4), 1))
    assert record["updates"] == record["batches"] == 8  # what the docstring says; the parameters changed twice
    assert int(record["state"].opt_state.gradient_step) == 2


# Seeds


@pytest.mark.parametrize("seed", [-1, 2**32, True])
def test_a_seed_out_of_range_is_refused_everywhere(seed):
    message = "seed=.* must be a whole number from 0 to 4294967295"
    for use in (
        lambda: check_seed(seed),
        lambda: first(TASK, seed=seed),
        lambda: swept(TASK, (0, seed)),
        lambda: jb.init_state(TASK, CONFIG.optimizer, seed),
        lambda: jb.epoch_order(seed, 0, 4),
    ):
        with pytest.raises(ValueError, match=message):
            use()


@pytest.mark.parametrize("seed", [2**31, 2**32 - 1, np.int64(2**31 + 5)])
def test_large_seeds_work_everywhere_and_mean_the_same(seed):
    noisy = TASK._replace(
        init=lambda key: jax.random.normal(key),
        prepare=lambda keys, x: x + jax.vmap(jax.random.normal)(keys),
    )
    for task in (TASK._replace(init=noisy.init), noisy):
        one = first(task, seed=seed)
        for runs in ("vmap", "threads", "map"):
            several = next(jb.sweep(task, optax.sgd, jnp.array([0.1, 0.1]), [seed, 3], batch_size=4, duration=jb.epochs(1), runs=runs))
            np.testing.assert_allclose(several["state"].params[0], one["state"].params, rtol=1e-5)
            assert several["loss"][0] == pytest.approx(one["loss"], rel=1e-5)
        assert one["loss"] != first(task, seed=seed - 2**31)["loss"]


# What a Flax model keeps beside its parameters


class Fixed(nn.Module):
    """A model with an array that is no parameter."""

    @nn.compact
    def __call__(self, images):
        mean = self.variable("constants", "mean", lambda: jnp.full((784,), 0.5))
        return nn.Dense(10)(images.reshape(len(images), -1) - mean.value[None])


class Attribute(nn.Module):
    """The way out that the message names."""

    mean: tuple[float, ...] = (0.5,)

    @nn.compact
    def __call__(self, images):
        return nn.Dense(10)(images.reshape(len(images), -1) - jnp.asarray(self.mean)[None])


def test_variables_that_are_no_parameters_are_not_trained():
    with pytest.raises(ValueError, match="model=Fixed keeps variables in 'constants'"):
        jb.classification_task(Fixed(), jb.load_dataset("digits"))
    task = jb.classification_task(Attribute(), jb.load_dataset("digits"))
    assert set(task.init(jax.random.key(0))) == {"params"}


# A state that is past the plan


@pytest.mark.parametrize(("duration", "after"), [(jb.steps(3), 3), (jb.steps(3), 5), (jb.epochs(1), 2), (jb.examples(4), 1)])
def test_a_state_at_or_past_the_end_is_refused(duration, after):
    *_, last = jb.fit(TASK, CONFIG._replace(duration=jb.steps(after)))
    with pytest.raises(ValueError, match=rf"state.step={after} is at or past the end of duration=.*counts from the start"):
        next(jb.fit(TASK, CONFIG._replace(duration=duration), state=last["state"]))


def test_the_way_out_trains_on(tmp_path):
    *_, last = jb.fit(TASK, CONFIG._replace(duration=jb.steps(3)))
    fresh = last["state"]._replace(step=jnp.zeros((), int))
    *_, again = jb.fit(TASK, CONFIG._replace(duration=jb.steps(2)), state=fresh)
    assert again["batches"] == 2 and int(again["state"].step) == 2
    assert float(again["state"].params) != float(last["state"].params)
    assert list(jb.fit(TASK, CONFIG._replace(duration=jb.steps(0)))) == []


@pytest.mark.parametrize("groups", [None, 2])
def test_a_run_with_checkpoints_that_is_whole_stays_whole(tmp_path, groups):
    config = CONFIG._replace(num_groups=groups)
    assert len(list(jb.fit_with_checkpoints(TASK, config, tmp_path))) == 1
    assert list(jb.fit_with_checkpoints(TASK, config, tmp_path)) == []


# NumPy's numbers where Python's go


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_numpy_numbers_are_numbers(kind, tmp_path):
    config = jb.FitConfig(optax.sgd(0.1), kind(4), jb.steps(kind(2)), num_groups=kind(2), seed=kind(3), evaluations_per_epoch=kind(2))
    plain = jb.FitConfig(optax.sgd(0.1), 4, jb.steps(2), num_groups=2, seed=3, evaluations_per_epoch=2)
    ours, theirs = ([strip(record) for record in jb.fit_with_checkpoints(TASK, one, tmp_path / name)] for one, name in ((config, "a"), (plain, "b")))
    assert ours == theirs and all(type(record["batch_size"]) is int for record in ours)
    json.dumps(ours)
    assert list(jb.fit_with_checkpoints(TASK, plain, tmp_path / "a")) == []  # the same run, whoever counted


def strip(record):
    return {name: value for name, value in record.items() if "seconds" not in name and name != "state"}
