"""The programs of one training step, and of an evaluation, as functions and shapes, to be compiled elsewhere than where they run.

:func:`jaxbatch.fit` loops over these steps, on accelerators within a compiled loop. The programs say what a step needs on each
device: their own memory, and what lies there beside it.

Axes: B examples in a batch, N devices, M = ⌈B / N⌉ examples on each.
"""

from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from jaxbatch.gradients.groups import check_count
from jaxbatch.gradients.part_norms import NoiseMonitor
from jaxbatch.gradients.updates import Optimizer
from jaxbatch.machine.cross_compiling import target_mesh
from jaxbatch.training.cut import choose_cut
from jaxbatch.training.evaluation import PARTS_OF_A_TEST_STREAM, lay_out_evaluation, metrics_argument
from jaxbatch.training.layouts import Layout, lay_out_step
from jaxbatch.training.pieces import lay_out_pieces
from jaxbatch.training.steps import step_of_cut
from jaxbatch.training.tasks import Task
from jaxbatch.training.train_state import state_shapes

_PARTS_OF_A_STREAM = 3  # on the device at a time: one in work, and as many ahead as jaxbatch.training.loops allows


class StepProgram(NamedTuple):
    """A program of a step or of an evaluation, and the shapes of what else lies on the device while it runs."""

    layout: Layout
    beside: dict[str, PyTree]


def step_programs(
    task: Task,
    optimizer: Optimizer,
    batch_size: int,
    *,
    num_groups: int | None = None,
    microbatch_size: int | None = None,
    num_devices: int = 1,
    monitor: NoiseMonitor | None = None,
) -> list[StepProgram]:
    """The programs that :func:`jaxbatch.fit` runs for a batch, for the platform that is compiled for.

    Args:
        task: see :class:`jaxbatch.Task`; its data are not touched, only their shapes.
        optimizer: any optax optimizer.
        batch_size: B, over all devices.
        num_groups: K, the updates per batch; ``None``: one.
        microbatch_size: the most examples that a device works on at a time; ``None``: as the task says.
        num_devices: N.
        monitor: see :class:`jaxbatch.FitConfig`.

    Returns:
        One program, or for streams and for Python loops over parts of a batch several, which run one after another.

    Raises:
        ValueError: K does not divide B, or a size is below 1.
    """
    check_count("batch_size", batch_size)
    check_count("num_devices", num_devices)
    state = state_shapes(task, optimizer, monitor)
    asked: dict[str, Any] = {"num_groups": num_groups, "microbatch_size": microbatch_size, "num_devices": num_devices, "monitor": monitor}
    cut = choose_cut(task, state.params, batch_size, **asked)
    if not cut.in_pieces:
        laid = lay_out_step(step_of_cut(task, optimizer, cut, monitor), state, task.train_data, cut, prepare=task.prepare)
        return [StepProgram(_over_mesh(laid, num_devices), {})]
    pieces, beside = lay_out_pieces(task, optimizer, state, cut, monitor=monitor), {}
    add = pieces.adds[max(cut.piece_lengths)]
    if "batch" in add.arguments:
        one_device = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[num_devices > 1 :], leaf.dtype)
        beside["batch ahead"] = [jax.tree.map(one_device, add.arguments["batch"])] * (_PARTS_OF_A_STREAM - 1)
    if cut.num_groups > 1:  # all gradients of a split are taken at the parameters before the batch: from the first update on there are two of them
        beside["params before the batch"] = state.params
    unused = {"state": state._replace(params=())}  # by the sums over parts
    data = {name: shapes for name, shapes in add.arguments.items() if name == "data"}
    programs = (add, unused | beside), (pieces.finish, data | beside)
    return [StepProgram(_over_mesh(layout, num_devices), others) for layout, others in programs]


def evaluation_program(task: Task, optimizer: Optimizer, batch_size: int) -> StepProgram | None:
    """The program with which :func:`jaxbatch.fit` evaluates ``batch_size`` test examples at a time; None: it evaluates nothing.

    It runs on one device, whatever the number of those that train.
    """
    if task.test_data is None or task.metrics_fn is None:
        return None
    params, beside = metrics_argument(task, state_shapes(task, optimizer)), {}
    layout = lay_out_evaluation(task.metrics_fn, params, task.test_data, batch_size, task.prepare_test)
    if "batch" in layout.arguments:
        beside["batch ahead"] = [layout.arguments["batch"]] * (PARTS_OF_A_TEST_STREAM - 1)
    return StepProgram(layout, beside)


def _over_mesh(layout: Layout, count: int) -> Layout:
    return layout if count == 1 else layout._replace(function=layout.over(target_mesh(count), "jit")[0])
