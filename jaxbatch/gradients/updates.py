"""An optimizer's update. An optimizer that uses the loss gets it too."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from jaxbatch.gradients.groups import check_params

Optimizer: TypeAlias = optax.GradientTransformation | optax.MultiSteps  # MultiSteps is no transformation, but works like one


def update(
    optimizer: Optimizer, gradient: PyTree, opt_state: PyTree, params: PyTree, loss: Float[Array, ""], counts: Bool[Array, ""] | None = None
) -> tuple[PyTree, PyTree]:
    """One update: the parameters and the optimizer's state after it.

    Args:
        optimizer: any optax optimizer. If it takes ``value``, as ``optax.contrib.reduce_on_plateau`` does, it gets ``loss``.
        gradient: the gradient of the mean loss, a pytree like ``params``.
        opt_state: the optimizer's state.
        params: the parameters at which the gradient was computed.
        loss: the mean loss at ``params``.
        counts: False where no example counts, see :func:`jaxbatch.sums.something_counts`. There is no loss then, so an optimizer that
            uses it is left as it is, and so are the parameters.

    Raises:
        ValueError: the optimizer needs further arguments, as a line search does.

    Example:
        >>> optimizer, params = optax.sgd(0.5), jnp.array(1.0)
        >>> update(optimizer, jnp.array(1.0), optimizer.init(params), params, jnp.array(0.5))[0].item()
        0.5
    """

    def step(value):
        updates, new_state = optax.with_extra_args_support(optimizer).update(gradient, opt_state, params, value=value)
        return optax.apply_updates(params, updates), new_state

    try:
        new = step(loss)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise ValueError(
            f"optimizer: its update needs more than gradient, state, parameters and value ({error}). A line search, which "
            "evaluates the loss again within an update, is not supported: take an optimizer with a learning rate."
        ) from None
    if counts is None or not _is_used(step, loss):
        return new
    return jax.tree.map(lambda new, old: jnp.where(counts, new, old), new, (params, opt_state))


def _is_used(function: Callable[[Array], Any], value: Array) -> bool:
    """Whether a function that is traced does anything with its argument."""
    program = jax.make_jaxpr(function)(value).jaxpr
    return any(variable is program.invars[0] for variables in (program.outvars, *(one.invars for one in program.eqns)) for variable in variables)


def check_optimizer(optimizer: Any, params: PyTree) -> None:
    """Checks that ``optimizer`` can update ``params``; the update is traced, not run.

    Raises:
        ValueError: ``optimizer`` is no optax optimizer, or needs more arguments than :func:`update` gives; or a leaf of ``params``
            is no floating-point array.

    Example:
        >>> check_optimizer(optax.sgd(0.1), jnp.array(1.0))
    """
    check_params(params)
    if not _is_optimizer(optimizer):
        raise ValueError(f"optimizer={optimizer!r} must be one of optax's, as optax.sgd(0.1).")

    def trace(params):
        return update(optimizer, params, optimizer.init(params), params, jnp.zeros(()))

    jax.eval_shape(trace, params)


def check_make_optimizer(make_optimizer: Any, setting: Any, name: str = "make_optimizer") -> None:
    """Checks that a function of a setting, such as a learning rate, makes an optimizer.

    Args:
        make_optimizer: what a user gave.
        setting: a setting whose values are known.
        name: the name of the argument.

    Raises:
        ValueError: it is an optimizer already, or no function, or makes something else.

    Example:
        >>> check_make_optimizer(optax.sgd(0.1), 0.1)
        Traceback (most recent call last):
        ValueError: make_optimizer is an optimizer whose learning rate is settled: give a function of the rate, as optax.adam, or lambda
        rate: optax.sgd(rate, momentum=0.9).
    """
    wanted = "give a function of the rate, as optax.adam, or lambda rate: optax.sgd(rate, momentum=0.9)."
    if _is_optimizer(make_optimizer):
        raise ValueError(f"{name} is an optimizer whose learning rate is settled: {wanted}")
    if not callable(make_optimizer):
        raise ValueError(f"{name}={make_optimizer!r} is no function that makes an optimizer: {wanted}")
    try:
        made = make_optimizer(setting)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise ValueError(f"{name} cannot be called with a learning rate alone ({error}): {wanted}") from None
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
    return True
