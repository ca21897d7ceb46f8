"""One loss per example, on every path; the loss that is called is the one that was given."""

import gc
import weakref

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxbatch as jb
from jaxbatch.training.epochs import compile_task_epoch

LOSS = lambda w, x: 0.5 * (x - w) ** 2
X = jnp.arange(8.0)
CONFIG = jb.FitConfig(optax.sgd(0.1), 4)


CONV = lambda w, x: jax.lax.conv(x[:, None, None, None], w, (1, 1), "VALID").reshape(-1)
WRONG = {
    "mean": lambda losses: losses.mean(),
    "sum": lambda losses: losses.sum(),
    "column": lambda losses: losses[:, None],
    "table": lambda losses: losses[:, None] * losses[None],
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("path", ["plain", "groups", "microbatches", "convolution", "devices", "stream", "sweep", "statistics"])
def test_losses_of_another_shape_are_refused_on_every_path(path, wrong):
    data, start = X, jnp.array(0.0)
    loss_fn = lambda w, x: WRONG[wrong](LOSS(w, x))
    if path == "convolution":
        loss_fn, start = lambda w, x: WRONG[wrong](CONV(w, x)), jnp.ones((1, 1, 1, 1))
    task = jb.Task(lambda key: start, loss_fn, None, jb.ArrayStream(X) if path == "stream" else data, None)
    config = CONFIG._replace(
        **{"groups": {"num_groups": 2}, "microbatches": {"microbatch_size": 2}, "convolution": {"microbatch_size": 2}}.get(path, {})
    )
    with pytest.raises(ValueError, match="loss_fn must return one loss per example"):
        if path == "devices":
            shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), jb.init_state(task, CONFIG.optimizer, 0))
            compile_task_epoch(task, CONFIG.optimizer, shapes, 2, 4, devices=jax.devices() * 2)
        elif path == "statistics":
            jb.gradient_statistics(loss_fn, start, X)
        elif path == "sweep":
            next(jb.sweep(task, optax.sgd, jnp.full(2, 0.1), [0, 1], batch_size=4, duration=jb.epochs(1)))
        else:
            next(jb.fit(task, config))


def test_streams_convolutions_and_devices_give_the_number_of_one_device():
    ramp = lambda w, x: w * x
    config = jb.FitConfig(optax.sgd(1.0), 8)
    for task in (jb.Task(lambda key: jnp.array(0.0), ramp, None, data, None) for data in (X, jb.ArrayStream(X))):
        (record,) = jb.fit(task, config._replace(microbatch_size=3))
        assert float(record["state"].params) == -3.5


class Scaled:
    """A loss with a scale of its own, on a convolution, so that accumulation is a Python loop over a compiled program."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, w, x):
        return jnp.sum(self.scale) * CONV(w, x)


def test_accumulation_takes_no_function_for_another():
    loss, w, x = Scaled(1.0), jnp.ones((1, 1, 1, 1)), jnp.full(4, 4.0)
    assert jb.accumulated_gradient(loss, w, x, 2).item() == 4.0
    loss.scale = 3.0
    assert jb.accumulated_gradient(loss, w, x, 2).item() == 12.0
    loss.scale = jnp.arange(5.0)  # an array in the closure
    assert jb.accumulated_gradient(loss, w, x, 2).item() == 40.0
    loss.scale = jnp.arange(1000.0) % 2
    assert jb.accumulated_gradient(loss, w, x, 2).item() == 2000.0
    loss.scale = (1 + jnp.arange(1000.0)) % 3
    assert jb.accumulated_gradient(loss, w, x, 2).item() == 4000.0
    gone = weakref.ref(loss)
    del loss
    gc.collect()
    assert gone() is None


def test_a_program_is_compiled_once_for_its_text(monkeypatch):
    count, w, x = [], jnp.ones((1, 1, 1, 1)), jnp.full(6, 4.0)
    compile = jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self, *args: count.append(1) or compile(self, *args))
    for _ in range(3):
        jb.accumulated_gradient(Scaled(7.0), w, x, 3)
    assert len(count) == 1
