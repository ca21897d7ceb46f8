"""The networks of the cross-check: losses, gradients, 50 steps of training."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbatch as jb
from experiments.cross_check.cases.case import Case, moved_bound
from experiments.cross_check.cases.truth import Tape
from experiments.cross_check.cases.truth_networks import losses_and_gradient

MODELS = {  # network, image side, channels, examples
    "simple_cnn": (jb.SimpleCNN, 28, 1, 7),
    "alexnet": (jb.AlexNet, 32, 3, 5),
    "resnet20": (jb.ResNet20, 32, 3, 4),
    "vgg19_bn": (jb.VGG19BN, 32, 3, 4),
    "resnet50": (jb.ResNet50, 32, 3, 3),
}


@functools.cache
def _network(name, dtype):
    model = MODELS[name][0](num_classes=10, dtype=jnp.dtype(dtype))
    settings = {} if name == "simple_cnn" else {"train": True, "mutable": ["batch_stats"]}

    def run(params, images, labels):
        def losses(params):
            outputs = model.apply({"params": params}, images, **settings)
            losses = jb.cross_entropy(outputs[0] if settings else outputs, labels)
            return losses.mean(), losses

        (_, example_losses), gradient = jax.value_and_grad(losses, has_aux=True)(params)
        return {"losses": example_losses, "gradient": gradient}

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


def networks() -> Iterator[Case]:
    """Losses and gradient of every network."""
    for name, (_, side, _, count) in MODELS.items():
        bound = lambda rounding, inputs, truth, name=name: moved_bound(lambda **tape: _network_truth(name, *inputs, **tape), rounding, truth)
        make = lambda precision, name=name: _network(name, "float32" if precision == "default" else precision)
        precisions = ("float64", "float32", "bfloat16", "default") if name != "resnet50" else ("float64", "float32")
        yield Case(name, f"{count}×{side}²", 1000, make, functools.partial(_network_inputs, name),
                   functools.partial(_network_truth, name), bound, ("jit",), precisions, name == "simple_cnn", True,
                   ("losses", "gradient"))  # fmt: skip


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
        example_losses, gradient = losses_and_gradient("simple_cnn", jax.tree.unflatten(names, params), images[batch], labels[batch], Tape(**tape))
        losses.append(example_losses.mean())
        velocity = [0.5 * v + g for v, g in zip(velocity, jax.tree.leaves(gradient), strict=True)]
        params = [leaf - 0.02 * v for leaf, v in zip(params, velocity, strict=True)]
    return {"losses": np.array(losses), "parameters": jax.tree.unflatten(names, params)}


def _train_inputs(random):
    params = _start("simple_cnn", int(random.integers(2)))
    labels = random.integers(0, 10, 64)
    images = random.random((64, 28, 28, 1)) * 0.5 + labels.reshape(-1, 1, 1, 1) / 20
    order = np.stack([random.permutation(64)[:BATCH] for _ in range(STEPS)]).astype(np.int32)
    return params, images, labels, order


def training() -> Iterator[Case]:
    """50 steps on one device."""
    bound = lambda rounding, inputs, truth: moved_bound(lambda **tape: _train_truth(*inputs, **tape), rounding, truth)
    yield Case(f"simple_cnn, {STEPS} steps", f"{BATCH} examples", 2000, _train, _train_inputs, _train_truth, bound,
               ("eager",), ("float64", "float32", "default"), parts=("losses", "parameters"))  # fmt: skip
