"""Goals. A goal is a metric with a direction and a value, such as a test accuracy of at least 0.98."""

import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from jaxbatch.kinds import checked
from jaxbatch.training.evaluation import call_metrics
from jaxbatch.training.fitting import fit
from jaxbatch.training.plans import FitConfig
from jaxbatch.training.tasks import Task
from jaxbatch.training.train_state import TrainState

_FORM = re.compile(r"\s*([A-Za-z_]\w*)\s*([<>])=?\s*(\S+)\s*")
_NO_VALUE = re.compile(r"\s*[A-Za-z_]\w*\s*[<>]=?\s*")


class Goal(NamedTuple):
    """A metric of the task, the value to reach, and whether larger values are better."""

    metric: str
    value: float
    above: bool = True

    def reached(self, measured: float) -> bool:
        """Whether a measured value is at least as good as the goal; NaN never is.

        Example:
            >>> Goal("accuracy", 0.98).reached(0.98), Goal("loss", 0.4, above=False).reached(math.nan)
            (True, False)
        """
        return measured >= self.value if self.above else measured <= self.value

    def in_record(self, record: Mapping[str, Any]) -> float:
        """The goal's metric in a record of :func:`jaxbatch.fit`."""
        return float(record[f"test_{self.metric}"])

    def __str__(self) -> str:
        return f"{self.metric}{'>' if self.above else '<'}{self.value:g}"


@checked
def as_goal(goal: "str | Goal") -> Goal:
    """A goal from its text, such as ``"accuracy>0.98"`` or ``"loss<0.4"``; a :class:`Goal` is returned as it is.

    Raises:
        ValueError: the text has another form, or its value is not a finite number.

    Example:
        >>> as_goal("accuracy>0.98"), str(as_goal("loss <= 0.4"))
        (Goal(metric='accuracy', value=0.98, above=True), 'loss<0.4')
    """
    if isinstance(goal, Goal):
        return goal
    match = _FORM.fullmatch(goal) if isinstance(goal, str) else None
    try:
        value = float(match[3]) if match else math.nan
    except ValueError:
        value = math.nan
    if match is None or not math.isfinite(value):
        fixed = " Where the length of the run is fixed and no value is known, ask jaxbatch.advise_within." if _NO_VALUE.fullmatch(str(goal)) else ""
        raise ValueError(f"goal={goal!r} must name a metric, a direction and a number, as 'accuracy>0.98' or 'loss<0.4'.{fixed}")
    return Goal(match[1], value, match[2] == ">")


def metric_names(task: Task) -> list[str]:
    """The names of a task's metrics, in alphabetical order; nothing is computed.

    Example:
        >>> import jax.numpy as jnp
        >>> loss_fn = lambda w, x: 0.5 * (x - w) ** 2
        >>> metric_names(Task(lambda key: jnp.array(0.0), loss_fn, lambda w, x: {"loss": loss_fn(w, x)}, jnp.ones(4), jnp.ones(2)))
        ['loss']
    """
    if task.test_data is None or task.metrics_fn is None:
        return []
    batch = task._replace(train_data=task.test_data, prepare=task.prepare_test).shapes_of_batch(1)
    return list(jax.eval_shape(functools.partial(call_metrics, task.metrics_fn), jax.eval_shape(task.start, jax.random.key(0)), batch))


def check_goal(task: Task, goal: "str | Goal") -> Goal:
    """The goal, if the task has its metric.

    Raises:
        ValueError: the task has no such metric, or no test data to take it on.

    Example:
        >>> import jax.numpy as jnp
        >>> task = Task(lambda key: jnp.array(0.0), None, lambda w, x: {"error": x - w}, jnp.ones(4), jnp.ones(2))
        >>> check_goal(task, "loss<0.4")
        Traceback (most recent call last):
        ValueError: goal='loss<0.4': the task's metrics are error.
    """
    goal, names = as_goal(goal), metric_names(task)
    if not names:
        raise ValueError(f"goal={str(goal)!r} needs a task with metrics_fn and test_data, on which its metric is taken.")
    if goal.metric not in names:
        raise ValueError(f"goal={str(goal)!r}: the task's metrics are {', '.join(names)}.")
    return goal


@checked
def fit_to_target(task: Task, config: FitConfig, goal: "str | Goal", *, state: TrainState | None = None) -> Iterator[dict[str, Any]]:
    """:func:`jaxbatch.fit`, but the first record that has reached a goal is the last one.

    Args:
        task: its ``test_data`` are what the goal is judged on. To choose a setting, take a part of the training set that is
            held out (:func:`jaxbatch.hold_out`), not the test set.
        config: its ``duration`` is the longest time to train; ``evaluations_per_epoch`` says how often the goal is looked at.
        goal: see :func:`as_goal`.
        state: see :func:`jaxbatch.fit`.

    Yields:
        The records of :func:`jaxbatch.fit`, with ``reached``. If the last one has ``reached`` False, the run is *censored*: the
        duration ended first, or the run diverged.

    Raises:
        ValueError: the task has no such metric, and the errors of :func:`jaxbatch.fit`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from jaxbatch import epochs
        >>> loss_fn = lambda w, x: 0.5 * (x - w) ** 2
        >>> task = Task(lambda key: jnp.array(0.0), loss_fn, lambda w, x: {"loss": loss_fn(w, x)}, jnp.ones(4), jnp.ones(4))
        >>> config = FitConfig(optax.sgd(0.5), batch_size=4, duration=epochs(100))
        >>> *_, last = fit_to_target(task, config, "loss<0.01")
        >>> last["updates"], last["reached"]
        (3, True)

    References:
        Shallue et al., `Measuring the Effects of Data Parallelism on Neural Network Training
        <https://arxiv.org/abs/1811.03600>`_, 2018, section 4.1: steps to result.
    """
    yield from until_reached(fit(task, config, state=state), check_goal(task, goal))


def until_reached(records: Iterable[dict[str, Any]], goal: Goal) -> Iterator[dict[str, Any]]:
    """Records up to the first that has reached a goal, each with whether it has.

    Example:
        >>> seen = until_reached(({"diverged": False, "test_loss": loss} for loss in (0.5, 0.3, 0.1)), Goal("loss", 0.4, above=False))
        >>> [(record["test_loss"], record["reached"]) for record in seen]
        [(0.5, False), (0.3, True)]
    """
    for record in records:
        reached = not record["diverged"] and goal.reached(goal.in_record(record))
        yield record | {"reached": reached}
        if reached:
            return
