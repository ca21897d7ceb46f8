"""Activations that are computed again: the same losses and gradients, from fewer kept bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.advice.memory_plan import even_parts
from jaxbatch.gradients.recompute import KEEPS, recompute
from jaxbatch.machine.platform import compiling_for


def deep_loss(params, batch):
    """A network of 9 layers of plain functions."""
    x, y = batch
    for w in params:
        x = jnp.tanh(x @ w) + x
    return ((x - y) ** 2).sum(-1)


def deep_inputs(dtype=jnp.float64):
    random = np.random.default_rng(0)
    params = [jnp.asarray(random.normal(size=(16, 16)) / 8, dtype) for _ in range(9)]
    return params, tuple(jnp.asarray(random.normal(size=(32, 16)), dtype) for _ in range(2))


def value_and_gradient(loss_fn, params, batch, has_aux=False):
    def mean(params):
        result = loss_fn(params, batch)
        return (result[0] if has_aux else result).mean(), result

    (_, result), gradient = jax.value_and_grad(mean, has_aux=True)(params)
    return result, gradient


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("jitted", [False, True])
def test_the_same_losses_and_gradients_in_float64(keep, jitted):
    with jax.enable_x64(True):
        params, batch = deep_inputs()
        loss_fn = jax.jit(deep_loss) if jitted else deep_loss
        found = value_and_gradient(recompute(loss_fn, keep), params, batch)
        expected = value_and_gradient(deep_loss, params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13), found, expected)


def test_fewer_bytes_pass_from_forward_to_backward():
    params, batch = deep_inputs(jnp.float32)
    kept = {}
    for keep in KEEPS:
        _, pullback = jax.vjp(lambda params, keep=keep: recompute(deep_loss, keep)(params, batch), params)
        kept[keep] = sum(leaf.size for leaf in jax.tree.leaves(pullback) if leaf.shape[:1] == (32,))
    assert kept["segments"] < kept["everything"] / 1.5


@pytest.mark.parametrize("keep", ["products", "segments"])
@pytest.mark.parametrize("network", [jb.AlexNet, pytest.param(jb.ResNet20, marks=pytest.mark.slow)])
def test_networks_with_custom_derivatives_and_state(network, keep):
    task = jb.classification_task(network(), _images())
    has_aux = task.update_model_state is not None
    start = task.init(jax.random.key(0))
    params, batch = start[0] if has_aux else start, jax.tree.map(lambda leaf: leaf[:4], task.train_data)
    found = jax.jit(lambda params: value_and_gradient(recompute(task.loss_fn, keep), params, batch, has_aux))(params)
    expected = jax.jit(lambda params: value_and_gradient(task.loss_fn, params, batch, has_aux))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), found, expected)


def _images():
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8), random.integers(0, 10, 8, dtype=np.int32)
    return jb.Dataset("random", images, labels, images, labels, 10, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("keep", KEEPS)
def test_a_step_takes_it_with_groups_microbatches_and_keys(keep):
    def noisy(params, batch):
        x, keys = batch
        noise = jax.vmap(lambda key: jax.random.normal(key, (16,)))(keys)
        for w in params:
            x = jnp.tanh((x + noise) @ w)
        return (x**2).sum(-1)

    params, (x, _) = deep_inputs(jnp.float32)
    batch = (x, jax.random.split(jax.random.key(1), 32))
    optimizer = optax.sgd(0.1)
    for call in (
        lambda loss_fn: jb.split_backward(loss_fn, optimizer, 4)(params, optimizer.init(params), batch)[0],
        lambda loss_fn: jb.accumulated_gradient(loss_fn, params, batch, 8),
        lambda loss_fn: jb.per_example_gradients(loss_fn, params, batch),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), call(recompute(noisy, keep)), call(noisy))


@pytest.mark.slow
def test_an_accelerators_program_needs_less_memory_and_more_operations():
    from jaxbatch.advice.time_bound import step_work

    task = jb.classification_task(jb.ResNet20(), _images())
    with compiling_for("gpu"):
        works = {keep: step_work(task._replace(loss_fn=recompute(task.loss_fn, keep)), optax.sgd(0.1), 8).operations for keep in KEEPS}
    assert works["everything"] < works["products"] < 1.02 * works["everything"]
    assert 1.1 * works["everything"] < works["segments"] < 1.4 * works["everything"]


def test_an_unknown_way_is_named():
    with pytest.raises(Exception, match="keep"):
        recompute(deep_loss, "nothing")


def test_parts_of_a_share_are_its_divisors_where_it_has_some():
    assert even_parts(8192) == [2**n for n in range(14)]
    assert even_parts(1) == [1]
    assert max(even_parts(8191)) == 8191


def test_a_plan_goes_from_microbatches_to_recomputation():
    task = jb.Task(lambda key: deep_inputs(jnp.float32)[0], deep_loss, None, (jnp.ones((100, 16)), jnp.ones((100, 16))), None)
    settings = {"optimizer": optax.sgd(0.1), "batch_size": 2**17, "target": "cpu", "margin": 0}
    roomy = jb.memory_plan(task, budget="1GiB", **settings)
    assert (roomy.chosen.keep, roomy.chosen.accumulation_steps) == ("everything", 1)
    cut = jb.memory_plan(task, budget="60MiB", frontier=True, **settings)
    assert cut.chosen.keep == "everything"
    assert cut.chosen.microbatch_size * cut.chosen.accumulation_steps >= 2**17
    assert cut.chosen.memory.total <= cut.limit == 60 * 2**20
    assert [option.keep for option in cut.options] == list(KEEPS)
    again = jb.memory_profile(task, [2**17], optimizer=optax.sgd(0.1), target="cpu", microbatch_size=cut.chosen.microbatch_size)
    assert again[2**17].total == cut.chosen.memory.total
    assert f"microbatch_size={cut.chosen.microbatch_size}" in str(cut)
    elsewhere = cut._replace(target=jb.find_target("v5e"))
    assert str(elsewhere).endswith("it was not compared with a real TPU v5e.") and "compared" not in elsewhere.sentence
