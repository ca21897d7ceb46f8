"""What the records of the huge-batch study say: the chosen rates, and each arm against plain training and the small batch.

Axes: S seeds that are reported.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

import jaxbatch as jb
from experiments.large_batch.arms import ARMS, KINDS, find_arm
from jaxbatch.intervals import Interval, interval, ratio_of_means
from jaxbatch.results.records import Record, as_number

Kind = Literal["helps", "nothing", "harms", "lost"]


def goal_of(config) -> jb.Goal:
    """The metric with its direction, as a goal whose value means nothing.

    Example:
        >>> from types import SimpleNamespace
        >>> goal_of(SimpleNamespace(metric="loss<"))
        Goal(metric='loss', value=0.5, above=False)
    """
    return jb.Goal(config.metric[:-1], 0.5, above=config.metric.endswith(">"))


def scores(config, records: Sequence[Record], arm: str) -> dict[float, tuple[float, ...]]:
    """How good each rate of the grid is, as (minus the runs that diverged, mean metric, minus mean loss); higher is better."""
    goal, rows = goal_of(config), [record for record in records if record["kind"] == "tune" and record["arm"] == arm]
    sign, rate_scores = 1 if goal.above else -1, {}
    for rate in sorted({row["learning_rate"] for row in rows}):
        every = [row for row in rows if row["learning_rate"] == rate]
        ended = [row for row in every if row[f"validation_{goal.metric}"] is not None]
        if ended:
            metric = float(np.mean([row[f"validation_{goal.metric}"] for row in ended]))
            loss = float(np.mean([as_number(row.get("validation_loss", 0.0)) for row in ended]))  # 0: the task has no metric of that name
            rate_scores[rate] = (len(ended) - len(every), sign * metric, -loss if np.isfinite(loss) else -np.inf)
    return rate_scores


def best_rate(config, records: Sequence[Record], arm: str) -> float | None:
    """The rate with the fewest seeds that diverge, then the best mean metric on the validation part, then the lowest loss on it.

    None where every run diverged, or there is none.
    """
    rate_scores = scores(config, records, arm)
    return max(rate_scores, key=lambda rate: rate_scores[rate], default=None)


def is_inside(config, rate: float) -> bool:
    """Whether a rate of the grid has neighbours on both sides; if not, a better one may lie outside."""
    return config.learning_rates[0] < rate < config.learning_rates[-1]


def rule_rate(config, records: Sequence[Record], arm: str) -> float | None:
    """The rate that the arm's rule makes of the small batch's best one."""
    base = best_rate(config, records, "small")
    return None if base is None else jb.scale_learning_rate(find_arm(arm).rule, base, config.small_batch_size, config.batch_size)


def pairs(config, records: Sequence[Record]) -> list[str]:
    """The pairs of the best arms of each kind, by what chose their rates; the names hold both."""
    best = []
    for kind in KINDS:
        tuned = {arm: max(rate_scores.values()) for arm in kind if (rate_scores := scores(config, records, arm))}
        best += [max(tuned, key=lambda arm: tuned[arm])] if tuned else []
    return [f"{one} + {other}" for position, one in enumerate(best) for other in best[position + 1 :]]


def reported(records: Sequence[Record]) -> list[str]:
    """The arms with runs to report, in the order of the table."""
    names = dict.fromkeys(record["arm"] for record in records if record["kind"] == "run")
    return [*(name for name in ARMS if name in names), *(name for name in names if name not in ARMS)]


def ends(records: Sequence[Record], arm: str, *names: str) -> np.ndarray:
    """``(S,)``: the value of the first name less those of the others, seed by seed; NaN where a run diverged."""
    rows = sorted((record for record in records if record["kind"] == "run" and record["arm"] == arm), key=lambda row: row["seed"])
    table = np.array([[np.nan if row.get(name) is None else row[name] for name in names] for row in rows], float).reshape(-1, len(names))
    return table[:, 0] - table[:, 1:].sum(1)


def mean(values: np.ndarray) -> Interval:
    """The mean with the 95% interval of Student's t; NaN is left out, and counted.

    Example:
        >>> f"{mean(np.array([1.0, 2.0, 3.0])):.2f}", mean(np.array([])).n
        ('2.00 [-0.48, 4.48]', 0)
    """
    return interval(values, scale="linear")


def difference(records: Sequence[Record], one: str, other: str, *names: str) -> Interval:
    """The difference of two arms at the end, paired by seed."""
    return mean(paired(ends(records, one, *names), ends(records, other, *names)))


def paired(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The differences, seed by seed; none where an arm has no runs."""
    return one - other if len(one) == len(other) else np.array([])


class Parts(NamedTuple):
    """How the loss on the test set differs from that of the small batch, as a sum of two."""

    optimization: Interval  # of the loss on the training set
    generalization: Interval  # of the loss on the test set less the loss on the training set


def parts(config, records: Sequence[Record], arm: str) -> Parts:
    """The two parts of an arm's gap to the small batch; in the metric itself if the task has no metric named loss."""
    loss = loss_of(config, records)
    return Parts(difference(records, arm, "small", f"train_{loss}"), difference(records, arm, "small", f"test_{loss}", f"train_{loss}"))


def loss_of(config, records: Sequence[Record]) -> str:
    """The metric in which the gap is split."""
    return "loss" if any("test_loss" in record for record in records) else goal_of(config).metric


class Standing(NamedTuple):
    """An arm against plain training with the huge batch."""

    kind: Kind
    gain: Interval  # its metric less that of plain; above 0 is better
    gap: Interval  # its metric less that of the small batch; below 0 is worse
    closed: Interval  # the part of the gap between plain and the small batch that it closes
    lost: int  # runs that diverged


def has_gap(config, records: Sequence[Record]) -> bool:
    """Whether plain training with the huge batch is worse than with the small one, beyond the seeds' chance."""
    gap = standing(config, records, "plain").gap
    return gap.excludes(0) and gap.value < 0


def standing(config, records: Sequence[Record], arm: str) -> Standing:
    """Whether an arm helps, harms, or does nothing that the interval of the paired difference shows."""
    goal = goal_of(config)
    sign, name = 1 if goal.above else -1, f"test_{goal.metric}"
    mine, plain, small = (sign * ends(records, one, name) for one in (arm, "plain", "small"))
    gain, gap, lost = paired(mine, plain), paired(mine, small), int(np.isnan(mine).sum())
    kind: Kind = "nothing"
    if lost > np.isnan(plain).sum():
        kind = "lost"
    elif mean(gain).excludes(0):
        kind = "helps" if mean(gain).value > 0 else "harms"
    closed = ratio_of_means(gain, gain - gap, scale="linear") if len(gain) == len(gap) else mean(np.array([]))
    return Standing(kind, mean(gain), mean(gap), closed, lost)


def resolve_metric(text: str | None, names: Sequence[str]) -> str:
    """The metric with its direction.

    Example:
        >>> resolve_metric(None, ["accuracy", "loss"]), resolve_metric(None, ["mse", "top_accuracy"]), resolve_metric("bleu>", ["bleu"])
        ('accuracy>', 'top_accuracy>', 'bleu>')
    """
    if text is None:
        best = next((name for name in names if name.endswith("accuracy")), "loss" if "loss" in names else names[0])
        return f"{best}{'>' if best.endswith('accuracy') else '<'}"
    if text[-1:] not in ("<", ">") or text[:-1].strip() not in names:
        raise ValueError(f"--metric {text} must be one of {', '.join(names)}, with > if larger values are better, else <, as '{names[0]}<'.")
    return text[:-1].strip() + text[-1]
