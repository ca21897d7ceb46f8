"""Runs many steps: in one compiled loop, in a Python loop over a compiled step, or in one over the pieces of steps.

Inside a compiled loop XLA:CPU has no fast convolution (:func:`jaxbatch.layers.loops_are_slow`). So a network with such
convolutions runs several times faster in a Python loop. No loop waits for the host between steps.

Axes: S steps, B examples in a batch, K groups.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxbatch.augment import Prepare
from jaxbatch.data.streams import is_stream
from jaxbatch.gradients.cut import Cut
from jaxbatch.gradients.part_norms import NoiseMonitor, WithNoise
from jaxbatch.gradients.updates import Optimizer
from jaxbatch.kinds import checked
from jaxbatch.layers import loops_are_slow
from jaxbatch.states import through_host
from jaxbatch.sums import Weighted
from jaxbatch.training.devices import Parallel, decode_parts, put_once, share_batches, share_parts
from jaxbatch.training.layouts import Layout, Step, check_indices, lay_out_step, one_step
from jaxbatch.training.pieces import lay_out_pieces
from jaxbatch.training.tasks import Task
from jaxbatch.training.train_state import TrainState

Loop = Literal["scan", "python"]
_IN_FLIGHT = 2  # parts of a stream that the host may be ahead of the device


@checked
def make_epoch(step: Step, prepare: Prepare | None = None, *, by_part: bool = False) -> Callable[..., tuple[Any, Array]]:
    """Makes one compiled program of any number of steps over data on the device.

    Args:
        step: ``(state, batch) -> (state, losses)``.
        prepare: changes a batch before the step, for example augments it: ``(keys, batch) -> batch``, with one key for each
            example (:func:`jaxbatch.augment.example_keys`). Then ``run`` takes a fourth argument, the array ``[seed, epoch]``.
        by_part: whether the step takes its examples itself, part by part, as one of :func:`jaxbatch.make_train_step` can. Then
            only a part of a batch is in memory, and ``prepare`` gets parts.

    Returns:
        ``run(state, data, indices) -> (state, losses)``: ``indices`` ``(S, B)`` say which examples go into
        which batch; ``losses`` ``(S,)`` are the batches' mean losses before each step, and with :class:`jaxbatch.Weighted` losses their
        totals and weights. The incoming state's memory is reused for the outgoing one: do not use it again.

    Example:
        >>> import optax
        >>> from jaxbatch import TrainState, make_train_step
        >>> step = make_train_step(lambda w, x: 0.5 * (x - w) ** 2, optax.sgd(0.5), batch_size=1)
        >>> state = TrainState(jnp.array(0.0), optax.sgd(0.5).init(0.0), jnp.array(0))
        >>> state, losses = make_epoch(step)(state, jnp.array([2.0, 6.0]), jnp.array([[1], [0]]))
        >>> float(state.params), losses.tolist()
        (2.5, [18.0, 0.5])
    """

    def steps(state, data, indices, seed_epoch=None):
        return lax.scan(lambda state, index: one_step(step, prepare, state, data, index, seed_epoch, by_part=by_part), state, indices)

    def run(state, data, indices, seed_epoch=None):
        check_indices(indices, data)
        return compiled(state, data, indices, seed_epoch)

    compiled = jax.jit(steps, donate_argnums=0)
    run.lower = compiled.lower  # type: ignore[attr-defined]  # as of what jax.jit returns
    return run


def stack_on_host(results: list) -> Any:
    """The results of S batches, stacked to leaves ``(S, ...)``; the host waits for the last.

    Example:
        >>> stack_on_host([jnp.array(1.0), jnp.array(2.0)])
        Array([1., 2.], dtype=float32)
    """
    return jax.tree.map(lambda *leaves: jnp.asarray(np.array(leaves)), *jax.device_get(results))


def choose_loop(one: Layout, devices: Sequence[jax.Device], parallel: Parallel) -> Loop:
    """``"python"`` where the program of a step has a convolution that is slow inside compiled loops, else ``"scan"``.

    Example:
        >>> one = lay_out_step(lambda state, batch: (state, batch), jnp.array(0.0), jnp.ones((8, 2)), Cut(4))
        >>> choose_loop(one, jax.devices()[:1], "jit")
        'scan'
    """
    return "python" if loops_are_slow(one.over(devices, parallel)[0], *one.arguments.values()) else "scan"


@checked
def compile_epoch(
    step: Step,
    state: Any,
    data: PyTree,
    num_steps: int,
    batch_size: int,
    *,
    prepare: Prepare | None = None,
    loop: Loop | None = None,
    devices: Sequence[jax.Device] | None = None,
    parallel: Parallel = "jit",
    num_groups: int = 1,
    by_part: bool = False,
) -> Callable[..., tuple[Any, Array]]:
    """Does what :func:`make_epoch` does, but compiles at once, for ``num_steps`` batches, with the fastest kind of loop.

    Args:
        step: ``(state, batch) -> (state, losses)``; on several devices ``(state, share, mask) -> (state, loss)`` along
            :data:`jaxbatch.training.devices.AXIS`, see :func:`jaxbatch.make_train_step`.
        state: only its shapes are used.
        data: leaves ``(N, ...)``; only their shapes are used. Each device gets all of the data.
        num_steps: S; a Python loop accepts any other S too.
        batch_size: B, over all devices.
        prepare: see :func:`make_epoch`.
        loop: ``"scan"``, ``"python"``, or ``None`` for :func:`choose_loop`.
        devices: the devices that share every batch; ``None``: the default device.
        parallel: how devices are used, see :func:`jaxbatch.training.devices.over_devices`.
        num_groups: K, if the step makes K updates from groups that the devices share.
        by_part: see :func:`make_epoch`.

    Returns:
        ``run(state, data, indices) -> (state, losses)``, as from :func:`make_epoch`. With ``prepare`` it also takes ``[seed, epoch]``.

    Raises:
        ValueError: ``loop`` or ``parallel`` is unknown, or there is no device.
    """
    devices = jax.devices()[:1] if devices is None else devices
    if (count := len(devices)) < 1:
        raise ValueError("devices is empty: at least 1 is needed.")
    cut = Cut(batch_size, num_groups, count, by_part=by_part)
    check_indices((), data)
    one = lay_out_step(step, state, data, cut, prepare=prepare)
    loop = loop or choose_loop(one, devices, parallel)
    if loop not in ("scan", "python"):
        raise ValueError(f"loop={loop!r} must be 'scan', 'python' or None.")
    laid = one if loop == "python" else lay_out_step(step, state, data, cut, prepare=prepare, num_steps=num_steps)
    program, put_on_all = laid.compile(devices, parallel)
    put_data = put_once(lambda data: put_on_all(data)[0])

    def run(state, data, indices, seed_epoch=None):
        seed_epoch = None if prepare is None else np.asarray(seed_epoch, np.uint32)
        check_indices(indices, data)
        index, mask = np.asarray(indices, np.int32), None
        if count > 1:
            data, (state,) = put_data(data), put_on_all(state)
            index, mask = share_batches(index, count, num_groups)
        if loop == "scan":
            state, losses = program(state, data, index, mask, seed_epoch)
        else:
            losses = []
            for number in range(len(indices)):
                batch = (index[number], None) if count == 1 else (index[:, number], mask[:, number])
                state, loss = program(state, data, *batch, seed_epoch)
                losses.append(loss)  # computed asynchronously: this does not wait
            losses = stack_on_host(losses)
        return (through_host(state), through_host(losses)) if count > 1 else (state, losses)

    run.any_length = loop == "python"  # type: ignore[attr-defined]  # whether it takes any other number of batches, too
    return run


def compile_epoch_in_pieces(
    task: Task,
    optimizer: Optimizer,
    state: Any,
    cut: Cut,
    *,
    devices: Sequence[jax.Device] | None = None,
    parallel: Parallel = "jit",
    monitor: NoiseMonitor | None = None,
) -> Callable[..., tuple[TrainState, Any]]:
    """Compiles steps on batches that only need the memory of a part of one.

    A part counts by its number of examples, so the gradient is that of the mean loss of the batch or group. Batch normalisation takes the
    moments of a part, and each part in turn updates the running moments. While the devices work on one part of a stream, the next ones are
    decoded and moved to them. The number of parts ahead is bounded, so that memory is that of a few parts, whatever the batch size.

    Args:
        task: as :func:`jaxbatch.fit` takes it.
        optimizer: any optax optimizer; it makes K updates per batch.
        state: only its shapes are used.
        cut: how batches are cut; each of K updates takes a group's gradient at the parameters before the batch.
        devices: the devices that share every part; ``None``: the default device.
        parallel: see :func:`jaxbatch.training.devices.over_devices`.
        monitor: see :func:`jaxbatch.make_train_step`.

    Returns:
        ``run(state, data, indices, [seed, epoch]) -> (state, losses)``. The last argument may be left out if nothing is
        random. The incoming state's memory is reused, unless K updates need it.
    """
    devices = jax.devices()[:1] if devices is None else devices
    count, num_groups, group_size, streamed = cut.num_devices, cut.num_groups, cut.group_size, is_stream(task.train_data)
    laid, size = lay_out_pieces(task, optimizer, state, cut, monitor=monitor), max(cut.piece_lengths)
    (begin, put_on_all), (finish, _) = (layout.compile(devices, parallel) for layout in (laid.begin, laid.finish))
    compiled = {length: layout.compile(devices, parallel) for length, layout in laid.adds.items()}
    deal, starts = compiled[size][1], range(0, group_size, size)

    def run(state, data, indices, seed_epoch=(0, 0)):
        if not streamed:
            check_indices(indices, data)
        indices, seed_epoch = np.asarray(indices, np.int32), np.asarray(seed_epoch, np.uint32)
        losses, behind = [], collections.deque()
        parts = lambda: share_parts(indices.reshape(-1, group_size), size, count)
        if streamed:
            ready = decode_parts(data, parts, tuple(seed_epoch.tolist()), deal)
        else:
            on_devices = data if count == 1 else deal(None, None, data)[2]
            ready = ((length, (on_devices, *part)) for length, *part in parts())
        (state,) = put_on_all(state)
        for _ in indices:
            start, of_batch, carried = state.params, [], {}
            for _ in range(num_groups):
                total = begin(state) | carried  # the noise is that of the whole batch, in the metric of its start
                for _ in starts:
                    length, part = next(ready)
                    total, part_loss = compiled[length][0](total, start, *part, seed_epoch)
                    behind.append(part_loss)
                    if streamed and len(behind) > _IN_FLIGHT:  # otherwise waiting parts would fill the host's memory
                        jax.block_until_ready(behind.popleft())
                state, loss, carried = finish(state, total)
                of_batch.append(loss)  # computed asynchronously: this does not wait
            losses.append(of_batch)
        return through_host(state) if count > 1 else state, _of_batches(losses)

    run.any_length = True  # type: ignore[attr-defined]
    return run


def _of_batches(results: list[list]) -> Any:
    """From the groups of S batches: the losses of the batches, and the noise, which is complete after the last group."""
    results = jax.device_get(results)
    if isinstance(results[0][0], WithNoise):
        losses = _of_batches([[group.losses for group in groups] for groups in results])
        return WithNoise(losses, stack_on_host([groups[-1].noise for groups in results]))
    if isinstance(results[0][0], Weighted):
        return Weighted(*map(jnp.asarray, np.array(results).sum(1).T))
    return jnp.asarray(np.array(results).mean(1))
