"""Sums of clipped gradients, and of any function of one, against the gradients themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbatch as jb
from tests import reference
from tests.conftest import make_problem


def by_hand(loss_fn, params, batch, max_norm):
    """A Python loop over the examples, in float64."""
    stacked = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), reference.per_example_gradients(loss_fn, params, batch))
    count = len(jax.tree.leaves(stacked)[0])
    norms = np.array([np.sqrt(sum((leaf[i] ** 2).sum() for leaf in jax.tree.leaves(stacked))) for i in range(count)])
    scale = [min(1.0, max_norm / norm) for norm in norms]
    return jax.tree.map(lambda leaf: sum(s * leaf[i] for i, s in enumerate(scale)), stacked), norms


@pytest.mark.parametrize("microbatch_size", [None, 1, 5, 24, 100])
@pytest.mark.parametrize("max_norm", [0.5, 5.0, 1e6])
def test_clipped_sums_are_those_of_a_loop(x64, microbatch_size, max_norm):
    loss_fn, params, batch = make_problem(24, np.float64)
    total, norms = jb.clipped_gradient_sum(loss_fn, params, batch, max_norm, microbatch_size=microbatch_size)
    expected, expected_norms = by_hand(loss_fn, params, batch, max_norm)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), total, expected)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-12)


def test_without_clipping_it_is_the_sum(problem):
    loss_fn, params, batch = problem
    total = jax.jit(lambda p: jb.clipped_gradient_sum(loss_fn, p, batch, 1e9, microbatch_size=7).total)(params)
    mean = reference.mean_gradient(loss_fn, params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 24 * b, rtol=2e-5, atol=1e-5), total, mean)


@given(st.integers(1, 9), st.integers(1, 12), st.floats(0.1, 10))
@settings(max_examples=15, deadline=None)
def test_the_norm_of_a_sum_is_bounded(batch_size, microbatch_size, max_norm):
    loss_fn, params, batch = make_problem(batch_size, seed=batch_size)
    total, norms = jb.clipped_gradient_sum(loss_fn, params, batch, max_norm, microbatch_size=microbatch_size)
    assert float(jnp.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(total)))) <= batch_size * max_norm * (1 + 1e-5)
    assert norms.shape == (batch_size,)


def test_a_gradient_of_zero_stays_zero():
    total, norms = jb.clipped_gradient_sum(lambda w, x: w * x, jnp.array(1.0), jnp.array([0.0, 4.0]), 1.0)
    assert total.item() == 1.0 and norms.tolist() == [0.0, 4.0]


def test_any_function_of_a_gradient(problem):
    loss_fn, params, batch = problem
    found = jb.sum_of_gradients(
        loss_fn, params, batch, lambda g: {"squares": jax.tree.map(jnp.square, g), "count": 1, "up": g["out"] > 0}, microbatch_size=5
    )
    each = reference.per_example_gradients(loss_fn, params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, (b**2).sum(0), rtol=1e-5), found["squares"], each)
    assert int(found["count"]) == 24
    np.testing.assert_array_equal(found["up"], (each["out"] > 0).sum(0))


def test_sums_in_bfloat16_are_kept_in_float32():
    total, _ = jb.clipped_gradient_sum(lambda w, x: w * x, jnp.array(1.0, jnp.bfloat16), jnp.ones(4096), 5.0, microbatch_size=1)
    assert total.dtype == jnp.bfloat16 and float(total) == 4096.0


def test_the_gradients_are_not_kept():
    features, batch_size = 100_000, 512
    loss_fn = lambda w, x: jnp.tanh(x * w[None, :]).sum(1)  # B × P numbers, were they all there at once
    w, x = jnp.ones(features), jnp.ones((batch_size, 1))

    def temporaries(function):
        return jax.jit(function).lower(w, x).compile().memory_analysis().temp_size_in_bytes

    clipped = temporaries(lambda w, x: jb.clipped_gradient_sum(loss_fn, w, x, 1.0, microbatch_size=8).total)
    assert clipped < 8 * 4 * features * 8  # a few copies of 8 gradients, where all of them are 205 MB
    assert temporaries(lambda w, x: jb.per_example_gradients(loss_fn, w, x, microbatch_size=8).sum(0)) > 20 * clipped


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_a_norm_that_bounds_nothing_is_refused(problem, max_norm):
    with pytest.raises(ValueError, match="max_norm=.* must be above 0"):
        jb.clipped_gradient_sum(*problem, max_norm)


def test_what_per_example_gradients_refuse_is_refused(problem):
    loss_fn, params, batch = problem
    with pytest.raises(ValueError, match="one loss per example"):
        jb.clipped_gradient_sum(lambda p, b: loss_fn(p, b).mean(), params, batch, 1.0)
    with pytest.raises(ValueError, match="microbatch_size=0"):
        jb.sum_of_gradients(loss_fn, params, batch, lambda g: g, microbatch_size=0)
