"""An optimizer's update. An optimizer that uses the loss gets it too."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jaxbatch.gradients.groups import check_params

Optimizer: TypeAlias = optax.GradientTransformation | optax.MultiSteps  # MultiSteps is no transformation, but works like one


def update(optimizer: Optimizer, gradient: PyTree, opt_state: PyTree, params: PyTree, loss: Float[Array, ""]) -> tuple[PyTree, PyTree]:
    """One update: the parameters and the optimizer's state after it.

    Args:
        optimizer: any optax optimizer. If it takes ``value``, as ``optax.contrib.reduce_on_plateau`` does, it gets ``loss``.
        gradient: the gradient of the mean loss, a pytree like ``params``.
        opt_state: the optimizer's state.
        params: the parameters at which the gradient was computed.
        loss: the mean loss at ``params``.

    Raises:
        ValueError: the optimizer needs further arguments, as a line search does.

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
            f"optimizer: its update needs more than gradient, state, parameters and value ({error}). A line search, which "
            "evaluates the loss again within an update, is not supported: take an optimizer with a learning rate."
        ) from None
    return optax.apply_updates(params, updates), opt_state


def check_optimizer(optimizer: Any, params: PyTree) -> None:
    """Checks that ``optimizer`` can update ``params``; the update is traced, not run.

    Raises:
        ValueError: ``optimizer`` is no optax optimizer, or needs more arguments than :func:`update` gives; or a leaf of ``params``
            is no floating-point array.

    Example:
        >>> check_optimizer(optax.sgd(0.1), jnp.array(1.0))
    """
    check_params(params)
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(f"optimizer={optimizer!r} must be one of optax's, as optax.sgd(0.1).")

    def trace(params):
        return update(optimizer, params, optimizer.init(params), params, jnp.zeros(()))

    jax.eval_shape(trace, params)
