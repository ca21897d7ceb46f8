"""Objects of other libraries and functions that take other arguments end in one line; metrics get keys of their own."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jaxbatch as jb
from jaxbatch.augment import example_keys, keys_for_metrics
from tests.conftest import ROOT

X = jnp.linspace(0.0, 1.0, 48).reshape(24, 2)
LOSS = lambda w, x: 0.5 * ((x - w[None]) ** 2).sum(-1)
TASK = jb.Task(lambda key: jnp.zeros(2), LOSS, lambda w, x: {"loss": LOSS(w, x)}, X, X)


class Normalised(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(2, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(nn.Dense(2)(x))


def first(**changes):
    return next(jb.fit(TASK._replace(**changes), jb.FitConfig(optax.sgd(0.1), 4)))


def torch_tensor():
    return pytest.importorskip("torch").ones(2)


def torch_module():
    return pytest.importorskip("torch").nn.Linear(2, 2)


def haiku_model(x):
    import haiku as hk

    return hk.BatchNorm(True, True, 0.9)(hk.Linear(2)(x), is_training=True)


def transformed():
    return pytest.importorskip("haiku").transform_with_state(haiku_model)


FOREIGN = [
    (
        lambda: eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0)),
        r"is a custom_jvp and not an array: .*equinox.partition\(model, equinox.is_inexact_array\)",
    ),
    (lambda: {"model": eqx.nn.Dropout(0.5), "w": 1.0}, r"params\['model'\].*equinox.partition"),
    (lambda: Linen(), r"params is a Linen and not an array: .*model.init\(key, example\)\['params'\]"),
    (lambda: Linen().init(jax.random.key(0), X), r"params\['batch_stats'\] are running moments and not learned: .*update_model_state"),
    (lambda: nnx.Dropout(0.5, rngs=nnx.Rngs(0)), r"is an nnx.RngCount and not learned: .*nnx.split\(model, nnx.Param, ...\)"),
    (lambda: Normalised(nnx.Rngs(0)), r"is an nnx.BatchStat and not learned: .*nnx.merge\(graphdef, params, rest\)"),
    (lambda: nnx.state(Normalised(nnx.Rngs(0))), r"is an nnx.BatchStat and not learned: .*nnx.split"),
    (lambda: nnx.split(nnx.Dropout(0.5, rngs=nnx.Rngs(0))), "is an nnx.RngCount and not learned: .*nnx.split"),
    (lambda: transformed(), r"is a function and not an array: .*transformed.init\(key, example\)"),
    (lambda: transformed().init(jax.random.key(0), X), r"\['counter'\] is int32 and has no gradient: .*\(params, model_state\).*update_model_state"),
    (torch_tensor, "params is a Tensor and not an array: jaxbatch differentiates JAX functions"),
    (torch_module, "params is a Linear and not an array: jaxbatch differentiates JAX functions"),
    (lambda: {"w": 1.0, "name": "x"}, r"params\['name'\] is a str and not an array: keep it out of params"),
]


KINDS = ["equinox", "equinox_part", "linen", "linen_variables", "nnx", "nnx_norm", "nnx_state", "nnx_split", "haiku", "haiku_state"]
KINDS += ["torch_tensor", "torch_module", "text"]


@pytest.mark.parametrize(("make", "message"), FOREIGN, ids=KINDS)
def test_parameters_as_another_library_has_them(make, message):
    for use in (
        lambda: jb.per_example_gradients(LOSS, make(), X),
        lambda: first(init=lambda key: make()),
        lambda: jb.group_gradients(LOSS, make(), X, 2),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            use()
        text = str(caught.value)
        assert "\n" not in text and ("equinox" in text) == ("equinox" in message), text  # no hint at a library that is not there


def test_parameters_of_each_library_are_taken():
    split = nnx.split(Normalised(nnx.Rngs(0)), nnx.Param, ...)
    good = [split[1], nnx.Linear(2, 2, rngs=nnx.Rngs(0)), Linen().init(jax.random.key(0), X)["params"]]
    good += [eqx.filter(eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0)), eqx.is_inexact_array), {"batch_stats": jnp.ones(2)}, np.ones(2)]
    for params in good:
        loss_fn = lambda p, x: x.sum(-1) + sum(leaf.sum() for leaf in jax.tree.leaves(p))
        assert jax.tree.leaves(jb.per_example_gradients(loss_fn, params, X))[0].shape[0] == 24


STATEFUL = {
    "init": lambda key: ({"a": jnp.zeros(2), "b": jnp.zeros(2), "c": jnp.zeros(2)}, jnp.zeros(2)),
    "loss_fn": lambda w, x: (LOSS(w["a"], x), x.mean(0)),
    "metrics_fn": lambda both, x: {"loss": LOSS(both[0]["a"], x)},
    "update_model_state": lambda old, new: 0.9 * old + 0.1 * new,
}


def unpacks(both, x):
    params, state = both
    return LOSS(params["a"], x), state


def unpacks_batch(w, batch):
    x, keys = batch
    return {"loss": LOSS(w, x)}


SLIPS = [
    ({**STATEFUL, "loss_fn": unpacks}, r"loss_fn: too many values to unpack .*It gets params alone \(the model's state goes to metrics_fn and update"
     r"_model_state\) and a batch: a dict of 'a', 'b', 'c', and an array of shape"),
    ({**STATEFUL, "loss_fn": lambda w, state, x: LOSS(w, x)}, r"loss_fn takes \(w, state, x\). It gets params alone"),
    ({**STATEFUL, "metrics_fn": lambda w, state, x: {"loss": LOSS(w, x)}}, r"metrics_fn takes \(w, state, x\). It gets params \(\(params, model"),
    ({**STATEFUL, "update_model_state": lambda state: state}, r"update_model_state takes \(state\). It gets the model's state and the aux"),
    ({**STATEFUL, "init": lambda key: jnp.zeros(2)}, r"init must return \(params, model_state\) for a task with update_model_state, but"),
    ({"loss_fn": lambda w, state, x: LOSS(w, x)}, r"loss_fn takes \(w, state, x\). It gets params alone and a batch: an array"),
    ({"loss_fn": lambda w, x: (LOSS(w, x), w)}, "loss_fn returned a tuple. If it is .*the task needs update_model_state"),
    ({"metrics_fn": unpacks_batch}, r"metrics_fn: .* values to unpack .*test examples \(as prepare_test, not prepare, returns them\)"),
    ({"metrics_fn": lambda w, x: LOSS(w, x)}, "metrics_fn must return a dict with one value per example for each name, but returned an array"),
    ({"prepare": lambda batch: batch}, r"prepare takes \(batch\). It gets a key for each example and a batch"),
    ({"prepare_test": lambda batch: batch}, r"prepare_test takes \(batch\). It gets a key for each example and a batch"),
    ({"init": lambda key, x: jnp.zeros(2)}, r"init takes \(key, x\). It gets one key"),
    ({"init": Linen()}, r"init=Linen is not a function: .*model.init\(key, example\)"),
    ({"init": transformed}, r"init=TransformedWithState is not a function: .*transformed.init\(key, example\)"),
    ({"init": jnp.zeros(2)}, "init=.* is not a function"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), SLIPS)
def test_a_function_that_takes_other_arguments(changes, message):
    if changes.get("init") is transformed:
        changes = {"init": transformed()}
    with pytest.raises(ValueError, match=message) as caught:
        first(**changes)
    assert "\n" not in str(caught.value)


def test_an_error_within_a_function_stays_as_it_is():
    def loss_fn(w, x):
        raise TypeError("of my own")

    with pytest.raises(TypeError, match="^of my own"):
        first(loss_fn=loss_fn)


# Keys for metrics


RANDOM = TASK._replace(
    metrics_fn=lambda w, batch: {"noise": jax.vmap(jax.random.uniform)(batch[1]), "loss": LOSS(w, batch[0])},
    prepare_test=lambda keys, x: (x, keys),
)
NOISE = float(jax.vmap(jax.random.uniform)(keys_for_metrics(jnp.arange(24))).mean())


@pytest.mark.parametrize("changes", [{}, {"seed": 5}, {"microbatch_size": 5}, {"evaluations_per_epoch": 3}])
def test_every_evaluation_sees_the_same_noise(changes):
    config = jb.FitConfig(optax.sgd(0.1), 4, jb.epochs(2))._replace(**changes)
    np.testing.assert_allclose([record["test_noise"] for record in jb.fit(RANDOM, config)], NOISE, rtol=1e-6)


@pytest.mark.parametrize("runs", ["vmap", "threads", "map"])
def test_so_do_sweeps(runs):
    (record,) = jb.sweep(RANDOM, optax.sgd, jnp.array([0.1, 0.2]), [0, 1], batch_size=4, duration=jb.epochs(1), runs=runs)
    np.testing.assert_allclose(record["test_noise"], NOISE, rtol=1e-6)


def test_so_do_streams_and_other_cuts():
    (record,) = jb.fit(RANDOM._replace(test_data=jb.ArrayStream(np.asarray(X))), jb.FitConfig(optax.sgd(0.1), 4, microbatch_size=7))
    np.testing.assert_allclose(record["test_noise"], NOISE, rtol=1e-6)
    for size in (1, 7, 24, 500):
        evaluate = jb.make_evaluate(RANDOM.metrics_fn, 24, size, prepare_test=RANDOM.prepare_test)
        np.testing.assert_allclose(evaluate(jnp.zeros(2), X)["noise"], NOISE, rtol=1e-6)


def test_whatever_evaluates_a_task_prepares_its_test_data():
    calls = [call for folder in ("jaxbatch", "experiments", "scripts") for path in (ROOT / folder).rglob("*.py")
             for call in re.findall(r"make_evaluate\(\w*\.?task\.metrics_fn[^\n]*", path.read_text(encoding="utf-8"))]  # fmt: skip
    assert len(calls) >= 1 and [call for call in calls if "prepare_test" not in call] == []
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "experiments").rglob("*.py")]
    studies = [call for text in texts for call in re.findall(r"[=:] make_task_evaluate\(", text)]
    assert len(studies) >= 6  # by the one function that does


def test_keys_of_metrics_are_not_those_of_training():
    training = example_keys(0, 0, jnp.arange(24))
    assert not (jax.random.key_data(training) == jax.random.key_data(keys_for_metrics(jnp.arange(24)))).all(1).any()


def test_goals_know_the_prepared_test_batch():
    *_, last = jb.fit_to_target(RANDOM, jb.FitConfig(optax.sgd(0.1), 4, jb.epochs(1)), "noise<1")
    assert last["reached"]


def test_a_test_batch_that_depends_on_its_company_is_refused():
    with pytest.raises(ValueError, match="prepare_test changes an example with the others in its batch"):
        first(prepare_test=lambda keys, x: x - x.mean(0, keepdims=True))
