"""Compiles an epoch of a task from three independent choices.

* **Where examples come from**: arrays on the device, or a stream (``task.train_data``).
* **How a batch's parts are summed**: groups with an update each (``num_groups``), microbatches one after another
  (``microbatch_size``), shares of several devices (``devices``). One function computes the gradient of a part
  (:func:`jaxbatch.gradients.accumulators.measure_part`).
* **How steps are looped**: ``lax.scan``, a Python loop over whole steps (:func:`jaxbatch.compile_epoch`), or a Python loop over
  their pieces (:func:`jaxbatch.training.loops.compile_epoch_in_pieces`). The last is for streams, and for models whose
  compiled loops are slow.

Every combination is defined. Up to the order of summation, it gives the numbers of one device that sees the whole batch; only
batch normalisation takes the moments of a part, and losses that couple examples otherwise are refused by :mod:`jaxbatch.training.cut_check`.
Parts that do not divide a batch are as equal as whole examples allow. :mod:`jaxbatch.training.cut` decides how a batch is cut.

Axes: S steps, B examples in a batch, K groups, N devices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxbatch.gradients.cut import Cut
from jaxbatch.gradients.independence import check_independent_losses, check_independent_prepare
from jaxbatch.gradients.part_norms import NoiseMonitor
from jaxbatch.gradients.updates import Optimizer
from jaxbatch.training.cut import choose_cut
from jaxbatch.training.devices import Parallel, alone
from jaxbatch.training.loops import compile_epoch, compile_epoch_in_pieces
from jaxbatch.training.steps import step_of_cut
from jaxbatch.training.tasks import Task
from jaxbatch.training.train_state import TrainState


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
    cut: Cut | None = None,
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
        cut: what was decided before of such batches; ``None``: it is decided here.

    Returns:
        ``run(state, data, indices, [seed, epoch]) -> (state, losses)`` with ``indices`` ``(S, B)``. The last argument may be
        left out if nothing is random. The incoming state's memory is reused.

    Raises:
        ValueError: K does not divide B; there is no device; ``prepare`` gets parts of a batch, or the loss groups of one
            example, and its result for an example depends on the other examples.
    """
    devices = jax.devices()[:1] if devices is None else devices
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    asked: dict[str, Any] = {"num_groups": num_groups, "microbatch_size": microbatch_size, "num_devices": len(devices), "monitor": monitor}
    cut = cut or choose_cut(task, state.params, batch_size, **asked)
    if cut.splits_prepare:
        check_independent_prepare(task)  # elsewhere it may see the batch whole
    if cut.group_size == 1 < batch_size and (cut.axis or cut.in_pieces):  # elsewhere the step itself checks
        check_independent_losses(task.loss._replace(function=alone(task.loss_fn)), state.params, task.shapes_of_batch(2))
    over: dict[str, Any] = {"devices": devices, "parallel": parallel}
    if cut.in_pieces:
        return compile_epoch_in_pieces(task, optimizer, state, cut, monitor=monitor, **over)
    step, data = step_of_cut(task, optimizer, cut, monitor), task.train_data
    return compile_epoch(step, state, data, num_steps, batch_size, prepare=task.prepare, num_groups=cut.num_groups, by_part=cut.by_part, **over)
