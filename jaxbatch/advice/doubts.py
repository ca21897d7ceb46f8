"""What advice must refuse or confess: data that no run can learn from, goals that are too near or too far, missing signal."""

import math
from collections.abc import Sequence

import jax
import numpy as np

from jaxbatch.advice.choices import Choice
from jaxbatch.advice.estimates import Estimate, Space, usual_sizes
from jaxbatch.advice.probes import Probe
from jaxbatch.advice.search import CONFIRMED
from jaxbatch.data.streams import is_stream
from jaxbatch.training.goals import Goal
from jaxbatch.training.run_programs import RunPrograms
from jaxbatch.training.tasks import Task
from jaxbatch.training.train_state import TrainState


def check_finite_data(task: Task) -> None:
    """Checks the arrays of a task; a stream is not read.

    Raises:
        ValueError: an array holds NaN or an infinity, and how many of its examples do.

    Example:
        >>> check_finite_data(Task(None, None, None, np.array([1.0, np.nan]), None))
        Traceback (most recent call last):
        ValueError: train_data holds NaN or infinite numbers in 1 of 2 examples. Remove them first.
    """
    for name, data in (("train_data", task.train_data), ("test_data", task.test_data)):
        if data is None or is_stream(data):
            continue
        for leaf in jax.tree.leaves(data):
            if jax.numpy.issubdtype(jax.numpy.result_type(leaf), jax.numpy.inexact):  # NumPy does not know bfloat16 for a number
                values = np.asarray(leaf)
                finite = np.isfinite(values if np.issubdtype(values.dtype, np.inexact) else values.astype(np.float32))
                bad = ~finite.reshape(len(values), -1).all(1)
                if bad.any():
                    raise ValueError(f"{name} holds NaN or infinite numbers in {bad.sum()} of {len(values)} examples. Remove them first.")


def check_not_there_yet(programs: RunPrograms, state: TrainState, goal: Goal) -> float:
    """The goal's metric before training, from the program that runs evaluate with.

    Raises:
        ValueError: it has reached the goal already.
    """
    value = float(programs.test()(programs.data(jax.devices()[:1])[1], state)[goal.metric])
    if goal.reached(value):
        raise ValueError(f"goal={str(goal)!r} is reached before training, at {goal.metric} {value:.4g}. Take a goal that has to be learned.")
    return value


def why_none(probes: Sequence[Probe], goal: Goal, start: float) -> str:
    """Why no probe reached the goal.

    Example:
        >>> lost = Probe(64, 0.1, 0, 9, False, True, 9, math.nan, 0.1, math.nan)
        >>> why_none([lost, lost._replace(learning_rate=1.0)], Goal("accuracy", 0.9), 0.1)
        'Training diverged at every learning rate from 0.1 to 1. Try smaller ones, and check the loss on one batch.'
    """
    if not probes:
        return "No run was made."
    rates = sorted(probe.learning_rate for probe in probes)
    span = f"from {rates[0]:.3g} to {rates[-1]:.3g}"
    if all(probe.diverged for probe in probes):
        return f"Training diverged at every learning rate {span}. Try smaller ones, and check the loss on one batch."
    pick = max if goal.above else min
    finite = [probe for probe in probes if math.isfinite(probe.best)]
    top = pick(finite, key=lambda probe: probe.best) if finite else None
    if top is None or (top.best <= start if goal.above else top.best >= start):
        return f"{goal.metric} never moved from {start:.4g} at any learning rate {span}. Check metrics_fn, the labels and the loss."
    return (
        f"No run reached {goal}: the best came to {top.best:.4g} after {top.updates} updates, at batch size {top.batch_size} and learning "
        f"rate {top.learning_rate:.3g}. Take an easier goal or longer runs."
    )


def doubts_of(probes: Sequence[Probe], space: Space, estimate: Estimate, advised: Choice, num_examples: int) -> list[str]:
    """What may be wrong with advice that was found.

    Args:
        probes: all of them.
        space: the settings to choose from.
        estimate: from the probes.
        advised: what is expected of the advised setting.
        num_examples: in the training set.
    """
    doubts, rate = doubts_of_runs(advised), estimate.best[1]
    reached = [probe for probe in probes if probe.reached]
    looks = float(advised.updates) / advised.look
    if looks < 4:
        doubts.append(
            f"The goal is reached within {looks:.1f} evaluations, and a run shows only between which two. "
            "Take a harder goal or more evaluations an epoch."
        )
    if len(space.batch_sizes) == 2:
        cause = f"The data set ({num_examples} examples) allows" if usual_sizes(num_examples) == space.batch_sizes else "There were"
        doubts.append(f"{cause} only 2 batch sizes to choose from.")
    if rate in (0, len(space.learning_rates) - 1):
        doubts.append(f"The learning rate {space.learning_rates[rate]:.3g} is at the end of those allowed; a better one may lie beyond.")
    if len({probe.batch_size for probe in reached}) < 3 and len(space.batch_sizes) > 1:
        doubts.append("Fewer than three batch sizes reached the goal, so that the dependence on the batch is mostly assumed.")
    tried = [probe.batch_size for probe in reached]
    low, high = (space.batch_sizes.index(pick(tried)) for pick in (min, max))
    fall = estimate.log_updates[:, low].min(1) - estimate.log_updates[:, high].min(1)
    if high > low and np.quantile(fall, 0.9) < 0.1 * math.log(space.batch_sizes[high] / space.batch_sizes[low]):
        doubts.append(
            f"Updates hardly fall from B = {space.batch_sizes[low]} to {space.batch_sizes[high]}: noise does not limit this task, and a "
            "larger batch saves nothing."
        )
    return doubts


def doubts_of_runs(advised: Choice) -> list[str]:
    """How little was seen of the advised setting itself."""
    name, doubts = f"Batch size {advised.batch_size} with learning rate {advised.learning_rate:.3g}", []
    if advised.runs == 0:
        doubts.append(f"{name} was never run: what is said of it comes from other settings. Run it, or allow more probes.")
    elif advised.reached < CONFIRMED:
        doubts.append(f"{name} reached the goal in only {advised.reached} of {advised.runs} {'run' if advised.runs == 1 else 'runs'}.")
    if advised.runs and advised.repeats < 2:
        doubts.append(
            "The advised setting was chosen for its own runs and hardly repeated: it may need more updates than expected. Allow more probes."
        )
    if advised.diverged:
        doubts.append(f"{name} diverged in {advised.diverged} of {advised.runs} runs. Take a smaller rate if a run must not fail.")
    late = advised.runs - advised.reached - advised.diverged
    if late and advised.reached >= CONFIRMED:
        doubts.append(f"{name} had not reached the goal in {late} of {advised.runs} runs when they were stopped.")
    return doubts
