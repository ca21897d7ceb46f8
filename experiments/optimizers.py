"""The optimizers that studies offer by name, as functions of the learning rate."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import optax

OptimizerName = Literal["sgd", "momentum", "adam", "adamw"]
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
    "adamw": optax.adamw,
}
CODE = {"sgd": "optax.sgd", "momentum": "functools.partial(optax.sgd, momentum=0.9)", "adam": "optax.adam", "adamw": "optax.adamw"}
