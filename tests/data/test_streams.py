"""Training on images that come in a stream is training all the same; its memory does not grow."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import jaxbatch as jb
from jaxbatch.layers import ConvBatchNorm
from tests.conftest import ROOT, make_problem


class Network(nn.Module):
    """Small, with batch normalisation."""

    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(3)(nn.relu(ConvBatchNorm(4, 3, padding=1)(images, train=train)).mean((1, 2)))


def trained(task, size=6, duration=2, **settings):
    config = jb.FitConfig(optax.sgd(0.05, 0.9), size, jb.epochs(duration), seed=3, **settings)
    return list(jb.fit(task, config))


def numbers(records):
    return [[record[key] for key in ("batches", "loss", "test_loss", "test_accuracy")] for record in records]


class Arrays:
    """Arrays as a stream."""

    def __init__(self, arrays):
        self.arrays = [np.asarray(leaf) for leaf in arrays]
        self.num_examples = len(self.arrays[0])
        self.example = tuple(jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in self.arrays)
        self.longest = 0

    def parts(self, indices, place=(0, 0)):
        for part in indices:
            self.longest = max(self.longest, len(part))
            yield tuple(leaf[part] for leaf in self.arrays)


def streamed(task):
    return task._replace(train_data=Arrays(task.train_data), test_data=Arrays(task.test_data))


@pytest.mark.parametrize(("size", "bound"), [(6, None), (6, 3), (7, 3), (10, 4)])
def test_a_stream_trains_as_data_on_the_device_do(size, bound):
    loss_fn, params, data = make_problem(24)
    names, leaves = sorted(data), tuple(data[name] for name in sorted(data))
    named = lambda batch: dict(zip(names, batch, strict=True))
    task = jb.Task(
        lambda key: params,
        lambda p, batch: loss_fn(p, named(batch)),
        lambda p, batch: {"loss": loss_fn(p, named(batch)), "accuracy": loss_fn(p, named(batch))},
        leaves,
        leaves,
        prepare=lambda keys, batch: (batch[0] + jax.vmap(lambda key: jax.random.normal(key, batch[0].shape[1:]))(keys), batch[1]),
    )
    there = streamed(task)
    rows = trained(there, size, microbatch_size=bound)
    np.testing.assert_allclose(numbers(rows), numbers(trained(task, size)), rtol=2e-5)
    assert there.train_data.longest <= (bound or size) and there.num_examples == 24


def test_batch_normalisation_in_a_stream_is_that_of_accumulation():
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8), random.integers(0, 3, 24).astype(np.int32)
    dataset = jb.Dataset("r", images, labels, images[:9], labels[:9], 3, (0.5,) * 3, (0.25,) * 3)
    task = jb.classification_task(Network(), dataset)
    expected = trained(task, 12, microbatch_size=4)
    found = trained(streamed(task), 12, microbatch_size=4)
    np.testing.assert_allclose(numbers(found), numbers(expected), rtol=2e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found[-1]["state"].model_state, expected[-1]["state"].model_state
    )


def test_workers_change_nothing_and_a_run_goes_on_where_it_stopped(image_folder, tmp_path):
    dataset = jb.open_images("colours", data_dir=image_folder)
    alone = jb.streamed_task(Network(), dataset, image_size=16, num_workers=0)
    whole = trained(alone, 8, 3, microbatch_size=4)
    helped = jb.streamed_task(Network(), dataset, image_size=16, num_workers=1, ahead=1)
    try:
        assert numbers(trained(helped, 8, 3, microbatch_size=4)) == numbers(whole)
    finally:
        helped.train_data.decoders.close()
    config = jb.FitConfig(optax.sgd(0.05, 0.9), 8, jb.epochs(3), seed=3, microbatch_size=4)
    first = jb.fit_with_checkpoints(alone, config, tmp_path)
    begun = [next(first), next(first)]
    first.close()
    rest = list(jb.fit_with_checkpoints(alone, config, tmp_path))
    assert numbers([begun[0], *rest]) == numbers(whole) and [record["epoch"] for record in rest] == [2.0, 3.0]


def test_a_split_step_takes_a_stream_and_names_a_wrong_number_of_groups(image_folder):
    task = jb.streamed_task(Network(), jb.open_images("colours", data_dir=image_folder), image_size=8, num_workers=0)
    *_, last = jb.fit(task, jb.FitConfig(optax.sgd(0.1), 4, jb.steps(3), num_groups=2))  # against arrays: test_parallel.py
    assert last["updates"] == 6 and last["batches"] == 3 and np.isfinite(last["loss"])
    with pytest.raises(ValueError, match="num_groups=3 does not divide batch_size=4"):
        next(jb.fit(task, jb.FitConfig(optax.sgd(0.1), 4, jb.steps(3), num_groups=3)))


def test_a_batch_of_524288_is_accumulated_exactly():
    count, random = 524_288, np.random.default_rng(0)
    x, y = random.normal(size=(count, 3)).astype(np.float32), random.normal(size=count).astype(np.float32)
    data = Arrays((x, y))
    loss_fn = lambda w, batch: 0.5 * (batch[0] @ w - batch[1]) ** 2
    metrics_fn = lambda w, batch: {"loss": loss_fn(w, batch), "accuracy": batch[1]}
    task = jb.Task(lambda key: jnp.ones(3), loss_fn, metrics_fn, data, Arrays((x[:5], y[:5])))
    (record,) = jb.fit(task, jb.FitConfig(optax.sgd(1.0), count, microbatch_size=8192))
    gradient = x.astype(float).T @ (x.astype(float) @ np.ones(3) - y) / count  # in float64, by hand
    np.testing.assert_allclose(record["state"].params, 1 - gradient, rtol=0, atol=1e-5)
    assert data.longest == 8192 and record["updates"] == 1


MEMORY = """
import resource, sys
import numpy as np, optax
import jax, jaxbatch as jb
from tests.data.test_streams import Network
from flax import linen as nn

class Noise:
    num_examples = 4096
    example = (jax.ShapeDtypeStruct((64, 64, 3), np.uint8), jax.ShapeDtypeStruct((), np.int32))

    def parts(self, indices, place=(0, 0)):
        for part in indices:
            yield np.random.default_rng(0).integers(0, 256, (len(part), 64, 64, 3), dtype=np.uint8), np.zeros(len(part), np.int32)

test = Noise()
test.num_examples = 32
random = np.zeros((1, 64, 64, 3), np.uint8)
task = jb.classification_task(Network(), jb.Dataset("r", random, np.zeros(1, np.int32), random, np.zeros(1, np.int32), 3, (0.5,) * 3, (0.25,) * 3))
task = task._replace(train_data=Noise(), test_data=test)
for size in (64, 4096):
    record, = jb.fit(task, jb.FitConfig(optax.sgd(0.1), size, jb.examples(4096), microbatch_size=64))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_batch():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, env=env, cwd=ROOT, check=True)
    small, large = map(float, done.stdout.split())
    # The batch of 4,096 is 48 MiB as bytes and 1 GiB of activations; 64 at a time need what 64 need.
    assert large < small + 40
