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

from jaxbatch.batches import even_part
from jaxbatch.data.streaming import prefetch
from jaxbatch.data.streams import Stream, is_stream
from jaxbatch.gradients.accumulation import mean_over, summed_gradient
from jaxbatch.gradients.groups import check_num_groups
from jaxbatch.gradients.part_norms import NoiseMonitor, WithNoise, add_spread, norms_of, start_sums, statistics_of_parts
from jaxbatch.gradients.updates import Optimizer
from jaxbatch.machine.compiling import compile_ahead
from jaxbatch.states import through_host
from jaxbatch.sums import add, mean_of_sum, zero_sum
from jaxbatch.training.devices import AXIS, Parallel, over_devices, share_batches
from jaxbatch.training.layouts import lay_out_part, prepared
from jaxbatch.training.loops import as_seed_epoch, stack_on_host
from jaxbatch.training.loss_shapes import task_has_weights
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


def parts_of_group(group_size: int, microbatch_size: int | None, num_devices: int) -> int:
    """The number of examples, over all devices, in each part of a group but a last one that is not full.

    Example:
        >>> parts_of_group(12, 2, 2), parts_of_group(12, None, 2)
        (4, 12)
    """
    return even_part(group_size, min(group_size, num_devices * (microbatch_size or group_size)))


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
    check_num_groups(num_groups, batch_size)
    devices = jax.devices()[:1] if devices is None else devices
    count, group_size, streamed = len(devices), batch_size // num_groups, is_stream(task.train_data)
    size = parts_of_group(group_size, microbatch_size, count)
    weighted = task_has_weights(task, state.params, -(-size // count), count)
    settings: dict[str, Any] = {"monitor": monitor, "num_groups": num_groups, "weighted": weighted}
    pieces = make_pieces(task, optimizer, group_size, axis=AXIS if count > 1 else None, **settings)
    starts, totals = range(0, group_size, size), jax.eval_shape(pieces.begin, state)

    begin, whole = over_devices(pieces.begin, devices, method, (False,))
    finish, _ = over_devices(pieces.finish, devices, method, (False, False), donate=(0,) if num_groups == 1 else ())
    begin = compile_ahead(begin, state, devices=devices)
    finish = compile_ahead(finish, state, totals, devices=devices)
    adds, example = {}, task.train_data.example if streamed else task.train_data
    for length in {size, group_size % size} - {0}:
        laid = lay_out_part(pieces.add, totals, state.params, example, length, count, streamed=streamed)
        add_part, deal = over_devices(laid.function, devices, method, laid.places(laid.split), donate=laid.numbers(laid.donate))
        adds[length] = compile_ahead(add_part, *laid.arguments.values(), devices=devices)

    def run(state, data, indices, seed_epoch=(0, 0)):
        indices, (seed_epoch,) = np.asarray(indices, np.int32), as_seed_epoch(seed_epoch)
        losses, behind = [], collections.deque()
        cut = lambda: _cut_shares(indices.reshape(-1, group_size), size, count)
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
                    total, part_loss = adds[length](total, start, *part, seed_epoch)
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
    if not isinstance(results[0][0], WithNoise):
        return _mean_of_groups(results)
    losses = _mean_of_groups([[group.losses for group in groups] for groups in results])
    return WithNoise(losses, stack_on_host([groups[-1].noise for groups in results]))


def _mean_of_groups(losses: list[list]) -> Array:
    if not isinstance(losses[0][0], Weighted):
        return jnp.asarray(np.array(losses).mean(1))
    total, weight = np.array(losses).sum(1).T
    return jnp.asarray(total / np.where(weight == 0, 1, weight))


def _cut_shares(groups: np.ndarray, size: int, count: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields each part's length, and its indices and mask as split over ``count`` devices."""
    for group in groups:
        for start in range(0, len(group), size):
            shares, mask = share_batches(group[None, start : start + size], count)
            lead = shares.shape[2:] if count == 1 else (count, -1)
            yield len(group[start : start + size]), shares.reshape(lead), mask.reshape(lead)


def _decoded_parts(stream: Stream, cut: Callable[[], Iterator], seed_epoch: tuple[int, int], deal: Callable) -> Iterator[tuple[int, tuple]]:
    """Yields the parts of a stream; another thread decodes them and moves them to the devices."""

    def put(item):
        examples, (length, shares, mask) = item
        examples = jax.tree.map(lambda leaf: leaf.reshape(*shares.shape, *leaf.shape[1:]), examples)
        return length, deal(None, None, examples, shares, mask)[2:]

    flat = (shares.reshape(-1) for _, shares, _ in cut())
    yield from prefetch(zip(stream.parts(flat, seed_epoch), cut(), strict=True), put=put)
