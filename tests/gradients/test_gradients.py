"""Per-example, group and accumulated gradients against Python loops; any model, any pytree; clear refusals."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbatch as jb
from tests import reference
from tests.conftest import make_problem


def assert_close(ours, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), ours, expected)


@pytest.mark.parametrize("method", [None, "map", "vmap", "unroll"])
@pytest.mark.parametrize("num_groups", [1, 2, 3, 8, 24])
def test_group_gradients_float64(x64, method, num_groups):
    loss_fn, params, batch = make_problem(24, np.float64)
    ours = jb.group_gradients(loss_fn, params, batch, num_groups, method=method)
    expected = reference.group_gradients(loss_fn, params, batch, num_groups)
    assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    mean = jax.tree.map(lambda leaf: leaf.mean(0), ours)
    assert_close(mean, reference.mean_gradient(loss_fn, params, batch), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("microbatch_size", [None, 1, 5, 24, 100])
def test_per_example_gradients_float64(x64, microbatch_size):
    loss_fn, params, batch = make_problem(24, np.float64)
    ours = jb.per_example_gradients(loss_fn, params, batch, microbatch_size=microbatch_size)
    assert_close(ours, reference.per_example_gradients(loss_fn, params, batch), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("microbatch_size", [1, 5, 7, 8, 24, 100])
def test_accumulated_gradient_float64(x64, microbatch_size):
    loss_fn, params, batch = make_problem(24, np.float64)
    ours = jb.accumulated_gradient(loss_fn, params, batch, microbatch_size)
    assert_close(ours, reference.mean_gradient(loss_fn, params, batch), rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=15)
@given(batch_size=st.integers(1, 20), microbatch_size=st.integers(1, 25))
def test_losses_keep_their_order(batch_size, microbatch_size):
    loss_fn, params, batch = make_problem(batch_size)
    losses, _ = jb.losses_and_mean_gradient(loss_fn, params, batch, microbatch_size=microbatch_size)
    np.testing.assert_allclose(losses, loss_fn(params, batch), rtol=1e-5)


@pytest.mark.parametrize("num_groups", [1, 4, 12])
def test_simple_cnn_in_float32(num_groups):
    # Stated tolerance in float32: 1e-5 of the largest entry.
    dataset = jb.load_dataset("digits")
    batch = (jnp.asarray(dataset.train_images[:12]), jnp.asarray(dataset.train_labels[:12]))
    model = jb.SimpleCNN()
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    loss_fn = jb.classification_loss(model.apply)
    ours = jax.jit(lambda p, b: jb.group_gradients(loss_fn, p, b, num_groups))(params, batch)
    expected = reference.group_gradients(loss_fn, params, batch, num_groups)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    assert_close(ours, expected, atol=1e-5 * scale)
    if num_groups == 12:
        single = jax.jit(lambda p, b: jb.per_example_gradients(loss_fn, p, b))(params, batch)
        assert_close(single, expected, atol=1e-5 * scale)


def test_losses_and_aux_come_from_the_same_forward(problem):
    loss_fn, params, batch = problem

    def with_aux(params, batch):
        losses = loss_fn(params, batch)
        return losses, {"mean": batch["x"].mean(0), "count": jnp.float32(losses.shape[0])}

    gradients, aux = jb.group_gradients(with_aux, params, batch, 3, has_aux=True)
    assert_close(gradients, reference.group_gradients(loss_fn, params, batch, 3), rtol=1e-5, atol=1e-6)
    assert aux["mean"].shape == (3, 5) and aux["count"].tolist() == [8.0, 8.0, 8.0]
    np.testing.assert_allclose(aux["mean"], batch["x"].reshape(3, 8, 5).mean(1), rtol=1e-5, atol=1e-6)
    losses, _, _ = jb.losses_and_group_gradients(with_aux, params, batch, 3, has_aux=True)
    np.testing.assert_allclose(losses, loss_fn(params, batch), rtol=1e-6)


def test_dropout_keys_ride_in_the_batch(x64):
    loss_fn, params, batch = make_problem(24, np.float64)

    def dropout_loss(params, batch):
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (5,)))(batch["key"])
        return loss_fn(params, {"x": batch["x"] * keep, "y": batch["y"]})

    batch = batch | {"key": jax.random.split(jax.random.key(3), 24)}
    ours = jb.group_gradients(dropout_loss, params, batch, 6)
    assert_close(ours, reference.group_gradients(dropout_loss, params, batch, 6), rtol=1e-10, atol=1e-12)
    single = jb.per_example_gradients(dropout_loss, params, batch, microbatch_size=5)
    assert_close(single, reference.per_example_gradients(dropout_loss, params, batch), rtol=1e-10, atol=1e-12)


def test_equinox_model():
    model = eqx.nn.MLP(5, 3, 8, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    _, _, batch = make_problem(12)

    def loss_fn(params, batch):
        return ((jax.vmap(eqx.combine(params, static))(batch["x"]) - batch["y"]) ** 2).sum(-1)

    ours = jb.group_gradients(loss_fn, params, batch, 4)
    assert_close(ours, reference.group_gradients(loss_fn, params, batch, 4), rtol=1e-5, atol=1e-6)


def test_flax_nnx_model():
    graph, params = nnx.split(nnx.Linear(5, 3, rngs=nnx.Rngs(0)))
    _, _, batch = make_problem(12)

    def loss_fn(params, batch):
        return ((nnx.merge(graph, params)(batch["x"]) - batch["y"]) ** 2).sum(-1)

    ours = jb.per_example_gradients(loss_fn, params, batch)
    assert_close(ours, reference.per_example_gradients(loss_fn, params, batch), rtol=1e-5, atol=1e-6)


def test_nan_stays_in_its_group(problem):
    loss_fn, params, batch = problem
    batch = {"x": batch["x"].at[5].set(jnp.nan), "y": batch["y"]}  # example 5 is in group 1 of 6
    gradients = jb.group_gradients(loss_fn, params, batch, 6)
    broken = {int(k) for leaf in jax.tree.leaves(gradients) for k in np.argwhere(~np.isfinite(np.asarray(leaf)))[:, 0]}
    assert broken == {1}


def test_integer_batch_leaves(problem):
    _, _, batch = problem

    def loss_fn(w, batch):
        return (batch.astype(jnp.float32) @ w) ** 2

    integers = jnp.arange(12).reshape(4, 3)
    assert_close(
        jb.per_example_gradients(loss_fn, jnp.ones(3), integers),
        jb.per_example_gradients(loss_fn, jnp.ones(3), integers.astype(jnp.float32)),
    )


def test_microbatching_bounds_memory():
    loss_fn, params, batch = make_problem(4096)

    def temp(function):
        return jax.jit(function).lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    whole = temp(lambda p, b: jb.losses_and_mean_gradient(loss_fn, p, b)[1])
    bounded = temp(lambda p, b: jb.accumulated_gradient(loss_fn, p, b, 64))
    assert bounded < whole / 4


BAD_CALLS = {
    "K does not divide B": (lambda f, p, b: jb.group_gradients(f, p, b, 7), "num_groups=7 .*batch_size=24.* 6 and 8"),
    "K is zero": (lambda f, p, b: jb.group_gradients(f, p, b, 0), "num_groups=0 must be a whole number of at least 1[.]"),
    "K above B": (lambda f, p, b: jb.group_gradients(f, p, b, 48), "num_groups=48 .* 24[.]"),
    "empty batch": (lambda f, p, b: jb.per_example_gradients(f, p, jax.tree.map(lambda x: x[:0], b)), "empty"),
    "leaves disagree": (lambda f, p, b: jb.per_example_gradients(f, p, b | {"y": b["y"][:3]}), r"disagree.*'x'. has 24, .*'y'. has 3"),
    "scalar in batch": (lambda f, p, b: jb.per_example_gradients(f, p, b | {"z": jnp.float32(1)}), "leading axis"),
    "scalar loss": (lambda f, p, b: jb.group_gradients(lambda *a: f(*a).mean(), p, b, 2), r"shape \(24,\).*Leave out the mean"),
    "loss per output": (lambda f, p, b: jb.group_gradients(lambda *a: f(*a)[:, None], p, b, 2), r"returned shape \(24, 1\)"),
    "aux not announced": (lambda f, p, b: jb.group_gradients(lambda *a: (f(*a), 0), p, b, 2), "has_aux=True"),
    "aux missing": (lambda f, p, b: jb.group_gradients(f, p, b, 2, has_aux=True), "pair"),
    "microbatch of zero": (lambda f, p, b: jb.accumulated_gradient(f, p, b, 0), "microbatch_size=0"),
    "unknown method": (lambda f, p, b: jb.group_gradients(f, p, b, 2, method="pmap"), "method='pmap'"),
    "microbatch with aux": (
        lambda f, p, b: jb.group_gradients(lambda *a: (f(*a), 0), p, b, 2, has_aux=True, microbatch_size=4),
        "has_aux",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_refusals_say_what_to_do(problem, name):
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call(*problem)
