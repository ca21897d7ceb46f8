"""Benchmarks of training: SimpleCNN's step, the AdaBatch networks' steps, sweeps, a change of batch size."""

import math
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from side_by_side import MOMENTUM, RATE, make_rows, median, random_task, start_peer, time_contenders

import jaxbatch as jb
from jaxbatch.batches import cut_batches
from jaxbatch.training.loops import compile_epoch
from jaxbatch.training.steps import make_task_step
from jaxbatch.training.train_state import init_state

NETWORKS = {"alexnet": jb.AlexNet, "resnet20": jb.ResNet20, "vgg19_bn": jb.VGG19BN}
STEPS_A_ROUND = {"alexnet": 20, "resnet20": 6, "vgg19_bn": 3}  # enough, since the first step after a pause is slow


def step_contenders(task, peer_name: str, optimizer, batch_size: int, num_steps: int, compiled_loop: bool = False, **settings):
    """jaxbatch's and PyTorch's epoch of a few steps, and the PyTorch process; only jaxbatch's if PyTorch is missing."""
    indices = np.asarray(cut_batches(jnp.arange(task.num_examples), batch_size).indices)
    step = make_task_step(task, optimizer, batch_size)
    state = init_state(task, optimizer, 0)
    run = compile_epoch(step, state, task.train_data, num_steps, batch_size)

    states = [jax.tree.map(jnp.copy, state)]

    def ours():  # continues to train, as the peer does
        states[0], losses = run(states[0], task.train_data, indices)
        return losses

    contenders = {"ours": ours}
    if compiled_loop:
        scan = compile_epoch(step, state, task.train_data, num_steps, batch_size, loop="scan")
        contenders["ours in one lax.scan"] = lambda: scan(jax.tree.map(jnp.copy, state), task.train_data, indices)
    peer = start_peer(task, state.params, peer_name, batch_size, **settings)
    if peer:
        contenders["torch eager"] = lambda: peer.run("train")
    return contenders, peer


def train(rounds: int, batch_sizes: tuple[int, ...]) -> list[dict]:
    """Compares SimpleCNN's compiled epochs with PyTorch eager, in milliseconds per step."""
    rows = []
    for batch_size in batch_sizes:
        num_steps = max(2, min(300, 6000 // batch_size))
        task = random_task(jb.SimpleCNN(), num_steps * batch_size)
        contenders, peer = step_contenders(task, "SimpleCNN", optax.sgd(RATE, MOMENTUM), batch_size, num_steps)
        times = time_contenders(contenders, rounds, peer)
        rows += make_rows("train", "simple_cnn", batch_size, 1, times, per=num_steps)
    return rows


def adabatch(rounds: int, models: tuple[str, ...], batch_size: int, num_steps: int | None, bfloat16: bool, compiled_loop: bool) -> list[dict]:
    """Times the AdaBatch networks' training steps, with the operations per second that they reach."""
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.01, 0.9))
    settings = {"rate": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "bfloat16": bfloat16}
    rows = []
    dtype = jnp.bfloat16 if bfloat16 else jnp.float32
    peak = matmul_rate(dtype)
    for name in models:
        model, count = NETWORKS[name](dtype=dtype), num_steps or STEPS_A_ROUND[name]
        task = random_task(model, count * batch_size, (32, 32, 3))
        contenders, peer = step_contenders(task, type(model).__name__, optimizer, batch_size, count, compiled_loop, **settings)
        times = time_contenders(contenders, rounds, peer)
        label = name + (" bfloat16" if bfloat16 else "")
        flops = 3 * forward_flops(model, batch_size)  # backward: the gradients of inputs and of kernels
        for row in make_rows("adabatch", label, batch_size, 1, times, per=count):
            gflops = flops / row["ours_ms"] / 1e6
            rows.append(row | {"gflops": gflops, "matmul_share": gflops * 1e9 / peak})
    return rows


def forward_flops(model, batch_size: int) -> int:
    """Floating-point operations of the convolutions and dense layers, in the forward pass, as the network defines them."""
    image = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    with mock.patch("jaxbatch.layers.convolution.choose_conv", return_value="platform"):  # as defined, not as computed
        jaxpr = jax.make_jaxpr(lambda v: model.apply(v, image))(variables)
    return batch_size * _flops(jaxpr.jaxpr)


def _flops(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns")):
            total += _flops(getattr(inner, "jaxpr", inner)) if hasattr(getattr(inner, "jaxpr", inner), "eqns") else 0
        if equation.primitive.name == "conv_general_dilated":
            kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(kernel[1:])  # (O, k, k, C)
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    return total


def matmul_rate(dtype, size: int | None = None) -> float:
    """Floating-point operations per second of the device in a large square matrix product: the best of ten."""
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    jax.block_until_ready(product(x))
    best = math.inf
    for _ in range(10):
        started = time.perf_counter()
        jax.block_until_ready(product(x))
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def many_runs(rounds: int, rates: int, seeds: int, num_examples: int, batch_size: int) -> list[dict]:
    """Compares learning rates × seeds of SimpleCNN in one program with one run after another."""
    task = random_task(jb.SimpleCNN(), num_examples)
    settings = np.tile(np.geomspace(0.001, 0.1, rates), seeds)
    numbers = np.repeat(np.arange(seeds), rates).tolist()
    duration = jb.steps(num_examples // batch_size)

    def make_optimizer(rate):
        return optax.sgd(rate, MOMENTUM)

    def seconds(runs):
        """The time of compiled training alone: that of the second epoch of two."""
        twice = jb.steps(2 * duration.amount)
        *_, last = jb.sweep(task, make_optimizer, settings, numbers, batch_size=batch_size, duration=twice, runs=runs)
        return last["train_seconds"] * 1e3

    times = [{"ours": seconds(None), "one after another": seconds("map")} for _ in range(rounds)]
    return make_rows("sweep", f"simple_cnn, {len(numbers)} runs", batch_size, 1, times)


def target(dataset: str, accuracy: float, batch_size: int, rate: float, max_epochs: int) -> list[dict]:
    """Times SimpleCNN from the first step to a test accuracy, checked after each epoch, without compilation."""
    task = jb.classification_task(jb.SimpleCNN(), jb.load_dataset(dataset))
    seconds = compiling = 0.0
    for record in jb.fit(task, jb.FitConfig(optax.sgd(rate, MOMENTUM), batch_size, jb.epochs(max_epochs))):
        seconds, compiling = seconds + record["train_seconds"], compiling + record["compile_seconds"]
        if record["test_accuracy"] >= accuracy:
            (row,) = make_rows("target", f"simple_cnn {dataset} {accuracy:.0%}", batch_size, 1, [{"ours": seconds * 1e3}])
            return [row | {"epochs": record["epoch"], "compile_ms": compiling * 1e3}]
    raise ValueError(f"{accuracy:.0%} was not reached in {max_epochs} epochs at --rate {rate}. Raise --max-epochs.")


def ladder(num_examples: int, sizes: tuple[int, ...], first_epochs: int, epochs_each: int) -> list[dict]:
    """What a change of batch size costs beyond the work of its first epoch. Programs for all sizes are compiled ahead.

    The first size lasts long enough to compile the programs of the others. ``ours_ms`` is the time from record to record of
    the first epoch at a new size, minus the median of the other epochs at that size. The peer is one step.
    """
    task = random_task(jb.SimpleCNN(), num_examples)
    schedule = lambda epoch: sizes[max(0, 1 + (epoch - first_epochs) // epochs_each)]
    duration = jb.epochs(first_epochs + epochs_each * (len(sizes) - 1))
    records, arrived = [], time.perf_counter()
    for record in jb.fit(task, jb.FitConfig(optax.sgd(RATE, MOMENTUM), schedule, duration)):
        now = time.perf_counter()
        records.append(record | {"wall_ms": (now - arrived) * 1e3})
        arrived = now
    rows = []
    for size in sizes[1:]:
        first, *others = [record for record in records if record["batch_size"] == size]
        ordinary = median([record["wall_ms"] for record in others]).value
        step_ms = median([record["train_seconds"] for record in others]).value * 1e3 / (num_examples // size)
        times = {"ours": first["wall_ms"] - ordinary, "an ordinary step": step_ms}
        (row,) = make_rows("ladder", "simple_cnn", size, 1, [times])
        waited = {"compile_ms": first["compile_seconds"] * 1e3, "waited_ms": first["stall_seconds"] * 1e3}
        rows.append(row | waited)
    return rows
