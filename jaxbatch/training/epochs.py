"""Compiles an epoch of a task from three independent choices.

* **Where examples come from**: arrays on the device, or a stream (``task.train_data``).
* **How a batch's parts are summed**: groups with an update each (``num_groups``), microbatches one after another
  (``microbatch_size``), shares of several devices (``devices``). One function computes the gradient of a part
  (:func:`jaxbatch.gradients.accumulation.summed_gradient`).
* **How steps are looped**: ``lax.scan``, a Python loop over whole steps (:func:`jaxbatch.compile_epoch`), or a Python loop over
  their pieces (:func:`jaxbatch.training.pieces.compile_epoch_in_pieces`). The last is for streams, and for models whose
  compiled loops are slow.

Every combination is defined. Up to the order of summation, it gives the numbers of one device that sees the whole batch; only
batch normalisation takes the moments of a part.

Axes: S steps, B examples in a batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxbatch.data.streams import is_stream
from jaxbatch.gradients.groups import check_microbatch_size, check_num_groups
from jaxbatch.gradients.independence import check_independent_losses, check_independent_prepare, has_independent_prepare
from jaxbatch.gradients.part_norms import NoiseMonitor
from jaxbatch.gradients.parts import choose_method
from jaxbatch.gradients.updates import Optimizer
from jaxbatch.layers import loops_are_slow
from jaxbatch.training.devices import AXIS, Parallel
from jaxbatch.training.loops import compile_epoch
from jaxbatch.training.loss_shapes import along_an_axis, shapes_of_batch
from jaxbatch.training.pieces import compile_epoch_in_pieces
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
    method: Parallel = "jit",
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
        method: how devices are used, see :func:`jaxbatch.training.devices.over_devices`.
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
    check_num_groups(groups, batch_size)
    check_microbatch_size(microbatch_size)
    if microbatch_size is not None:
        task = task._replace(microbatch_size=smallest(microbatch_size, task.microbatch_size))
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    cut = microbatch_size is not None and batch_size // groups > microbatch_size * len(devices)
    in_pieces = runs_in_pieces(task, state, batch_size, cut)
    at_a_time = microbatch_size if in_pieces else task.examples_at_a_time
    further = microbatch_for_noise(monitor, batch_size, groups, len(devices), at_a_time)
    if monitor is not None and further is not None:
        # Other batches stay whole where one program can hold both ways.
        always = monitor.every == 1 or axis or task.update_model_state is not None or runs_in_pieces(task, state, batch_size, True)
        if always:
            settings: dict[str, Any] = {"num_groups": num_groups, "devices": devices, "method": method, "monitor": monitor}
            return compile_task_epoch(task, optimizer, state, num_steps, batch_size, microbatch_size=further, **settings)
    if axis or (in_pieces and (cut or groups > 1)):
        check_independent_prepare(task)  # elsewhere it may see the batch whole
    if groups == batch_size > 1 and (axis or in_pieces):  # elsewhere the step itself checks
        check_independent_losses(along_an_axis(task.loss_fn), state.params, shapes_of_batch(task, 2), has_aux=task.update_model_state is not None)
    over: dict[str, Any] = {"devices": devices, "method": method, "num_groups": groups}
    if in_pieces:
        return compile_epoch_in_pieces(task, optimizer, state, batch_size, microbatch_size, monitor=monitor, **over)
    step = make_task_step(task, optimizer, batch_size, num_groups=num_groups, axis=axis, monitor=monitor, cut_to_measure=further)
    by_part = takes_by_part(task, state.params, batch_size, groups, len(devices), further)
    run = compile_epoch(step, state, task.train_data, num_steps, batch_size, prepare=task.prepare, by_part=by_part, **over)
    return lambda state, data, indices, *seed_epoch: run(state, data, indices, *(seed_epoch if task.prepare is not None else ()))


def takes_by_part(task: Task, params: Any, batch_size: int, num_groups: int = 1, num_devices: int = 1, further: int | None = None) -> bool:
    """Whether a compiled step takes each part's examples when it works on it, so that the batch is never in memory whole.

    A batch is taken whole if its step has no loop over parts: if it has no parts, and if it has groups side by side or one after
    another without a loop, where the compiler keeps what all of them need anyway. So is one whose ``prepare`` changes an example
    with the others in its batch: on one device it sees all of them, and its numbers must not depend on the cut.
    """
    share = -(-batch_size // num_groups // max(1, num_devices))  # no device at all is refused where they are told apart
    loss_fn = task.loss_fn if num_devices == 1 else along_an_axis(task.loss_fn)
    cut = share > min(further or share, task.examples_at_a_time or share)
    in_turn = lambda: choose_method(loss_fn, params, shapes_of_batch(task, share), share) == "map"
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
    share = -(-batch_size // num_groups // max(1, num_devices))  # no device at all is refused where they are told apart
    each = -(-monitor.parts // (num_groups * num_devices))
    wanted = -(-share // each)
    return wanted if wanted < min(at_a_time or share, share) else None


def runs_in_pieces(task: Task, state: Any, batch_size: int, cut: bool) -> bool:
    """Whether a Python loop runs the pieces of a step: for a stream, and for a batch that is cut if compiled loops are slow."""
    slow = lambda: loops_are_slow(task.loss_fn, state.params, shapes_of_batch(task, task.examples_at_a_time or batch_size))
    return is_stream(task.train_data) or (cut and slow())
