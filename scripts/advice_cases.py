"""The cases on which jaxbatch.advise is built, and those on which it is only scored. No setting of advise saw the latter."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbatch as jb

SGD_RATES = (0.001, 0.00316, 0.01, 0.0316, 0.1, 0.316, 1.0)
ADAM_RATES = (0.0001, 0.000316, 0.001, 0.00316, 0.01, 0.0316, 0.1)
SIZES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Case(NamedTuple):
    """A task, an optimizer by learning rate, a goal, and the sweep that finds the best setting."""

    task: Callable[[], jb.Task]
    make_optimizer: Callable[[Any], Any]
    goal: str
    learning_rates: tuple[float, ...]
    max_epochs: float  # the longest run
    batch_sizes: tuple[int, ...] = SIZES
    evaluations_per_epoch: int = 12
    building: bool = False  # whether advise was built with it; the others are only scored


def image_task(name: str, model, num_examples: int | None = None) -> jb.Task:
    """A network on a data set, or on the first so many of its training examples, a sixth of which are held out to judge on."""
    dataset = jb.load_dataset(name)
    if num_examples is not None:
        dataset = dataset._replace(train_images=dataset.train_images[:num_examples], train_labels=dataset.train_labels[:num_examples])
    return jb.classification_task(model(num_classes=dataset.num_classes), jb.hold_out(dataset))


NUM_FEATURES, LABEL_NOISE = 20, 0.25  # of the regression: its features' variances are 1, 2^-1.5, 3^-1.5, ...


def regression_task(num_examples: int = 4000) -> jb.Task:
    """Linear regression with independent features of known variances and a known solution, so that its law of updates is known.

    Its metric is the expected loss above the least one, which needs no test set.
    """
    random, variances = np.random.default_rng(0), np.arange(1.0, NUM_FEATURES + 1) ** -1.5
    solution = np.full(NUM_FEATURES, variances.sum() ** -0.5)
    features = np.sqrt(variances) * random.standard_normal((num_examples, NUM_FEATURES))
    labels = features @ solution + LABEL_NOISE**0.5 * random.standard_normal(num_examples)

    def loss_fn(params, batch):
        x, y = batch
        return 0.5 * (x @ params - y) ** 2

    def metrics_fn(params, batch):
        return {"excess": jnp.full(len(batch[1]), 0.5) * (variances * (params - solution) ** 2).sum()}

    data = jnp.asarray(features, jnp.float32), jnp.asarray(labels, jnp.float32)
    return jb.Task(lambda key: jnp.zeros(NUM_FEATURES), loss_fn, metrics_fn, data, jax.tree.map(lambda leaf: leaf[:1], data))


def equinox_task() -> jb.Task:
    """A user's Equinox model on the embedded digits."""
    import equinox as eqx

    dataset = jb.hold_out(jb.load_dataset("digits"))

    def make(key):
        return eqx.partition(eqx.nn.MLP(784, 10, width_size=64, depth=2, key=key), eqx.is_inexact_array)

    static = make(jax.random.key(0))[1]

    def logits(params, images):
        flat = images.reshape(len(images), -1).astype(jnp.float32) / 255
        return jax.vmap(eqx.combine(params, static))(flat)

    def loss_fn(params, batch):
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch[0]), batch[1])

    def metrics_fn(params, batch):
        return {"loss": loss_fn(params, batch), "accuracy": (logits(params, batch[0]).argmax(-1) == batch[1]).astype(jnp.float32)}

    train, held = ((jnp.asarray(images), jnp.asarray(labels)) for images, labels in (dataset[1:3], dataset[3:5]))
    return jb.Task(lambda key: make(key)[0], loss_fn, metrics_fn, train, held)


MLP = functools.partial(jb.MLP, (128,))
MOMENTUM = functools.partial(optax.sgd, momentum=0.9)
CASES = {
    "digits_cnn_sgd": Case(
        lambda: image_task("digits", jb.SimpleCNN), functools.partial(optax.sgd, momentum=0.5), "accuracy>0.95", SGD_RATES, 30, building=True
    ),
    "digits_mlp_adamw": Case(lambda: image_task("digits", MLP), optax.adamw, "accuracy>0.95", ADAM_RATES, 30, building=True),
    "digits_cnn_adamw": Case(lambda: image_task("digits", jb.SimpleCNN), optax.adamw, "accuracy>0.95", ADAM_RATES, 30),
    "digits_mlp_momentum": Case(lambda: image_task("digits", MLP), MOMENTUM, "accuracy>0.95", SGD_RATES, 30),
    "digits_equinox_adamw": Case(equinox_task, optax.adamw, "accuracy>0.95", ADAM_RATES, 30),
    "mnist_cnn_momentum": Case(lambda: image_task("mnist", jb.SimpleCNN, 6_000), MOMENTUM, "accuracy>0.95", SGD_RATES, 10),
    "mnist_cnn_adamw": Case(lambda: image_task("mnist", jb.SimpleCNN, 6_000), optax.adamw, "accuracy>0.95", ADAM_RATES, 10),
    "mnist_mlp_momentum": Case(lambda: image_task("mnist", MLP, 6_000), MOMENTUM, "loss<0.3", SGD_RATES, 10),
    "mnist_mlp_adamw": Case(lambda: image_task("mnist", MLP, 6_000), optax.adamw, "accuracy>0.92", ADAM_RATES, 10),
    "cifar10_cnn_momentum": Case(lambda: image_task("cifar10", jb.SimpleCNN, 6_000), MOMENTUM, "accuracy>0.33", SGD_RATES, 12),
    "cifar10_alexnet_momentum": Case(
        lambda: image_task("cifar10", jb.AlexNet, 3_000), MOMENTUM, "accuracy>0.25", SGD_RATES[1:6], 10, (8, 16, 32, 64, 128, 256), 6
    ),
    "regression_sgd": Case(regression_task, optax.sgd, "excess<0.02", (0.0316, 0.1, 0.178, 0.316, 0.562, 1.0, 1.78), 4, evaluations_per_epoch=100),
}
