"""The words and numbers of a target in tables, figures and sentences: accuracies in percent, any other metric as it is."""

from collections.abc import Sequence

import numpy as np

from jaxbatch.intervals import interval
from jaxbatch.training.goals import Goal


def is_share(goal: Goal) -> bool:
    """Whether the metric is an accuracy between 0 and 1, which is shown in percent.

    Example:
        >>> is_share(Goal("accuracy", 0.95)), is_share(Goal("loss", 0.4, above=False))
        (True, False)
    """
    return goal.metric.endswith("accuracy") and goal.above and 0 < goal.value < 1


def in_words(goal: Goal) -> str:
    """The target within a sentence.

    Example:
        >>> in_words(Goal("accuracy", 0.95)), in_words(Goal("loss", 0.4, above=False))
        ('95% validation accuracy', 'a validation loss of at most 0.4')
    """
    if is_share(goal):
        return f"{100 * goal.value:g}% validation {goal.metric}"
    return f"a validation {goal.metric} of at {'least' if goal.above else 'most'} {goal.value:g}"


def in_short(goal: Goal) -> str:
    """The target where it is clear that it is one.

    Example:
        >>> in_short(Goal("accuracy", 0.95)), in_short(Goal("loss", 0.4, above=False))
        ('95%', 'loss ≤ 0.4')
    """
    return f"{100 * goal.value:g}%" if is_share(goal) else f"{goal.metric} {'≥' if goal.above else '≤'} {goal.value:g}"


def heading(goal: Goal, what: str = "validation {}") -> str:
    """The head of a column that holds the metric.

    Example:
        >>> heading(Goal("accuracy", 0.95)), heading(Goal("loss", 0.4, above=False), "test {} at the end")
        ('validation accuracy, %', 'test loss at the end')
    """
    return what.format(goal.metric) + (", %" if is_share(goal) else "")


def scale(goal: Goal) -> float:
    """What the metric is multiplied with where it is shown."""
    return 100.0 if is_share(goal) else 1.0


def show(goal: Goal, values: Sequence[float | None], percent: str = ".2f", other: str = ".4g") -> str:
    """The mean of the metric over seeds, with its interval, as a table shows it; None: not finite.

    Example:
        >>> show(Goal("accuracy", 0.95), [0.5]), show(Goal("loss", 0.4, above=False), [0.125])
        ('50.00', '0.125')
    """
    shown = [np.nan if value is None else scale(goal) * value for value in values]
    return format(interval(shown, scale="linear" if is_share(goal) else "any"), percent if is_share(goal) else other)


def better(goal: Goal, one: float, other: float | None) -> float | None:
    """The better of two measurements, of which the second may be the first one's own beginning, None.

    Example:
        >>> better(Goal("loss", 0.4, above=False), 0.3, 0.2), better(Goal("loss", 0.4, above=False), float("nan"), None)
        (0.2, None)
    """
    if not np.isfinite(one):
        return other
    return one if other is None else max(one, other) if goal.above else min(one, other)


def has_collapsed(goal: Goal, end: float | None, best: float | None) -> bool:
    """Whether a run ends below half of its best accuracy. Other metrics have no zero to count from: False.

    Example:
        >>> has_collapsed(Goal("accuracy", 0.95), 0.1, 0.8), has_collapsed(Goal("loss", 0.4, above=False), 2.0, 0.1)
        (True, False)
    """
    return is_share(goal) and (end or 0.0) < 0.5 * (best or 0.0)


def lost_in_words(goal: Goal) -> str:
    """What it means that a run is lost."""
    return f"diverged, or below half of its own best validation {goal.metric}" if is_share(goal) else "diverged"
