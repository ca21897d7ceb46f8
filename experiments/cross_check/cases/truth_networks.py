"""The five networks on a :class:`experiments.cross_check.cases.truth.Tape`: losses and gradients of given weights, in float64."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.cross_check.cases.truth import Tape, Var


def losses_and_gradient(name: str, params: Mapping[str, Any], images: np.ndarray, labels: np.ndarray, tape: Tape, weights=None):
    """``(B,)`` losses, and the gradient of their mean (or of their sum with ``weights``) as a tree like ``params``."""
    inputs = {path: tape.constant(leaf) for path, leaf in _leaves(params)}
    take = lambda *path: inputs[path]
    logits = NETWORKS[name](tape, take, tape.constant(images))
    logits = tape.add_bias(tape.dense(logits, take("Dense_0", "kernel")), take("Dense_0", "bias"))
    losses = tape.cross_entropy(logits, labels)
    tape.backward(losses, np.full(len(labels), 1 / len(labels)) if weights is None else weights)
    return losses.value, _tree(params, {path: var.gradient for path, var in inputs.items()})


def _leaves(tree, path=()):
    if not isinstance(tree, Mapping):
        return [(path, tree)]
    return [pair for name in tree for pair in _leaves(tree[name], (*path, name))]


def _tree(like, gradients, path=()):
    if not isinstance(like, Mapping):
        return gradients[path]
    return {name: _tree(like[name], gradients, (*path, name)) for name in like}


def _simple_cnn(tape: Tape, take, x: Var) -> Var:
    for index in range(3):
        x = tape.add_bias(tape.conv(x, take(f"ConvMaxPool_{index}", "kernel")), take(f"ConvMaxPool_{index}", "bias"))
        x = tape.relu(tape.max_pool(x, 2))
    return tape.flatten(x)


def _alexnet(tape: Tape, take, x: Var) -> Var:
    layers = [("ConvMaxPool_0", 4, 5), ("ConvMaxPool_1", 1, 2), ("Conv_0", 1, 1), ("Conv_1", 1, 1), ("ConvMaxPool_2", 1, 1)]
    for name, strides, padding in layers:
        x = tape.relu(tape.add_bias(tape.conv(x, take(name, "kernel"), strides, padding), take(name, "bias")))
        if name.startswith("ConvMaxPool"):
            x = tape.max_pool(x, 2)
    return tape.flatten(x)


class _Units:
    """Convolutions with batch normalisation, in the order in which jaxbatch's networks create them."""

    def __init__(self, tape: Tape, take, with_bias: bool = False):
        self._tape, self._take, self._with_bias, self._next = tape, take, with_bias, 0

    def __call__(self, x: Var, strides: int = 1) -> Var:
        name, tape, take = f"ConvBatchNorm_{self._next}", self._tape, self._take
        self._next += 1
        kernel = take(name, "Conv_0", "kernel")
        x = tape.conv(x, kernel, strides, kernel.value.shape[1] // 2)
        if self._with_bias:
            x = tape.add_bias(x, take(name, "bias"))
        return tape.batch_norm(x, take(name, "BatchNorm_0", "scale"), take(name, "BatchNorm_0", "bias"))


def _resnet20(tape: Tape, take, x: Var) -> Var:
    unit = _Units(tape, take)
    x = tape.relu(unit(x))
    for stage in range(3):
        for block in range(3):
            first = stage > 0 and block == 0
            inner = unit(tape.relu(unit(x, 2 if first else 1)))
            x = tape.relu(tape.add(inner, unit(x, 2) if first else x))
    return tape.mean_pixels(x)


def _resnet50(tape: Tape, take, x: Var) -> Var:
    unit = _Units(tape, take)
    x = tape.max_pool(tape.relu(unit(x, 2)), 3, 2, 1)
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            strides = 2 if stage > 0 and block == 0 else 1
            inner = unit(tape.relu(unit(tape.relu(unit(x)), strides)))
            x = tape.relu(tape.add(inner, unit(x, strides) if block == 0 else x))
    return tape.mean_pixels(x)


def _vgg19_bn(tape: Tape, take, x: Var) -> Var:
    unit = _Units(tape, take, with_bias=True)
    for count in (2, 2, 4, 4, 4):
        for _ in range(count):
            x = tape.relu(unit(x))
        x = tape.max_pool(x, 2)
    return tape.flatten(x)


NETWORKS = {"simple_cnn": _simple_cnn, "alexnet": _alexnet, "resnet20": _resnet20, "resnet50": _resnet50, "vgg19_bn": _vgg19_bn}
