"""A training step for one batch size."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from jaxbatch.gradients.accumulators import state_in_turn, update_in_turn
from jaxbatch.gradients.cut import Cut, Share
from jaxbatch.gradients.groups import Loss, LossFn
from jaxbatch.gradients.part_norms import NoiseMonitor, WithNoise, metric_of, spread_sum
from jaxbatch.gradients.split import update_by_groups
from jaxbatch.gradients.updates import Optimizer
from jaxbatch.kinds import checked
from jaxbatch.sums import Losses, Weighted, sum_losses
from jaxbatch.training.tasks import Task, UpdateModelState
from jaxbatch.training.train_state import TrainState, end_of_batch


@checked
def make_train_step(
    loss_fn: LossFn,
    optimizer: Optimizer,
    batch_size: int,
    *,
    num_groups: int | None = None,
    microbatch_size: int | None = None,
    update_model_state: UpdateModelState | None = None,
    axis: str | None = None,
    monitor: NoiseMonitor | None = None,
    cut_to_measure: int | None = None,
) -> Callable[..., tuple[TrainState, Losses | WithNoise]]:
    """A training step for one batch size, jit-compiled and usable inside ``lax.scan``.

    Args:
        loss_fn: ``(params, batch) -> losses`` of shape ``(B,)``, or :class:`jaxbatch.Weighted`, which the step then returns.
        optimizer: any optax optimizer.
        batch_size: B, static: another size needs another step.
        num_groups: None for one update on the mean gradient; K for K updates from K groups' gradients
            (:func:`jaxbatch.split_backward`).
        microbatch_size: examples worked on at a time. It changes the use of memory and cache, but not the result.
        update_model_state: if given, ``loss_fn`` returns ``(losses, aux)``, see :class:`jaxbatch.Task`. With groups or
            microbatches it is called for each one's aux in turn. (Then batch normalisation takes the moments of a group or
            microbatch, which is called *ghost* batch norm.)
        axis: the name of an axis of devices along which the step runs; each device has its share of every group.
        monitor: measures the noise of the gradient from the parts that the step has, see :class:`jaxbatch.NoiseMonitor`; a
            step of one part measures nothing.
        cut_to_measure: a smaller ``microbatch_size`` for the batches that are measured, if a batch would otherwise be one part. Not
            with ``update_model_state``, whose number of calls would change.

    Returns:
        ``step(state, batch) -> (state, losses)``; the losses are computed at the incoming parameters. With ``axis`` it is
        ``step(state, share, mask) -> (state, loss of the batch)``, the mean or a :class:`jaxbatch.Weighted` of sums; ``mask`` is
        False for fillers, and None if there are none. With ``monitor`` the losses come with the batch's noise, as a pair. A fourth
        argument ``take`` (a ``jax.tree_util.Partial``) makes examples from indices, which then stand in place of the batch: each
        part's when the step works on it, so that no other examples are in memory.

    Raises:
        ValueError: the step gets a batch of another size.

    Example:
        >>> import optax
        >>> step = make_train_step(lambda w, x: 0.5 * (x - w) ** 2, optax.sgd(0.5), batch_size=2)
        >>> state = TrainState(jnp.array(0.0), optax.sgd(0.5).init(0.0), jnp.array(0))
        >>> state, losses = step(state, jnp.array([1.0, 3.0]))
        >>> float(state.params), int(state.step), losses.tolist()
        (1.0, 1, [0.5, 4.5])
    """
    if cut_to_measure is not None and update_model_state is not None:
        raise ValueError(f"cut_to_measure={cut_to_measure} would change how often update_model_state is called: leave one of them out.")
    cut = Cut(batch_size, num_groups or 1, microbatch_size=microbatch_size, axis=axis, to_measure=cut_to_measure)
    return _make_step(Loss(loss_fn, update_model_state is not None), optimizer, cut, update_model_state, monitor)


def _make_step(
    loss: Loss, optimizer: Optimizer, cut: Cut, update_model_state: Any, monitor: NoiseMonitor | None
) -> Callable[..., tuple[TrainState, Any]]:
    groups, axis = cut.num_groups, cut.axis

    @jax.jit
    def step(state, batch, mask=None, take=None):
        size = jax.tree.leaves(batch)[0].shape[0]
        if axis is None and size != cut.batch_size:
            raise ValueError(f"this step was made for batch_size={cut.batch_size} and got a batch of {size} examples.")
        model_state, metric, more = state.model_state, None, {}
        # Groups are measured before they are put in turn, and devices average their aux once, after all parts: those are kept.
        if loss.has_aux and groups == 1 and axis is None:
            more["model_state"] = state_in_turn(update_model_state, model_state)
        if monitor is not None:
            metric = metric_of(monitor, state.params, state.opt_state, state.step // groups)
            examples = batch if take is None else jax.eval_shape(take, batch)
            more["spread"] = spread_sum(monitor, metric, state.params, loss.is_weighted(state.params, examples))
        (params, opt_state), losses, aux, means, total = update_by_groups(
            loss, optimizer, (state.params, state.opt_state), Share(batch, mask, take), cut, more
        )
        if loss.has_aux:  # aux that is kept has leading axes of groups and microbatches
            flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), aux)
            model_state = total["model_state"] if "model_state" in total else update_in_turn(update_model_state, model_state, flat)
        if axis is not None:
            losses = lax.psum(sum_losses(losses), axis) if isinstance(losses, Weighted) else means.mean()
        changed = {"params": params, "opt_state": opt_state, "step": state.step + groups, "model_state": model_state}
        return end_of_batch(state, changed, cut, losses, None if monitor is None else (monitor, metric, total))

    return step


def make_task_step(task: Task, optimizer: Optimizer, batch_size: int, **settings: Any) -> Callable[..., tuple[TrainState, Any]]:
    """:func:`make_train_step` with the functions of a task, and the microbatch that suits the platform."""
    settings = {"microbatch_size": task.examples_at_a_time, "update_model_state": task.update_model_state} | settings
    return make_train_step(task.loss_fn, optimizer, batch_size, **settings)


def step_of_cut(task: Task, optimizer: Optimizer, cut: Cut, monitor: NoiseMonitor | None = None) -> Callable[..., tuple[TrainState, Any]]:
    """:func:`make_train_step` for a task whose batches are cut so."""
    return _make_step(task.loss, optimizer, cut, task.update_model_state, monitor)
