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
from jax import lax
from jaxtyping import PyTree

from jaxbatch.augment import prepared
from jaxbatch.data.streams import is_stream
from jaxbatch.gradients.accumulation import next_model_state, summed_gradient
from jaxbatch.gradients.aux_means import mean_aux
from jaxbatch.gradients.groups import has_weights
from jaxbatch.gradients.part_norms import Metric, NoiseMonitor, NoiseSums, Spread, WithNoise, metric_of, no_spread, norms_of, statistics_of_parts
from jaxbatch.gradients.updates import Optimizer, update
from jaxbatch.sums import Losses, Weighted, add, divisor, mean_of_sum, something_counts, sum_losses, totals, zero_sum
from jaxbatch.training.cut import Cut
from jaxbatch.training.devices import alone
from jaxbatch.training.layouts import Layout, shapes_of
from jaxbatch.training.steps import TrainState
from jaxbatch.training.tasks import Task


class Total(NamedTuple):
    """What the parts of a group add up to so far."""

    gradient: PyTree
    model_state: PyTree
    loss: Losses
    spread: Spread | None = None  # with a monitor: over this group and those before it
    metric: Metric | None = None
    earlier: PyTree = None  # with a monitor: the summed gradient of the groups before this one


class Pieces(NamedTuple):
    """The pieces of an update, as pure functions."""

    begin: Callable[[TrainState], Total]
    add: Callable[..., tuple[Total, Losses]]  # (total, params, data, index, mask, seed_epoch) -> (total, the part's summed loss)
    finish: Callable[[TrainState, Total], tuple[TrainState, Any]]  # -> (state, mean loss)


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
    ``finish`` returns a :class:`WithNoise` and the fields of the total with which the next of the batch's K groups starts.
    """
    has_aux, streamed = task.update_model_state is not None, is_stream(task.train_data)

    def begin(state):
        loss = Weighted(jnp.zeros(()), jnp.zeros(())) if weighted else jnp.zeros(())
        total = Total(zero_sum(state.params), state.model_state, loss)
        if monitor is None:
            return total
        metric = metric_of(monitor, state.params, state.opt_state, state.step // num_groups)
        return total._replace(spread=no_spread(norms_of(monitor, metric), state.params, weighted), metric=metric, earlier=total.gradient)

    def add_part(total, params, data, index, mask, seed_epoch):
        examples = prepared(task.prepare, data if streamed else jax.tree.map(lambda leaf: leaf[index], data), seed_epoch, index)
        norms = None if monitor is None else norms_of(monitor, total.metric)
        gradient, losses, (aux, own, spread) = summed_gradient(task.loss_fn, params, examples, mask=mask, has_aux=has_aux, norms=norms)
        loss = sum_losses(losses)
        if axis is not None:
            (loss, gradient, spread), aux = lax.psum((loss, gradient, spread), axis), mean_aux(axis, aux, own)
        model_state = next_model_state(task.update_model_state, total.model_state, aux) if has_aux else total.model_state
        sums = add((total.gradient, total.loss, total.spread), (gradient, loss, spread))
        return total._replace(gradient=sums[0], model_state=model_state, loss=sums[1], spread=sums[2]), loss

    def finish(state, total):
        whole = divisor(total.loss, group_size)
        mean, gradient = totals(total.loss) / whole, mean_of_sum(total.gradient, whole, state.params)
        params, opt_state = update(optimizer, gradient, state.opt_state, state.params, mean, something_counts(total.loss))
        state = state._replace(params=params, opt_state=opt_state, step=state.step + 1, model_state=total.model_state)
        loss = total.loss if weighted else mean
        if monitor is None:
            return state, loss
        sums = NoiseSums(total.spread, add(total.earlier, total.gradient))
        noise = statistics_of_parts(monitor, total.metric, sums, group_size * num_groups)
        on = {"spread": sums.spread, "metric": total.metric, "earlier": sums.gradient}
        return state, (WithNoise(loss, noise), None if num_groups == 1 else on)

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
        >>> from jaxbatch.training.steps import state_shapes
        >>> task = Task(lambda key: jnp.zeros(()), lambda w, x: (x - w) ** 2, None, jnp.ones(40), None)
        >>> laid = lay_out_pieces(task, optax.sgd(0.1), state_shapes(task, optax.sgd(0.1)), Cut(10, num_devices=2, microbatch_size=2))
        >>> laid.adds[4].arguments["index"].shape, {length: layout.split for length, layout in laid.adds.items()}
        ((2, 2), {4: ('batch', 'index', 'mask'), 3: ('batch', 'index', 'mask')})
    """
    data, num_devices, lengths = task.train_data, cut.num_devices, cut.piece_lengths
    several, largest = num_devices > 1, -(-max(lengths) // num_devices)
    weighted = has_weights(alone(task.loss_fn), state.params, task.shapes_of_batch(largest), task.update_model_state is not None)
    pieces = make_pieces(task, optimizer, cut.group_size, axis=cut.axis, monitor=monitor, num_groups=cut.num_groups, weighted=weighted)
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
