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

from jaxbatch.batches import even_part
from jaxbatch.data.streams import is_stream
from jaxbatch.gradients.groups import check_microbatch_size, check_num_groups
from jaxbatch.gradients.updates import Optimizer
from jaxbatch.machine.cross_compiling import AXIS, target_mesh
from jaxbatch.training.devices import over_devices
from jaxbatch.training.epochs import runs_in_pieces
from jaxbatch.training.loops import one_step
from jaxbatch.training.loss_shapes import task_has_weights
from jaxbatch.training.pieces import make_pieces
from jaxbatch.training.steps import TrainState, make_task_step
from jaxbatch.training.tasks import Task, smallest

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
    check_num_groups(groups, batch_size)
    check_microbatch_size(microbatch_size)
    cut = microbatch_size is not None and batch_size // groups > microbatch_size * num_devices
    task = task._replace(microbatch_size=smallest(microbatch_size, task.microbatch_size))
    state = state_shapes(task, optimizer)
    if runs_in_pieces(task, state, batch_size, cut):
        return _pieces(task, optimizer, state, batch_size // groups, groups, microbatch_size, num_devices)
    return [_whole_step(task, optimizer, state, batch_size, num_groups, num_devices)]


def state_shapes(task: Task, optimizer: Optimizer) -> TrainState:
    """The shapes of a task's state at its start; nothing is computed."""
    start = jax.eval_shape(task.init, jax.random.key(0))
    params, model_state = (start, ()) if task.update_model_state is None else start
    opt_state = jax.eval_shape(optimizer.init, params)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(params, opt_state, step, model_state)


def _whole_step(task, optimizer, state, batch_size: int, num_groups, count: int) -> StepProgram:
    groups = num_groups or 1
    share = groups * -(-batch_size // groups // count)
    filled_up = share * count > batch_size
    step = make_task_step(task, optimizer, batch_size, num_groups=num_groups, axis=AXIS if count > 1 else None)

    def one(state, data, index, mask, seed_epoch):
        given = () if count == 1 else (mask if filled_up else None,)
        return one_step(step, task.prepare, state, data, index, seed_epoch, *given)

    lead = (share,) if count == 1 else (count, share)
    arguments = {
        "state": state,
        "data": _shapes(task.train_data),
        "index": jax.ShapeDtypeStruct(lead, jnp.int32),
        "mask": None if count == 1 else jax.ShapeDtypeStruct(lead, jnp.bool_),
        "seed_epoch": None if task.prepare is None else jax.ShapeDtypeStruct((2,), jnp.uint32),
    }
    return _over_mesh("step", one, arguments, ("state",) if count == 1 else (), ("index", "mask"), count)


def _pieces(task, optimizer, state, group_size: int, groups: int, microbatch_size, count: int) -> list[StepProgram]:
    size = even_part(group_size, min(group_size, count * (microbatch_size or group_size)))
    weighted = task_has_weights(task, state.params, -(-size // count), count)
    pieces, streamed = make_pieces(task, optimizer, group_size, axis=AXIS if count > 1 else None, weighted=weighted), is_stream(task.train_data)
    total = jax.eval_shape(pieces.begin, state)
    lead = (size,) if count == 1 else (count, -(-size // count))
    stream = lambda lead: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype), task.train_data.example)
    data = {"batch": stream(lead)} if streamed else {"data": _shapes(task.train_data)}
    arguments = {
        "total": total,
        "params": state.params,
        **data,
        "index": jax.ShapeDtypeStruct(lead, jnp.int32),
        "mask": jax.ShapeDtypeStruct(lead, jnp.bool_) if size % count else None,
        "seed_epoch": jax.ShapeDtypeStruct((2,), jnp.uint32),
    }
    ahead = {"batch ahead": [stream(lead[-1:])] * (_PARTS_OF_A_STREAM - 1)} if streamed else {}
    split = ("batch", "index", "mask")
    # All gradients of a split are taken at the parameters before the batch, so from the first update on there are two of them.
    before = {"params before the batch": state.params} if groups > 1 else {}
    beside = {"opt_state": state.opt_state, "model_state": state.model_state, **ahead, **before}
    add = _over_mesh("add a part", pieces.add, arguments, ("total",), split, count)._replace(beside=beside)
    finish = _over_mesh("update", pieces.finish, {"state": state, "total": total}, ("state",) if groups == 1 else (), (), count)
    return [add, finish._replace(beside=(ahead if streamed else data) | before)]


def _over_mesh(name, function, arguments, donate, split, count: int) -> StepProgram:
    if count > 1:
        function, _ = over_devices(function, target_mesh(count), "jit", [key in split for key in arguments])
    return StepProgram(name, function, arguments, donate, split, {})


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
