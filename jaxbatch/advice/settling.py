"""What is settled before the first run of a search, and what is concluded after the last."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np

from jaxbatch.advice.advice import Advice, cost_of_update, noise_scale_of
from jaxbatch.advice.choices import Objective, summarize
from jaxbatch.advice.doubts import check_finite_data, check_not_there_yet, doubts_of, why_none
from jaxbatch.advice.estimates import Space, make_estimate, usual_sizes
from jaxbatch.advice.largest_batch import find_largest_batch
from jaxbatch.advice.memory import make_measure
from jaxbatch.advice.probes import Probe, ProbePrograms, make_adjustable
from jaxbatch.advice.request import Question, check_question
from jaxbatch.advice.rules import rules_for
from jaxbatch.advice.throughput import Throughput
from jaxbatch.gradients.run_lengths import takes_num_steps
from jaxbatch.gradients.updates import check_make_optimizer
from jaxbatch.intervals import unknown
from jaxbatch.machine.targets import as_bytes, find_target
from jaxbatch.training.goals import Goal, check_goal
from jaxbatch.training.tasks import Task, updates_of
from jaxbatch.training.train_state import start_shapes


class Setting(NamedTuple):
    """What is settled before the first run."""

    goal: Goal
    objective: Objective
    batch_sizes: tuple[int, ...]
    learning_rates: tuple[float, ...]
    evaluations_per_epoch: int
    num_examples: int
    start: float  # the goal's metric before training
    largest_batch_size: int | None  # that memory holds; None: every size that is considered fits; 0: not known
    rules: tuple[str, ...]
    run_lengths: tuple[int, ...] | None = None  # updates of the longest run at each size, for an optimizer whose schedule goes over them
    looks: Mapping[int, int] | None = None  # updates between two looks by batch size; None: they follow from evaluations_per_epoch

    @property
    def prefer(self) -> str:
        """Which of two sizes to take that cost the same: the one that saves what the objective leaves out.

        For ``"examples"`` that is time, which a larger size saves; else it is examples, which a smaller one saves.
        """
        return "larger" if self.objective == "examples" else "smaller"

    def space(self, throughput: Throughput) -> Space:
        """The settings to choose from, with the cost of an update."""
        return Space(self.batch_sizes, self.learning_rates, cost_of_update(self.objective, throughput, self.batch_sizes))


def settle(task: Task, question: Question, known: Setting | None = None) -> tuple[Setting, ProbePrograms]:
    """Checks a question; returns the setting, and what its runs share.

    Args:
        task: see :class:`jaxbatch.Task`.
        question: what is asked.
        known: what an earlier call settled for the same question; then no memory is looked at.
    """
    goal, objective, optimizer, seed = question.goal, question.objective, question.optimizer, question.seed
    check_question(task, goal, question.batch_sizes, question.learning_rates, question.evaluations_per_epoch, seed)
    goal, sizes = check_goal(task, goal), _sizes(task.num_examples, question.batch_sizes)
    rates = tuple(sorted({float(rate) for rate in question.learning_rates}))
    if len(rates) < 3:
        raise ValueError(f"learning_rates={list(rates)} must hold at least 3 different finite numbers above 0.")
    if objective not in get_args(Objective):
        raise ValueError(f"objective={objective!r} must be 'time', 'examples' or 'balanced'.")
    check_finite_data(task)
    lengths = [updates_of(task, question.longest, size) for size in sizes]
    check_make_optimizer(optimizer, rates[0], "optimizer", lengths[0])
    programs = ProbePrograms(task, make_adjustable(optimizer, rates[0], start_shapes(task), lengths[0]), rates[0], lengths[0])
    if known is not None:
        return known, programs
    begun = programs.start(rates[0], seed)
    start = check_not_there_yet(programs.at(rates[0]), begun, goal)
    largest = largest_that_fits(task, question.make_at(task, sizes[0])(rates[0]), sizes, question.target, question.memory)
    sizes = tuple(size for size in sizes if not largest or size <= largest)
    if not sizes:
        raise ValueError(f"memory={question.memory!r} holds a batch of at most {largest}, so there is nothing to choose from. Take a smaller model.")
    rules = tuple(rules_for(begun.opt_state))
    run_lengths = tuple(lengths[: len(sizes)]) if takes_num_steps(optimizer) else None
    setting = Setting(goal, objective, sizes, rates, question.evaluations_per_epoch, task.num_examples, start, largest, rules, run_lengths)
    return setting, programs


def conclude(setting: Setting, throughput: Throughput, probes: Sequence[Probe]) -> Advice:
    """The advice that follows from runs. Nothing is run."""
    common: dict[str, Any] = {
        "objective": setting.objective,
        "goal": setting.goal,
        "throughput": throughput,
        "largest_batch_size": setting.largest_batch_size,
        "probes": tuple(probes),
        "rules": setting.rules,
        "noise_scale": noise_scale_of(probes),
    }
    if not any(probe.reached for probe in probes):
        nothing: dict[str, Any] = {"choices": (), "close_sizes": (), "candidates": (), "critical_batch_size": unknown(), "expected_regret": np.nan}
        return Advice(None, None, doubts=(why_none(probes, setting.goal, setting.start),), **nothing, **common)
    space = setting.space(throughput)
    estimate = make_estimate(probes, space, setting.prefer)
    fields = summarize(
        estimate,
        space,
        throughput,
        probes,
        setting.objective,
        prefer=setting.prefer,
        evaluations_per_epoch=setting.evaluations_per_epoch,
        num_examples=setting.num_examples,
        looks=setting.looks,
    )
    if setting.run_lengths is not None:
        fields["run_length"] = setting.run_lengths[setting.batch_sizes.index(fields["batch_size"])]
    doubts = doubts_of(probes, space, estimate, fields["choices"][estimate.best[0]], setting.num_examples)
    return Advice(doubts=tuple(doubts), **fields, **common)


def _sizes(count: int, batch_sizes: Sequence[int] | None) -> tuple[int, ...]:
    sizes = tuple(sorted(set(map(int, usual_sizes(count) if batch_sizes is None else batch_sizes))))
    if not sizes or sizes[0] < 1 or sizes[-1] > count:
        raise ValueError(f"batch_sizes={list(sizes)} must hold sizes between 1 and the {count} examples of the data set.")
    return sizes


def largest_that_fits(task: Task, optimizer: Any, sizes: Sequence[int], target: str, memory: str | float | None) -> int | None:
    """The largest batch that fits in memory; None if even the largest of the sizes does, 0 if the device's memory is not known."""
    device = find_target(target)
    limit = device.usable if memory is None else as_bytes(memory, "memory")
    if not limit:
        return 0
    if make_measure(task, optimizer=optimizer, target=device)(sizes[-1]).total <= 0.9 * limit:
        return None
    return find_largest_batch(task, optimizer=optimizer, target=device, budget=memory).batch_size
