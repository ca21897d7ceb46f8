"""A step in pieces: programs that sum gradients over parts of a batch, for a Python loop, and then make an update.

This is for data in a stream. It is also for large batches through networks with XLA's convolutions, which are slow inside
compiled loops on CPU. All other tasks accumulate in a compiled loop within the step (:func:`jaxbatch.make_train_step` with
``microbatch_size``). The numbers are the same.

Axes: K groups.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbatch.augment import prepared
from jaxbatch.data.streams import is_stream
from jaxbatch.gradients.accumulators import gradient_sum, loss_sum, measure_part, state_in_turn, together
from jaxbatch.gradients.cut import Cut
from jaxbatch.gradients.part_norms import NoiseMonitor, WithNoise, metric_of, spread_sum
from jaxbatch.gradients.updates import Optimizer, update
from jaxbatch.sums import Losses, add, divisor, something_counts
from jaxbatch.training.devices import alone
from jaxbatch.training.layouts import Layout, shapes_of
from jaxbatch.training.tasks import Task
from jaxbatch.training.train_state import TrainState, end_of_batch

Total = dict[str, Any]  # what the parts of a group add up to so far; with a monitor also the batch's metric, and the gradient of earlier groups


class AfterGroup(NamedTuple):
    """What is known after the update of a group."""

    state: TrainState
    losses: Losses | WithNoise  # the mean loss, or weighted the sums; with a monitor also the noise of the groups so far
    carried: Total  # the fields of the total with which the next group of the batch starts


class Pieces(NamedTuple):
    """The pieces of an update, as pure functions."""

    begin: Callable[[TrainState], Total]
    add: Callable[..., tuple[Total, Losses]]  # (total, params, data, index, mask, seed_epoch) -> (total, the part's summed loss)
    finish: Callable[[TrainState, Total], AfterGroup]


def make_pieces(task: Task, optimizer: Optimizer, cut: Cut, *, monitor: NoiseMonitor | None = None, weighted: bool = False) -> Pieces:
    """The pieces of an update from the gradient of a group, over all parts and devices.

    With ``weighted`` the task's losses are :class:`Weighted`, and so is the loss that ``finish`` returns: summed, not divided.
    ``data`` are the examples of a part if the task has a stream, else the whole training set on the device.
    """
    loss, streamed = task.loss, is_stream(task.train_data)

    def collect(params, model_state, metric):
        several = {"gradient": gradient_sum(params), "loss": loss_sum(weighted)}
        if task.update_model_state is not None:
            several["model_state"] = state_in_turn(task.update_model_state, model_state)
        if monitor is not None:
            several["spread"] = spread_sum(monitor, metric, params, weighted)
        return together(several)

    def begin(state):
        metric = None if monitor is None else metric_of(monitor, state.params, state.opt_state, state.step // cut.num_groups)
        total = collect(state.params, state.model_state, metric).start()
        return total if monitor is None else total | {"metric": metric, "earlier": total["gradient"]}

    def add_part(total, params, data, index, mask, seed_epoch):
        examples = prepared(task.prepare, data if streamed else jax.tree.map(lambda leaf: leaf[index], data), seed_epoch, index)
        sums = collect(params, None, total.get("metric"))
        part = sums.of_part(measure_part(loss, params, examples, mask))
        if cut.axis is not None:
            part = sums.over_devices(cut.axis, part)
        return total | sums.add(total, part), part["loss"]

    def finish(state, total):
        done = collect(state.params, None, total.get("metric")).finish(total, divisor(total["loss"], cut.group_size))
        mean = total["loss"] if weighted else done["loss"]
        counts = something_counts(total["loss"])
        params, opt_state = update(optimizer, done["gradient"], state.opt_state, state.params, done["loss"], counts)
        model_state = done.get("model_state", state.model_state)
        changed = {"params": params, "opt_state": opt_state, "step": state.step + 1, "model_state": model_state}
        if monitor is None:
            return AfterGroup(*end_of_batch(state, changed, cut, mean, None), {})
        carried = {name: total[name] for name in ("spread", "metric")} | {"earlier": add(total["earlier"], total["gradient"])}
        measured = monitor, total["metric"], {"spread": total["spread"], "gradient": carried["earlier"]}
        return AfterGroup(*end_of_batch(state, changed, cut, mean, measured), {} if cut.num_groups == 1 else carried)

    return Pieces(begin, add_part, finish)


class PieceLayouts(NamedTuple):
    """The programs of an update in pieces."""

    begin: Layout
    adds: dict[int, Layout]  # by the number of examples in a part, the largest first
    finish: Layout


def lay_out_pieces(task: Task, optimizer: Optimizer, state: TrainState, cut: Cut, *, monitor: NoiseMonitor | None = None) -> PieceLayouts:
    """The programs of the pieces of :func:`make_pieces`; of ``state`` only the shapes are used.

    Example:
        >>> import optax
        >>> from jaxbatch.training.train_state import state_shapes
        >>> task = Task(lambda key: jnp.zeros(()), lambda w, x: (x - w) ** 2, None, jnp.ones(40), None)
        >>> laid = lay_out_pieces(task, optax.sgd(0.1), state_shapes(task, optax.sgd(0.1)), Cut(10, num_devices=2, microbatch_size=2))
        >>> laid.adds[4].arguments["index"].shape, {length: layout.split for length, layout in laid.adds.items()}
        ((2, 2), {4: ('batch', 'index', 'mask'), 3: ('batch', 'index', 'mask')})
    """
    data, num_devices, lengths = task.train_data, cut.num_devices, cut.piece_lengths
    several, largest = num_devices > 1, -(-max(lengths) // num_devices)
    loss = task.loss._replace(function=alone(task.loss_fn))
    weighted = loss.is_weighted(state.params, task.shapes_of_batch(largest))
    pieces = make_pieces(task, optimizer, cut, monitor=monitor, weighted=weighted)
    total, donated = jax.eval_shape(pieces.begin, state), ("state",) if cut.num_groups == 1 else ()

    def lay_out_part(length: int) -> Layout:
        lead = (num_devices, -(-length // num_devices)) if several else (length,)
        of_part = lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype)
        examples = {"batch": jax.tree.map(of_part, data.example)} if is_stream(data) else {"data": shapes_of(data)}
        kinds = {"index": (lead, jnp.int32), "mask": (lead, jnp.bool_), "seed_epoch": ((2,), jnp.uint32)}
        numbers = {name: jax.ShapeDtypeStruct(*kind) for name, kind in kinds.items()}
        # If the number of devices divides the length, there are no fillers and no mask is needed.
        without_mask = lambda total, params, data, index, mask, seed_epoch: pieces.add(total, params, data, index, None, seed_epoch)
        function = pieces.add if length % num_devices else without_mask
        return Layout(function, {"total": total, "params": state.params} | examples | numbers, ("total",), ("batch", "index", "mask"))

    return PieceLayouts(
        Layout(pieces.begin, {"state": state}, (), ()),
        {length: lay_out_part(length) for length in lengths},
        Layout(pieces.finish, {"state": state, "total": total}, donated, ()),
    )
