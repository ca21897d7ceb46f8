"""Gradient statistics against loops, the noise scale against quadratics whose scale is known, intervals against chance."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbatch as jb
from jaxbatch.intervals import Interval, ratio_of_means
from tests import reference
from tests.conftest import make_problem
from tests.training.test_loops import convolution_task


@pytest.mark.parametrize("num_groups", [None, 2, 10, 70])
def test_statistics_against_a_loop_in_float64(x64, num_groups):
    loss_fn, params, batch = make_problem(140, np.float64)  # per example: two full parts of 64 and a rest of 12
    expected = reference.gradient_statistics(loss_fn, params, batch, num_groups or 140)
    for method in (None, "map", "vmap", "unroll") if num_groups == 10 else (None,):
        found = jb.gradient_statistics(loss_fn, params, batch, num_groups=num_groups, method=method)
        np.testing.assert_allclose(found, expected, rtol=1e-10)
    found = jax.jit(lambda p, b: jb.gradient_statistics(loss_fn, p, b, num_groups=num_groups))(params, batch)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_microbatches_within_groups(problem):
    loss_fn, params, batch = problem
    whole = jb.gradient_statistics(loss_fn, params, batch, num_groups=3)
    parts = jb.gradient_statistics(loss_fn, params, batch, num_groups=3, microbatch_size=3)
    np.testing.assert_allclose(parts, whole, rtol=1e-4)


def test_a_network_on_xlas_convolutions():
    task = convolution_task()
    params = jax.jit(task.init)(jax.random.key(0))
    found = jb.gradient_statistics(task.loss_fn, params, task.train_data, num_groups=4)
    expected = reference.gradient_statistics(task.loss_fn, params, task.train_data, 4)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_an_equinox_model():
    model = eqx.nn.MLP(5, 3, 7, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    loss_fn = lambda p, batch: (jax.vmap(eqx.combine(p, static))(batch["x"]) ** 2).sum(-1)
    _, _, batch = make_problem(12)
    expected = reference.gradient_statistics(loss_fn, params, batch, 12)
    np.testing.assert_allclose(jb.gradient_statistics(loss_fn, params, batch), expected, rtol=1e-3)


def test_refusals(problem):
    loss_fn, params, batch = problem
    one = jax.tree.map(lambda leaf: leaf[:1], batch)
    with pytest.raises(ValueError, match="num_groups=1 must be at least 2"):
        jb.gradient_statistics(loss_fn, params, one)
    with pytest.raises(ValueError, match="num_groups=1 must be at least 2"):
        jb.gradient_statistics(loss_fn, params, batch, num_groups=1)
    with pytest.raises(ValueError, match="num_groups=7 does not divide batch_size=24. Nearest that do: 6 and 8"):
        jb.gradient_statistics(loss_fn, params, batch, num_groups=7)
    with pytest.raises(ValueError, match="one loss per example"):
        jb.gradient_statistics(lambda p, b: loss_fn(p, b).mean(), params, batch)
    with pytest.raises(ValueError, match="method='all'"):
        jb.gradient_statistics(loss_fn, params, batch, method="all")
    with pytest.raises(ValueError, match="no step"):
        jb.gradient_noise_scale(jb.GradientStatistics(jnp.zeros(0), jnp.zeros(0)))


def test_memory_does_not_grow_with_the_number_of_groups():
    loss_fn = lambda w, x: ((x @ w) ** 2).sum(-1)
    params, batch = jnp.ones((100, 100)), jnp.ones((2048, 100))

    def needed(function):
        return jb.program_memory(jax.jit(function).lower(params, batch).compile())

    all_kept = needed(lambda p, b: jb.per_example_gradients(loss_fn, p, b))
    assert needed(lambda p, b: jb.gradient_statistics(loss_fn, p, b)) < all_kept / 8
    assert needed(lambda p, b: jb.gradient_statistics(loss_fn, p, b, num_groups=1024)) < all_kept / 8


def quadratic_steps(num_steps, batch_size=8, scale=16.0, dimensions=4, seed=0):
    """Per-example gradients w - x of a quadratic loss at w = 0, the noise scale exact: trace 4 scale, signal 4."""
    random = np.random.default_rng(seed)
    mean, spread = np.ones(dimensions), math.sqrt(scale)
    data = mean + spread * random.normal(size=(num_steps, batch_size, dimensions))
    loss_fn = lambda w, x: 0.5 * ((x - w[None]) ** 2).sum(-1)
    measure = jax.jit(jax.vmap(lambda x: jb.gradient_statistics(loss_fn, jnp.zeros(dimensions), x)))
    return measure(jnp.asarray(data, jnp.float32))


def test_the_scale_of_a_quadratic_is_found_and_the_mean_of_ratios_is_not():
    steps = quadratic_steps(20_000)
    np.testing.assert_allclose(steps.signal.mean(), 4.0, rtol=0.03)
    np.testing.assert_allclose(steps.trace.mean(), 64.0, rtol=0.01)
    found = jb.gradient_noise_scale(steps)
    assert found.low < 16 < found.high and found.high - found.low < 1.5 and found.n == 20_000
    assert abs(float(found) - 16) < 0.8
    of_ratios = float((steps.trace / steps.signal).mean())
    assert abs(of_ratios - 16) > 8  # why the means come first


def test_the_interval_covers_the_scale_as_often_as_it_says():
    steps = quadratic_steps(400 * 40, batch_size=32)
    by_trial = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(400, 40), steps)
    found = [jb.gradient_noise_scale(jb.GradientStatistics(*pair)) for pair in zip(*by_trial, strict=True)]
    hits = sum(not interval.excludes(16) for interval in found)
    assert 0.92 < hits / 400 < 0.98
    assert np.isfinite([interval.high for interval in found]).all()


def test_no_signal_is_an_open_interval():
    random = np.random.default_rng(0)
    found = jb.gradient_noise_scale(jb.GradientStatistics(jnp.asarray(random.normal(size=30)), jnp.full(30, 5.0)))
    assert found.high == math.inf
    one = jb.gradient_noise_scale(jb.GradientStatistics(jnp.array(2.0), jnp.array(8.0)))
    assert one.value == 4 and math.isnan(one.low) and one.n == 1
    half = jb.gradient_noise_scale(jb.GradientStatistics(jnp.array([1.0, jnp.nan, 1.1]), jnp.array([8.0, 1.0, jnp.inf])))
    assert half.value == 8 and half.n == 1


def test_ratio_of_means_against_resampling():
    random = np.random.default_rng(1)
    x, y = random.normal(10, 2, 200), random.normal(4, 1, 200)
    found = ratio_of_means(x, y)
    picks = random.integers(0, 200, (4000, 200))
    low, high = np.percentile(x[picks].mean(1) / y[picks].mean(1), [2.5, 97.5])
    np.testing.assert_allclose([found.low, found.high], [low, high], rtol=0.02)
    assert ratio_of_means([1.0, 1.0], [0.0, 0.0]) == Interval(math.inf, -math.inf, math.inf, 2)
    assert ratio_of_means([], []).n == 0


def test_error_of_a_batch_is_the_noise_scale_over_its_size():
    random = np.random.default_rng(2)
    full = {"a": np.full(3, 2.0, np.float32)}
    batches = {"a": (2.0 + random.normal(size=(4000, 10, 3)).mean(1)).astype(np.float32)}
    errors = jax.vmap(lambda gradient: jb.relative_squared_error(gradient, full))(batches)
    np.testing.assert_allclose(errors.mean(), (3.0 / 12.0) / 10, rtol=0.05)
    assert jnp.isnan(jb.cosine_similarity({"a": jnp.zeros(3)}, full))
