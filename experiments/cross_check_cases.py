"""What the cross-check computes: each row with an independent float64 truth and a bound that says how it was derived.

Functions here call the library by its public names and run as one program; truths are NumPy, at most a
:class:`experiments.truth.Tape`. Inputs are drawn from a seed; what a machine is given is rounded to its precision first, and
the truth is that of the rounded inputs.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.random import threefry_2x32

import jaxbatch as jb
from experiments.truth import Rounding, Tape
from experiments.truth_networks import losses_and_gradient
from jaxbatch import layers, parallel

FACTOR = 4.0  # a bound is so many times the expected rounding: four standard deviations
ROUNDING = {
    "float64": Rounding(2.0**-53, 2.0**-53),
    "float32": Rounding(2.0**-24, 2.0**-24),
    "bfloat16": Rounding(2.0**-24, 2.0**-8),  # sums are kept in float32
    "default": Rounding(2.0**-24, 2.0**-24),  # float32 arrays; the platform chooses how it multiplies them
}
FORMS = ("eager", "jit", "scan", "vmap")
MODELS = {  # network, image side, channels, examples
    "simple_cnn": (jb.SimpleCNN, 28, 1, 7),
    "alexnet": (jb.AlexNet, 32, 3, 5),
    "resnet20": (jb.ResNet20, 32, 3, 4),
    "vgg19_bn": (jb.VGG19BN, 32, 3, 4),
    "resnet50": (jb.ResNet50, 32, 3, 3),
}


class Case(NamedTuple):
    """One computation at one size."""

    name: str
    size: str
    number: int  # of what the figure draws the error against: the longest sum
    make: Callable[[str], Callable[..., Any]]  # precision -> function of the inputs
    draw: Callable[[np.random.Generator], tuple]  # inputs: trees of float64 and integers
    truth: Callable[..., Any]  # of the same inputs
    bound: Callable[..., Any] | None = None  # (rounding, inputs, truth) -> bound; None: from ``number`` alone
    forms: tuple[str, ...] = FORMS
    precisions: tuple[str, ...] = tuple(ROUNDING)
    quick: bool = False
    parameters_float32: bool = False  # in bfloat16 the inputs stay float32: the network rounds them itself
    parts: tuple[str, ...] = ()  # entries of the output that are rows of their own, with bounds of their own


def length_bound(rounding: Rounding, length: int, results: int = 2) -> float:
    """The bound of a sum of ``length`` terms that passes through ``results`` roundings."""
    return FACTOR * (math.sqrt(length) * rounding.sums + results * rounding.stored)


def all_cases() -> Iterator[Case]:
    """Every computation, in the order of the table."""
    yield from reductions()
    yield from single_layers()
    yield from library_gradients()
    yield from updates()
    yield from networks()
    yield from training()


# Reductions -----------------------------------------------------------------------------------------------------------


def total(x):
    """A sum, by the platform."""
    return jnp.sum(x)


def squares_after_product(rows):
    """Wrong in its last row with jaxlib 0.10.2 on CPU (jax issue 39103)."""
    return jax.vmap(lambda row: jnp.sum((jnp.eye(3, dtype=rows.dtype) @ row) ** 2))(rows)


def reductions() -> Iterator[Case]:
    """Sums at awkward sizes, the known-bad one, many axes."""
    for size in (1, 7, 1023, 1025, 32_768, 32_769, 1_000_003):
        draw = lambda random, size=size: (random.normal(size=size),)
        yield Case("sum", f"{size:,}", size, lambda _: total, draw, np.sum, _sum_bound, quick=size in (7, 1025, 32_769))
    whole = lambda random: (np.sign(random.normal(size=32_769)) * random.integers(1, 8, 32_769),)
    exact = lambda rounding, inputs, truth: 0.0 if rounding.stored < 1e-4 else length_bound(rounding, 1)
    yield Case("sum of whole numbers", "32,769", 32_769, lambda _: total, whole, np.sum, exact, quick=True)
    for size, precision in ((32_769, "float32"), (16_385, "float64"), (1000, "float32")):
        rows = lambda random, size=size: (np.stack([np.arange(size, dtype=float), np.zeros(size), np.zeros(size)], 1),)
        truth = lambda rows: (rows**2).sum(1)
        yield Case("sum of squares after a product", f"{size:,}", 3, lambda _: squares_after_product, rows, truth,
                   forms=("eager", "jit"), precisions=(precision,), quick=True)  # fmt: skip
    rank = lambda random: (random.normal(size=(2,) * 8),)
    yield Case("sum over 4 of 8 axes", "2⁸", 16, lambda _: lambda x: x.sum((0, 2, 4, 6)), rank,
               lambda x: x.sum((0, 2, 4, 6)), quick=True)  # fmt: skip


def _sum_bound(rounding, inputs, truth):
    # The sum may happen to be small: errors go by the size of the partial sums.
    expected = np.sqrt((inputs[0] ** 2).sum())
    return length_bound(rounding, inputs[0].size) * expected / max(abs(float(truth)), 1e-300)


# Single layers --------------------------------------------------------------------------------------------------------


def _with_gradients(function):
    """``(inputs..., cotangent) -> (output, gradients...)``"""

    def run(*inputs):
        out, back = jax.vjp(function, *inputs[:-1])
        return out, *back(inputs[-1].astype(out.dtype))

    return run


@functools.cache
def _dense(precision):
    return _with_gradients(lambda x, kernel: x @ kernel)


@functools.cache
def _conv(strides, padding, layout):
    return _with_gradients(lambda x, kernel: layers.conv(x, kernel, layout=layout, strides=strides, padding=padding))


@functools.cache
def _pool(layout):
    return _with_gradients(lambda x: layers.max_pool(x, 2, layout=layout))


@functools.cache
def _norm(precision):
    return _with_gradients(lambda x, scale, bias: layers.batch_norm(x, scale, bias))


@functools.cache
def _entropy(precision):
    def run(logits, cotangent, labels):
        losses, back = jax.vjp(lambda z: jb.cross_entropy(z, labels), logits)
        return losses, *back(cotangent.astype(losses.dtype))

    return run


def _taped(layer, *values, cotangent):
    tape = Tape()
    inputs = [tape.constant(value) for value in values]
    out = layer(tape, *inputs)
    tape.backward(out, cotangent)
    return out.value, *(one.gradient for one in inputs)


def _conv_truth(strides, padding, turned, x, kernel, cotangent):
    if turned:  # (C, H, W, B)
        x, cotangent = x.transpose(3, 1, 2, 0), cotangent.transpose(3, 1, 2, 0)
    found = _taped(lambda tape, *pair: tape.conv(*pair, strides, padding), x, kernel, cotangent=cotangent)
    return (found[0].transpose(3, 1, 2, 0), found[1].transpose(3, 1, 2, 0), found[2]) if turned else found


CONVS = (  # layout, B, side, C, O, k, strides, padding: where it comes from
    ("batch_minor", 16, 28, 1, 10, 5, 1, 0),  # SimpleCNN
    ("batch_minor", 16, 12, 10, 20, 5, 1, 0),
    ("batch_minor", 1, 4, 20, 40, 3, 1, 0),
    ("native", 3, 32, 3, 64, 11, 4, 5),  # AlexNet
    ("native", 4, 4, 64, 96, 5, 1, 2),  # kernel larger than the image
    ("native", 17, 2, 33, 65, 3, 1, 1),  # the same, 16 examples and more
    ("native", 4, 32, 16, 16, 3, 1, 1),  # ResNet-20
    ("native", 1, 32, 16, 32, 3, 2, 1),
    ("native", 5, 16, 16, 32, 1, 2, 0),
    ("native", 2, 32, 3, 64, 7, 2, 3),  # ResNet-50
    ("native", 2, 2, 512, 512, 3, 1, 1),  # VGG19_BN
    ("native", 3, 17, 31, 33, 3, 1, 1),  # powers of two and one more or less
    ("native", 129, 5, 7, 9, 3, 1, 1),
)


def single_layers() -> Iterator[Case]:
    """Dense, convolution, pooling, batch normalisation and loss, forward and gradient."""
    for batch, inputs, outputs in ((1, 40, 10), (64, 40, 10), (63, 65, 33), (17, 513, 100), (128, 1024, 257)):
        draw = lambda random, a=batch, b=inputs, c=outputs: tuple(random.normal(size=shape) for shape in ((a, b), (b, c), (a, c)))
        truth = lambda x, w, dy: (x @ w, dy @ w.T, x.T @ dy)
        yield Case("dense", f"{batch}×{inputs}→{outputs}", max(batch, inputs, outputs), _dense, draw, truth, quick=batch == 63)
    for layout, batch, side, channels, outputs, size, strides, padding in CONVS:
        turned = layout == "batch_minor"
        after = (side + 2 * padding - size) // strides + 1

        def draw(random, b=batch, n=side, c=channels, o=outputs, k=size, m=after, turned=turned):
            shapes = ((b, n, n, c), (o, k, k, c), (b, m, m, o))
            x, kernel, cotangent = (random.normal(size=shape) for shape in shapes)
            return (x.transpose(3, 1, 2, 0), kernel, cotangent.transpose(3, 1, 2, 0)) if turned else (x, kernel, cotangent)

        length = max(size**2 * max(channels, outputs), batch * after**2)
        name, text = "convolution", f"{batch}×{side}²×{channels}→{outputs}, {size}×{size}/{strides}"
        truth = functools.partial(_conv_truth, strides, padding, turned)
        quick = (batch, side) in ((16, 12), (17, 2), (3, 17))
        yield Case(name, text, length, lambda _, a=(strides, padding, layout): _conv(*a), draw, truth, quick=quick)
    for layout, shape in (("native", (3, 8, 8, 5)), ("native", (1, 7, 7, 33)), ("batch_minor", (10, 24, 24, 4))):

        def draw(random, shape=shape):
            # Within a window all differ and bfloat16 holds them: the largest is the largest in every precision.
            place = (np.arange(shape[1])[:, None] % 2 * 2 + np.arange(shape[2])[None] % 2)[None, :, :, None]
            x = 4.0 * random.integers(-32, 32, shape) + place
            return x, random.integers(-64, 64, (shape[0], shape[1] // 2, shape[2] // 2, shape[3])).astype(float)

        truth = lambda x, dy: _taped(_pool_whole_windows, x, cotangent=dy)
        yield Case("max-pool", "×".join(map(str, shape)), 1, lambda _, layout=layout: _pool(layout), draw, truth,
                   lambda *_: 0.0, quick=True)  # fmt: skip
    for shape in ((4, 16, 16, 16), (1, 8, 8, 33), (20, 2, 2, 512), (65, 1, 1, 3)):
        parts = (shape, shape[3:], shape[3:], shape)
        draw = lambda random, parts=parts: tuple(random.normal(size=part) for part in parts)
        truth = lambda x, scale, bias, dy: _taped(Tape.batch_norm, x, scale, bias, cotangent=dy)
        count = shape[0] * shape[1] * shape[2]
        bound = lambda rounding, *_, count=count: length_bound(rounding, count, 4)
        yield Case("batch normalisation", "×".join(map(str, shape)), count, _norm, draw, truth, bound, quick=shape[0] == 4)
    for batch, classes in ((64, 10), (1, 100), (7, 1000)):
        draw = lambda random, a=batch, b=classes: (3 * random.normal(size=(a, b)), random.normal(size=a), random.integers(0, b, a))
        truth = lambda z, dy, labels: _taped(lambda tape, z: tape.cross_entropy(z, labels), z, cotangent=dy)
        bound = lambda rounding, inputs, _, classes=classes: length_bound(rounding, classes, 4 + np.abs(inputs[0]).max())
        yield Case("cross entropy", f"{batch}×{classes}", classes, _entropy, draw, truth, bound, quick=batch == 64)


def _pool_whole_windows(tape, x):
    rows, columns = (n // 2 * 2 for n in x.value.shape[1:3])
    kept = tape.constant(x.value[:, :rows, :columns])
    out = tape.max_pool(kept, 2)

    def back():
        x.gradient[:, :rows, :columns] += kept.gradient

    tape._steps.insert(0, back)  # the last to be walked back
    return out


# The library's gradients, on a smooth network of bare functions ------------------------------------------------------


def smooth_loss(params, batch):
    """Two layers and tanh: no kinks, so the bound is that of rounding alone."""
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


def library_gradients() -> Iterator[Case]:
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
        forms = ("eager", "jit", "scan") if kind != "accumulated" else ("eager",)  # it loops in Python by itself
        yield Case(name, "24 examples", 24, lambda _, kind=kind: _gradient(kind), _smooth_inputs, truth, bound, forms, LIBRARY, True)


# Updates and random bits ----------------------------------------------------------------------------------------------


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


# Networks -------------------------------------------------------------------------------------------------------------


@functools.cache
def _network(name, dtype):
    model = MODELS[name][0](num_classes=10, dtype=jnp.dtype(dtype))
    settings = {} if name == "simple_cnn" else {"train": True, "mutable": ["batch_stats"]}

    def run(params, images, labels):
        def losses(params):
            found = model.apply({"params": params}, images, **settings)
            losses = jb.cross_entropy(found[0] if settings else found, labels)
            return losses.mean(), losses

        (_, found), gradient = jax.value_and_grad(losses, has_aux=True)(params)
        return {"losses": found, "gradient": gradient}

    return run


def _start(name, seed):
    model, side, channels, _ = MODELS[name]
    with jax.default_device(jax.devices("cpu")[0]):
        variables = jax.jit(model(num_classes=10).init)(jax.random.key(seed), jnp.zeros((1, side, side, channels)))
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])


def _network_inputs(name, random):
    _, side, channels, count = MODELS[name]
    params = _start(name, int(random.integers(2)))
    return params, random.normal(size=(count, side, side, channels)), random.integers(0, 10, count)


def _network_truth(name, params, images, labels, **tape):
    losses, gradient = losses_and_gradient(name, params, images, labels, Tape(**tape))
    return {"losses": losses, "gradient": gradient}


def moved_bound(run: Callable[..., Any], rounding: Rounding, truth: dict[str, Any]) -> dict[str, float]:
    """How far rounding and kinks move each part of what a tape computes, relative to its size.

    ``run(**tape)`` computes it on a tape with these settings. Rounding is scaled down to where no kink is met, and its effect
    up again; the kinks' effect is that of taking them all one way and all the other.
    """
    small = 2.0**-53 / rounding.stored
    tiny = Rounding(rounding.sums * small, rounding.stored * small)
    moved = [run(rounding=tiny, random=np.random.default_rng(n)) for n in range(2)]
    # In float64 no branch is near enough to a kink to be taken otherwise.
    sides = [truth, truth] if rounding.stored < 1e-12 else [run(rounding=rounding, side=side) for side in (1, -1)]
    return {
        part: FACTOR * max(apart(one[part], truth[part]) for one in moved) / small
        + apart(sides[0][part], sides[1][part], truth[part])
        for part in truth
    }


def apart(a: Any, b: Any, size: Any = None) -> float:
    """‖a − b‖ ÷ ‖b‖ (or ‖size‖) over all leaves together."""
    norm = lambda tree: math.sqrt(sum(float((np.asarray(leaf, np.float64) ** 2).sum()) for leaf in jax.tree.leaves(tree)))
    difference = norm(jax.tree.map(lambda x, y: np.asarray(x, np.float64) - np.asarray(y, np.float64), a, b))
    return difference / max(norm(b if size is None else size), 1e-300)


def networks() -> Iterator[Case]:
    """Losses and gradient of every network."""
    for name, (_, side, _, count) in MODELS.items():
        bound = lambda rounding, inputs, truth, name=name: moved_bound(
            lambda **tape: _network_truth(name, *inputs, **tape), rounding, truth
        )
        make = lambda precision, name=name: _network(name, "float32" if precision == "default" else precision)
        precisions = ("float64", "float32", "bfloat16", "default") if name != "resnet50" else ("float64", "float32")
        yield Case(name, f"{count}×{side}²", 1000, make, functools.partial(_network_inputs, name),
                   functools.partial(_network_truth, name), bound, ("jit",), precisions, name == "simple_cnn", True,
                   ("losses", "gradient"))  # fmt: skip


# Training -------------------------------------------------------------------------------------------------------------

STEPS, BATCH = 50, 8


@functools.cache
def _train(precision):
    model = jb.SimpleCNN(dtype=jnp.dtype("float32" if precision == "default" else precision))
    loss_fn = lambda params, batch: jb.cross_entropy(model.apply({"params": params}, batch[0]), batch[1])
    optimizer = optax.sgd(0.02, 0.5)
    epoch = jb.make_epoch(jb.make_train_step(loss_fn, optimizer, BATCH))

    def run(params, images, labels, order):
        state = jb.TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
        state, losses = epoch(state, (images, labels), order)
        return {"losses": losses, "parameters": state.params}

    return run


def _train_truth(params, images, labels, order, **tape):
    names = jax.tree.structure(params)
    params, velocity, losses = jax.tree.leaves(params), [0.0] * names.num_leaves, []
    for batch in order:
        found, gradient = losses_and_gradient(
            "simple_cnn", jax.tree.unflatten(names, params), images[batch], labels[batch], Tape(**tape)
        )
        losses.append(found.mean())
        velocity = [0.5 * v + g for v, g in zip(velocity, jax.tree.leaves(gradient), strict=True)]
        params = [leaf - 0.02 * v for leaf, v in zip(params, velocity, strict=True)]
    return {"losses": np.array(losses), "parameters": jax.tree.unflatten(names, params)}


def _train_inputs(random):
    params = _start("simple_cnn", int(random.integers(2)))
    labels = random.integers(0, 10, 64)
    images = random.random((64, 28, 28, 1)) * 0.5 + labels.reshape(-1, 1, 1, 1) / 20
    order = np.stack([random.permutation(64)[:BATCH] for _ in range(STEPS)]).astype(np.int32)
    return params, images, labels, order


@functools.cache
def _shared_train(batch_size, count, method, platform):
    optimizer = optax.sgd(0.1, 0.9)
    task = jb.Task(None, smooth_loss, None, (jnp.zeros((24, 9)), jnp.zeros((24, 3))), None)

    def run(params, batch):
        state = jb.TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
        devices = jax.devices(platform)[:count]
        program = parallel.compile_parallel_epoch(
            task._replace(train_data=batch), optimizer, state, 2, batch_size, devices, method=method
        )
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


def training() -> Iterator[Case]:
    """50 steps on one device; two on several."""
    bound = lambda rounding, inputs, truth: moved_bound(lambda **tape: _train_truth(*inputs, **tape), rounding, truth)
    yield Case(f"simple_cnn, {STEPS} steps", f"{BATCH} examples", 2000, _train, _train_inputs, _train_truth, bound,
               ("eager",), ("float64", "float32", "default"), parts=("losses", "parameters"))  # fmt: skip
    platform = jax.default_backend()
    counts = [count for count in (2, 4, 8) if count <= jax.device_count()]
    bound = lambda rounding, *_: length_bound(rounding, 24 + 9, 16)
    for count in counts:
        for size in (8, 11):  # 11 is filled up with a mask
            for method in ("jit", "pmap"):
                make = lambda _, a=(size, count, method, platform): _shared_train(*a)
                yield Case(f"steps on several devices, {method}", f"{size} examples, {count} devices", size, make,
                           _smooth_inputs, functools.partial(_shared_truth, size), bound, ("eager",), LIBRARY, count == 4)  # fmt: skip
