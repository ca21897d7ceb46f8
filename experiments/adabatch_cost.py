"""What a network's forward and backward passes cost at each batch size, on one device and on several."""

from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp

import jaxbatch as jb
from jaxbatch.augment import normalise
from jaxbatch.machine.timing import timed_rounds
from jaxbatch.results.records import Record
from jaxbatch.training.devices import AXIS, over_devices


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
    contenders, pairs = {}, [(count, size) for count in sizes for size in sizes[count]]
    image = normalise(jnp.asarray(dataset.train_images[:1]), dataset.mean, dataset.std)
    variables = jax.jit(models[1].init)(jax.random.key(0), image)
    for count, size in pairs:
        share = -(-size // count)
        some = jnp.asarray(dataset.train_images[jnp.arange(count * share) % size])
        batch = normalise(some, dataset.mean, dataset.std)
        cotangent = jax.random.normal(jax.random.key(1), (count * share, dataset.num_classes)) / size
        forward, backward = _passes(models[count], across=count > 1)
        for name, function, arguments in (("forward", forward, (batch,)), ("both", backward, (batch, cotangent))):
            if count > 1:
                split = [leaf.reshape(count, share, *leaf.shape[1:]) for leaf in arguments]
                function, place = over_devices(
                    function, jax.devices()[:count], method, (False, *(True for _ in split)), outputs_split=name == "forward"
                )
                arguments = place(variables, *split)
            else:
                function, arguments = jax.jit(function), (variables, *arguments)
            program = function.lower(*arguments).compile()
            contenders[name, count, size] = lambda program=program, arguments=arguments: program(*arguments)
    for number, times in enumerate(timed_rounds(contenders, rounds)):
        for count, size in pairs:
            both, alone = times["both", count, size], times["forward", count, size]
            place = {"kind": "cost", "round": number, "devices": count, "batch_size": size}
            yield place | {"forward_ms": alone, "backward_ms": both - alone}


def _passes(model, across: bool):
    """``forward(variables, images)`` and the gradient of its product with a cotangent, summed over devices if ``across``."""

    def forward(variables, images):
        stateful = {"train": True, "mutable": ["batch_stats"]} if "batch_stats" in variables else {}
        found = model.apply(variables, images, **stateful)
        return found[0] if stateful else found

    def backward(variables, images, cotangent):
        product = lambda params: (forward({**variables, "params": params}, images) * cotangent).sum()
        gradient = jax.grad(product)(variables["params"])
        return jax.lax.psum(gradient, AXIS) if across else gradient

    return forward, backward
