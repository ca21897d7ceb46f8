"""Compiles an epoch of a task from three independent choices, and decides how its batches are cut.

* **Where examples come from**: arrays on the device, or a stream (``task.train_data``).
* **How a batch's parts are summed**: groups with an update each (``num_groups``), microbatches one after another
  (``microbatch_size``), shares of several devices (``devices``). One function computes the gradient of a part
  (:func:`jaxbatch.gradients.accumulation.summed_gradient`).
* **How steps are looped**: ``lax.scan``, a Python loop over whole steps (:func:`jaxbatch.compile_epoch`), or a Python loop over
  their pieces (:func:`jaxbatch.training.loops.compile_epoch_in_pieces`). The last is for streams, and for models whose
  compiled loops are slow.

Every combination is defined. Up to the order of summation, it gives the numbers of one device that sees the whole batch; only
batch normalisation takes the moments of a part, and losses that couple examples otherwise are refused by :mod:`jaxbatch.training.cut_check`.
Parts that do not divide a batch are as equal as whole examples allow. The cut of a size is the same for programs that run here and for those that are
compiled for elsewhere (:mod:`jaxbatch.training.step_programs`).

Axes: S steps, B examples in a batch, K groups, N devices.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxbatch.batches import even_part
from jaxbatch.data.streams import is_stream
from jaxbatch.gradients.groups import check_microbatch_size, check_num_groups
from jaxbatch.gradients.independence import check_independent_losses, check_independent_prepare, has_independent_prepare
from jaxbatch.gradients.part_norms import NoiseMonitor
from jaxbatch.gradients.parts import choose_method
from jaxbatch.gradients.updates import Optimizer
from jaxbatch.layers import loops_are_slow
from jaxbatch.training.devices import AXIS, Parallel, alone, share_of_group
from jaxbatch.training.loops import compile_epoch, compile_epoch_in_pieces
from jaxbatch.training.steps import TrainState, make_task_step
from jaxbatch.training.tasks import Task, smallest


def compile_task_epoch(
    task: Task,
    optimizer: Optimizer,
    state: Any,
    num_steps: int,
    batch_size: int,
    *,
    num_groups: int | None = None,
    microbatch_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    parallel: Parallel = "jit",
    monitor: NoiseMonitor | None = None,
) -> Callable[..., tuple[TrainState, Any]]:
    """Compiles ``num_steps`` batches of a task at once, with the fastest kind of loop.

    Args:
        task: see :class:`jaxbatch.Task`.
        optimizer: any optax optimizer.
        state: only its shapes are used.
        num_steps: S.
        batch_size: B, over all devices.
        num_groups: K, the updates per batch; ``None``: one.
        microbatch_size: the most examples that a device works on at a time; ``None``: as the task says.
        devices: the devices that share every batch; ``None``: the default device.
        parallel: how devices are used, see :func:`jaxbatch.training.devices.over_devices`.
        monitor: how noise is measured, see :class:`jaxbatch.NoiseMonitor`; ``losses`` are then a pair with the noise of each
            batch. A batch with fewer parts than it asks for is cut further.

    Returns:
        ``run(state, data, indices, [seed, epoch]) -> (state, losses)`` with ``indices`` ``(S, B)``. The last argument may be
        left out if nothing is random. The incoming state's memory is reused.

    Raises:
        ValueError: K does not divide B; there is no device; ``prepare`` gets parts of a batch, or the loss groups of one
            example, and its result for an example depends on the other examples.
    """
    devices = jax.devices()[:1] if devices is None else devices
    groups, axis = 1 if num_groups is None else num_groups, AXIS if len(devices) > 1 else None
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    cut = choose_cut(task, state.params, batch_size, num_groups=groups, microbatch_size=microbatch_size, num_devices=len(devices), monitor=monitor)
    task = cut.task
    if cut.splits_prepare:
        check_independent_prepare(task)  # elsewhere it may see the batch whole
    if groups == batch_size > 1 and (axis or cut.in_pieces):  # elsewhere the step itself checks
        check_independent_losses(alone(task.loss_fn), state.params, task.shapes_of_batch(2), has_aux=task.update_model_state is not None)
    over: dict[str, Any] = {"devices": devices, "parallel": parallel, "num_groups": groups}
    if cut.in_pieces:
        return compile_epoch_in_pieces(task, optimizer, state, batch_size, monitor=monitor, **over)
    step = make_task_step(task, optimizer, batch_size, num_groups=num_groups, axis=axis, monitor=monitor, cut_to_measure=cut.to_measure)
    return compile_epoch(step, state, task.train_data, num_steps, batch_size, prepare=task.prepare, by_part=cut.by_part, **over)


class Cut(NamedTuple):
    """How batches of one size go through training."""

    task: Task  # its ``microbatch_size`` is the one that was asked for, or a smaller one so that noise can be measured
    in_pieces: bool  # a Python loop runs the pieces of a step
    splits_prepare: bool  # ``prepare`` cannot see the batch of an update whole
    to_measure: int | None  # a smaller microbatch for the batches whose noise is measured, within the same program
    by_part: bool  # a compiled step takes the examples of each part when it works on it

    @property
    def at_a_time(self) -> int | None:
        """The most examples that a device works on at once in a batch that is not measured; None: its whole share of a group."""
        return self.task.microbatch_size if self.in_pieces else self.task.examples_at_a_time


def choose_cut(
    task: Task,
    params: Any,
    batch_size: int,
    *,
    num_groups: int = 1,
    microbatch_size: int | None = None,
    num_devices: int = 1,
    monitor: NoiseMonitor | None = None,
) -> Cut:
    """Decides how batches of ``batch_size`` are cut, on the platform that is compiled for.

    Args:
        task: see :class:`jaxbatch.Task`.
        params: only their shapes are used.
        batch_size: B, over all devices.
        num_groups: K, the updates per batch.
        microbatch_size: the most examples that a device works on at a time; ``None``: as the task says.
        num_devices: N.
        monitor: a batch with fewer parts than it asks for is cut further.

    Raises:
        ValueError: K does not divide B, a size is below 1, or there is no device.
    """
    check_num_groups(num_groups, batch_size)
    check_microbatch_size(microbatch_size)
    if num_devices < 1:
        raise ValueError("devices is empty: at least 1 is needed.")
    size = smallest(microbatch_size, task.microbatch_size)
    bounded, several = task._replace(microbatch_size=size), size is not None and batch_size // num_groups > size * num_devices
    in_pieces = runs_in_pieces(bounded, params, batch_size, several)
    further = microbatch_for_noise(monitor, batch_size, num_groups, num_devices, size if in_pieces else bounded.examples_at_a_time)
    # Batches that are not measured stay whole where one program can hold both forms of a step.
    one_form = lambda: num_devices > 1 or task.update_model_state is not None or runs_in_pieces(bounded, params, batch_size, True)
    if monitor is not None and further is not None and (monitor.every == 1 or one_form()):
        return choose_cut(bounded, params, batch_size, num_groups=num_groups, microbatch_size=further, num_devices=num_devices)
    by_part = not in_pieces and takes_by_part(bounded, params, batch_size, num_groups, num_devices, further)
    splits_prepare = num_devices > 1 or (in_pieces and (several or num_groups > 1))
    return Cut(bounded, in_pieces, splits_prepare, further, by_part)


def takes_by_part(task: Task, params: Any, batch_size: int, num_groups: int = 1, num_devices: int = 1, further: int | None = None) -> bool:
    """Whether a compiled step takes each part's examples when it works on it, so that the batch is never in memory whole.

    A batch is taken whole if its step has no loop over parts. Such a step has no parts at all, or it has groups side by side, or
    groups one after another without a loop; there the compiler keeps what all of them need anyway. A batch is also taken whole if
    ``prepare`` changes an example with the others in its batch: on one device it sees all of them, and its numbers must not depend
    on the cut.
    """
    share = share_of_group(batch_size, num_groups, num_devices)
    cut = share > min(further or share, task.examples_at_a_time or share)
    in_turn = lambda: choose_method(alone(task.loss_fn), params, task.shapes_of_batch(share), share) == "map"
    return (cut or (num_groups > 1 and in_turn())) and has_independent_prepare(task)


def microbatch_for_noise(monitor: NoiseMonitor | None, batch_size: int, num_groups: int, num_devices: int, at_a_time: int | None) -> int | None:
    """A smaller microbatch, if the batch has fewer parts than the monitor asks for and can be cut further; else None.

    Example:
        >>> microbatch_for_noise(NoiseMonitor(), 9, 1, 1, None), microbatch_for_noise(NoiseMonitor(), 9, 1, 1, 3)
        (5, None)
        >>> microbatch_for_noise(NoiseMonitor(parts=8), 16, 2, 2, None)  # each device's share of a group, 4 examples, is cut in 2
        2
    """
    if monitor is None:
        return None
    share = share_of_group(batch_size, num_groups, num_devices)
    each = -(-monitor.parts // (num_groups * num_devices))
    wanted, there = -(-share // each), -(-share // even_part(share, at_a_time or share))
    return wanted if there < each and wanted < share else None


def runs_in_pieces(task: Task, params: Any, batch_size: int, several: bool) -> bool:
    """Whether a Python loop runs the pieces of a step: for a stream, and for several parts if compiled loops are slow."""
    slow = lambda: loops_are_slow(alone(task.loss_fn), params, task.shapes_of_batch(task.examples_at_a_time or batch_size))
    return is_stream(task.train_data) or (several and slow())
