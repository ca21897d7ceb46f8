"""A training step for one batch size, and the state that it changes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32, PyTree, UInt32

from jaxbatch.batches import check_seed
from jaxbatch.gradients.accumulators import state_in_turn, update_in_turn
from jaxbatch.gradients.cut import Cut, Share
from jaxbatch.gradients.groups import Loss, LossFn
from jaxbatch.gradients.part_norms import NoiseMonitor, WithNoise, metric_of, spread_sum, statistics_of_parts
from jaxbatch.gradients.split import update_by_groups
from jaxbatch.gradients.updates import Optimizer, check_optimizer
from jaxbatch.kinds import checked
from jaxbatch.machine.compiling import take_out_constants
from jaxbatch.states import as_arrays, difference, same_containers
from jaxbatch.sums import Losses, Weighted, sum_losses
from jaxbatch.training.tasks import Task, UpdateModelState

_INIT = 0x696E6974  # "init": makes the keys of initialisation differ from the keys of shuffling


class TrainState(NamedTuple):
    """Everything that a step changes, and from ``progress`` on what :func:`jaxbatch.fit` needs besides to go on.

    A field that steps change is declared here, made by :func:`init_state` and changed by the step. One that they do not change is declared
    here and left out by :func:`without_run`, and written by :func:`jaxbatch.training.run_fields.written`. New ones come last, so that older
    checkpoints can be read.
    """

    params: PyTree
    opt_state: PyTree
    step: Int32[Array, ""]  # calls of the optimizer so far; optax.MultiSteps makes one update from several calls
    model_state: PyTree = ()  # the model's state besides its parameters, such as running moments
    progress: PyTree = ()  # how far the run has come, from jaxbatch.training.plans.write_progress
    noise: PyTree = ()  # running averages of the noise, from jaxbatch.training.monitor.NoiseTrack
    policy: PyTree = ()  # what a batch-size policy has chosen and its state, a jaxbatch.schedules.policies.Choice


def without_run(state: TrainState) -> TrainState:
    """A state as steps take it: parameters, optimizer and model, nothing of the run that it comes from."""
    return state._replace(progress=(), noise=(), policy=())


@checked
def init_state(task: Task, optimizer: Any, seed: int | np.integer | UInt32[Array, ""]) -> TrainState:
    """Parameters, optimizer state and model state at the start, a pure function of the seed.

    Raises:
        ValueError: a parameter is not a floating-point array, or ``optimizer`` is not one of optax's or is a line search.

    Example:
        >>> import optax
        >>> task = Task(lambda key: jax.random.normal(key, (2,)), None, None, jnp.zeros((4, 1)), None)
        >>> bool((init_state(task, optax.sgd(0.1), 3).params == init_state(task, optax.sgd(0.1), 3).params).all())
        True
    """
    return make_init_state(task)(optimizer, seed)


def make_init_state(task: Task) -> Callable[[Any, Any], TrainState]:
    """``(optimizer, seed) -> state`` as :func:`init_state` makes it, by one program for all seeds and optimizers.

    Example:
        >>> import optax
        >>> task = Task(lambda key: jax.random.normal(key, (2,)), None, None, jnp.zeros((4, 1)), None)
        >>> begin = make_init_state(task)
        >>> all((begin(optax.sgd(0.1), seed).params == init_state(task, optax.sgd(0.1), seed).params).all() for seed in (0, 1))
        True
    """
    start = None

    def begin(optimizer, seed):
        nonlocal start
        if not isinstance(seed, jax.Array):  # the seeds of a sweep are traced, and were checked before
            check_seed(seed)
        key = jax.random.fold_in(jax.random.key(seed), _INIT)
        if start is None:
            run, constants = take_out_constants(task.start, key)
            compiled = jax.jit(run)
            start = lambda key: compiled(constants, key)
        params, model_state = (start(key), ()) if task.update_model_state is None else start(key)
        check_optimizer(optimizer, params)
        return as_arrays(TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), model_state))

    return begin


def start_state(task: Task, optimizer: Any, seed: Any, given: TrainState | None = None) -> TrainState:
    """The state from which a run starts: ``given``, or else that of the seed.

    Raises:
        ValueError: ``given`` is no state, or is that of another model or optimizer; see also
            :func:`jaxbatch.gradients.updates.check_optimizer`.
    """
    if given is None:
        return init_state(task, optimizer, seed)
    if not isinstance(given, TrainState):
        raise ValueError(f"state is of type {type(given).__name__} and must be a jaxbatch.TrainState, as record['state'] is one.")
    check_optimizer(optimizer, given.params)
    for name, wanted in _parts_at_start(task).items():
        change = difference(getattr(given, name), wanted, types=False)
        if change is not None:
            raise ValueError(f"state.{name} is not of this task ({change}): give a state of this task, or the task of the state.")
    wanted = jax.eval_shape(optimizer.init, given.params)
    change = difference(given.opt_state, wanted, types=False)
    if change is not None or not same_containers(given.opt_state, wanted):
        change = change or "is made of other containers"
        raise ValueError(f"state.opt_state is not of this optimizer ({change}): give that of the state, or opt_state=optimizer.init(params).")
    return as_arrays(given)


def _parts_at_start(task: Task) -> dict[str, PyTree]:
    """The shapes of a task's parameters and model state; none where ``init`` cannot be traced, because who has a state needs none."""
    if not callable(task.init):
        return {}
    try:
        start = jax.eval_shape(task.start, jax.random.key(0))
    except jax.errors.JAXTypeError:
        return {}
    return {"params": start} if task.update_model_state is None else dict(zip(("params", "model_state"), start, strict=True))


def state_shapes(task: Task, optimizer: Optimizer) -> TrainState:
    """The shapes of a task's state at its start; nothing is computed.

    Example:
        >>> import optax
        >>> state_shapes(Task(lambda key: jnp.ones(3), None, None, jnp.zeros((4, 1)), None), optax.sgd(0.1)).params.shape
        (3,)
    """
    return jax.eval_shape(lambda: init_state(task, optimizer, 0))


def start_shapes(task: Task) -> PyTree:
    """The shapes of the parameters at a task's start; the parameters are only traced, not computed.

    Example:
        >>> start_shapes(Task(lambda key: jnp.ones(3), None, None, jnp.zeros((4, 1)), None)).shape
        (3,)
    """
    start = jax.eval_shape(task.start, jax.random.key(0))
    return start if task.update_model_state is None else start[0]


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
        state = state._replace(params=params, opt_state=opt_state, step=state.step + groups, model_state=model_state)
        if axis is not None:
            losses = lax.psum(sum_losses(losses), axis) if isinstance(losses, Weighted) else means.mean()
        if metric is None:
            return state, losses
        return state, WithNoise(losses, statistics_of_parts(monitor, metric, total["spread"], total["gradient"], cut.group_size * groups))

    return step


def make_task_step(task: Task, optimizer: Optimizer, batch_size: int, **settings: Any) -> Callable[..., tuple[TrainState, Any]]:
    """:func:`make_train_step` with the functions of a task, and the microbatch that suits the platform."""
    settings = {"microbatch_size": task.examples_at_a_time, "update_model_state": task.update_model_state} | settings
    return make_train_step(task.loss_fn, optimizer, batch_size, **settings)


def step_of_cut(task: Task, optimizer: Optimizer, cut: Cut, monitor: NoiseMonitor | None = None) -> Callable[..., tuple[TrainState, Any]]:
    """:func:`make_train_step` for a task whose batches are cut so."""
    return _make_step(task.loss, optimizer, cut, task.update_model_state, monitor)
