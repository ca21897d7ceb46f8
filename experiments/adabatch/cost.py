"""What a network's forward and backward passes cost at each batch size, on one device and on several."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbatch as jb
from jaxbatch.augment import normalise
from jaxbatch.gradients.groups import losses_and_aux
from jaxbatch.machine.timing import timed_rounds
from jaxbatch.results.records import Record
from jaxbatch.sums import totals
from jaxbatch.training.devices import AXIS, over_devices
from jaxbatch.training.train_state import init_state


def measure_cost(models: Mapping[int, object], dataset: jb.Dataset, sizes: Mapping[int, Sequence[int]], method: str, rounds: int) -> Iterator[Record]:
    """Milliseconds of the forward pass, and of the backward pass beyond it, side by side in every round.

    With several devices, each has its share of the batch, which is filled up if the devices do not divide it. The backward
    pass then ends with the sum of the gradients over the devices. Loading, loss and optimizer are left out.

    Args:
        models: maps a number of devices to the network for it; the parameters of these networks are alike.
        dataset: its first images are the batch.
        sizes: maps a number of devices to the batch sizes.
        method: how several devices share a step, see :func:`jaxbatch.training.devices.over_devices`.
        rounds: records of each pair.
    """
    image = normalise(jnp.asarray(dataset.train_images[:1]), dataset.mean, dataset.std)
    variables = jax.jit(models[1].init)(jax.random.key(0), image)

    def calls(count, size):
        share = -(-size // count)
        some = jnp.asarray(dataset.train_images[jnp.arange(count * share) % size])
        batch = normalise(some, dataset.mean, dataset.std)
        cotangent = np.random.default_rng(1).standard_normal((count * share, dataset.num_classes), np.float32) / size
        forward, backward = _passes(models[count], across=count > 1)
        return (forward, (batch,)), (backward, (batch, cotangent))

    yield from _timed(variables, calls, sizes, method, rounds)


def measure_task_cost(task: jb.Task, sizes: Mapping[int, Sequence[int]], method: str, rounds: int) -> Iterator[Record]:
    """:func:`measure_cost` of a task of the user's own: what is timed is its loss function, and the gradient of the mean loss."""
    params, has_aux = init_state(task, optax.sgd(0.0), 0).params, task.update_model_state is not None

    def calls(count, size):
        index = jnp.arange(count * -(-size // count)) % size
        batch = jax.tree.map(lambda leaf: leaf[index], task.train_data)

        def forward(params, batch):
            return losses_and_aux(task.loss_fn, params, batch, has_aux)[0]

        def backward(params, batch):
            gradient = jax.grad(lambda params: totals(forward(params, batch)).sum() / size)(params)
            return jax.lax.psum(gradient, AXIS) if count > 1 else gradient

        return (forward, (batch,)), (backward, (batch,))

    yield from _timed(params, calls, sizes, method, rounds)


def _timed(params, calls: Callable, sizes: Mapping[int, Sequence[int]], method: str, rounds: int) -> Iterator[Record]:
    """Times what ``calls(devices, batch size)`` returns: forward and backward, each with its arguments after ``params``."""
    contenders, pairs = {}, [(count, size) for count in sizes for size in sizes[count]]
    for count, size in pairs:
        share = -(-size // count)
        for name, (function, arguments) in zip(("forward", "both"), calls(count, size), strict=True):
            if count > 1:
                split = jax.tree.map(lambda leaf, shape=(count, share): leaf.reshape(*shape, *leaf.shape[1:]), arguments)
                function, put = over_devices(
                    function, jax.devices()[:count], method, (False, *(True for _ in split)), outputs_split=name == "forward"
                )
                arguments = put(params, *split)
            else:
                function, arguments = jax.jit(function), (params, *arguments)
            program = function.lower(*arguments).compile()
            contenders[name, count, size] = lambda program=program, arguments=arguments: program(*arguments)
    for number, times in enumerate(timed_rounds(contenders, rounds)):
        for count, size in pairs:
            both, alone = times["both", count, size], times["forward", count, size]
            key_fields = {"kind": "cost", "round": number, "devices": count, "batch_size": size}
            yield key_fields | {"forward_ms": alone, "backward_ms": both - alone}


def _passes(model, across: bool):
    """``forward(variables, images)`` and the gradient of its product with a cotangent, summed over devices if ``across``."""

    def forward(variables, images):
        stateful = {"train": True, "mutable": ["batch_stats"]} if "batch_stats" in variables else {}
        outputs = model.apply(variables, images, **stateful)
        return outputs[0] if stateful else outputs

    def backward(variables, images, cotangent):
        product = lambda params: (forward({**variables, "params": params}, images) * cotangent).sum()
        gradient = jax.grad(product)(variables["params"])
        return jax.lax.psum(gradient, AXIS) if across else gradient

    return forward, backward
