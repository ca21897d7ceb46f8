"""What a state may hold: every type, keys, numbers, nothing; through the host, to disk and back, and through training."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.states import as_arrays, is_key, through_host
from jaxbatch.training.checkpoints import Checkpoints
from tests.conftest import ROOT

TYPES = ["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2", "int8", "int16", "int32", "uint8", "uint16", "uint32", "bool",
         "complex64"]  # fmt: skip
LEAVES = {name: lambda name=name: jnp.asarray([0, 1, 3, 1]).astype(name) for name in TYPES}
LEAVES |= {
    "NaN, infinity, -0, smallest": lambda: jnp.array([jnp.nan, jnp.inf, -0.0, 1e-45]),
    "NaN of one's own": lambda: np.array([0x7FC01234, 0xFFC00001], np.uint32).view(np.float32),
    "only -0": lambda: jnp.array([-0.0, -0.0]),
    "only 0": lambda: jnp.zeros((3, 2)),
    "scalar": lambda: jnp.array(3.0, jnp.bfloat16),
    "empty": lambda: jnp.zeros((0,)),
    "empty of several axes": lambda: jnp.zeros((2, 0, 3), jnp.bfloat16),
    "NumPy": lambda: np.arange(3, dtype=np.int32),
    "NumPy scalar": lambda: np.float32(0.1),
    "key": lambda: jax.random.key(7),
    "keys": lambda: jax.random.split(jax.random.key(7), (2, 3)),
    "no keys": lambda: jax.random.split(jax.random.key(7), 2)[:0],
    "key of rbg": lambda: jax.random.key(7, impl="rbg"),
    "keys of unsafe_rbg": lambda: jax.random.split(jax.random.key(7, impl="unsafe_rbg"), 2),
    "older key": lambda: jax.random.PRNGKey(7),
    "int": lambda: 3,
    "float": lambda: 0.1,
    "bool number": lambda: True,
    "complex number": lambda: 1 + 2j,
    "None": lambda: None,
    "empty tuple": lambda: (),
    "named": lambda: Named(jnp.ones(2), {"key": jax.random.key(1)}),
}
WIDE = {"float64": lambda: jnp.array([0.1, -0.0]), "int64": lambda: jnp.array([2**40]), "complex128": lambda: jnp.array([0.1j])}


class Named(NamedTuple):
    values: object
    others: object


def bits(leaf):
    """Type, shape and every bit."""
    data = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
    return str(leaf.dtype), leaf.shape, data.tobytes()


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert [bits(leaf) for leaf in jax.tree.leaves(found)] == [bits(leaf) for leaf in jax.tree.leaves(as_arrays(expected))]
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))


def round_trip(state, folder):
    like = jax.eval_shape(lambda: as_arrays(state))
    Checkpoints(folder, {}).save(1, state)
    return Checkpoints(folder, {}).latest(like)


@pytest.mark.parametrize("name", LEAVES)
def test_bit_for_bit_through_disk_and_host(name, tmp_path):
    state = {"step": jnp.array(1), "held": LEAVES[name]()}
    assert_same(round_trip(state, tmp_path), state)
    assert_same(through_host(as_arrays(state)), state)


@pytest.mark.parametrize("name", WIDE)
def test_64_bits(name, tmp_path, x64):
    state = {"held": WIDE[name](), "number": 0.1, "key": jax.random.key(1)}
    assert state["held"].dtype == name
    assert_same(round_trip(state, tmp_path), state)
    assert_same(through_host(as_arrays(state)), state)


def test_keys_of_another_kind_are_another_state(tmp_path):
    Checkpoints(tmp_path, {}).save(1, {"key": jax.random.key(0)})
    for other in (jax.random.key(0, impl="rbg"), jax.random.PRNGKey(0), jnp.zeros(())):
        with pytest.raises(ValueError, match="another model or optimizer"):
            Checkpoints(tmp_path, {}).latest({"key": other})


def everything_held(inner):
    """An optimizer whose state has everything in it, and uses it."""

    def init(params):
        return inner.init(params), {name: make() for name, make in LEAVES.items()}, 0

    def update(gradient, state, params=None):
        inner_state, held, count = state
        updates, inner_state = inner.update(gradient, inner_state, params)
        key, _ = jax.random.split(held["key"])
        return updates, (inner_state, held | {"key": key, "float": held["float"] * 2}, count + 1)

    return optax.GradientTransformation(init, update)


def noisy_task():
    """A key in the model's state as well: the loss of a batch is moved by what it draws."""
    data = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
    init = lambda key: (jnp.ones(3), {"key": jax.random.fold_in(key, 1), "drawn": jnp.zeros(())})

    def loss_fn(params, batch):
        losses = ((batch * params[None]) ** 2).sum(1)
        return losses, losses.mean()

    def update_model_state(state, mean):
        key, used = jax.random.split(state["key"])
        return {"key": key, "drawn": state["drawn"] + mean * jax.random.normal(used)}

    metrics_fn = lambda pair, batch: {"loss": loss_fn(pair[0], batch)[0]}
    return jb.Task(init, loss_fn, metrics_fn, data, data, update_model_state=update_model_state)


def noisy_optimizer():
    return optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.sgd(0.05, 0.9))


@pytest.mark.parametrize("optimizer", [noisy_optimizer(), everything_held(optax.sgd(0.05))], ids=["add_noise", "everything"])
def test_a_run_that_is_stopped_ends_in_the_same_bits(optimizer, tmp_path):
    task, config = noisy_task(), jb.FitConfig(optimizer, 4, jb.epochs(4), seed=2)
    *_, whole = jb.fit(task, config)
    for records in (1, 2):
        run = jb.fit_with_checkpoints(task, config, tmp_path)
        for _ in range(records + 1):  # the last of them is not on disk yet
            next(run)
        run.close()
    rest = list(jb.fit_with_checkpoints(task, config, tmp_path))
    assert [record["epoch"] for record in rest] == [4.0]
    assert_same(rest[-1]["state"], whole["state"])
    assert list(jb.fit_with_checkpoints(task, config, tmp_path)) == []


@pytest.mark.parametrize("runs", ["vmap", "threads", "map"])
def test_keys_in_a_sweep(runs):
    task, seeds = noisy_task(), [0, 1]

    def make(rate):
        return optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.sgd(rate))

    settings = {"batch_size": 4, "duration": jb.epochs(2), "runs": runs}
    first, last = jb.sweep(task, make, jnp.array([0.05, 0.1]), seeds, **settings)
    (again,) = jb.sweep(task, make, jnp.array([0.05, 0.1]), seeds, after=first, **settings)
    *_, alone = jb.fit(task, jb.FitConfig(make(0.1), 4, jb.epochs(2), seed=1))
    for record in (last, again):
        np.testing.assert_allclose(record["state"].params[1], alone["state"].params, rtol=1e-5)
        assert bits(record["state"].model_state["key"][1]) == bits(alone["state"].model_state["key"])


RUN = """
import json
import jax, numpy as np
import jaxbatch as jb
from tests.test_states import bits, everything_held, is_key, noisy_optimizer, noisy_task
import optax

found, task = [], noisy_task()
streamed = task._replace(
    train_data=jb.ArrayStream((task.train_data,)), test_data=jb.ArrayStream((task.test_data,)), loss_fn=lambda p, batch: task.loss_fn(p, batch[0]),
    metrics_fn=lambda p, batch: task.metrics_fn(p, batch[0]),
)
for optimizer in (noisy_optimizer(), everything_held(optax.sgd(0.05))):
    config = jb.FitConfig(optimizer, 4, jb.epochs(2), seed=2)
    *_, one = jb.fit(task, config)
    for data in (task, streamed):
        for method in ("jit", "pmap"):
            *_, record = jb.fit(data, config._replace(num_devices=2, parallel=method))
            for mine, theirs in zip(jax.tree.leaves(record["state"]), jax.tree.leaves(one["state"]), strict=True):
                assert mine.dtype == theirs.dtype and len(mine.devices()) == 1, (mine, theirs)
                if is_key(mine):
                    assert bits(mine) == bits(theirs)
                else:
                    np.testing.assert_allclose(np.asarray(mine, complex), np.asarray(theirs, complex), rtol=1e-4, atol=1e-5)
            found.append(method)
print(json.dumps(found))
"""


def test_on_two_devices():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", RUN], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["jit", "pmap"] * 4
