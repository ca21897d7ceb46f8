"""docs/recipes.md: every recipe trains; cutting a batch changes nothing where examples are independent; moments are those of batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.augment import example_keys
from tests.docs.code_blocks import code_blocks, run_block

RECIPES = code_blocks("recipes.md")
WEIGHTS = {  # the first layer, before batch normalisation
    "Flax Linen 1": lambda params: (params["Dense_0"]["kernel"], params["Dense_0"]["bias"]),
    "Flax NNX 1": lambda params: (params["first"]["kernel"][...], params["first"]["bias"][...]),
    "Haiku 1": lambda params: (params["linear"]["w"], params["linear"]["b"]),
    "Equinox 1": lambda params: (params.first.weight.T, params.first.bias),
}
RANDOM = ("Haiku 0", "Diffusion 0")  # in the test, too
DROPOUT = ("Flax Linen 0", "Flax NNX 0", "Equinox 0", *WEIGHTS)


def made(name):
    names = run_block(RECIPES[name], name)
    return names["task"], names["config"]


def batch_of(task, size, epoch=0):
    index = jnp.arange(size)
    batch = jax.tree.map(lambda leaf: leaf[:size], task.train_data)
    return batch if task.prepare is None else task.prepare(example_keys(0, epoch, index), batch)


def close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), one, other)


def test_there_is_one_for_every_library_and_kind():
    libraries = [name for name in RECIPES if name.startswith(("Flax Linen", "Flax NNX", "Haiku", "Equinox"))]
    assert len(libraries) == 8 and len(RECIPES) == 12 and set(WEIGHTS) <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name):
    task, config = made(name)
    records = list(jb.fit(task, config))
    metric = "test_error" if "physics" in name else "test_loss"
    assert records[-1]["loss"] < 0.8 * records[0]["loss"] and records[-1][metric] < 0.8 * records[0][metric]
    assert not records[-1]["diverged"] and task.num_examples == 512
    if name in RANDOM:  # another cut of the test set, the same noise
        (again,) = jb.fit(task, config._replace(duration=jb.steps(1), microbatch_size=20))
        (whole,) = jb.fit(task, config._replace(duration=jb.steps(1)))
        np.testing.assert_allclose(again[metric], whole[metric], rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in WEIGHTS])
def test_examples_are_independent(name):
    task, _ = made(name)
    params, batch = task.start(jax.random.key(0)), batch_of(task, 12)
    whole = jax.jit(lambda p: jb.accumulated_gradient(task.loss_fn, p, batch, 12))(params)
    close(jax.jit(lambda p: jb.accumulated_gradient(task.loss_fn, p, batch, 5))(params), whole)
    if name != "Flax Linen 0":  # whose mean is over tokens and not over examples
        each = jax.jit(lambda p: jb.per_example_gradients(task.loss_fn, p, batch))(params)
        close(jax.tree.map(lambda leaf: leaf.mean(0), each), whole)


@pytest.mark.parametrize("name", WEIGHTS)
def test_moments_are_those_of_batches(name):
    task, _ = made(name)
    (params, state), batch = task.start(jax.random.key(3)), batch_of(task, 64)
    weight, bias = WEIGHTS[name](params)
    hidden = np.maximum(np.asarray(batch[0], np.float64) @ np.asarray(weight, np.float64) + np.asarray(bias, np.float64), 0)
    losses, aux = jax.jit(task.loss_fn)(params, batch)
    moments = [leaf for leaf in jax.tree.leaves(aux) if leaf.shape == (32,)]
    for wanted in (hidden.mean(0), hidden.var(0)):
        assert any(np.allclose(leaf, wanted, rtol=1e-3, atol=1e-5) for leaf in moments)
    after = task.update_model_state(state, aux)
    for old, own, new in zip(*map(jax.tree.leaves, (state, aux, after)), strict=True):
        assert new.dtype == old.dtype
        if jnp.issubdtype(old.dtype, jnp.floating):
            np.testing.assert_allclose(new, 0.9 * old + 0.1 * own, rtol=1e-5)
    with pytest.raises(ValueError, match="changes with the others in its batch"):
        jb.per_example_gradients(lambda p, b: task.loss_fn(p, b)[0], params, batch_of(task, 4))
    test = jax.jit(task.metrics_fn)
    few = jax.tree.map(lambda leaf: leaf[:4], task.test_data)
    one = jax.tree.map(lambda leaf: leaf[:1], task.test_data)
    np.testing.assert_allclose(test((params, after), few)["loss"][:1], test((params, after), one)["loss"], rtol=1e-4)  # no moments of a batch


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_follows_the_keys(name):
    task, _ = made(name)
    start = task.start(jax.random.key(0))
    params = start if task.update_model_state is None else start[0]
    losses = jax.jit(lambda batch: jax.tree.leaves(task.loss_fn(params, batch))[0])
    first, again, other = (losses(batch_of(task, 8, epoch)) for epoch in (0, 0, 1))
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize(("name", "goal"), [("Lookahead 0", "loss<2"), ("Haiku 0", "loss<10")])
def test_advice_on_a_recipe(name, goal):
    names = run_block(RECIPES[name], name)
    optimizer = names.get("lookahead", optax.adam)
    settings = {"batch_sizes": [16, 64], "learning_rates": [0.01, 0.03, 0.1], "max_probes": 6, "longest": jb.epochs(12)}
    settings |= {"evaluations_per_epoch": 4, "measure_noise": False}
    advice = jb.advise(names["task"], goal, optimizer=optimizer, objective="examples", **settings)
    assert advice.batch_size in (16, 64) and advice.learning_rate > 0
