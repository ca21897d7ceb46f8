"""No program holds data or parameters as constants: what is lowered does not grow with them.

A program that closes over an array has it written out in its text, twice its size, and compiled.
"""

import itertools
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
from experiments.adabatch import cost as adabatch_cost
from experiments.convergence import __main__ as convergence
from experiments.gradient_smoothness import __main__ as gradient_smoothness
from experiments.harness import speed
from experiments.split_backward import __main__ as split_backward
from experiments.split_backward import cost as split_backward_cost
from experiments.split_backward.steps import ARMS
from experiments.split_backward.training import Segment, Trainer
from jaxbatch.gradients.cut import Cut
from jaxbatch.layers import BatchNorm
from jaxbatch.training.loops import compile_epoch_in_pieces
from tests.conftest import ROOT

SMALL, LARGE = (2_000, 4), (20_000, 400)  # examples and features: 2,000 times the data, 100 times the parameters
SMALL_IMAGES, LARGE_IMAGES = (2_000, 1), (20_000, 10)
OPTIMIZER, SIZE, DURATION = optax.sgd(0.01, 0.9), 8, jb.steps(2)


def linear_task(num_examples, features, **changes):
    random = np.random.default_rng(0)
    x = random.normal(size=(num_examples, features)).astype(np.float32)
    data = (jnp.asarray(x), jnp.asarray(random.integers(0, 9, num_examples), jnp.int32))

    def loss_fn(params, batch):
        return (batch[0] @ params - batch[1]) ** 2

    def metrics_fn(params, batch):
        return {"loss": loss_fn(params, batch), "accuracy": loss_fn(params, batch)}

    init = lambda key: jax.random.normal(key, (features,)) / features
    return jb.Task(init, loss_fn, metrics_fn, data, jax.tree.map(lambda leaf: leaf[: num_examples // 2], data))._replace(**changes)


def convolution_task(num_examples, channels, **changes):
    """On XLA's own convolution, which on CPU goes through Python loops."""
    images = jnp.asarray(np.random.default_rng(0).normal(size=(num_examples, 3, 3, channels)), jnp.float32)

    def loss_fn(params, batch):
        return jax.lax.conv_general_dilated(batch, params, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")).sum((1, 2, 3)) ** 2

    init = lambda key: 0.1 * jax.random.normal(key, (3, 3, channels, 2))
    task = jb.Task(init, loss_fn, lambda p, x: {"loss": loss_fn(p, x)}, images, images[: num_examples // 2])
    return task._replace(**changes)


def pretrained(task):
    """Starts from parameters that are there already."""
    params = jnp.asarray(np.random.default_rng(1).normal(size=task.train_data[0].shape[1]), jnp.float32)
    return task._replace(init=lambda key: params)


def noisy(keys, batch):
    return batch[0] + jax.vmap(jax.random.normal)(keys)[:, None], batch[1]


def streamed(task):
    return task._replace(train_data=jb.ArrayStream(task.train_data), test_data=jb.ArrayStream(task.test_data))


def fit(task, **settings):
    list(jb.fit(task, jb.FitConfig(OPTIMIZER, SIZE, DURATION, **settings)))


def sweep(task, runs):
    make = lambda rate: optax.sgd(rate, 0.9)
    list(jb.sweep(task, make, jnp.array([0.1, 0.2]), [0, 1], batch_size=SIZE, duration=DURATION, runs=runs))


def accumulating(task):
    state, indices = jb.init_state(task, OPTIMIZER, 0), np.arange(2 * SIZE).reshape(2, SIZE)
    compile_epoch_in_pieces(task, OPTIMIZER, state, Cut(SIZE, microbatch_size=4))(state, task.train_data, indices)


def gradients(task):
    params, batch = task.init(jax.random.key(0)), jax.tree.map(lambda leaf: leaf[: len(leaf) // 100], task.train_data)
    jb.per_example_gradients(task.loss_fn, params, batch)
    jb.group_gradients(task.loss_fn, params, batch, 4)
    jb.accumulated_gradient(task.loss_fn, params, batch, 5)
    jb.gradient_statistics(task.loss_fn, params, batch, num_groups=4)


def split_study(task):
    config = split_backward.Config(batch_size=SIZE, num_groups=2, quick=True, learning_rate=0.02, cost_rounds=1, epochs=1)
    list(split_backward_cost.measure_exactness(task, config))
    list(split_backward_cost.measure_cost(task, config, 0))
    trainer = Trainer(task._replace(test_data=(task.test_data, task.test_data)), config)
    for arm in ARMS:
        trainer.train(arm, 0.1, trainer.start(0), 0, Segment(0, 0, 2, 2 * SIZE))


def smoothness_study(task):
    config = gradient_smoothness.Config(batch_sizes=(SIZE,), iterations=2, learning_rate=0.02, batches_compared=2)
    programs = gradient_smoothness.make_programs(task, config)
    gradient_smoothness.measure_curve(task, config, SIZE, 0, programs)
    list(gradient_smoothness.measure_errors(task, config, 0, programs))


def speed_study(task):
    state, indices = jb.init_state(task, OPTIMIZER, 0), np.arange(2 * SIZE, dtype=np.int32).reshape(2, SIZE)
    for step, carry in (
        (speed.forward_only(task, SIZE), state.params),
        (speed.gradient_only(task), (state.params, jnp.zeros_like(state.params))),
    ):
        jb.compile_epoch(step, carry, task.train_data, 2, SIZE)(jax.tree.map(jnp.copy, carry), task.train_data, indices)


def cost_study(task, count=1):
    class Network(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            return BatchNorm()(images, train=train)[:, 0, 0, :3]

    images = np.asarray(255 * task.train_data[0][:, None, None], np.uint8)
    labels = np.asarray(task.train_data[1])
    shape = (0.5,) * images.shape[3]
    dataset = jb.Dataset("random", images, labels, images, labels, 3, shape, shape)
    list(adabatch_cost.measure_cost({1: Network(), count: Network()}, dataset, {count: [SIZE]}, "jit", 1))


PATHS = {
    "fit, compiled loop": fit,
    "fit, prepared": lambda task: fit(task._replace(prepare=noisy)),
    "fit, microbatches": lambda task: fit(task._replace(microbatch_size=4)),
    "fit, split groups": lambda task: fit(task, num_groups=2),
    "fit, stream": lambda task: fit(streamed(task), microbatch_size=3),
    "fit, Python loop": fit,
    "fit, Python loop, split groups": lambda task: fit(task, num_groups=2),
    "fit, Python loop, accumulating": lambda task: fit(task, microbatch_size=4),
    "accumulating": accumulating,
    "sweep, vmap": lambda task: sweep(task, "vmap"),
    "sweep, map": lambda task: sweep(task, "map"),
    "sweep, threads": lambda task: sweep(task, "threads"),
    "sweep, Python loop, vmap": lambda task: sweep(task, "vmap"),
    "sweep, Python loop, threads": lambda task: sweep(task, "threads"),
    "fit, pretrained": lambda task: fit(pretrained(task)),
    "sweep, vmap, pretrained": lambda task: sweep(pretrained(task), "vmap"),
    "sweep, threads, pretrained": lambda task: sweep(pretrained(task), "threads"),
    "gradients": gradients,
    "study of split batches": split_study,
    "study of smoothness": smoothness_study,
    "study of speed": speed_study,
    "study of cost": cost_study,
    "noise in the study of convergence": lambda task: convergence.measure_noise(task, task.init(jax.random.key(0)), 0, 1),
}
numbers = itertools.count()


def programs_of(run, task, folder):
    """The lengths of the texts of all that is lowered while ``run(task)`` runs."""
    folder = folder / f"{next(numbers)}"
    jax.config.update("jax_dump_ir_to", str(folder))
    try:
        run(task)
    finally:
        jax.config.update("jax_dump_ir_to", None)
    return {file.name: file.stat().st_size for file in folder.iterdir()}


def growth(path, folder):
    """How many characters the largest program of the large task has more than that of the small one, and both."""
    images = "Python loop" in path
    make = convolution_task if images else linear_task
    sizes = (SMALL_IMAGES, LARGE_IMAGES) if images else (SMALL, LARGE)
    small, large = (programs_of(PATHS[path], make(*size), folder) for size in sizes)
    return max(large.values()) - max(small.values()), small, large


@pytest.mark.parametrize("path", PATHS)
def test_programs_do_not_grow_with_what_they_are_given(path, tmp_path):
    grown, small, large = growth(path, tmp_path)
    assert len(large) >= 2 or path.startswith("gradients"), large
    # The same operations on longer arrays: a few digits more in the shapes. 400 parameters as a constant are 3,200.
    assert grown < 600, (small, large)


def test_a_constant_would_be_seen(tmp_path):
    def closing(task):
        jax.jit(lambda params: task.loss_fn(params, task.train_data))(jnp.ones(task.train_data[0].shape[1]))

    PATHS["closing"] = closing
    try:
        assert growth("closing", tmp_path)[0] > 1e6
    finally:
        del PATHS["closing"]


RUN = """
import pathlib, sys
from tests.gradients import test_constants as t

t.PATHS = {
    "two devices": lambda task: t.fit(task, num_devices=2),
    "two devices, pmap": lambda task: t.fit(task, num_devices=2, parallel="pmap"),
    "two devices, stream": lambda task: t.fit(t.streamed(task), num_devices=2, microbatch_size=3),
    "two devices, stream, pmap": lambda task: t.fit(t.streamed(task), num_devices=2, parallel="pmap"),
    "two devices, Python loop": lambda task: t.fit(task, num_devices=2),
    "two devices, study of cost": lambda task: t.cost_study(task, 2),
}
for path in t.PATHS:
    grown, small, large = t.growth(path, pathlib.Path(sys.argv[1]))
    assert grown < 600, (path, small, large)
print(len(t.PATHS), "paths")
"""


def test_programs_for_several_devices(tmp_path):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "6 paths\n"
