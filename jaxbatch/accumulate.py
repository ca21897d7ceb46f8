"""A batch larger than the device holds: gradients summed over microbatches by a Python loop, then one update.

For networks on XLA's convolutions, which are slow inside compiled loops on CPU, and for examples that come in a stream;
everything else accumulates in a compiled loop within the step (:func:`jaxbatch.make_train_step` with ``microbatch_size``).
The numbers are the same.

Axes: S steps, B examples in a batch, N devices.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxbatch.augment import example_keys
from jaxbatch.batches import even_part
from jaxbatch.compiling import compile_ahead
from jaxbatch.groups import losses_and_aux
from jaxbatch.layers import own_examples
from jaxbatch.loops import as_place
from jaxbatch.parallel import AXIS, Method, count_own, mean_over_devices, over_devices, share_batches
from jaxbatch.states import through_host
from jaxbatch.streaming import prefetch
from jaxbatch.sums import add as add_part
from jaxbatch.sums import mean_of_sum, widen, zero_sum
from jaxbatch.tasks import Task
from jaxbatch.train import TrainState, apply_gradient
from jaxbatch.updates import Optimizer

_IN_FLIGHT = 2  # parts that the host may be ahead of the device


class Accumulation(NamedTuple):
    """An update in pieces: ``begin(state)``, ``add(total, params, examples, index, mask, place)`` for each part, ``finish(state, total)``."""

    begin: Callable[..., Any]
    add: Callable[..., Any]  # -> (total, the part's summed loss)
    finish: Callable[..., Any]  # -> (state, mean loss)


def make_accumulation(
    task: Task, optimizer: Optimizer, batch_size: int, *, over_axis: bool = False
) -> Accumulation:
    """The pieces, as pure functions.

    Args:
        task: of which loss, model state and ``prepare`` are used.
        optimizer: any optax optimizer.
        batch_size: B, over all parts and devices.
        over_axis: whether ``add`` runs on several devices along :data:`jaxbatch.parallel.AXIS`, each with its share.
    """
    has_aux = task.update_model_state is not None

    def begin(state):
        return zero_sum(state.params), state.model_state, jnp.zeros(())

    def add(total, params, examples, index, mask=None, place=None):
        summed, model_state, loss = total
        if task.prepare is not None:
            examples = task.prepare(example_keys(place[0], place[1], index), examples)

        def loss_sum(p):
            with own_examples(mask):
                losses, aux = losses_and_aux(task.loss_fn, p, examples, has_aux)
            return widen(losses if mask is None else jnp.where(mask, losses, 0)).sum(), aux

        (found, aux), gradient = jax.value_and_grad(loss_sum, has_aux=True)(params)
        if over_axis:
            (found, gradient), aux = lax.psum((found, widen(gradient)), AXIS), mean_over_devices(aux, count_own(mask))
        model_state = task.update_model_state(model_state, aux) if has_aux else model_state
        return (add_part(summed, gradient), model_state, loss + found), found

    def finish(state, total):
        summed, model_state, loss = total
        loss, gradient = loss / batch_size, mean_of_sum(summed, batch_size, state.params)
        return apply_gradient(state, optimizer, gradient, model_state, loss), loss

    return Accumulation(begin, add, finish)


def compile_accumulating_epoch(
    task: Task, optimizer: Optimizer, state: Any, batch_size: int, microbatch_size: int
) -> Callable[..., tuple[TrainState, Array]]:
    """Steps on batches of ``batch_size`` in the memory of ``microbatch_size``, compiled here and now.

    The last microbatch of a batch counts by its number of examples, so the gradient is that of the batch's mean loss.
    Batch normalisation takes the moments of a microbatch, and the running ones are updated by each in turn.

    Args:
        task: as :func:`jaxbatch.fit` takes it.
        optimizer: any optax optimizer; one update a batch.
        state: of which only shapes are used.
        batch_size: B.
        microbatch_size: examples on the device at a time, at most.

    Returns:
        ``run(state, data, indices) -> (state, losses)``, as :func:`jaxbatch.compile_epoch`; with ``task.prepare`` it takes
        ``[seed, epoch]`` beside. The incoming state's memory is reused.
    """
    begin, add, finish = make_accumulation(task, optimizer, batch_size)
    size = even_part(batch_size, microbatch_size)

    def take_and_add(total, params, data, index, place=None):
        return add(total, params, jax.tree.map(lambda leaf: leaf[index], data), index, place=place)[0]

    shapes = jax.eval_shape(begin, state)
    begin = compile_ahead(jax.jit(begin), state)
    finish = compile_ahead(jax.jit(finish, donate_argnums=0), state, shapes)
    place = () if task.prepare is None else (jax.ShapeDtypeStruct((2,), jnp.uint32),)
    adds = {}
    for count in {size, batch_size % size} - {0}:
        wanted = (shapes, state.params, _shapes(task.train_data), jax.ShapeDtypeStruct((count,), jnp.int32), *place)
        adds[count] = compile_ahead(jax.jit(take_and_add, donate_argnums=0), *wanted)

    def run(state, data, indices, *place):
        losses, place = [], as_place(*place)
        for index in np.asarray(indices):
            total = begin(state)
            for start in range(0, batch_size, size):
                part = index[start : start + size]
                total = adds[len(part)](total, state.params, data, part, *place)
            state, loss = finish(state, total)
            losses.append(loss)  # a promise: nothing is waited for here
        return state, jnp.asarray(np.array(jax.device_get(losses)))

    return run


def compile_streamed_epoch(
    task: Task,
    optimizer: Optimizer,
    state: Any,
    batch_size: int,
    microbatch_size: int | None,
    devices: Sequence[jax.Device],
    *,
    method: Method = "jit",
) -> Callable[..., tuple[TrainState, Array]]:
    """:func:`compile_accumulating_epoch` for data that come in a stream, on one device or several.

    Parts are decoded and moved to the devices while they work on those before; what is ahead is bounded, so memory is
    that of a few parts whatever the batch size.

    Args:
        task: whose ``train_data`` are a :class:`jaxbatch.streams.Stream`.
        optimizer, state: as there.
        batch_size: B, over all devices.
        microbatch_size: examples on each device at a time, at most; ``None``: its whole share.
        devices: N of them.
        method: see :func:`jaxbatch.parallel.over_devices`.

    Returns:
        ``run(state, stream, indices, place) -> (state, losses)``.
    """
    count = len(devices)
    size = even_part(batch_size, min(batch_size, count * (microbatch_size or batch_size)))
    sums = make_accumulation(task, optimizer, batch_size, over_axis=count > 1)
    totals = jax.eval_shape(sums.begin, state)

    lengths = {size, batch_size % size} - {0}

    def adding(length):
        filled_up = length % count > 0  # then some slots hold no example of their own

        def add_share(total, params, examples, index, mask, place):
            return sums.add(total, params, examples, index, mask if filled_up else None, place)

        return add_share

    def on_devices(function, split, donate=()):
        if count == 1:
            return jax.jit(function, donate_argnums=donate), lambda *arguments: jax.device_put(arguments)
        # pmap wants something that is dealt out; what is whole on all devices is an array like any other.
        return over_devices(function, devices, method if any(split) else "jit", split, donate=donate)

    dealt = (True, True, True)
    begin, whole = on_devices(sums.begin, (False,))
    finish, _ = on_devices(sums.finish, (False, False), donate=(0,))
    _, deal = on_devices(sums.add, dealt)
    begin, finish = compile_ahead(begin, state), compile_ahead(finish, state, totals)
    place = jax.ShapeDtypeStruct((2,), jnp.uint32)
    adds = {}
    for length in lengths:
        lead = (length,) if count == 1 else (count, -(-length // count))
        examples = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype), task.train_data.example)
        kinds = (jax.ShapeDtypeStruct(lead, dtype) for dtype in (jnp.int32, jnp.bool_))
        add, _ = on_devices(adding(length), (False, False, *dealt, False), donate=(0,))
        adds[length] = compile_ahead(add, totals, state.params, examples, *kinds, place)

    def cut(indices):
        """Each part's length, with indices and mask as the devices are dealt them."""
        for index in indices:
            for start in range(0, batch_size, size):
                part = index[start : start + size]
                shares, mask = share_batches(part[None], count)
                yield len(part), shares[:, 0], mask[:, 0]

    def run(state, stream, indices, place):
        indices, (place,) = np.asarray(indices, np.int32), as_place(place)
        flat = (shares.reshape(-1) for _, shares, _ in cut(indices))

        def put(examples, shares, mask):
            lead = shares.shape[1:] if count == 1 else shares.shape
            return deal(*jax.tree.map(lambda leaf: leaf.reshape(*lead, *leaf.shape[1:]), (examples, shares.reshape(-1), mask.reshape(-1))))

        decoded = zip(stream.parts(flat, tuple(place.tolist())), cut(indices), strict=True)
        ready = prefetch(((examples, *rest) for examples, rest in decoded), put=lambda item: (item[1], put(item[0], *item[2:])))
        losses, behind = [], collections.deque()
        (state,) = whole(state)
        for _ in indices:
            total = begin(state)
            for _ in range(0, batch_size, size):
                length, part = next(ready)
                total, found = adds[length](total, state.params, *part, place)
                behind.append(found)
                if len(behind) > _IN_FLIGHT:  # or the host would pile up parts that the device has not come to
                    jax.block_until_ready(behind.popleft())
            state, loss = finish(state, total)
            losses.append(loss)
        return through_host(state) if count > 1 else state, jnp.asarray(np.array(jax.device_get(losses)))

    return run


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
