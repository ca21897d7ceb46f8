"""The programs of one training step as functions and shapes, to be compiled elsewhere than where they run.

:func:`jaxbatch.fit` loops over these steps, on accelerators within a compiled loop. The programs say what a step needs on each
device: their own memory, and what lies there beside it.

Axes: B examples in a batch, N devices, M = ⌈B / N⌉ examples on each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxbatch.data.streams import is_stream
from jaxbatch.gradients.updates import Optimizer
from jaxbatch.machine.cross_compiling import AXIS, target_mesh
from jaxbatch.training.cuts import Cut, choose_cut
from jaxbatch.training.devices import over_devices
from jaxbatch.training.layouts import Layout, lay_out_part, lay_out_step
from jaxbatch.training.loss_shapes import task_has_weights
from jaxbatch.training.pieces import make_pieces, parts_of_group
from jaxbatch.training.steps import TrainState, make_task_step
from jaxbatch.training.tasks import Task

_PARTS_OF_A_STREAM = 3  # on the device at a time: one in work, and as many ahead as jaxbatch.training.pieces allows


class StepProgram(NamedTuple):
    """A program of a step."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, PyTree]  # shapes by what they hold: "state", "data", "batch", ...
    donate: tuple[str, ...]
    split: tuple[str, ...]  # arguments that are split over the devices
    beside: dict[str, PyTree]  # shapes of what else lies on the device while it runs


def step_programs(
    task: Task,
    optimizer: Optimizer,
    batch_size: int,
    *,
    num_groups: int | None = None,
    microbatch_size: int | None = None,
    num_devices: int = 1,
) -> list[StepProgram]:
    """The programs that :func:`jaxbatch.fit` runs for a batch, for the platform that is compiled for.

    Args:
        task: see :class:`jaxbatch.Task`; its data are not touched, only their shapes.
        optimizer: any optax optimizer.
        batch_size: B, over all devices.
        num_groups: K, the updates per batch; ``None``: one.
        microbatch_size: the most examples that a device works on at a time; ``None``: as the task says.
        num_devices: N.

    Returns:
        One program, or for streams and for Python loops over parts of a batch several, which run one after another.

    Raises:
        ValueError: K does not divide B, or a size is below 1.
    """
    groups = 1 if num_groups is None else num_groups
    if batch_size < 1 or num_devices < 1:
        raise ValueError(f"batch_size={batch_size} and num_devices={num_devices} must be at least 1.")
    state = state_shapes(task, optimizer)
    cut = choose_cut(task, state.params, batch_size, num_groups=groups, microbatch_size=microbatch_size, num_devices=num_devices)
    if cut.in_pieces:
        return _pieces(cut.task, optimizer, state, batch_size // groups, groups, microbatch_size, num_devices)
    return [_whole_step(cut, optimizer, state, batch_size, num_groups, num_devices)]


def state_shapes(task: Task, optimizer: Optimizer) -> TrainState:
    """The shapes of a task's state at its start; nothing is computed."""
    start = jax.eval_shape(task.init, jax.random.key(0))
    params, model_state = (start, ()) if task.update_model_state is None else start
    opt_state = jax.eval_shape(optimizer.init, params)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(params, opt_state, step, model_state)


def _whole_step(cut: Cut, optimizer, state, batch_size: int, num_groups, count: int) -> StepProgram:
    task = cut.task
    step = make_task_step(task, optimizer, batch_size, num_groups=num_groups, axis=AXIS if count > 1 else None)
    over: dict[str, Any] = {"num_groups": num_groups or 1, "num_devices": count, "by_part": cut.by_part}
    laid = lay_out_step(step, state, task.train_data, batch_size, prepare=task.prepare, **over)
    return _over_mesh("step", laid, {}, count)


def _pieces(task, optimizer, state, group_size: int, groups: int, microbatch_size, count: int) -> list[StepProgram]:
    size = parts_of_group(group_size, microbatch_size, count)
    weighted = task_has_weights(task, state.params, -(-size // count), count)
    pieces, streamed = make_pieces(task, optimizer, group_size, axis=AXIS if count > 1 else None, weighted=weighted), is_stream(task.train_data)
    data = task.train_data.example if streamed else task.train_data
    part = lay_out_part(pieces.add, jax.eval_shape(pieces.begin, state), state.params, data, size, count, streamed=streamed)
    one_device = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[count > 1 :], leaf.dtype)
    ahead = {"batch ahead": [jax.tree.map(one_device, part.arguments["batch"])] * (_PARTS_OF_A_STREAM - 1)} if streamed else {}
    # All gradients of a split are taken at the parameters before the batch, so from the first update on there are two of them.
    before = {"params before the batch": state.params} if groups > 1 else {}
    add = _over_mesh("add a part", part, {"opt_state": state.opt_state, "model_state": state.model_state, **ahead, **before}, count)
    update = Layout(pieces.finish, {"state": state, "total": part.arguments["total"]}, ("state",) if groups == 1 else (), ())
    return [add, _over_mesh("update", update, (ahead if streamed else {"data": part.arguments["data"]}) | before, count)]


def _over_mesh(name: str, laid: Layout, beside: dict[str, PyTree], count: int) -> StepProgram:
    function = laid.function if count == 1 else over_devices(laid.function, target_mesh(count), "jit", laid.places(laid.split))[0]
    return StepProgram(name, *laid._replace(function=function), beside)
