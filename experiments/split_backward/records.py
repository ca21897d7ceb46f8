"""Reads the records of the split-backward study: curves, ends of runs, times to the target, the rate of each arm."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.harness.goal_words import has_collapsed, is_share
from experiments.split_backward.steps import OWN_RULES, RULES
from jaxbatch.intervals import Interval, interval
from jaxbatch.results.records import Record
from jaxbatch.training.goals import Goal

PROTOCOLS = {"original": "one rate", "tuned": "own rates"}


def protocols_of(records: Sequence[Record]) -> list[str]:
    """The protocols that have been run, as the records name them."""
    return [name for name in PROTOCOLS if any(r["kind"] == "end" and r["protocol"] == name for r in records)]


def recorded_as(protocol: str, arm: str) -> str:
    """The arm under which an arm is recorded: with a rate of its own, (c) is the same as (a).

    Example:
        >>> recorded_as("original", "scaled"), recorded_as("tuned", "scaled")
        ('scaled', 'one')
    """
    return RULES[arm] if protocol == "tuned" else arm


def curve(records: Sequence[Record], protocol: str, arm: str, seed: int) -> list[Record]:
    """The evaluations of one arm and seed on the validation part, in order."""
    identity = (protocol, recorded_as(protocol, arm), seed)
    rows = [r for r in records if r["kind"] == "curve" and (r["protocol"], r["arm"], r["seed"]) == identity]
    return sorted(rows, key=lambda row: row["segment"])


def ends(records: Sequence[Record], protocol: str, arm: str) -> list[Record]:
    """The single evaluation on the test set of each seed's run, sorted by seed."""
    rows = [r for r in records if r["kind"] == "end" and (r["protocol"], r["arm"]) == (protocol, recorded_as(protocol, arm))]
    return sorted(rows, key=lambda row: row["seed"])


def seeds_of(records: Sequence[Record], protocol: str) -> list[int]:
    """The seeds that have finished."""
    return sorted({r["seed"] for r in records if r["kind"] == "end" and r["protocol"] == protocol})


def rate_of(records: Sequence[Record], protocol: str, arm: str) -> float:
    """The rate of an arm's updates."""
    return ends(records, protocol, arm)[0]["learning_rate"]


def final(records: Sequence[Record], protocol: str, arm: str, key: str) -> list[float]:
    """``test_accuracy`` or another ``test_<metric>`` at each seed's end; NaN for a diverged run."""
    return [float("nan") if row[key] is None else row[key] for row in ends(records, protocol, arm)]


def is_lost(goal: Goal, rows: Sequence[Record]) -> bool:
    """Whether a run has diverged, or has collapsed (ends below half of its best validation accuracy)."""
    values = [_value(goal, row) for row in rows]
    return rows[-1]["diverged"] or has_collapsed(goal, values[-1], np.nanmax([*values, -np.inf]))


def num_lost(records: Sequence[Record], protocol: str, arm: str, goal: Goal) -> int:
    """How many of an arm's runs are lost."""
    return sum(is_lost(goal, curve(records, protocol, arm, seed)) for seed in seeds_of(records, protocol))


def to_target(records: Sequence[Record], protocol: str, arm: str, key: str, goal: Goal) -> list[float]:
    """``examples``, ``updates`` or ``seconds`` at the first evaluation that reaches the target; NaN if none does."""
    amounts = []
    for seed in seeds_of(records, protocol):
        hits = (row[key] for row in curve(records, protocol, arm, seed) if goal.reached(_value(goal, row)))
        amounts.append(next(hits, float("nan")))
    return amounts


def _value(goal: Goal, row: Record) -> float:
    value = row[f"validation_{goal.metric}"]
    return float("nan") if value is None else value


def cost_ratio(records: Sequence[Record], name: str) -> Interval:
    """Time of a kind of step ÷ time of one ordinary step, median over rounds."""
    rounds = [r for r in records if r["kind"] == "cost"]
    return interval([r[f"{name}_ms"] / r["one_ms"] for r in rounds], np.median, scale="log")


class Tried(NamedTuple):
    """How good a rate of an arm is, from the runs that choose a rate; the smallest tuple is the best."""

    lost: int  # number of runs that diverged or collapsed
    misses: bool  # whether a run does not reach the target
    examples: float  # mean to the target; 0 if not all runs reach it
    error: float  # how bad the validation metric is at the end: 1 − mean accuracy, mean loss, ...


def tried(records: Sequence[Record], arm: str, goal: Goal) -> dict[float, Tried]:
    """Maps each rate to the result of its runs."""
    by_rate: dict[float, list[Record]] = {}
    for record in records:
        if record["kind"] == "tune" and record["arm"] == RULES[arm]:
            by_rate.setdefault(record["learning_rate"], []).append(record)
    return {rate: _judge(by_rate[rate], goal) for rate in sorted(by_rate)}


def _judge(rows: Sequence[Record], goal: Goal) -> Tried:
    lost = sum(row["diverged"] or has_collapsed(goal, _value(goal, row), row[f"best_validation_{goal.metric}"]) for row in rows)
    reached = [row["examples_to_target"] for row in rows if row["examples_to_target"] is not None]
    misses = len(reached) < len(rows)
    if is_share(goal):
        error = 1 - np.mean([0.0 if row["diverged"] else _value(goal, row) for row in rows])
    else:
        ends = [_value(goal, row) for row in rows if not row["diverged"]]
        error = np.mean(ends) * (-1 if goal.above else 1) if ends else np.inf
    return Tried(lost, misses, 0.0 if misses else float(np.mean(reached)), float(error))


def chosen_rate(records: Sequence[Record], arm: str, goal: Goal) -> float:
    """The rate whose runs are not lost and reach the target with the fewest examples, or else end with the best metric.

    Everything is measured on the validation part. Rates without a lost run come first; among these, rates at which every run
    reaches the target. If rates are equal, the metric at the end decides.
    """
    rates = tried(records, arm, goal)
    return min(rates, key=rates.get)


def rates_on_edge(config, records: Sequence[Record]) -> dict[str, str]:
    """The arms whose chosen rate is the grid's ``lowest`` or ``highest``: a better one may lie outside the grid."""
    if len(config.learning_rates) < 2:
        return {}
    ends = {min(config.learning_rates): "lowest", max(config.learning_rates): "highest"}
    chosen = {arm: rate_of(records, "tuned", arm) for arm in OWN_RULES}
    return {arm: ends[rate] for arm, rate in chosen.items() if rate in ends}
