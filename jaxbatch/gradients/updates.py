"""An optimizer's update. An optimizer that uses the loss gets it too."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from jaxbatch.gradients.groups import check_params
from jaxbatch.gradients.run_lengths import for_length, takes_num_steps
from jaxbatch.states import difference

Optimizer: TypeAlias = optax.GradientTransformation | optax.MultiSteps  # MultiSteps is no transformation, but works like one


def update(
    optimizer: Optimizer, gradient: PyTree, opt_state: PyTree, params: PyTree, loss: Float[Array, ""], counts: Bool[Array, ""] | None = None
) -> tuple[PyTree, PyTree]:
    """One update: the parameters and the optimizer's state after it.

    Args:
        optimizer: any optax optimizer. If it takes ``value``, as ``optax.contrib.reduce_on_plateau`` does, it gets ``loss``. docs/optimizers.md
            lists all of optax's.
        gradient: the gradient of the mean loss, a pytree like ``params``.
        opt_state: the optimizer's state.
        params: the parameters at which the gradient was computed.
        loss: the mean loss at ``params``.
        counts: False where no example counts, see :func:`jaxbatch.sums.something_counts`. There is no loss then, so an optimizer that
            uses it is left as it is, and so are the parameters.

    Raises:
        ValueError: the optimizer needs further arguments, as a line search does; or other parameters, as ``optax.lookahead`` does; or its
            updates do not have the shapes of the parameters, as those of ``optax.contrib.dpsgd``.

    Example:
        >>> optimizer, params = optax.sgd(0.5), jnp.array(1.0)
        >>> update(optimizer, jnp.array(1.0), optimizer.init(params), params, jnp.array(0.5))[0].item()
        0.5
    """
    step = lambda value: call_update(optimizer, gradient, opt_state, params, value)
    try:
        updates, new_state = step(loss)
    except _FAULTS as error:
        _refuse("update", error, opt_state)
        raise
    _check_shapes(updates, params)
    new = optax.apply_updates(params, updates), new_state
    if counts is None or not _is_used(step, loss):
        return new
    return jax.tree.map(lambda new, old: jnp.where(counts, new, old), new, (params, opt_state))


def _is_used(function: Callable[[Array], Any], value: Array) -> bool:
    """Whether a function that is traced does anything with its argument."""
    program = jax.make_jaxpr(function)(value).jaxpr
    return any(variable is program.invars[0] for variables in (program.outvars, *(one.invars for one in program.eqns)) for variable in variables)


def call_update(optimizer: Optimizer, gradient: PyTree, opt_state: PyTree, params: PyTree, loss: Any) -> tuple[PyTree, PyTree]:
    """What the optimizer's own ``update`` returns; it gets ``value=loss`` if it takes a value.

    Example:
        >>> optimizer, params = optax.contrib.sam(optax.sgd(0.5), optax.sgd(0.1), sync_period=1), jnp.array(1.0)
        >>> call_update(optimizer, jnp.array(1.0), optimizer.init(params), params, jnp.array(0.5))[0].item()  # sam takes no value
        -0.5
    """
    with_value = optimizer if isinstance(optimizer, optax.MultiSteps) else optax.with_extra_args_support(optimizer)
    try:
        return with_value.update(gradient, opt_state, params, value=loss)
    except TypeError as error:
        if "unexpected keyword argument 'value'" not in str(error):
            raise
    return optimizer.update(gradient, opt_state, params)


_FAULTS = (TypeError, ValueError, AttributeError, IndexError, KeyError)


def _refuse(function: str, error: Exception, opt_state: PyTree = None) -> None:
    """Raises a ValueError that names the optimizer, if ``error`` says that it is none for :func:`update`; its own bugs stay as they are."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, jax.errors.JAXTypeError):
        return
    is_lookahead = lambda node: isinstance(node, optax.LookaheadState)
    if any(map(is_lookahead, jax.tree.leaves(opt_state, is_leaf=is_lookahead))):
        raise ValueError(
            "optimizer: optax.lookahead takes optax.LookaheadParams and the gradient of the fast ones alone. docs/recipes.md (Lookahead) shows an "
            "init that makes them, and the line that picks the gradient."
        ) from error
    if (isinstance(error, TypeError) and "argument" in text) or (isinstance(error, ValueError) and "_fn must be provided" in text):
        raise ValueError(
            f"optimizer: its {function} needs more than gradient, state, parameters and value ({text}). What evaluates the loss again within an "
            "update, as a line search does, is not supported: take an optimizer that needs one gradient."
        ) from None
    if not isinstance(error, TypeError):
        raise ValueError(f"optimizer: its {function} fails for these parameters ({type(error).__name__}: {text}).") from error


def _check_shapes(updates: PyTree, params: PyTree) -> None:
    """Refuses updates of other shapes, which adding them to the parameters would spread over whole arrays without a word."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), moved in zip(leaves, jax.tree.leaves(updates), strict=False):
        if jnp.shape(leaf) != jnp.shape(moved):
            raise ValueError(
                f"optimizer: its update of params{jax.tree_util.keystr(path)} has shape {jnp.shape(moved)} and not {jnp.shape(leaf)}. If it wants a "
                "gradient for each example, as optax.contrib.dpsgd does, take jaxbatch.clipped_gradient_sum instead."
            )


def check_optimizer(optimizer: Any, params: PyTree) -> None:
    """Checks that ``optimizer`` can update ``params``; the update is traced, not run.

    Raises:
        ValueError: ``optimizer`` is no optax optimizer, needs more than :func:`update` gives, or its state changes its form; or a leaf of
            ``params`` is no floating-point array.

    Example:
        >>> check_optimizer(optax.sgd(0.1), jnp.array(1.0))
    """
    check_params(params)
    if not _is_optimizer(optimizer):
        raise ValueError(f"optimizer={optimizer!r} must be one of optax's, as optax.sgd(0.1).")

    def trace(params):
        try:
            state = optimizer.init(params)
        except _FAULTS as error:
            _refuse("init", error)
            raise
        return state, update(optimizer, params, state, params, jnp.zeros(()))[1]

    change = difference(*jax.eval_shape(trace, params)[::-1])
    if change is not None:
        raise ValueError(f"optimizer: after an update its state {change}, so that no program can go on with it.")


def check_make_optimizer(make_optimizer: Any, setting: Any, name: str = "make_optimizer", num_steps: int | None = None) -> None:
    """Checks that a function of a setting, such as a learning rate, makes an optimizer; or one of a rate and the updates of the run.

    Args:
        make_optimizer: what a user gave.
        setting: a setting whose values are known.
        name: the name of the argument.
        num_steps: the updates of a run, where a function of two arguments is allowed (:func:`jaxbatch.gradients.run_lengths.takes_num_steps`).

    Raises:
        ValueError: it is an optimizer already, or no function, or makes something else.

    Example:
        >>> check_make_optimizer(optax.sgd(0.1), 0.1)
        Traceback (most recent call last):
        ValueError: make_optimizer is an optimizer whose learning rate is settled: give a function of the rate, as optax.adam, or lambda
        rate: optax.sgd(rate, momentum=0.9).
    """
    wanted = "give a function of the rate, as optax.adam, or lambda rate: optax.sgd(rate, momentum=0.9)."
    two = num_steps is not None and takes_num_steps(make_optimizer)
    given = "a learning rate and num_steps" if two else "a learning rate"
    if _is_optimizer(make_optimizer):
        raise ValueError(f"{name} is an optimizer whose learning rate is settled: {wanted}")
    if not callable(make_optimizer):
        raise ValueError(f"{name}={make_optimizer!r} is no function that makes an optimizer: {wanted}")
    try:
        made = (for_length(make_optimizer, num_steps) if two else make_optimizer)(setting)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise ValueError(f"{name} cannot be called with {given} alone ({error}): {wanted}") from None
    if not _is_optimizer(made):
        raise ValueError(f"{name} makes {type(made).__name__}, which is no optimizer of optax: {wanted}")


def _is_optimizer(value: Any) -> bool:
    return hasattr(value, "init") and hasattr(value, "update") and not isinstance(value, type)


_NEED_VALUES = (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError, jax.errors.TracerIntegerConversionError)


def takes_traced(make_optimizer: Callable[[Any], Optimizer], setting: Any, params: PyTree) -> bool:
    """Whether one program can serve all settings: the optimizer can be made from one that is traced, without an ``if`` on its value.

    Args:
        make_optimizer: ``setting -> optimizer``.
        setting: numbers or arrays; only their shapes are used.
        params: only their shapes are used.

    Example:
        >>> warmed = lambda rate: optax.sgd(optax.warmup_cosine_decay_schedule(0.0, rate, 1, 9))
        >>> takes_traced(optax.sgd, 0.1, jnp.ones(2)), takes_traced(warmed, 0.1, jnp.ones(2))
        (True, False)
    """

    def trace(setting, params):
        optimizer = make_optimizer(setting)
        return update(optimizer, params, optimizer.init(params), params, jnp.zeros(()))

    try:
        jax.eval_shape(trace, jax.tree.map(jnp.asarray, setting), params)
    except _NEED_VALUES:
        return False
    except TypeError as error:
        if "Tracer" not in str(error):  # it cannot be a key of a dict, as of optax.piecewise_constant_schedule, or an argument of NumPy
            raise
        return False
    return True
