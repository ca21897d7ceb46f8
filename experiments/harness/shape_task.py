"""The tasks of the memory study: networks on data sets of which only the shapes are used, so that none is loaded."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxbatch as jb
from jaxbatch.training.classification import task_of_model

NETWORKS = {
    "simple_cnn": jb.SimpleCNN,
    "mlp": jb.MLP,
    "alexnet": jb.AlexNet,
    "resnet20": jb.ResNet20,
    "vgg19_bn": jb.VGG19BN,
    "resnet50": jb.ResNet50,
}
Network = Literal["simple_cnn", "mlp", "alexnet", "resnet20", "vgg19_bn", "resnet50"]
DataName = Literal["digits", "mnist", "fashion_mnist", "kmnist", "cifar10", "cifar100", "imagenet"]
# training examples, shape of an image, classes
SHAPES = {
    "digits": (1442, (28, 28, 1), 10),
    "mnist": (60_000, (28, 28, 1), 10),
    "fashion_mnist": (60_000, (28, 28, 1), 10),
    "kmnist": (60_000, (28, 28, 1), 10),
    "cifar10": (50_000, (32, 32, 3), 10),
    "cifar100": (50_000, (32, 32, 3), 100),
    "imagenet": (1_281_167, (224, 224, 3), 1000),
}
USUAL = {"simple_cnn": "mnist", "mlp": "mnist", "resnet50": "imagenet"}  # the others: cifar10


class ShapeStream(NamedTuple):
    """A stream of which only the shapes are known."""

    num_examples: int
    example: tuple

    def parts(self, indices, seed_epoch):
        """Nothing can be read."""
        raise ValueError("this stream only has shapes.")


def shape_task(model: Network, dataset: DataName, dtype: str) -> jb.Task:
    """A network on a data set; ImageNet is streamed, the others lie on the device, as in the other studies."""
    count, shape, classes = SHAPES[dataset]
    network = NETWORKS[model](num_classes=classes, dtype=jnp.dtype(dtype))
    if dataset == "imagenet":
        data = ShapeStream(count, (jax.ShapeDtypeStruct(shape, np.uint8), jax.ShapeDtypeStruct((), np.int32)))
    else:
        data = (jax.ShapeDtypeStruct((count, *shape), np.uint8), jax.ShapeDtypeStruct((count,), np.int32))
    blank = jb.Dataset(dataset, None, None, None, None, classes, (0.5,) * shape[2], (0.5,) * shape[2])
    return task_of_model(network, shape, blank, data, None, None)
