"""Several devices make the run of one: four virtual CPU devices, in a process of their own."""

import numpy as np
import pytest

from jaxbatch.training.devices import share_batches
from tests.conftest import on_four_devices

RUN = """
import json, sys
import jax, numpy as np, optax
import jax.numpy as jnp
from flax import linen as nn
import jaxbatch as jb
from jaxbatch.layers import ConvBatchNorm
from jaxbatch.training.devices import AXIS
from tests.conftest import make_problem
from tests.training.test_loops import changed_losses
from tests.data.test_stream_parts import FAULTS, fault_on_two_devices

loss_fn, params, data = make_problem(24)
metrics_fn = lambda p, batch: {"loss": loss_fn(p, batch), "accuracy": loss_fn(p, batch)}
plain = jb.Task(lambda key: jax.tree.map(lambda leaf: leaf + jax.random.normal(key), params), loss_fn, metrics_fn, data, data)
noisy = plain._replace(prepare=lambda keys, batch: batch | {"x": batch["x"] + jax.vmap(lambda k: jax.random.normal(k, (5,)))(keys)})
# Keys that ride in the batch: what the loss sees has another structure than the data.
keyed = plain._replace(
    prepare=lambda keys, batch: (keys, batch),
    loss_fn=lambda p, batch: loss_fn(p, batch[1] | {"x": batch[1]["x"] + jax.vmap(lambda k: jax.random.normal(k, (5,)))(batch[0])}),
)


class Network(nn.Module):
    axis_name: str | None = None
    ghost_size: int | None = None

    @nn.compact
    def __call__(self, images, train=False):
        norm = {"axis_name": self.axis_name, "ghost_size": self.ghost_size}
        return nn.Dense(3)(nn.relu(ConvBatchNorm(4, 3, padding=1, use_bias=True, **norm)(images, train=train)).mean((1, 2)))


def network(**norm):
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (24, 6, 6, 2), dtype=np.uint8), random.integers(0, 3, 24).astype(np.int32)
    return jb.classification_task(Network(**norm), jb.Dataset("r", images, labels, images, labels, 3, (0.5, 0.5), (0.25, 0.25)))


def last(task, size, **changes):
    config = jb.FitConfig(optax.sgd(0.02, 0.9), size, jb.epochs(2), seed=4)._replace(**changes)
    *_, record = jb.fit(task, config)
    state = record["state"]
    kept = state.params, state.opt_state, state.model_state, record["loss"], record["test_loss"]
    return [np.asarray(leaf, float).ravel() for leaf in jax.tree.leaves(kept)]


def apart(a, b):
    return max(float(np.abs(x - y).max() / (1 + np.abs(y).max())) for x, y in zip(a, b, strict=True))


found = {}
for name, task in (("plain", plain), ("prepared", noisy), ("keys", keyed), ("microbatches", plain._replace(microbatch_size=2))):
    for size in (8, 6, 7) if name == "plain" else (7,):  # 7: neither 2 nor 4 divide it; 6: one of 4 devices has nothing
        one = last(task, size)
        for method in ("jit", "pmap"):
            for count in (2, 4):
                found[f"{name} {size} {method} {count}"] = apart(last(task, size, num_devices=count, parallel=method), one)
one, ghost = last(network(), 8), last(network(ghost_size=2), 8)
for method in ("jit", "pmap"):
    found[f"synchronised {method}"] = apart(last(network(axis_name=AXIS), 8, num_devices=4, parallel=method), one)
    found[f"local is ghost {method}"] = apart(last(network(), 8, num_devices=4, parallel=method)[:-2], ghost[:-2])
found["local is not the whole"] = apart(ghost, one)
schedule = jb.adabatch_schedule(batch_size=3, growth=2, every=1)
found["schedule"] = apart(last(plain, schedule, num_devices=4), last(plain, schedule))


def streamed(task):
    return task._replace(train_data=jb.ArrayStream(task.train_data), test_data=jb.ArrayStream(task.test_data))


for size in (8, 7):  # on 4 devices 7 are filled up
    for method in ("jit", "pmap"):
        task, settings = network(axis_name=AXIS), {"num_devices": 4, "parallel": method}
        found[f"streamed {size} {method}"] = apart(last(streamed(task), size, **settings), last(task, size, **settings))
pairs = jax.tree.leaves(data)
tupled = plain._replace(
    loss_fn=lambda p, batch: loss_fn(p, dict(zip(sorted(data), batch))), train_data=tuple(pairs), test_data=tuple(pairs),
    metrics_fn=lambda p, batch: metrics_fn(p, dict(zip(sorted(data), batch))),
)
for size, bound in ((8, 2), (9, 1), (9, 2), (7, 1)):
    one = last(tupled, size)
    for method in ("jit", "pmap"):
        settings = {"num_devices": 4, "parallel": method, "microbatch_size": bound}
        found[f"streamed in parts {size} {bound} {method}"] = apart(last(streamed(tupled), size, **settings), one)
for size, count, groups in ((8, 2, 2), (8, 4, 2), (9, 2, 3), (6, 4, 3)):  # 9: groups of 3, filled up to 4 places
    one = last(tupled, size, num_groups=groups)
    for method in ("jit", "pmap"):
        settings = {"num_devices": count, "parallel": method, "num_groups": groups}
        found[f"split {size} {count} {groups} {method}"] = apart(last(tupled, size, **settings), one)
        found[f"split, streamed {size} {count} {groups} {method}"] = apart(last(streamed(tupled), size, **settings, microbatch_size=1), one)
    found[f"split, streamed {size} {groups}"] = apart(last(streamed(tupled), size, num_groups=groups, microbatch_size=2), one)
    found[f"split, microbatches {size} {groups}"] = apart(last(tupled, size, num_groups=groups, microbatch_size=1), one)
for method in ("jit", "pmap"):
    shared = last(network(axis_name=AXIS), 8, num_devices=2, parallel=method, num_groups=2)
    found[f"split, moments {method}"] = apart(shared, last(network(), 8, num_groups=2))
for changes, text in (({"num_devices": 5}, "num_devices=5"), ({"num_devices": 2, "parallel": "mpi"}, "parallel='mpi'")):
    try:
        last(plain, 8, **changes)
    except ValueError as error:
        found[f"refused {text}"] = 0.0 if text in str(error) else 1.0
for method in ("jit", "pmap"):
    try:
        last(network(axis_name=AXIS), 4, num_devices=2, parallel=method, num_groups=4)
    except ValueError as error:
        found[f"refused groups of one {method}"] = 0.0 if "the loss of an example changes with the others" in str(error) else 1.0
pooled = plain._replace(loss_fn=lambda p, batch: loss_fn(p, batch) + 0 * jax.lax.pmean(loss_fn(p, batch).mean(), AXIS))
for bound in (None, 2):
    found[f"a collective of its own {bound}"] = apart(last(pooled, 8, num_devices=2, microbatch_size=bound), last(plain, 8))
convolution = lambda w, x: jax.lax.conv(x, w, (1, 1), "VALID").sum((1, 2, 3))
for number in (0, 1):  # the same text, for another device
    place = jax.devices()[number]
    arguments = jax.device_put((jnp.ones((1, 1, 1, 1)), jnp.arange(4.0).reshape(4, 1, 1, 1)), place)
    gradient = jb.accumulated_gradient(convolution, *arguments, 2)
    found[f"on device {number}"] = abs(float(gradient.sum()) - 1.5) if gradient.devices() == {place} else 1.0
weighted = plain._replace(prepare=lambda keys, batch: batch | {"y": batch["y"] / jnp.abs(batch["y"]).sum()})
for method in ("jit", "pmap"):
    try:
        last(weighted, 8, num_devices=2, parallel=method)
    except ValueError as error:
        found[f"refused weights {method}"] = 0.0 if "prepare changes an example with the others" in str(error) else 1.0
for method in ("jit", "pmap"):
    for name, (_, message) in FAULTS.items():
        found[f"a stream {name} {method}"] = fault_on_two_devices(name, message, method)
for kind in ("numpy", "list", "jax"):
    losses = [changed_losses(kind, count) for count in (1, 2)]
    found[f"changed data {kind}"] = float(np.abs(np.array(losses) - ([3.5, 3.5] if kind == "jax" else [3.5, 133.5])).max())
on_host, moved, put = jax.tree.map(np.array, data), [], jax.device_put
of_host = lambda leaf: any(leaf is one for one in jax.tree.leaves(on_host))
jax.device_put = lambda tree, *onto: moved.extend(map(of_host, jax.tree.leaves(tree))) or put(tree, *onto)
for method in ("jit", "pmap"):
    moved.clear()
    config = jb.FitConfig(optax.sgd(0.02), schedule, jb.epochs(2), num_devices=2, parallel=method, evaluations_per_epoch=4)
    count = len(list(jb.fit(plain._replace(train_data=on_host, test_data=None), config)))
    found[f"moved once {method}"] = abs(sum(moved) - len(jax.tree.leaves(on_host))) + (count < 8)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    return on_four_devices(RUN)


@pytest.mark.parametrize(("name", "count"), [("plain", 12), ("prepared", 4), ("keys", 4), ("microbatches", 4)])
def test_the_run_of_one_device(found, name, count):
    errors = {key: value for key, value in found.items() if key.startswith(name)}
    assert len(errors) == count and max(errors.values()) < 1e-5, errors  # 6 and 7 examples are not divided by 4 devices


def test_data_on_the_host_are_moved_to_the_devices_once(found):
    errors = {key: value for key, value in found.items() if key.startswith("moved once")}
    assert len(errors) == 2 and max(errors.values()) == 0, errors


def test_moments_synchronised_or_of_each_device(found):
    assert found["synchronised jit"] < 1e-5 and found["synchronised pmap"] < 1e-5
    assert found["local is ghost jit"] < 1e-5 and found["local is ghost pmap"] < 1e-5
    assert found["local is not the whole"] > 1e-3


def test_a_stream_is_shared_as_data_on_the_devices_are(found):
    errors = {key: value for key, value in found.items() if key.startswith("streamed")}
    assert len(errors) == 12 and max(errors.values()) < 1e-5, errors


def test_a_split_step_is_that_of_one_device_that_has_the_batch(found):
    errors = {key: value for key, value in found.items() if key.startswith("split")}
    assert len(errors) == 4 * 4 + 3 * 2 + 2 and max(errors.values()) < 1e-5, errors


def test_a_loss_may_use_the_axis_in_parts_too(found):
    errors = {key: value for key, value in found.items() if key.startswith("a collective")}
    assert len(errors) == 2 and max(errors.values()) < 1e-5, errors


def test_a_wrong_stream_is_one_line_on_several_devices_too(found):
    errors = {key: value for key, value in found.items() if key.startswith("a stream")}
    assert len(errors) == 2 * 13 and max(errors.values()) == 0, errors


def test_data_that_were_changed_since_the_last_call_are_the_new_ones(found):
    errors = {key: value for key, value in found.items() if key.startswith("changed data")}
    assert len(errors) == 3 and max(errors.values()) < 1e-4, errors


def test_a_schedule_and_refusals(found):
    assert found["schedule"] < 1e-5
    assert found["on device 0"] == found["on device 1"] == 0
    assert sum(key.startswith("refused") for key in found) == 6
    assert all(value == 0 for key, value in found.items() if key.startswith("refused"))


@pytest.mark.parametrize("size", [1, 3, 8])
def test_every_example_has_one_place(size):
    indices = np.arange(2 * size, dtype=np.int32).reshape(2, size)
    shares, mask = share_batches(indices, 4)
    assert shares.shape == mask.shape == (4, 2, -(-size // 4))
    for step in range(2):
        assert sorted(shares[:, step][mask[:, step]]) == list(indices[step])
