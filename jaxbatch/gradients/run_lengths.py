"""Optimizers whose schedule goes over the whole run: functions of a learning rate and of the run's number of updates."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def takes_num_steps(make_optimizer: Any) -> bool:
    """Whether a function makes an optimizer from a learning rate and the number of updates of the run, and not from a rate alone.

    Such a function has a parameter ``num_steps``, or two positional parameters without a default. ``optax.adamw`` has a default for its second
    one, so it is a function of the rate.

    Args:
        make_optimizer: what a user gave; what is no function, or has no signature, takes none.

    Example:
        >>> import optax
        >>> takes_num_steps(optax.adamw), takes_num_steps(lambda rate, length: optax.sgd(rate)), takes_num_steps(lambda rate, num_steps=9: None)
        (False, True, True)
    """
    try:
        parameters = inspect.signature(make_optimizer).parameters
    except (TypeError, ValueError):
        return False
    needed = [one for one in parameters.values() if one.kind in _POSITIONAL and one.default is one.empty]
    settled = isinstance(make_optimizer, functools.partial) and "num_steps" in make_optimizer.keywords
    return ("num_steps" in parameters and not settled) or len(needed) == 2


def for_length(make_optimizer: Callable[..., Any], num_steps: Any) -> Callable[[Any], Any]:
    """The function of the rate that remains for runs of one length; a function of the rate alone as it is.

    Args:
        make_optimizer: ``learning_rate -> optimizer`` or ``(learning_rate, num_steps) -> optimizer``.
        num_steps: updates of the run; it may be traced.

    Example:
        >>> import optax
        >>> for_length(optax.sgd, 9) is optax.sgd, for_length(lambda rate, num_steps: (rate, num_steps), 9)(0.1)
        (True, (0.1, 9))
    """
    if not takes_num_steps(make_optimizer):
        return make_optimizer
    if "num_steps" in inspect.signature(make_optimizer).parameters:
        return lambda learning_rate: make_optimizer(learning_rate, num_steps=num_steps)
    return lambda learning_rate: make_optimizer(learning_rate, num_steps)
