"""What :func:`jaxbatch.advise` is asked, checked before anything runs: each slip is one line that names the argument."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxbatch.advice.choices import Objective
from jaxbatch.advice.probes import MakeOptimizer, Probe
from jaxbatch.advice.throughput import Throughput
from jaxbatch.batches import Duration, check_duration, check_seed, epochs
from jaxbatch.gradients.run_lengths import for_length
from jaxbatch.gradients.updates import Optimizer
from jaxbatch.training.goals import Goal
from jaxbatch.training.tasks import Task, updates_of

LEARNING_RATES = tuple(float(f"{10 ** (quarter / 4):.3g}") for quarter in range(-16, 3))  # 0.0001 to 3.16, four to a power of ten
_FEWEST = 4  # examples, from which on there are two batch sizes to choose from


class Question(NamedTuple):
    """What :func:`jaxbatch.advise` is asked of a task; it says what the fields mean."""

    goal: str | Goal
    optimizer: MakeOptimizer
    objective: Objective = "time"
    batch_sizes: Sequence[int] | None = None
    learning_rates: Sequence[float] = LEARNING_RATES
    longest: Duration = epochs(30)
    evaluations_per_epoch: int = 12
    target: str = "here"
    memory: str | float | None = None
    budget: float | None = None
    max_probes: int = 30
    tolerance: float = 0.05
    measure_noise: bool = True
    seed: int = 0

    def make_at(self, task: Task, batch_size: int) -> Callable[[Any], Optimizer]:
        """``learning_rate -> optimizer``, whose schedule goes over the longest run at this size if it has one."""
        return for_length(self.optimizer, updates_of(task, self.longest, batch_size))


def check_question(task: Any, goal: Any, batch_sizes: Any, learning_rates: Any, evaluations_per_epoch: Any, seed: Any) -> None:
    """Checks the kinds of what is to be trained and chosen from; whether sizes fit the data is checked later.

    Raises:
        ValueError: one is of another kind or out of range.

    Example:
        >>> task = Task(None, None, None, np.zeros(8), None)
        >>> check_question(task, "loss<1", 64, [0.1, 0.2, 0.3], 12, 0)
        Traceback (most recent call last):
        ValueError: batch_sizes=64 must be a list of whole numbers of at least 1, as [16, 64, 256].
    """
    if not isinstance(task, Task):
        raise ValueError(f"task is of type {type(task).__name__}, and must be a jaxbatch.Task, as from jaxbatch.classification_task.")
    if isinstance(goal, Goal) and not (isinstance(goal.metric, str) and _is_number(goal.value)):
        raise ValueError(f"goal={goal!r} must name a metric and a finite number to reach.")
    if batch_sizes is None and task.num_examples < _FEWEST:
        raise ValueError(f"task has {task.num_examples} training examples: too few to choose a batch size. At least {_FEWEST} are needed.")
    check_lists(batch_sizes, learning_rates)
    _check_whole("evaluations_per_epoch", evaluations_per_epoch, 1)
    check_seed(seed)


def check_lists(batch_sizes: Any, learning_rates: Any, *, some: bool = False) -> None:
    """Checks what is chosen from; with ``some``, whether there is a learning rate at all.

    Raises:
        ValueError: one is no list of numbers that it may hold.

    Example:
        >>> check_lists(None, [0.1, -0.1])
        Traceback (most recent call last):
        ValueError: learning_rates=[0.1, -0.1] must be a list of finite numbers above 0, as [0.001, 0.01, 0.1].
    """
    if batch_sizes is not None:
        sizes = "must be a list of whole numbers of at least 1, as [16, 64, 256]."
        _check_list("batch_sizes", batch_sizes, lambda size: _is_whole(size) and size >= 1, sizes)
    rates = "must be a list of finite numbers above 0, as [0.001, 0.01, 0.1]."
    _check_list("learning_rates", learning_rates, lambda rate: _is_number(rate) and rate > 0, rates)
    if some and not list(learning_rates):
        raise ValueError(f"learning_rates={learning_rates!r} must hold at least one rate.")


def check_limits(
    *,
    longest: Any,
    budget: Any,
    max_probes: Any,
    tolerance: Any,
    measure_noise: Any,
    seed: Any,
    throughput: Any,
    known: Any,
    on_probe: Any,
    on_progress: Any,
) -> None:
    """Checks how long a search may take, and what it is given to start from and to call.

    Raises:
        ValueError: one is of another kind or out of range.
    """
    check_spending(longest, budget, max_probes, tolerance, seed)
    if not isinstance(measure_noise, bool | np.bool_):
        raise ValueError(f"measure_noise={measure_noise!r} must be True or False.")
    if throughput is not None and not isinstance(throughput, Throughput):
        raise ValueError(
            f"throughput is of type {type(throughput).__name__}, and must come from jaxbatch.measure_throughput; None: it is measured here."
        )
    if not isinstance(known, Sequence) or isinstance(known, str) or not all(isinstance(probe, Probe) for probe in known):
        raise ValueError(f"known must be the probes of an earlier call, as on_probe got them, and is a {type(known).__name__} of something else.")
    check_functions(on_probe=on_probe, on_progress=on_progress)


def check_spending(longest: Any, budget: Any, max_probes: Any, tolerance: Any, seed: Any) -> None:
    """Checks what a search may spend.

    Raises:
        ValueError: one is of another kind or out of range.

    Example:
        >>> check_spending(epochs(3), -1, 30, 0.05, 0)
        Traceback (most recent call last):
        ValueError: budget=-1 must be a number of seconds of at least 0, or None for no limit.
    """
    if not isinstance(longest, Duration):
        raise ValueError(f"longest={longest!r} has no unit. Give a duration, as jaxbatch.epochs(30) or jaxbatch.steps(1000).")
    check_duration(longest)
    if not longest.amount > 0:
        raise ValueError(f"longest={longest.unit}({longest.amount}) must be above 0: no run would make an update.")
    if budget is not None and not (_is_number(budget) and budget >= 0):
        raise ValueError(f"budget={budget!r} must be a number of seconds of at least 0, or None for no limit.")
    _check_whole("max_probes", max_probes, 1)
    if not (_is_number(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance={tolerance!r} must be a finite number of at least 0, as 0.05 for a twentieth.")
    check_seed(seed)
    if seed + max_probes > 2**32:
        raise ValueError(f"seed={seed} leaves no seeds for max_probes={max_probes} runs below {2**32}. Take a smaller seed.")


def check_functions(**functions: Any) -> None:
    """Checks functions that are called with what happens; ``on_progress`` may be None.

    Raises:
        ValueError: one is no function.

    Example:
        >>> check_functions(on_probe=3)
        Traceback (most recent call last):
        ValueError: on_probe=3 must be a function.
    """
    for name, function in functions.items():
        if not callable(function) and not (function is None and name == "on_progress"):
            raise ValueError(f"{name}={function!r} must be a function{' or None' if name == 'on_progress' else ''}.")


def check_known(known: Sequence[Probe], batch_sizes: Sequence[int], learning_rates: Sequence[float]) -> None:
    """Checks that earlier runs were chosen from the same settings.

    Example:
        >>> check_known([Probe(8, 0.1, 0, 9, True, False, 9, 0.0, 0.0, 0.0)], [16, 32], [0.1])
        Traceback (most recent call last):
        ValueError: known holds a run with batch size 8 and learning rate 0.1, and the choice is among [16, 32] and [0.1]: ask what was
        asked when it was made.
    """
    for probe in known:
        if probe.batch_size not in batch_sizes or probe.learning_rate not in learning_rates:
            raise ValueError(
                f"known holds a run with batch size {probe.batch_size} and learning rate {probe.learning_rate:g}, and the choice is among "
                f"{list(batch_sizes)} and {list(learning_rates)}: ask what was asked when it was made."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_whole(name: str, value: Any, least: int) -> None:
    if not _is_whole(value) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}.")


def _check_list(name: str, values: Any, is_right: Any, wanted: str) -> None:
    if hasattr(values, "tolist"):
        values = values.tolist()
    again = isinstance(values, Iterable) and not isinstance(values, str) and iter(values) is not values  # a generator is read once
    if not again or not all(map(is_right, values)):
        raise ValueError(f"{name}={values!r} {wanted}")
