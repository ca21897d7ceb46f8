"""Batches that the devices do not divide: what fills them up counts nowhere, in no loss, gradient or moment."""

import pytest

from tests.conftest import on_four_devices

RUN = """
import functools, json
import jax, numpy as np, optax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
import jaxbatch as jb
from jaxbatch.layers import BatchNorm, example_mask
from jaxbatch.training.loops import make_epoch
from jaxbatch.training.devices import AXIS, over_devices, share_batches
from jaxbatch.training.epochs import compile_task_epoch
from jaxbatch.training.classification import running_average
from jaxbatch.training.steps import make_task_step
from tests.reference import step_of_shares

jax.config.update("jax_enable_x64", True)
random, RATE = np.random.default_rng(0), 0.5


class OwnMean(nn.Module):
    "A user's layer that couples examples: the batch's mean is taken off, fillers left out."

    @nn.compact
    def __call__(self, x, train):
        mask = example_mask()
        own = jnp.ones(len(x), bool) if mask is None else mask
        total, count = jnp.where(own[:, None, None, None], x, 0).sum(0, keepdims=True), own.sum()
        try:
            total, count = lax.psum((total, count), AXIS)
        except NameError:  # on one device there is no axis
            pass
        return x - total / count


class Network(nn.Module):
    norm: type = BatchNorm
    axis_name: str | None = None
    ghost_size: int | None = None

    @nn.compact
    def __call__(self, x, train=False):
        for _ in range(2):
            norm = self.norm(axis_name=self.axis_name, ghost_size=self.ghost_size) if self.norm is BatchNorm else self.norm()
            x = jnp.tanh(norm(nn.Dense(3)(x), train=train))
        return nn.Dense(2)(x).mean((1, 2))


def make_task(dtype, microbatch_size=None, jitted=False, **norm):
    model = Network(**norm)
    data = (random.normal(size=(14, 2, 1, 2)).astype(dtype) * 3 + 1, random.normal(size=(14, 2)).astype(dtype))

    def init(key):
        variables = jax.tree.map(lambda leaf: leaf.astype(dtype), model.init(key, data[0][:1]))
        return variables["params"], variables.get("batch_stats", jnp.zeros(()))

    def loss_fn(params, batch):
        out, found = model.apply({"params": params}, batch[0], train=True, mutable=["batch_stats"])
        return ((out - batch[1]) ** 2).sum(-1), found.get("batch_stats", jnp.zeros(()))

    loss_fn = jax.jit(loss_fn) if jitted else loss_fn
    return jb.Task(init, loss_fn, None, jax.tree.map(jnp.asarray, data), None, microbatch_size, running_average)


def start(task):
    return jb.init_state(task, optax.sgd(RATE), 0)


def indices(size, steps=2):
    return np.arange(steps * size, dtype=np.int32).reshape(steps, size)


def on_one(task, size):
    epoch = make_epoch(make_task_step(task, optax.sgd(RATE), size))
    return epoch(start(task), task.train_data, indices(size))


def on_shares(task, size, count):
    state, losses = start(task), []
    for index in indices(size):
        state, loss = step_of_shares(task, state, jax.tree.map(lambda leaf: leaf[index], task.train_data), count, RATE)
        losses.append(loss)
    return state, np.array(losses)


def on_devices(task, size, count, method="jit", steps=2):
    devices = jax.devices()[:count]
    run = compile_task_epoch(task, optax.sgd(RATE), start(task), steps, size, devices=devices, parallel=method)
    return run(start(task), task.train_data, indices(size, steps))


def streamed(task, size, count, method="jit"):
    task = task._replace(train_data=jb.ArrayStream(task.train_data))
    run = compile_task_epoch(task, optax.sgd(RATE), start(task), 2, size, devices=jax.devices()[:count], parallel=method)
    return run(start(task), task.train_data, indices(size), [0, 0])


def apart(a, b):
    pairs = zip(jax.tree.leaves((a[0].params, a[0].model_state, a[1])), jax.tree.leaves((b[0].params, b[0].model_state, b[1])), strict=True)
    return max(float(np.abs(x - y).max() / (1 + np.abs(y).max())) for x, y in pairs)


found = {}
whole, whole32, local = make_task("float64", axis_name=AXIS), make_task("float32", axis_name=AXIS), make_task("float64")
for size in (5, 6, 7):
    one, one32 = on_one(whole, size), on_one(whole32, size)
    for count in (2, 3, 4):
        place = f"{size} on {count}"
        found[f"float64 whole {place}"] = apart(on_devices(whole, size, count), one)
        if (size, count) in ((5, 4), (6, 4), (7, 3)):
            found[f"float32 whole {place}"] = apart(on_devices(whole32, size, count), one32)
            found[f"float64 pmap {place}"] = apart(on_devices(whole, size, count, "pmap"), one)
            found[f"float64 streamed {place}"] = apart(streamed(whole, size, count), one)
            found[f"float64 local {place}"] = apart(on_devices(local, size, count), on_shares(local, size, count))
parts = make_task("float64", microbatch_size=1)
found["float64 microbatches 5 on 3"] = apart(on_devices(parts, 5, 3), on_shares(parts, 5, 3))
found["float64 streamed local 7 on 4"] = apart(streamed(local, 7, 4, "pmap"), on_shares(local, 7, 4))
own = make_task("float64", norm=OwnMean)
found["float64 own layer 5 on 4"] = apart(on_devices(own, 5, 4), on_one(own, 5))
jitted = make_task("float64", jitted=True, axis_name=AXIS)
on_devices(jitted, 5, 4, steps=1)  # what it traced then must not come again
found["float64 jitted 5 on 4"] = apart(on_devices(jitted, 5, 4), on_one(jitted, 5))
ghost = make_task("float64", ghost_size=2)  # 7 on 2 devices: groups of 2, 2 and 2, 1
state, losses = on_devices(ghost, 7, 2, steps=1)
parts = [ghost.loss_fn(start(ghost).params, jax.tree.map(lambda leaf: leaf[i : i + 2], ghost.train_data)) for i in (0, 2, 4)]
parts += [local.loss_fn(start(ghost).params, jax.tree.map(lambda leaf: leaf[6:7], ghost.train_data))]
aux = jax.tree.map(lambda *leaves: sum(n * leaf for n, leaf in zip((2, 2, 2, 1), leaves)) / 7, *(part[1] for part in parts))
twin = running_average(start(ghost).model_state, aux), np.concatenate([part[0] for part in parts]).mean()[None]
pairs = zip(jax.tree.leaves((state.model_state, losses)), jax.tree.leaves(twin), strict=True)
found["float64 ghost 7 on 2"] = max(float(np.abs(x - y).max()) for x, y in pairs)


def moments(x, mask):
    from jaxbatch.layers.normalisation import shared_moments

    return shared_moments(x.reshape(-1, 1, 1, 1), AXIS, mask)


x = np.array([0.0, 0.0, 0.0, 0.0, 100.0])
shares, mask = share_batches(np.arange(5, dtype=np.int32)[None], 4)
program, place = over_devices(moments, jax.devices()[:4], "jit", (True, True))
mean, variance = program(*place(x[shares[:, 0]], mask[:, 0]))
found["mean"], found["variance"] = mean.item(), variance.item()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    return on_four_devices(RUN)


def test_synchronised_moments_by_hand(found):
    assert (found["mean"], found["variance"]) == (20.0, 1600.0)  # of 0, 0, 0, 0, 100; the fourth device has none of them


@pytest.mark.parametrize(
    ("kind", "count", "bound"),
    [
        ("float64 whole", 9, 1e-12),
        ("float32 whole", 3, 1e-6),
        ("float64 pmap", 3, 1e-12),
        ("float64 streamed", 4, 1e-12),
        ("float64 local", 3, 1e-12),
        ("float64 microbatches", 1, 1e-12),
        ("float64 ghost", 1, 1e-12),
        ("float64 own layer", 1, 1e-12),
        ("float64 jitted", 1, 1e-12),
    ],
)
def test_fillers_count_nowhere(found, kind, count, bound):
    errors = {key: value for key, value in found.items() if key.startswith(kind)}
    assert len(errors) == count and max(errors.values()) < bound, errors  # NaN is not below
