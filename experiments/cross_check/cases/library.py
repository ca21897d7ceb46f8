"""The library's gradients on a smooth network of plain functions, updates, random bits, steps on several devices."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.random import threefry_2x32

import jaxbatch as jb
from experiments.cross_check.cases.case import FORMS, Case, length_bound
from jaxbatch.training.epochs import compile_task_epoch


def smooth_loss(params, batch):
    """Two layers and tanh. It has no kinks, so the bound follows from rounding alone."""
    x, y = batch
    return ((jnp.tanh(x @ params["in"]) @ params["out"] - y) ** 2).sum(-1)


def _smooth_gradients(params, batch, groups):
    """(groups, ...) gradients of the groups' mean losses, by hand."""
    x, y = batch
    hidden = np.tanh(x @ params["in"])
    error = 2 * (hidden @ params["out"] - y)
    inner = (error @ params["out"].T) * (1 - hidden**2)
    parts = np.arange(len(x)).reshape(groups, -1)
    size = parts.shape[1]
    return {
        "in": np.stack([x[part].T @ inner[part] / size for part in parts]),
        "out": np.stack([hidden[part].T @ error[part] / size for part in parts]),
    }


def _smooth_inputs(random, count=24):
    params = {"in": random.normal(size=(9, 7)) / 3, "out": random.normal(size=(7, 3)) / 3}
    return params, (random.normal(size=(count, 9)), random.normal(size=(count, 3)))


@functools.cache
def _gradient(kind):
    calls = {
        "per example": lambda params, batch: jb.per_example_gradients(smooth_loss, params, batch),
        "groups": lambda params, batch: jb.group_gradients(smooth_loss, params, batch, 4),
        "accumulated": lambda params, batch: jb.accumulated_gradient(smooth_loss, params, batch, 5),
        "split": _split_run,
    }
    return calls[kind]


def _split_run(params, batch):
    optimizer = optax.sgd(0.1, 0.9)
    return jb.split_backward(smooth_loss, optimizer, 4)(params, optimizer.init(params), batch)[0]


def _split_truth(params, batch):
    velocity = {name: np.zeros_like(leaf) for name, leaf in params.items()}
    gradients, out = _smooth_gradients(params, batch, 4), dict(params)
    for k in range(4):
        for name in out:
            velocity[name] = 0.9 * velocity[name] + gradients[name][k]
            out[name] = out[name] - 0.1 * velocity[name]
    return out


LIBRARY = ("float64", "float32")  # a user's own loss function computes in the type of its parameters


def gradients() -> Iterator[Case]:
    """Per-example, group and accumulated gradients, and the split."""
    mean = lambda params, batch: {name: leaf[0] for name, leaf in _smooth_gradients(params, batch, 1).items()}
    rows = {
        "per-example gradients": ("per example", lambda params, batch: _smooth_gradients(params, batch, 24)),
        "group gradients": ("groups", lambda params, batch: _smooth_gradients(params, batch, 4)),
        "accumulated gradient": ("accumulated", mean),
        "split: 4 updates of one forward": ("split", _split_truth),
    }
    bound = lambda rounding, *_: length_bound(rounding, 24 + 9, 12)  # two sums forward, two backward, each through a product
    for name, (kind, truth) in rows.items():
        forms = ("eager", "jit", "scan") if kind != "accumulated" else ("eager",)  # it already loops in Python
        yield Case(name, "24 examples", 24, lambda _, kind=kind: _gradient(kind), _smooth_inputs, truth, bound, forms, LIBRARY, True)


@functools.cache
def _optimizer(name):
    optimizer = {"sgd": optax.sgd(0.1, 0.9), "adam": optax.adam(0.1)}[name]

    def run(params, gradients):
        state = optimizer.init(params)
        for gradient in gradients:
            moved, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, moved)
        return params

    return run


def _sgd(params, gradients):
    velocity = np.zeros_like(params)
    for gradient in gradients:
        velocity = 0.9 * velocity + gradient
        params = params - 0.1 * velocity
    return params


def _adam(params, gradients):
    first, second = np.zeros_like(params), np.zeros_like(params)
    for step, gradient in enumerate(gradients, 1):
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        params = params - 0.1 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return params


def threefry(keys, counts):
    """Two words of random bits for each key and counter."""
    return jnp.stack([threefry_2x32(key, count) for key, count in zip(keys, counts, strict=True)])


# Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011): the known answers of Threefry-2x32 with 20 rounds.
THREEFRY = (
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
)


def updates() -> Iterator[Case]:
    """Five updates of two optimizers; random bits."""
    for name, truth in (("sgd", _sgd), ("adam", _adam)):
        draw = lambda random: (random.normal(size=1000), random.normal(size=(5, 1000)))
        bound = lambda rounding, *_: length_bound(rounding, 1, 30)  # five updates of half a dozen operations
        yield Case(f"updates of {name}", "1,000", 5, lambda _, name=name: _optimizer(name), draw, truth, bound, FORMS, LIBRARY, True)
    columns = tuple(np.array(column, np.uint32) for column in zip(*THREEFRY, strict=True))
    yield Case("random bits", "3 words", 1, lambda _: threefry, lambda _: columns[:2], lambda *_: columns[2].astype(float),
               lambda *_: 0.0, ("eager", "jit"), ("float32",), True)  # fmt: skip


@functools.cache
def _shared_train(batch_size, count, method, platform):
    optimizer = optax.sgd(0.1, 0.9)
    task = jb.Task(None, smooth_loss, None, (jnp.zeros((24, 9)), jnp.zeros((24, 3))), None)

    def run(params, batch):
        state = jb.TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
        devices = jax.devices(platform)[:count]
        program = compile_task_epoch(task._replace(train_data=batch), optimizer, state, 2, batch_size, devices=devices, parallel=method)
        order = np.arange(2 * batch_size, dtype=np.int32).reshape(2, batch_size)
        return program(state, batch, order)[0].params

    return run


def _shared_truth(batch_size, params, batch):
    velocity, out = {name: np.zeros_like(leaf) for name, leaf in params.items()}, dict(params)
    for step in range(2):
        part = tuple(leaf[step * batch_size : (step + 1) * batch_size] for leaf in batch)
        gradient = _smooth_gradients(out, part, 1)
        for name in out:
            velocity[name] = 0.9 * velocity[name] + gradient[name][0]
            out[name] = out[name] - 0.1 * velocity[name]
    return out


def several_devices() -> Iterator[Case]:
    """Two steps on several devices, compared with one computed by hand."""
    platform = jax.default_backend()
    counts = [count for count in (2, 4, 8) if count <= jax.device_count()]
    bound = lambda rounding, *_: length_bound(rounding, 24 + 9, 16)
    for count in counts:
        for size in (8, 11):  # 11 examples are filled up, with a mask
            for method in ("jit", "pmap"):
                make = lambda _, a=(size, count, method, platform): _shared_train(*a)
                yield Case(f"steps on several devices, {method}", f"{size} examples, {count} devices", 24, make,
                           _smooth_inputs, functools.partial(_shared_truth, size), bound, ("eager",), LIBRARY, count == 4)  # fmt: skip
