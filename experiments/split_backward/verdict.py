"""The sentences of the split-backward study: only those that its records support."""

from collections.abc import Sequence

import numpy as np

from experiments.harness.goal_words import in_words, is_share, scale
from experiments.harness.optimizers import heavy_ball
from experiments.split_backward.records import cost_ratio, final, num_lost, protocols_of, rate_of, rates_on_edge, seeds_of, to_target
from experiments.split_backward.steps import OWN_RULES
from jaxbatch.gradients.split import largest_stable_curvature
from jaxbatch.intervals import Interval, interval
from jaxbatch.results.records import Record
from jaxbatch.training.goals import Goal, as_goal

SAME_UPDATE = 1e-3  # as a share of a step: far above rounding, far below any real difference
HELPS = {
    "better": "is better than one update per batch",
    "worse": "is worse than one update per batch",
    "unstable": "is faster than one update per batch and then loses runs",
    "same": "shows no difference from one update per batch",
}
SMALL = {
    "same": "do equally well, as far as the intervals show",
    "better": "do worse",
    "worse": "do better",
    "unstable": "are slower and steadier",
}


def arm_names(num_groups: int) -> dict[str, str]:
    """The names of the arms in the sentences."""
    return {
        "one": "(a) one update",
        "split": f"(b) split in {num_groups}",
        "scaled": f"(c) {num_groups} × the rate",
        "small": f"(d) {num_groups} small",
    }


def other_seeds(config) -> str:
    """The seeds that chose the rates."""
    return f"{config.tune_seeds} other seed{'s' if config.tune_seeds > 1 else ''}"


def tiny(value: float | None) -> str:
    """Formats a number of which only the order of magnitude matters."""
    return "not finite" if value is None else f"{value:.0e}"


def verdict(config, records: Sequence[Record]) -> list[str]:
    """Sentences on the cost, then on (b) against the other arms, at one rate and at each arm's best rate."""
    k = config.num_groups
    split_cost, small_cost, naive_cost = (cost_ratio(records, kind) for kind in ("split", "small", "naive"))
    sentences = [
        f"Cost: a split step takes {split_cost:.2f} times an ordinary step; {k} small steps {small_cost:.2f}; the naive way {naive_cost:.2f}."
    ]
    sentences += at_one_rate(config, records)
    if "tuned" in protocols_of(records):
        sentences += at_own_rates(config, records)
    return sentences


def at_one_rate(config, records: Sequence[Record]) -> list[str]:
    """Sentences on the original protocol: one rate for (a), (b) and (d), K times this rate for (c)."""
    k, goal, n = config.num_groups, as_goal(config.target), len(seeds_of(records, "original"))
    names, standing, texts = arm_names(k), {}, {}
    for other in ("one", "scaled", "small"):
        standing[other], text = against(records, "original", other, goal)
        texts[other] = say(names[other], standing[other], text)
    distances = [r for r in records if r["kind"] == "distance"]
    if distances and max(r["batch_split_scaled"] for r in distances) < SAME_UPDATE:
        standing["scaled"], (_, text) = "identical", against(records, "original", "scaled", goal)
        texts["scaled"] = (
            f"(b) and {names['scaled']} are the same update up to rounding (after one batch they differ by at most "
            f"{tiny(max(r['batch_split_scaled'] for r in distances))} of the step), so any difference between their runs is "
            f"chance: {text}."
        )
    sentences = [f"At one rate, {config.learning_rate:g}:", *texts.values()]
    if distances:
        scaled = interval([r["batch_split_scaled"] for r in distances])
        other = interval([r["batch_split_small"] for r in distances])
        sentences.append(
            f"After one batch from the same state, (b) and (c) differ by {100 * scaled.value:.1f}% of the step, and (b) and "
            f"(d) by {100 * other.value:.1f}%."
        )
    momentum = heavy_ball(config)
    if momentum:
        split_limit = largest_stable_curvature(config.learning_rate, momentum, k)
        scaled_limit = largest_stable_curvature(k * config.learning_rate, momentum)
        sentences.append(f"Theory: on a quadratic loss (b) is stable up to curvature {split_limit:.3g}, (c) up to {scaled_limit:.3g}.")
    only = {
        "identical": f"it is a {k} times larger learning rate and nothing else",
        "same": f"no difference from a {k} times larger learning rate shows",
        "better": f"it does better than a {k} times larger learning rate",
        "worse": f"it does worse than a {k} times larger learning rate",
        "unstable": f"it is faster than a {k} times larger learning rate and then loses runs",
    }[standing["scaled"]]
    sentences.append(
        f"Verdict at one rate: splitting {HELPS[standing['one']]}; {only}; {_small_batches(config, records, standing['small'])} (n = {n} seeds)."
    )
    return sentences


def at_own_rates(config, records: Sequence[Record]) -> list[str]:
    """Sentences on the fair comparison: every arm at the rate chosen for it on the validation part."""
    k, goal, n = config.num_groups, as_goal(config.target), len(seeds_of(records, "tuned"))
    names, standing, texts = arm_names(k) | {"one": "(a) one update (and so (c))"}, {}, {}
    for other in ("one", "small"):
        standing[other], text = against(records, "tuned", other, goal)
        texts[other] = say(names[other], standing[other], text)
    letters = {"one": "(a)", "split": "(b)", "small": "(d)"}
    rates = ", ".join(f"{letters[arm]} {rate_of(records, 'tuned', arm):g}" for arm in OWN_RULES)
    sentences = [f"Each arm at its best rate, {rates}, of {len(config.learning_rates)} tried with {other_seeds(config)}:"]
    for arm, edge in rates_on_edge(config, records).items():
        rate = rate_of(records, "tuned", arm)
        sentences.append(f"The best rate of {letters[arm]}, {rate:g}, is the {edge} of the grid: a better one may lie beyond.")
    return [
        *sentences,
        *texts.values(),
        f"Verdict with each arm at its best rate: splitting {HELPS[standing['one']]}; "
        f"{_small_batches(config, records, standing['small'])} (n = {n} seeds).",
    ]


def _small_batches(config, records: Sequence[Record], standing: str) -> str:
    dear = interval([r["small_ms"] / r["split_ms"] for r in records if r["kind"] == "cost"], np.median, scale="log")
    return f"{config.num_groups} ordinary small batches {SMALL[standing]}, at {dear:.2f} times the cost"


def paired(records: Sequence[Record], protocol: str, other: str, key: str) -> Interval:
    """Interval of the difference ``(b) − other`` at the end, seed by seed."""
    return interval(np.subtract(final(records, protocol, "split", key), final(records, protocol, other, key)), scale="linear")


def examples_ratio(records: Sequence[Record], protocol: str, other: str, goal: Goal) -> Interval:
    """Interval of the ratio ``(b) ÷ other`` of the examples to the target, seed by seed."""
    mine, theirs = (np.asarray(to_target(records, protocol, arm, "examples", goal)) for arm in ("split", other))
    return interval(mine / theirs, scale="log")


def against(records: Sequence[Record], protocol: str, other: str, goal: Goal) -> tuple[str, str]:
    """Whether (b) is better or worse than another arm, and the numbers that show why.

    ``better``, ``worse`` or ``same`` by examples to the target on the validation part, or else by the test metric at the
    end, if an interval shows it; ``unstable`` if (b) would be better but loses more runs.
    """
    mine, theirs = (np.asarray(to_target(records, protocol, arm, "examples", goal)) for arm in ("split", other))
    missed = [int(np.isnan(values).sum()) for values in (mine, theirs)]
    lost = [num_lost(records, protocol, arm, goal) for arm in ("split", other)]
    ends = paired(records, protocol, other, f"test_{goal.metric}")
    ratio = examples_ratio(records, protocol, other, goal)
    shown = ends.times(scale(goal))
    text = f"final test {goal.metric} differs by " + (f"{shown:+.2f} points" if is_share(goal) else f"{shown:+.3g}")
    if ratio.n:
        text += f", examples to {in_words(goal)} by a factor of {ratio:.2f}"
    n = len(mine)
    if any(missed):
        text += f"; target reached in {n - missed[0]} of {n} runs against {n - missed[1]}"
    if any(lost):
        text += f"; runs lost: {lost[0]} against {lost[1]}"
    if missed[0] != missed[1]:
        standing = "better" if missed[0] < missed[1] else "worse"
    elif ratio.excludes(1):
        standing = "better" if ratio.value < 1 else "worse"
    elif ends.excludes(0):
        standing = "better" if (ends.value > 0) == goal.above else "worse"
    else:
        standing = "same"
    if lost[0] > lost[1]:
        standing = "unstable" if standing == "better" else "worse"
    elif lost[0] < lost[1] and standing == "same":
        standing = "better"
    return standing, text


def say(name: str, standing: str, text: str) -> str:
    """The sentence on (b) against an arm."""
    conclusion = {
        "better": "(b) is ahead",
        "worse": "(b) is behind",
        "same": "the intervals show no difference",
        "unstable": "(b) is ahead and then loses runs",
    }[standing]
    return f"Against {name}: {text}: {conclusion}."
