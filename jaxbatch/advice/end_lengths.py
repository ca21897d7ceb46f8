"""How long runs of a fixed length are, and what all of them may cost, checked before anything runs."""

import math
from typing import Any, NamedTuple

from jaxbatch.batches import Duration, check_duration


class Seconds(NamedTuple):
    """A length of training in seconds, without compilation and evaluation."""

    amount: float


def seconds(amount: float) -> Seconds:
    """A budget in seconds of training, for :func:`jaxbatch.advise_within`; compilation and evaluation do not count.

    Raises:
        ValueError: it is not a finite number above 0.

    Example:
        >>> seconds(600)
        Seconds(amount=600)
    """
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not (amount > 0 and math.isfinite(amount)):
        raise ValueError(f"seconds={amount!r} must be a finite number above 0.")
    return Seconds(amount)


def check_lengths(within: Any, horizon: Any, *, may_be_seconds: bool = False) -> None:
    """Checks the lengths of runs.

    Args:
        within: the length of the longest run that may be made.
        horizon: the length that the answer is for, or None.
        may_be_seconds: whether the longest run may be counted in seconds, where there is no horizon.

    Raises:
        ValueError: one has no unit, or is not above 0.
    """
    in_seconds = may_be_seconds and horizon is None
    for name, value in (("within", within), ("horizon", horizon)):
        if value is None and name == "horizon":
            continue
        if isinstance(value, Seconds) and name == "within" and in_seconds:
            seconds(value.amount)
        elif not isinstance(value, Duration):
            other = ", or jaxbatch.seconds(600)" if name == "within" and in_seconds else ""
            raise ValueError(f"{name}={value!r} has no unit. Give jaxbatch.epochs(10), examples, tokens, steps{other}.")
        else:
            check_duration(value)
            if not value.amount > 0:
                raise ValueError(f"{name}={value.unit}({value.amount}) must be above 0: no run would make an update.")


def check_full_runs(full_runs: Any) -> None:
    """Checks what all runs together may cost.

    Raises:
        ValueError: it is no number, or too small.

    Example:
        >>> check_full_runs(1)
        Traceback (most recent call last):
        ValueError: full_runs=1 must be a number of at least 2: what all runs together may cost, in runs of the whole length.
    """
    if isinstance(full_runs, bool) or not isinstance(full_runs, int | float) or not 2 <= full_runs < math.inf:
        raise ValueError(f"full_runs={full_runs!r} must be a number of at least 2: what all runs together may cost, in runs of the whole length.")


def checked_budget(budget: Any) -> float | None:
    """A budget that is checked before its clock begins.

    Raises:
        ValueError: it is no number of seconds.

    Example:
        >>> checked_budget("1h")
        Traceback (most recent call last):
        ValueError: budget='1h' must be a number of seconds of at least 0, or None for no limit.
    """
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int | float) or not budget >= 0):
        raise ValueError(f"budget={budget!r} must be a number of seconds of at least 0, or None for no limit.")
    return budget
