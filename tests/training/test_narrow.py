"""Numbers that leave their type: batches of a billion, sums in float16, narrow integers, squares of norms, differences of equals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.gradients.norms import direction, norm
from jaxbatch.states import as_arrays, check_integers
from jaxbatch.training.devices import AXIS
from jaxbatch.training.steps import make_task_step
from tests.conftest import on_four_devices
from tests.losses.test_contrastive_losses import contrastive

ONE = lambda w, x: w * x  # the gradient of an example is x
PLAIN, WEIGHTED = "plain", "weighted"
LOSSES = {PLAIN: ONE, WEIGHTED: lambda w, x: jb.Weighted(w * x, jnp.ones_like(x))}


def monitored_step(loss_fn, w, x, **settings):
    size = x.shape[0]
    step = jb.make_train_step(loss_fn, optax.sgd(0.1), size, monitor=jb.NoiseMonitor(), **settings)
    return step(jb.TrainState(w, optax.sgd(0.1).init(w), jnp.array(0)), x)


OVER_A_BATCH = {
    "accumulated_gradient": lambda loss_fn, w, x: jb.accumulated_gradient(loss_fn, w, x, x.shape[0] // 4),
    "losses_and_mean_gradient": lambda loss_fn, w, x: jb.losses_and_mean_gradient(loss_fn, w, x, microbatch_size=x.shape[0] // 4),
    "group_gradients": lambda loss_fn, w, x: jb.group_gradients(loss_fn, w, x, 3 if x.shape[0] % 3 == 0 else 4),
    "per_example_gradients": jb.per_example_gradients,
    "clipped_gradient_sum": lambda loss_fn, w, x: jb.clipped_gradient_sum(loss_fn, w, x, 1.0),
    "sum_of_gradients": lambda loss_fn, w, x: jb.sum_of_gradients(loss_fn, w, x, lambda g: g > 0),
    "gradient_statistics": jb.gradient_statistics,
    "gradient_statistics of groups": lambda loss_fn, w, x: jb.gradient_statistics(
        loss_fn, w, x, num_groups=x.shape[0] // (3 if x.shape[0] % 3 == 0 else 4)
    ),
    "hessian_vector_product": lambda loss_fn, w, x: jb.hessian_vector_product(loss_fn, w, w, x, microbatch_size=x.shape[0] // 4),
    "coupled_gradient": lambda loss_fn, w, x: jb.coupled_gradient(lambda w, z: z**2, ONE, w, x, x.shape[0] // 4),
    "monitored step": monitored_step,
    "monitored step in microbatches": functools.partial(monitored_step, microbatch_size=4096),
    "monitored step of groups": lambda loss_fn, w, x: monitored_step(loss_fn, w, x, num_groups=3 if x.shape[0] % 3 == 0 else 4),
    "evaluation": lambda loss_fn, w, x: jb.make_evaluate(lambda w, x: {"loss": w * x, "right": x > 0}, x.shape[0])(w, x),
}


@pytest.mark.parametrize("batch_size", [46_341, 10**9])  # whose square, and whose own number of bytes, no int32 holds
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", OVER_A_BATCH)
def test_a_batch_of_a_billion_is_traced(name, loss, batch_size):
    shapes = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((batch_size,), jnp.float32)
    jax.eval_shape(functools.partial(OVER_A_BATCH[name], LOSSES[loss]), *shapes)


# float16: scaled before the backward pass


def in_half_precision_inside(w, x):
    return (w.astype(jnp.float16) * x.astype(jnp.float16)).astype(jnp.float32)


@pytest.mark.parametrize("loss", [ONE, LOSSES[WEIGHTED], in_half_precision_inside], ids=["plain", "weighted", "inside"])
@pytest.mark.parametrize("size", [None, 2048, 1500])
def test_the_gradient_of_thousands_fits_into_float16(loss, size):
    inside = loss is in_half_precision_inside
    w, x = jnp.array(1.0, jnp.float32 if inside else jnp.float16), jnp.full(4096, 50.0, jnp.float32 if inside else jnp.float16)
    losses, gradient = jax.jit(lambda w, x: jb.losses_and_mean_gradient(loss, w, x, microbatch_size=size))(w, x)
    assert float(gradient) == 50.0
    if size:
        assert float(jb.accumulated_gradient(loss, w, x, size)) == 50.0
        assert float(jb.hessian_vector_product(lambda w, x: loss(w, x * w), w, jnp.ones_like(w), x, microbatch_size=size)) == 100.0
    _, (losses, noise) = monitored_step(loss, w, x, microbatch_size=size or 2048)
    assert float(noise.signal[0]) == 2500.0 and float(noise.trace[0]) == 0.0


def test_devices_in_float16_do_not_overflow():
    task = jb.Task(lambda key: jnp.array(1.0, jnp.float16), ONE, None, jnp.full(4096, 50.0, jnp.float16), None)
    step = make_task_step(task, optax.sgd(0.5), 4096, axis=AXIS)
    start = jnp.array(1.0, jnp.float16)
    state = jb.TrainState(start, optax.sgd(0.5).init(start), jnp.array(0))
    new, loss = jax.vmap(lambda x: step(state, x, None), axis_name=AXIS)(task.train_data.reshape(2, 2048))
    assert new.params.tolist() == [-24.0, -24.0] and loss.tolist() == [50.0, 50.0]


# integers


def test_metrics_that_are_integers_are_averaged_without_an_end():
    values = jnp.full(3000, 1_000_000, jnp.int32)
    weights = jnp.ones(3000, jnp.int32)
    metrics = lambda _, x: {"own": x, "narrow": jnp.full(len(x), 100, jnp.int8), "weighted": jb.Weighted(x, weights[: len(x)]), "hit": x > 0}
    for size in (500, 3000, 7):
        found = jb.make_evaluate(metrics, 3000, size)(jnp.zeros(()), values)
        assert {name: float(value) for name, value in found.items()} == {"own": 1e6, "narrow": 100.0, "weighted": 1e6, "hit": 1.0}


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.int32, bool])
@pytest.mark.parametrize("microbatch_size", [None, 7])
def test_sums_over_gradients_of_narrow_integers(dtype, microbatch_size):
    found = jb.sum_of_gradients(ONE, jnp.array(1.0), jnp.ones(200), lambda g: (g > 0).astype(dtype), microbatch_size=microbatch_size)
    assert int(found) == 200 and found.dtype == (jnp.uint32 if dtype == jnp.uint8 else jnp.int32)


def test_integers_that_would_be_cut_are_refused():
    big = np.array([1, 2**31])
    with pytest.raises(ValueError, match=r"train_data\[0\] goes from 1 to 2147483648, and JAX keeps int64 as int32"):
        list(jb.fit(jb.Task(lambda key: jnp.array(0.0), ONE, None, (big,), None), jb.FitConfig(optax.sgd(0.1), 2)))
    with pytest.raises(ValueError, match=r"arrays\['x'\] goes from 1 to 2147483648"):
        next(jb.ArrayStream({"x": big}).parts([np.array([0, 1])]))
    with pytest.raises(ValueError, match=r"state\['count'\] goes from"):
        as_arrays({"count": np.int64(-(2**31) - 1)})
    check_integers({"x": np.array([2**31 - 1]), "y": np.array([2.0**40]), "z": np.zeros(0, np.int64), "k": jax.random.key(0)}, "data")


def test_wide_integers_stay_with_x64(x64):
    assert as_arrays(np.int64(2**40)).item() == 2**40
    assert float(jb.make_evaluate(lambda _, x: {"x": x}, 2, 2)(jnp.zeros(()), jnp.array([2**40, 2**40 + 2]))["x"]) == 2**40 + 1


AUX = """
import json
import jax, jax.numpy as jnp, numpy as np, optax
import jaxbatch as jb

found = {}
for dtype in ("int32", "int8", "uint32", "bool", "float32"):
    value = jnp.asarray(1 if dtype == "bool" else 3, dtype)
    loss_fn = lambda w, x: (w * x, value)
    for examples in (8, 7):  # 7: with fillers
        for count in (1, 2, 4):
            task = jb.Task(lambda key: (jnp.array(0.0), value), loss_fn, None, jnp.ones(examples), None, update_model_state=lambda old, new: new)
            (record,) = jb.fit(task, jb.FitConfig(optax.sgd(0.1), examples, num_devices=count))
            state = record["state"].model_state
            found[f"{dtype} {examples} {count}"] = [float(state), float(value), state.dtype.name == dtype]
big = 2**30 + 1  # which float32 does not hold
init, loss_fn, newest = (lambda key: (jnp.array(0.0), jnp.array(big))), (lambda w, x: (w * x, jnp.array(big))), (lambda old, new: new)
task = jb.Task(init, loss_fn, None, jnp.ones(8), None, update_model_state=newest)
(record,) = jb.fit(task, jb.FitConfig(optax.sgd(0.1), 8, num_devices=2))
found["big"] = [int(record["state"].model_state), big, True]
print(json.dumps(found))
"""


def test_integer_aux_is_the_same_on_any_number_of_devices():
    found = on_four_devices(AUX)
    assert len(found) == 31
    assert {name: values for name, values in found.items() if values[0] != values[1] or not values[2]} == {}


# norms


@pytest.mark.parametrize("size", [1e20, 1e-30, 1.0])
def test_norms_of_any_size(size):
    x = size * jnp.array([[3.0, -4.0], [0.3, 0.4]])
    found = jb.clipped_gradient_sum(lambda w, x: x @ w, jnp.ones(2), x, 0.5 * size)
    np.testing.assert_allclose(np.asarray(found.norms, float) / size, [5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(found.total, float) / size, [0.6, 0.0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(norm({"a": x[0]}) / size, 5, rtol=1e-6)
    np.testing.assert_allclose(direction(x[0]), [0.6, -0.8], rtol=1e-6)
    np.testing.assert_allclose(jb.cosine_similarity(x[0], x[1]), -0.28, rtol=1e-6)
    np.testing.assert_allclose(jb.relative_squared_error(2 * x[0], x[0]), 1, rtol=1e-6)


def test_norms_that_are_no_numbers():
    assert np.isinf(norm(jnp.array([jnp.inf, 1.0]))) and np.isnan(norm(jnp.array([jnp.nan, 1.0]))) and norm(()) == 0
    assert np.isnan(jb.cosine_similarity(jnp.zeros(2), jnp.ones(2)))


# differences of nearly equal numbers

MANY = 20_000


def near_one(count, spread):
    return jnp.asarray(1 + spread * np.random.default_rng(0).normal(size=count), jnp.float32)


@pytest.mark.parametrize("spread", [0.1, 1e-3])
@pytest.mark.parametrize(("groups", "method"), [(None, None), (None, "map"), (MANY // 4, "map"), (MANY // 4, "vmap"), (50, "unroll")])
def test_statistics_of_gradients_that_hardly_differ(spread, groups, method):
    x = near_one(MANY, spread)
    means = np.asarray(x, np.float64).reshape(groups or MANY, -1).mean(1)
    trace = MANY / len(means) * means.var(ddof=1)
    found = jb.gradient_statistics(ONE, jnp.array(1.0), x, num_groups=groups, method=method)
    np.testing.assert_allclose(found, (means.mean() ** 2 - trace / MANY, trace), rtol=1e-3 if len(means) > 100 or spread > 0.01 else 5e-3)


@pytest.mark.parametrize("spread", [0.1, 1e-3])
@pytest.mark.parametrize("weights", [lambda n: np.ones(n), lambda n: np.random.default_rng(1).integers(0, 5, n), lambda n: np.arange(n) > 2])
def test_statistics_of_weighted_gradients_that_hardly_differ(weights, spread):
    x, w = near_one(MANY, spread), weights(MANY).astype(np.float32)
    sums = np.asarray(x, np.float64) * w
    whole, square_weights = w.sum(dtype=np.float64), (w.astype(np.float64) ** 2).sum()
    mean = sums.sum() / whole
    noise = ((sums - w * mean) ** 2).sum() + 2 * mean * (w * (sums - w * mean)).sum()  # sum |g|^2 - q |mean|^2, in float64
    trace = MANY * noise / (whole**2 - square_weights)
    for method in (None, "map"):
        found = jb.gradient_statistics(lambda p, b: jb.Weighted(p * b[0] * b[1], b[1]), jnp.array(1.0), (x, jnp.asarray(w)), method=method)
        np.testing.assert_allclose(found, (mean**2 - trace / MANY, trace), rtol=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_monitored_step_of_gradients_that_hardly_differ(loss):
    x = near_one(4096, 0.1)
    _, (_, noise) = monitored_step(LOSSES[loss], jnp.array(1.0), x, microbatch_size=1)
    np.testing.assert_allclose(noise.trace[0], np.asarray(x, np.float64).var(ddof=1), rtol=1e-3)


@pytest.mark.parametrize("name", ["info_nce", "nt_xent"])
def test_contrastive_losses_near_zero_keep_their_digits(name):
    x = jnp.eye(4)
    for temperature in (0.1, 0.05, 0.02):
        expected = contrastive(name, np.eye(4), np.eye(4), temperature)
        for chunk_size in (None, 2):
            found = getattr(jb, name)(x, x, temperature, chunk_size=chunk_size)
            assert (np.asarray(found) > 0).all()
            np.testing.assert_allclose(found, expected, rtol=1e-5)
