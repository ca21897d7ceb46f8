"""The library works under JAX's settings for finding faults, and computes the same under them.

All tests run with rank promotion refused (``conftest.py``); the other settings are here.
"""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from tests.conftest import make_problem

LOSS, PARAMS, BATCH = make_problem(8)
OPTIMIZER = optax.sgd(0.1, 0.9)
METRICS = lambda params, batch: {"loss": LOSS(params, batch)}
TASK = jb.Task(lambda key: PARAMS, LOSS, METRICS, BATCH, BATCH)
NOISY = TASK._replace(prepare=lambda keys, batch: batch | {"x": batch["x"] + jax.vmap(lambda key: jax.random.normal(key, (5,), jnp.float32))(keys)})
CONFIG = jb.FitConfig(OPTIMIZER, 4, jb.epochs(2))


def images_task(model):
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (8, 28, 28, 1), dtype=np.uint8), random.integers(0, 10, 8).astype(np.int32)
    return jb.classification_task(model, jb.Dataset("r", images, labels, images, labels, 10, (0.5,), (0.25,)))


def stream():
    parts = lambda indices, place=(0, 0): (jax.tree.map(lambda leaf: np.asarray(leaf)[index], BATCH) for index in indices)
    example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), BATCH)
    streamed = type("Streamed", (), {"parts": staticmethod(parts)})()
    streamed.num_examples, streamed.example = 8, example
    return streamed


def train(task=TASK, **changes):
    *_, last = jb.fit(task, CONFIG._replace(**changes))
    return last["state"].params, last.get("test_loss")


def sweep(runs, task=TASK):
    make = lambda rate: optax.sgd(rate, 0.9)
    *_, last = jb.sweep(task, make, np.array([0.1, 0.2], np.float32), [0, 1], batch_size=4, duration=jb.epochs(1), runs=runs)
    return last["test_loss"]


def step(num_groups=None, microbatch_size=None):
    run = jb.make_train_step(LOSS, OPTIMIZER, 8, num_groups=num_groups, microbatch_size=microbatch_size)
    return run(jb.init_state(TASK, OPTIMIZER, 0), BATCH)[0].params


def epoch(compiled):
    run, state = jb.make_train_step(LOSS, OPTIMIZER, 4), jb.init_state(TASK, OPTIMIZER, 0)
    indices = jb.epoch_batches(0, 0, 8, 4).indices
    program = jb.compile_epoch(run, state, BATCH, 2, 4) if compiled else jb.make_epoch(run)
    return program(state, BATCH, indices)[0].params


def convolution_loss(w, batch):
    """On XLA's convolutions, for which accumulation is a Python loop on CPU."""
    x = jnp.broadcast_to(batch["x"][:, :1, None, None], (batch["x"].shape[0], 4, 4, 1))
    kernel = jnp.broadcast_to(w, (3, 3, 1, 1))
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")).mean((1, 2, 3))


CONVOLUTION = jb.Task(lambda key: jnp.float32(0.5), convolution_loss, None, BATCH, None)


def rates():
    schedule = jb.adabatch_schedule(batch_size=2, growth=2, every=1)
    coupled = jb.coupled_learning_rate(schedule, init=1.0, decay=0.5, num_examples=8, num_epochs=3, shape=jb.cosine(3), warmup=jb.steps(2))
    others = jb.step_decay(0.5, 1), jb.cyclic(2.0)
    return [coupled(jnp.asarray(n)) for n in range(8)], [shape(jnp.asarray(0.5)) for shape in others]


def statistics(num_groups):
    found = jb.gradient_statistics(LOSS, PARAMS, BATCH, num_groups=num_groups)
    return found, jb.gradient_noise_scale(jax.tree.map(lambda value: jnp.stack([value, 2 * value]), found)).value


CALLS = {
    "per_example_gradients": lambda: jb.per_example_gradients(LOSS, PARAMS, BATCH),
    "per_example_gradients in parts": lambda: jb.per_example_gradients(LOSS, PARAMS, BATCH, microbatch_size=3),
    "group_gradients": lambda: [jb.group_gradients(LOSS, PARAMS, BATCH, 2, method=method) for method in ("map", "vmap", "unroll")],
    "losses_and_mean_gradient": lambda: jb.losses_and_mean_gradient(LOSS, PARAMS, BATCH, microbatch_size=3),
    "accumulated_gradient": lambda: jb.accumulated_gradient(LOSS, PARAMS, BATCH, 3),
    "clipped_gradient_sum": lambda: jb.clipped_gradient_sum(LOSS, PARAMS, BATCH, 1.0, microbatch_size=3),
    "sum_of_gradients": lambda: jb.sum_of_gradients(LOSS, PARAMS, BATCH, lambda g: jax.tree.map(jnp.square, g)),
    "statistics of examples": lambda: statistics(None),
    "statistics of groups": lambda: statistics(4),
    "split_backward": lambda: jb.split_backward(LOSS, OPTIMIZER, 4)(PARAMS, OPTIMIZER.init(PARAMS), BATCH),
    "step": step,
    "step in microbatches": lambda: step(microbatch_size=3),
    "step, split": lambda: step(num_groups=2),
    "make_epoch": lambda: epoch(False),
    "compile_epoch": lambda: epoch(True),
    "make_evaluate": lambda: jb.make_evaluate(METRICS, 8, 3)(PARAMS, BATCH),
    "fit": train,
    "fit, prepared": lambda: train(NOISY),
    "fit, split": lambda: train(num_groups=2),
    "fit, microbatches": lambda: train(microbatch_size=3),
    "fit, monitored": lambda: train(monitor=jb.NoiseMonitor(every=3, per_layer=True)),
    "fit, split and monitored": lambda: train(num_groups=2, monitor=jb.NoiseMonitor()),
    "fit, single examples monitored": lambda: train(optimizer=optax.sgd(0.001), batch_size=lambda epoch: 1 + epoch, monitor=jb.NoiseMonitor()),
    "fit, stream monitored": lambda: train(TASK._replace(train_data=stream(), test_data=stream()), monitor=jb.NoiseMonitor()),
    "fit, convolution": lambda: train(CONVOLUTION),
    "fit, convolution in microbatches": lambda: train(CONVOLUTION, microbatch_size=3),
    "accumulated_gradient, convolution": lambda: jb.accumulated_gradient(convolution_loss, jnp.float32(0.5), BATCH, 3),
    "fit, schedule": lambda: train(batch_size=lambda epoch: 2 * 2**epoch),
    "fit, stream": lambda: train(TASK._replace(train_data=stream(), test_data=stream()), microbatch_size=3),
    "fit, adam": lambda: train(optimizer=optax.adam(0.01)),
    "fit_with_checkpoints": lambda: [r["loss"] for r in jb.fit_with_checkpoints(TASK, CONFIG, tempfile.mkdtemp())],
    "sweep, map": lambda: sweep("map"),
    "sweep, vmap": lambda: sweep("vmap"),
    "sweep, threads": lambda: sweep("threads"),
    "sweep, prepared": lambda: sweep(None, NOISY),
    "SimpleCNN": lambda: train(images_task(jb.SimpleCNN()), duration=jb.steps(2)),
    "MLP": lambda: train(images_task(jb.MLP((8,))), duration=jb.steps(2)),
    "rates": rates,
    "scale_learning_rate": lambda: jb.scale_learning_rate("sqrt", 0.1, 64, 128),
    "cosine_similarity": lambda: jb.cosine_similarity(PARAMS, PARAMS),
    "relative_squared_error": lambda: jb.relative_squared_error(PARAMS, jax.tree.map(lambda leaf: 2 * leaf, PARAMS)),
    "check_backend": lambda: [check.passed for check in jb.check_backend.__wrapped__()],
}

SETTINGS = {
    "disable_jit": jax.disable_jit,
    "debug_nans": lambda: jax.debug_nans(True),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "x64": lambda: jax.enable_x64(True),
    "leak checks": jax.checking_leaks,
}


@pytest.fixture(scope="module")
def plain():
    return {}


OPTAX_FAILS = ("fit, adam", "strict promotion")  # a float to the power of an int32 count, in its own Adam
THOROUGH = ("disable_jit", "leak checks")  # seconds each, so only the main calls are always made under them
MAIN = ("per_example_gradients", "split_backward", "step", "fit", "fit, monitored", "fit, stream", "sweep, vmap", "rates")


def pairs():
    for pair in ((call, setting) for call in CALLS for setting in SETTINGS):
        if pair != OPTAX_FAILS:
            yield pytest.param(*pair, marks=pytest.mark.slow if is_slow(*pair) else ())


def is_slow(call, setting):
    return call == "SimpleCNN" or (setting in THOROUGH and call not in MAIN)


@pytest.mark.parametrize(("call", "setting"), list(pairs()))
def test_the_same_under_every_setting(call, setting, plain):
    if call not in plain:
        plain[call] = jax.device_get(CALLS[call]())
    with SETTINGS[setting]():
        found = jax.device_get(CALLS[call]())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=2e-4, atol=1e-5), found, plain[call]
    )
