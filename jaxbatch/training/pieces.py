"""Runs a step in pieces: a Python loop sums gradients over parts of a batch, then comes an update.

This is for data in a stream. It is also for large batches through networks with XLA's convolutions, which are slow inside
compiled loops on CPU. All other tasks accumulate in a compiled loop within the step (:func:`jaxbatch.make_train_step` with
``microbatch_size``). The numbers are the same.

Axes: S steps, B examples in a batch, K groups, N devices.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxbatch.augment import prepared
from jaxbatch.batches import even_part
from jaxbatch.data.streaming import prefetch
from jaxbatch.data.streams import Stream, is_stream
from jaxbatch.gradients.accumulation import mean_over, summed_gradient
from jaxbatch.gradients.groups import has_weights
from jaxbatch.gradients.part_norms import NoiseMonitor, WithNoise, add_spread, norms_of, start_sums, statistics_of_parts
from jaxbatch.gradients.updates import Optimizer
from jaxbatch.states import through_host
from jaxbatch.sums import add, mean_of_sum, zero_sum
from jaxbatch.training.devices import AXIS, Parallel, alone, share_parts
from jaxbatch.training.layouts import Layout, shapes_of
from jaxbatch.training.loops import as_seed_epoch, stack_on_host
from jaxbatch.training.steps import TrainState, apply_gradient
from jaxbatch.training.tasks import Task
from jaxbatch.weighted import Weighted, divisor, sum_losses, totals

_IN_FLIGHT = 2  # parts of a stream that the host may be ahead of the device


class Pieces(NamedTuple):
    """The pieces of an update, as pure functions."""

    begin: Callable[[TrainState], PyTree]  # -> total
    add: Callable[..., tuple[PyTree, Array]]  # (total, params, data, index, mask, seed_epoch) -> (total, the part's summed loss)
    finish: Callable[[TrainState, PyTree], tuple[TrainState, Any]]  # -> (state, mean loss)


def make_pieces(
    task: Task,
    optimizer: Optimizer,
    group_size: int,
    *,
    axis: str | None = None,
    monitor: NoiseMonitor | None = None,
    num_groups: int = 1,
    weighted: bool = False,
) -> Pieces:
    """The pieces of an update from the gradient of ``group_size`` examples, over all parts and devices.

    With ``weighted`` the task's losses are :class:`Weighted`, and so is the loss that ``finish`` returns: summed, not divided.
    ``data`` are the examples of a part if the task has a stream, else the whole training set on the device. With ``monitor``,
    ``finish`` returns a :class:`WithNoise` and the noise's sums so far, which the next of the batch's K groups starts from.
    """
    has_aux, streamed = task.update_model_state is not None, is_stream(task.train_data)

    def begin(state):
        sums = None if monitor is None else start_sums(monitor, state.params, state.opt_state, state.step // num_groups, weighted)
        loss = Weighted(jnp.zeros(()), jnp.zeros(())) if weighted else jnp.zeros(())
        return zero_sum(state.params), state.model_state, loss, sums

    def add_part(total, params, data, index, mask, seed_epoch):
        gradient, model_state, loss, sums = total
        examples = prepared(task.prepare, data if streamed else jax.tree.map(lambda leaf: leaf[index], data), seed_epoch, index)
        norms = norms_of(monitor, sums)
        part, losses, (aux, own, spread) = summed_gradient(task.loss_fn, params, examples, mask=mask, has_aux=has_aux, norms=norms)
        part_loss = sum_losses(losses)
        if axis is not None:
            (part_loss, part, spread), aux = lax.psum((part_loss, part, spread), axis), mean_over(axis, aux, own)
        model_state = task.update_model_state(model_state, aux) if has_aux else model_state
        sums = None if monitor is None else add_spread(sums, spread)
        return (add(gradient, part), model_state, jax.tree.map(jnp.add, loss, part_loss), sums), part_loss

    def finish(state, total):
        gradient, model_state, loss, sums = total
        whole = divisor(loss, group_size)
        mean, gradient = totals(loss) / whole, mean_of_sum(gradient, whole, state.params)
        state = apply_gradient(state, optimizer, gradient, model_state, mean)
        loss = loss if weighted else mean
        if monitor is None:
            return state, loss
        sums = sums._replace(gradient=add(sums.gradient, total[0]))
        noise = statistics_of_parts(monitor, sums, group_size * num_groups)
        return state, (WithNoise(loss, noise), None if num_groups == 1 else sums)

    return Pieces(begin, add_part, finish)


class PieceLayouts(NamedTuple):
    """The programs of an update in pieces."""

    size: int  # examples, over all devices, in each part of a group but a last one that is not full
    begin: Layout
    adds: dict[int, Layout]  # by the number of examples in a part
    finish: Layout


def lay_out_pieces(
    task: Task,
    optimizer: Optimizer,
    state: TrainState,
    group_size: int,
    *,
    num_groups: int = 1,
    microbatch_size: int | None = None,
    num_devices: int = 1,
    monitor: NoiseMonitor | None = None,
) -> PieceLayouts:
    """The programs of the pieces of :func:`make_pieces`; of ``state`` only the shapes are used.

    Example:
        >>> import optax
        >>> from jaxbatch.training.steps import state_shapes
        >>> task = Task(lambda key: jnp.zeros(()), lambda w, x: (x - w) ** 2, None, jnp.ones(40), None)
        >>> laid = lay_out_pieces(task, optax.sgd(0.1), state_shapes(task, optax.sgd(0.1)), 10, microbatch_size=2, num_devices=2)
        >>> laid.size, laid.adds[4].arguments["index"].shape, {length: layout.split for length, layout in laid.adds.items()}
        (4, (2, 2), {4: ('batch', 'index', 'mask'), 2: ('batch', 'index', 'mask')})
    """
    data, several = task.train_data, num_devices > 1
    size = even_part(group_size, min(group_size, num_devices * (microbatch_size or group_size)))
    loss_fn = alone(task.loss_fn) if several else task.loss_fn
    weighted = has_weights(loss_fn, state.params, task.shapes_of_batch(-(-size // num_devices)), task.update_model_state is not None)
    over: dict[str, Any] = {"monitor": monitor, "num_groups": num_groups, "weighted": weighted}
    pieces = make_pieces(task, optimizer, group_size, axis=AXIS if several else None, **over)
    totals, donated = jax.eval_shape(pieces.begin, state), ("state",) if num_groups == 1 else ()

    def add(length: int) -> Layout:
        lead = (num_devices, -(-length // num_devices)) if several else (length,)
        of_part = lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype)
        examples = {"batch": jax.tree.map(of_part, data.example)} if is_stream(data) else {"data": shapes_of(data)}
        of_slots = {"index": jax.ShapeDtypeStruct(lead, jnp.int32), "mask": jax.ShapeDtypeStruct(lead, jnp.bool_)}
        of_all = {"seed_epoch": jax.ShapeDtypeStruct((2,), jnp.uint32)}
        # If the number of devices divides the length, there are no fillers and no mask is needed.
        without_mask = lambda total, params, data, index, mask, seed_epoch: pieces.add(total, params, data, index, None, seed_epoch)
        function = pieces.add if length % num_devices else without_mask
        return Layout(function, {"total": totals, "params": state.params} | examples | of_slots | of_all, ("total",), ("batch", "index", "mask"))

    return PieceLayouts(
        size,
        Layout(pieces.begin, {"state": state}, (), ()),
        {length: add(length) for length in (size, group_size % size) if length},
        Layout(pieces.finish, {"state": state, "total": totals}, donated, ()),
    )


def compile_epoch_in_pieces(
    task: Task,
    optimizer: Optimizer,
    state: Any,
    batch_size: int,
    microbatch_size: int | None,
    *,
    devices: Sequence[jax.Device] | None = None,
    method: Parallel = "jit",
    num_groups: int = 1,
    monitor: NoiseMonitor | None = None,
) -> Callable[..., tuple[TrainState, Any]]:
    """Compiles steps on batches of ``batch_size`` that only need the memory of ``microbatch_size`` examples.

    A part counts by its number of examples, so the gradient is that of the mean loss of the batch or group. Batch
    normalisation takes the moments of a part, and each part in turn updates the running moments. While the devices work on
    one part of a stream, the next ones are decoded and moved to them. The number of parts ahead is bounded, so that memory is
    that of a few parts, whatever the batch size.

    Args:
        task: as :func:`jaxbatch.fit` takes it.
        optimizer: any optax optimizer; it makes K updates per batch.
        state: only its shapes are used.
        batch_size: B, over all devices.
        microbatch_size: the most examples on each device at a time; ``None``: its whole share.
        devices: the devices that share every part; ``None``: the default device.
        method: see :func:`jaxbatch.training.devices.over_devices`.
        num_groups: K, the updates per batch, each from a group's gradient at the parameters before the batch.
        monitor: see :func:`jaxbatch.make_train_step`.

    Returns:
        ``run(state, data, indices, [seed, epoch]) -> (state, losses)``. The last argument may be left out if nothing is
        random. The incoming state's memory is reused, unless K updates need it.
    """
    devices = jax.devices()[:1] if devices is None else devices
    count, group_size, streamed = len(devices), batch_size // num_groups, is_stream(task.train_data)
    over: dict[str, Any] = {"num_groups": num_groups, "microbatch_size": microbatch_size, "num_devices": count, "monitor": monitor}
    laid = lay_out_pieces(task, optimizer, state, group_size, **over)
    (begin, whole), (finish, _) = (layout.compile(devices, method) for layout in (laid.begin, laid.finish))
    compiled = {length: layout.compile(devices, method) for length, layout in laid.adds.items()}
    deal, starts = compiled[laid.size][1], range(0, group_size, laid.size)

    def run(state, data, indices, seed_epoch=(0, 0)):
        indices, (seed_epoch,) = np.asarray(indices, np.int32), as_seed_epoch(seed_epoch)
        losses, behind = [], collections.deque()
        cut = lambda: share_parts(indices.reshape(-1, group_size), laid.size, count)
        if streamed:
            ready = _decoded_parts(data, cut, tuple(seed_epoch.tolist()), deal)
        else:
            on_devices = data if count == 1 else deal(None, None, data)[2]
            ready = ((length, (on_devices, *part)) for length, *part in cut())
        (state,) = whole(state)
        for _ in indices:
            start, of_batch, sums = state.params, [], None
            for _ in range(num_groups):
                total = begin(state)
                if sums is not None:  # the noise is that of the whole batch, in the metric of its start
                    total = (*total[:3], sums)
                for _ in starts:
                    length, part = next(ready)
                    total, part_loss = compiled[length][0](total, start, *part, seed_epoch)
                    behind.append(part_loss)
                    if streamed and len(behind) > _IN_FLIGHT:  # otherwise waiting parts would fill the host's memory
                        jax.block_until_ready(behind.popleft())
                state, loss = finish(state, total)
                if monitor is not None:
                    loss, sums = loss
                of_batch.append(loss)  # computed asynchronously: this does not wait
            losses.append(of_batch)
        return through_host(state) if count > 1 else state, _of_batches(losses)

    return run


def _of_batches(results: list[list]) -> Any:
    """From the groups of S batches: the mean losses of the batches, and the noise, which is complete after the last group."""
    results = jax.device_get(results)
    if isinstance(results[0][0], WithNoise):
        losses = _of_batches([[group.losses for group in groups] for groups in results])
        return WithNoise(losses, stack_on_host([groups[-1].noise for groups in results]))
    if isinstance(results[0][0], Weighted):
        total, weight = np.array(results).sum(1).T
        return jnp.asarray(total / np.where(weight == 0, 1, weight))
    return jnp.asarray(np.array(results).mean(1))


def _decoded_parts(stream: Stream, cut: Callable[[], Iterator], seed_epoch: tuple[int, int], deal: Callable) -> Iterator[tuple[int, tuple]]:
    """Yields the parts of a stream; another thread decodes them and moves them to the devices."""

    def put(item):
        examples, (length, shares, mask) = item
        examples = jax.tree.map(lambda leaf: leaf.reshape(*shares.shape, *leaf.shape[1:]), examples)
        return length, deal(None, None, examples, shares, mask)[2:]

    flat = (shares.reshape(-1) for _, shares, _ in cut())
    yield from prefetch(zip(stream.parts(flat, seed_epoch), cut(), strict=True), put=put)
