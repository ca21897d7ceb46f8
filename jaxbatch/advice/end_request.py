"""What :func:`jaxbatch.advise_within` is asked, checked and settled before anything runs."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxbatch.advice.doubts import check_finite_data
from jaxbatch.advice.end_estimate import FEWEST_UPDATES, RACE, EndSpace
from jaxbatch.advice.end_law import choose_scale
from jaxbatch.advice.end_lengths import Seconds, check_full_runs, check_lengths
from jaxbatch.advice.ending import Ending
from jaxbatch.advice.estimates import usual_sizes
from jaxbatch.advice.request import LEARNING_RATES, check_question
from jaxbatch.advice.throughput import Throughput
from jaxbatch.batches import Duration, num_steps
from jaxbatch.training.goals import metric_names
from jaxbatch.training.tasks import Task

_FORM = re.compile(r"\s*([A-Za-z_]\w*)\s*([<>])\s*")
FEWEST_STEPS = 8  # updates of a whole run, below which a batch size is not considered


class Metric(NamedTuple):
    """A metric of the task, and whether larger values are better."""

    name: str
    above: bool

    def __str__(self) -> str:
        return f"{self.name}{'>' if self.above else '<'}"


def as_metric(text: "str | Metric") -> Metric:
    """A metric with its direction from its text: ``"loss<"`` shall fall, ``"accuracy>"`` shall rise.

    Raises:
        ValueError: the text has another form.

    Example:
        >>> as_metric("accuracy>"), str(as_metric("loss <"))
        (Metric(name='accuracy', above=True), 'loss<')
    """
    if isinstance(text, Metric):
        return text
    match = _FORM.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"goal={text!r} must name a metric and a direction and no value, as 'loss<' or 'accuracy>', where a budget is given.")
    return Metric(match[1], match[2] == ">")


class EndQuestion(NamedTuple):
    """What :func:`jaxbatch.advise_within` is asked of a task; it says what the fields mean."""

    goal: str | Metric
    optimizer: Any
    within: Duration | Seconds
    horizon: Duration | None = None
    batch_sizes: Sequence[int] | None = None
    learning_rates: Sequence[float] = LEARNING_RATES
    full_runs: float = 8.0
    target: str = "here"
    memory: str | float | None = None
    budget: float | None = None
    seed: int = 0


def check_end_question(task: Any, question: EndQuestion) -> Metric:
    """The metric of a question, whose fields are checked.

    Raises:
        ValueError: a field is of another kind or out of range, or the task lacks the metric.

    Example:
        >>> import numpy as np
        >>> task = Task(None, None, None, np.zeros(8), None)
        >>> check_end_question(task, EndQuestion("loss<", None, within=10))
        Traceback (most recent call last):
        ValueError: within=10 has no unit. Give jaxbatch.epochs(10), examples, tokens, steps, or jaxbatch.seconds(600).
    """
    check_question(task, None, question.batch_sizes, question.learning_rates, 1, question.seed)
    metric, names = as_metric(question.goal), metric_names(task) if isinstance(question.within, Duration | Seconds) else []
    check_lengths(question.within, question.horizon, may_be_seconds=True)
    if not names:
        raise ValueError(f"goal={str(metric)!r} needs a task with metrics_fn and test_data, on which its metric is taken.")
    if metric.name not in names:
        raise ValueError(f"goal={str(metric)!r}: the task's metrics are {', '.join(names)}.")
    if not list(question.learning_rates):
        raise ValueError(f"learning_rates={question.learning_rates!r} must hold at least one rate.")
    check_full_runs(question.full_runs)
    check_finite_data(task)
    return metric


def choose_sizes(task: Task, batch_sizes: Sequence[int] | None) -> tuple[int, ...]:
    """The batch sizes that are considered, in ascending order.

    Raises:
        ValueError: a size is larger than the data set.
    """
    sizes = tuple(sorted(set(map(int, usual_sizes(task.num_examples) if batch_sizes is None else batch_sizes))))
    if not sizes or sizes[-1] > task.num_examples:
        raise ValueError(f"batch_sizes={list(sizes)} must hold sizes between 1 and the {task.num_examples} examples of the data set.")
    return sizes


def steps_of(task: Task, length: Duration | Seconds, batch_sizes: Sequence[int], throughput: Throughput | None) -> dict[int, int]:
    """The updates of a run of a length, by batch size."""
    if isinstance(length, Seconds):
        assert throughput is not None
        return {size: max(1, int(length.amount / throughput.seconds_at(size))) for size in batch_sizes}
    count = lambda size: num_steps(length, num_examples=task.num_examples, batch_size=size, tokens_per_example=task.tokens_per_example)
    return {size: count(size) for size in batch_sizes}


def make_space(
    task: Task, question: EndQuestion, metric: Metric, batch_sizes: Sequence[int], start: float, throughput: Throughput | None
) -> EndSpace:
    """The settings to choose from; sizes with too few updates are left out, unless they were asked for.

    Raises:
        ValueError: the horizon is shorter than the runs that may be made, or no size has enough updates.
    """
    payable = steps_of(task, question.within, batch_sizes, throughput)
    asked = payable if question.horizon is None else steps_of(task, question.horizon, batch_sizes, throughput)
    if question.batch_sizes is None:
        batch_sizes = [size for size in batch_sizes if payable[size] >= FEWEST_STEPS]
    if not batch_sizes:
        raise ValueError(f"within={question.within} has fewer than {FEWEST_STEPS} updates at every batch size: give more.")
    if any(asked[size] < payable[size] for size in batch_sizes):
        raise ValueError(f"horizon={question.horizon} must not be shorter than within={question.within}, the longest run that may be made.")
    tests = len(jax.tree.leaves(task.test_data)[0]) if hasattr(jax.tree.leaves(task.test_data)[0], "__len__") else 10_000
    middle = batch_sizes[len(batch_sizes) // 2]
    return EndSpace(
        tuple(batch_sizes),
        tuple(sorted({float(rate) for rate in question.learning_rates})),
        {size: asked[size] for size in batch_sizes},
        {size: payable[size] for size in batch_sizes},
        choose_scale(metric.above, start, [], tests),
        start,
        float(asked[middle] * middle),
    )


def check_earlier(throughput: Any, known: Any, on_ending: Any, on_progress: Any) -> None:
    """Checks what :func:`jaxbatch.advise_within` is given to start from and to call.

    Raises:
        ValueError: one is of another kind.

    Example:
        >>> check_earlier(None, 3, print, None)
        Traceback (most recent call last):
        ValueError: known=3 must be a list of the runs of an earlier call, as on_ending got them.
    """
    if throughput is not None and not isinstance(throughput, Throughput):
        raise ValueError(f"throughput={throughput!r} must come from jaxbatch.measure_throughput; None: it is measured here, if it is needed.")
    if not isinstance(known, Sequence) or not all(isinstance(ending, Ending) for ending in known):
        raise ValueError(f"known={known!r} must be a list of the runs of an earlier call, as on_ending got them.")
    if not callable(on_ending):
        raise ValueError(f"on_ending={on_ending!r} must be a function.")
    if on_progress is not None and not callable(on_progress):
        raise ValueError(f"on_progress={on_progress!r} must be a function or None.")


def check_known_ends(known: Sequence[Ending], space: EndSpace) -> None:
    """Checks that earlier runs were made for the same question.

    Raises:
        ValueError: one is of a setting or of a length that is not asked about.
    """
    for ending in known:
        size, rate, updates = ending.batch_size, ending.learning_rate, ending.num_steps
        if size not in space.batch_sizes or rate not in space.learning_rates or updates > space.payable_steps[size]:
            most = [space.payable_steps[size] for size in space.batch_sizes]
            raise ValueError(
                f"known holds a run of {updates} updates with batch size {size} and learning rate {rate:g}, and the choice is among "
                f"{list(space.batch_sizes)}, with at most {most} updates, and {list(space.learning_rates)}: ask what was asked when it was made, "
                "with the same throughput."
            )


def first_size(num_steps: Mapping[int, int]) -> int:
    """The size of the first, shortest runs: 64, or the largest below whose runs of a sixteenth of the length have updates enough, or of a quarter.

    Args:
        num_steps: updates of the longest run, by batch size.

    Example:
        >>> first_size({16: 800, 64: 200, 256: 50}), first_size({8: 120, 16: 60}), first_size({64: 9, 128: 4})
        (16, 8, 64)
    """
    for part in (RACE, 4):
        enough = [size for size, steps in num_steps.items() if size <= 64 and steps >= part * FEWEST_UPDATES]
        if enough:
            return max(enough)
    return min(num_steps)
