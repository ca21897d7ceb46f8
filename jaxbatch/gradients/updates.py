"""An optimizer's update, with the loss where the optimizer wants it."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

Optimizer: TypeAlias = optax.GradientTransformation | optax.MultiSteps  # the latter has init and update, and is no transformation


def update(optimizer: Optimizer, gradient: PyTree, opt_state: PyTree, params: PyTree, loss: Float[Array, ""]) -> tuple[PyTree, PyTree]:
    """One update: the parameters and the optimizer's state after it.

    Args:
        optimizer: any of optax's. One that asks for ``value``, as ``optax.contrib.reduce_on_plateau``, gets ``loss``.
        gradient: of the mean loss, like ``params``.
        opt_state: the optimizer's state.
        params: where the gradient was taken.
        loss: the mean loss there.

    Raises:
        ValueError: an optimizer that asks for more, as a line search does.

    Example:
        >>> optimizer, params = optax.sgd(0.5), jnp.array(1.0)
        >>> update(optimizer, jnp.array(1.0), optimizer.init(params), params, jnp.array(0.5))[0].item()
        0.5
    """
    try:
        updates, opt_state = optax.with_extra_args_support(optimizer).update(gradient, opt_state, params, value=loss)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise ValueError(
            f"optimizer: its update wants more than gradient, state, parameters and value ({error}). A line search, which "
            "evaluates the loss again within an update, is not supported: take an optimizer with a learning rate."
        ) from None
    return optax.apply_updates(params, updates), opt_state


def check_optimizer(optimizer: Any, params: PyTree) -> None:
    """Makes sure that ``optimizer`` can update ``params`` (traced, not run).

    Raises:
        ValueError: what is no optimizer of optax's, or asks for more than :func:`update` gives.

    Example:
        >>> check_optimizer(optax.sgd(0.1), jnp.array(1.0))
    """
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(f"optimizer={optimizer!r} must be one of optax's, as optax.sgd(0.1).")

    def trace(params):
        return update(optimizer, params, optimizer.init(params), params, jnp.zeros(()))

    jax.eval_shape(trace, params)
