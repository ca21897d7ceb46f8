"""Sums over parts are kept in float32 at least: gradients, losses, metrics, statistics, on every path that adds up parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import jaxbatch as jb
from jaxbatch.gradients.accumulation import mean_gradient
from jaxbatch.gradients.cut import Cut, Share
from jaxbatch.gradients.groups import Loss
from jaxbatch.training.devices import AXIS
from jaxbatch.training.pieces import make_pieces
from jaxbatch.training.steps import make_task_step

HALF = (jnp.bfloat16, jnp.float16)
ONE = lambda w, x: w * x  # the gradient of an example is x


def task_of(dtype, x, **changes):
    init = lambda key: jnp.array(1.0, dtype)
    return jb.Task(init, ONE, lambda w, x: {"loss": (w * x).astype(dtype)}, x, x)._replace(**changes)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [1, 3])
def test_microbatches_of_ones_have_the_mean_one(dtype, size):
    w, x = jnp.array(1.0, dtype), jnp.ones(4096)
    found = jb.accumulated_gradient(ONE, w, x, size)
    assert found.dtype == dtype and float(found) == 1.0
    assert float(jax.jit(lambda w: jb.accumulated_gradient(ONE, w, x, size))(w)) == 1.0
    assert float(mean_gradient(Loss(ONE), w, Share(x), Cut(4096, microbatch_size=size))[1]) == 1.0


@pytest.mark.parametrize("dtype", HALF)
def test_accumulation_in_a_python_loop_keeps_the_sum(dtype):
    kernel = jnp.ones((1, 1, 1, 1), dtype)
    loss_fn = lambda k, x: jax.lax.conv(x.astype(dtype), k, (1, 1), "VALID").sum((1, 2, 3))  # what makes the loop one in Python
    assert float(jb.accumulated_gradient(loss_fn, kernel, jnp.ones((2048, 1, 1, 1)), 1).sum()) == 1.0


@pytest.mark.parametrize("dtype", HALF)
def test_float64_stays_float64_and_float32_is_not_cast(dtype, x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=64))
    found = jb.accumulated_gradient(ONE, jnp.array(1.0, jnp.float64), x, 5)
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, np.asarray(x).mean(), rtol=1e-13)
    text = str(
        jax.make_jaxpr(lambda w, x: mean_gradient(Loss(ONE), w, Share(x), Cut(64, microbatch_size=5))[1])(jnp.float32(1), x.astype(jnp.float32))
    )
    assert "convert_element_type" not in text and str(dtype.dtype) not in text


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("groups", [None, 2])
def test_steps_in_microbatches(dtype, groups):
    step = jb.make_train_step(ONE, optax.sgd(0.5), 4096, num_groups=groups, microbatch_size=1)
    start = jnp.array(1.0, dtype)
    state, _ = step(jb.TrainState(start, optax.sgd(0.5).init(start), jnp.array(0)), jnp.ones(4096))
    assert float(state.params) == 1 - 0.5 * (groups or 1)


@pytest.mark.parametrize("dtype", HALF)
def test_accumulation_over_parts_keeps_gradient_and_loss(dtype):
    begin, add, finish = make_pieces(task_of(dtype, jnp.ones(4)), optax.sgd(0.5), Cut(2000))
    start = jnp.array(1.0, dtype)
    state = jb.TrainState(start, optax.sgd(0.5).init(start), jnp.array(0))
    part = lambda _, total: add(total, state.params, jnp.ones(4, dtype), jnp.zeros(1, int), None, None)[0]
    state, loss, _ = finish(state, jax.lax.fori_loop(0, 2000, part, begin(state)))
    assert float(state.params) == 0.5 and float(loss) == 1.0 and state.params.dtype == dtype


@pytest.mark.parametrize("dtype", HALF)
def test_devices_add_up_in_float32(dtype):
    step = make_task_step(task_of(dtype, jnp.ones(8)), optax.sgd(0.5), 8, axis=AXIS)
    start = jnp.array(1.0, dtype)
    state = jb.TrainState(start, optax.sgd(0.5).init(start), jnp.array(0))
    text = str(jax.make_jaxpr(step, axis_env=[(AXIS, 4)])(state, jnp.ones(2, dtype), jnp.ones(2, bool)))
    sums = [line for line in text.splitlines() if "psum" in line]
    assert len(sums) == 2 and all(":f32[]" in line for line in sums)  # the loss and the gradient


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("loop", ["scan", "python"])
def test_records_of_many_batches_tell_the_mean_loss(dtype, loop, monkeypatch):
    monkeypatch.setattr("jaxbatch.training.loops.choose_loop", lambda *_: loop)
    task = task_of(dtype, jnp.ones(300, dtype))
    (record,) = jb.fit(task, jb.FitConfig(optax.sgd(0.0), 1))
    assert record["loss"] == 1.0
    (record,) = jb.sweep(task, optax.sgd, jnp.zeros(2), [0, 1], batch_size=1, duration=jb.epochs(1))
    assert record["loss"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", HALF)
def test_losses_of_a_batch_are_averaged_in_float32(dtype):
    losses = jnp.asarray([300.0, 301.0, 302.0, 20_000.0] * 64, dtype)
    state, means = jb.make_epoch(lambda state, batch: (state, batch))(jnp.zeros(()), losses, jnp.arange(256)[None])
    assert means.dtype == jnp.float32
    np.testing.assert_allclose(means, [np.asarray(losses, np.float64).mean()], rtol=1e-6)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("batch_size", [500, 7])
def test_metrics_are_averaged_in_float32(dtype, batch_size):
    values = jnp.asarray(np.random.default_rng(0).uniform(500, 1000, 1000), dtype)
    evaluate = jb.make_evaluate(lambda _, x: {"value": x, "large": x > 768}, 1000, batch_size)
    found = evaluate(jnp.zeros(()), values)
    np.testing.assert_allclose(found["value"], np.asarray(values, np.float64).mean(), rtol=1e-6)
    np.testing.assert_allclose(found["large"], (np.asarray(values, np.float64) > 768).mean(), rtol=1e-6)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("method", "groups"), [("map", None), ("vmap", None), ("map", 1024), ("vmap", 1024), ("unroll", 64)])
def test_statistics_in_half_precision(dtype, method, groups):
    x = jnp.asarray(1 + np.random.default_rng(0).normal(size=4096), dtype)
    found = jb.gradient_statistics(ONE, jnp.array(1.0, dtype), x, num_groups=groups, method=method)
    wide = np.asarray(x, np.float64)
    size = 4096 // (groups or 4096)
    means = wide.reshape(-1, size).mean(1)
    trace = size * means.var(ddof=1)
    signal = means.mean() ** 2 - means.var(ddof=1) / len(means)
    # A group's own gradient is the loss function's, in its precision; per example it is exact here.
    np.testing.assert_allclose([found.signal, found.trace], [signal, trace], rtol=5e-5 if groups is None else 0.02)


def test_norms_and_angles_in_half_precision():
    a, b = jnp.full(4, 300.0, jnp.float16), jnp.array([300.0, 0, 0, 0], jnp.float16)
    assert float(jb.cosine_similarity(a, b)) == pytest.approx(0.5)
    assert float(jb.relative_squared_error(a, b)) == pytest.approx(3.0)
    many = jnp.ones(4096, jnp.bfloat16)
    assert float(jb.cosine_similarity(many, many)) == pytest.approx(1.0)
    tiny = jnp.full(4, 1e-15)  # the product of two squared norms would be below float32
    assert float(jb.cosine_similarity(tiny, tiny)) == pytest.approx(1.0)


class Counter(nn.Module):
    """A model in bfloat16 whose every image has the same gradient."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(2, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16, kernel_init=nn.initializers.zeros)(images.reshape(len(images), -1))


def test_a_model_in_bfloat16_trains_as_its_large_batch():
    images, labels = np.full((1024, 1, 1, 1), 255, np.uint8), np.zeros(1024, np.int32)
    dataset = jb.Dataset("ones", images, labels, images[:8], labels[:8], 2, (0.0,), (1.0,))

    def end(microbatch_size):
        task = jb.classification_task(Counter(), dataset, microbatch_size=microbatch_size)
        (record,) = jb.fit(task, jb.FitConfig(optax.sgd(1.0), 1024))
        return record["state"].params["params"]["Dense_0"]["bias"]

    assert end(1).tolist() == end(1024).tolist() == [0.5, -0.5]
