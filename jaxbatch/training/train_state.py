"""The state that training changes: how it begins, what steps take of it, and what it becomes after a batch."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Key, PyTree, UInt32

from jaxbatch.batches import check_seed
from jaxbatch.gradients.cut import Cut
from jaxbatch.gradients.part_norms import Metric, NoiseMonitor, WithNoise, check_monitor, statistics_of_parts
from jaxbatch.gradients.updates import Optimizer, check_optimizer
from jaxbatch.kinds import checked
from jaxbatch.machine.compiling import compile_ahead
from jaxbatch.machine.constants import call_compiled, take_out_constants
from jaxbatch.states import as_arrays, difference, same_containers
from jaxbatch.sums import Losses
from jaxbatch.training.tasks import Task

_INIT = 0x696E6974  # "init": makes the keys of initialisation differ from the keys of shuffling


class TrainState(NamedTuple):
    """Everything that a step changes, and from ``progress`` on what :func:`jaxbatch.fit` needs besides to go on.

    A field that steps change is declared here, made by :func:`init_state` or :func:`for_steps` and changed by :func:`end_of_batch`. One that
    they do not change is declared here, left out by :func:`for_steps` and written by :func:`jaxbatch.training.run_fields.written`. A new one
    has a default, with which checkpoints are read that lack it.
    """

    params: PyTree
    opt_state: PyTree
    step: Int32[Array, ""]  # calls of the optimizer so far; optax.MultiSteps makes one update from several calls
    model_state: PyTree = ()  # the model's state besides its parameters, such as running moments
    progress: PyTree = ()  # how far the run has come, from jaxbatch.training.plans.write_progress
    noise: PyTree = ()  # running averages of the noise, from jaxbatch.training.monitor.NoiseTrack
    policy: PyTree = ()  # what a batch-size policy has chosen and its state, a jaxbatch.schedules.policies.Choice


def for_steps(state: TrainState, monitor: NoiseMonitor | None = None) -> TrainState:
    """A state as steps take it: parameters, optimizer and model, nothing of the run that it comes from.

    Raises:
        ValueError: steps cannot measure what the monitor asks for, see :func:`jaxbatch.gradients.part_norms.check_monitor`.
    """
    if monitor is not None:
        check_monitor(monitor, state.opt_state, state.params)
    return state._replace(progress=(), noise=(), policy=())


def by_kind(state: TrainState) -> dict[str, PyTree]:
    """The parts of a state as a memory profile tells them apart: what is neither a parameter nor the optimizer's counts as the model's state."""
    rest = state._asdict()
    return {name: rest.pop(name) for name in ("params", "opt_state")} | {"model_state": rest}


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
    start = compile_start(task)

    def begin(optimizer, seed):
        params, model_state = start(key_of_start(seed))
        check_optimizer(optimizer, params)
        return as_arrays(TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), model_state))

    return begin


def key_of_start(seed: Any) -> Key[Array, ""]:
    """The key with which a run of this seed begins; a traced seed was checked before.

    Example:
        >>> bool(key_of_start(0) == jax.random.key(0))
        False
    """
    if not isinstance(seed, jax.Array):
        check_seed(seed)
    return jax.random.fold_in(jax.random.key(seed), _INIT)


def compile_start(task: Task) -> Callable[[Key[Array, ""]], tuple[PyTree, PyTree]]:
    """``key -> (params, model_state)`` by one program for all keys, which runs and sweeps share because its text is the same.

    Example:
        >>> start = compile_start(Task(lambda key: jax.random.normal(key, (2,)), None, None, jnp.zeros((4, 1)), None))
        >>> start(key_of_start(0))[0].shape, bool((start(key_of_start(0))[0] == start(key_of_start(1))[0]).any()), start(key_of_start(0))[1]
        ((2,), False, ())
    """
    compiled = None

    def start(key):
        nonlocal compiled
        if isinstance(key, jax.core.Tracer):  # of a program around this one
            begun = call_compiled(task.start, key)
        else:
            if compiled is None:
                run, constants = take_out_constants(task.start, key)
                compiled = functools.partial(compile_ahead(jax.jit(run), constants, key), constants)
            begun = compiled(key)
        return (begun, ()) if task.update_model_state is None else begun

    return start


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


def state_shapes(task: Task, optimizer: Optimizer, monitor: NoiseMonitor | None = None) -> TrainState:
    """The shapes of a task's state at its start, as steps take it; nothing is computed.

    Example:
        >>> import optax
        >>> state_shapes(Task(lambda key: jnp.ones(3), None, None, jnp.zeros((4, 1)), None), optax.sgd(0.1)).params.shape
        (3,)
    """
    return jax.eval_shape(lambda: for_steps(init_state(task, optimizer, 0), monitor))


def start_shapes(task: Task) -> PyTree:
    """The shapes of the parameters at a task's start; the parameters are only traced, not computed.

    Example:
        >>> start_shapes(Task(lambda key: jnp.ones(3), None, None, jnp.zeros((4, 1)), None)).shape
        (3,)
    """
    start = jax.eval_shape(task.start, jax.random.key(0))
    return start if task.update_model_state is None else start[0]


def end_of_batch(
    state: TrainState, changed: dict[str, PyTree], cut: Cut, losses: Losses, measured: tuple[NoiseMonitor, Metric, dict[str, Any]] | None
) -> tuple[TrainState, Losses | WithNoise]:
    """The state after a batch and what a step tells of it; in pieces also after each group but the last, of the groups so far.

    Args:
        state: before its last update.
        changed: fields of the state after it.
        cut: of the batch.
        losses: of the batch.
        measured: how its noise is measured, and by name the sums over all of its parts: their ``"spread"`` and ``"gradient"``.
    """
    state = state._replace(**changed)
    if measured is None:
        return state, losses
    monitor, metric, total = measured
    return state, WithNoise(losses, statistics_of_parts(monitor, metric, total["spread"], total["gradient"], cut.group_size * cut.num_groups))
