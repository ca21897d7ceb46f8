"""Tables of the split-backward study, from its records alone; the sentences are in split_backward_verdict."""

from collections.abc import Sequence

import numpy as np
from rich.console import Console

from experiments.harness.goal_words import heading, in_short, in_words, is_share, lost_in_words, show
from experiments.harness.optimizers import optimizer_words
from experiments.harness.study import setting_of
from experiments.split_backward.records import (
    PROTOCOLS,
    chosen_rate,
    cost_ratio,
    curve,
    final,
    num_lost,
    protocols_of,
    rate_of,
    recorded_as,
    seeds_of,
    to_target,
    tried,
)
from experiments.split_backward.steps import ARMS, OWN_RULES
from experiments.split_backward.verdict import arm_names, other_seeds, tiny, verdict
from jaxbatch.intervals import interval
from jaxbatch.results.records import Record
from jaxbatch.results.report import print_table
from jaxbatch.training.goals import Goal, as_goal

__all__ = ["print_tables", "verdict"]


def print_tables(console: Console, config, records: Sequence[Record], provenance: Record) -> None:
    """Prints the rates tried, the way to the target, the end, the cost of a step, distances; with 95% intervals."""
    where = f"{provenance['device']}, {provenance['num_cores']} cores, jax {provenance['jax']}"
    console.print(
        f"\n{setting_of(config)}, B = {config.batch_size}, K = {config.num_groups}, {optimizer_words(config)} at rate "
        f"{config.learning_rate:g}"
        + (" and at each arm's best rate" if config.tune else "")
        + f", {config.epochs} epochs, {len(seeds_of(records, 'original'))} seeds; {where}",
        soft_wrap=True,
    )
    if "tuned" in protocols_of(records):
        _print_choice(console, config, records)
    _print_ways(console, config, records)
    _print_ends(console, config, records)
    _print_cost(console, config, records)
    _print_distances(console, config, records)


def _print_choice(console: Console, config, records: Sequence[Record]) -> None:
    names, rows, goal = arm_names(config.num_groups), [], as_goal(config.target)
    tried_by_arm = {arm: tried(records, arm, goal) for arm in OWN_RULES}
    for rate in config.learning_rates:
        row = [f"{rate:g}"]
        for arm in OWN_RULES:
            result = tried_by_arm[arm][rate]
            text = _end(goal, result.error) if result.misses else f"{result.examples / 1000:.1f}"
            text = f"{text}, {result.lost} lost" if result.lost else text
            row.append(f"{text}  ← chosen" if rate == chosen_rate(records, arm, goal) else text)
        rows.append(row)
    title = f"Choice of the rates on the validation part, {other_seeds(config)}: examples / 1000 to "
    title += f"{in_short(goal)}, or the {goal.metric} at the end where not all reach it"
    columns = ["rate", *(names[arm] + (", (c)" if arm == "one" else "") for arm in OWN_RULES)]
    print_table(console, title, columns, rows)


def _end(goal: Goal, error: float) -> str:
    """The metric at the end, from how bad it is."""
    return f"{100 - 100 * error:.1f}%" if is_share(goal) else f"{-error if goal.above else error:.3g}"


def _print_ways(console: Console, config, records: Sequence[Record]) -> None:
    names, goal, rows = arm_names(config.num_groups), as_goal(config.target), []
    for protocol in protocols_of(records):
        for arm in ARMS:
            row = [PROTOCOLS[protocol], names[arm], f"{rate_of(records, protocol, arm):.3g}"]
            if recorded_as(protocol, arm) != arm:
                rows.append([*row, "same as (a)", "", "", ""])
                continue
            reached = np.isfinite(to_target(records, protocol, arm, "examples", goal)).sum()
            amounts = {key: to_target(records, protocol, arm, key, goal) for key in ("examples", "updates", "seconds")}
            thousands = interval(np.divide(amounts["examples"], 1000), scale="log")
            numbers = [f"{thousands:.1f}", f"{interval(amounts['updates'], scale='log'):,.0f}", f"{interval(amounts['seconds'], scale='log'):.2f}"]
            rows.append([*row, f"{reached}/{len(seeds_of(records, protocol))}", *numbers])
    title = f"To {in_words(goal)}, mean over the seeds that reach it"
    print_table(console, title, ["rates", "arm", "rate", "reached", "examples / 1000", "updates", "seconds"], rows)


def _print_ends(console: Console, config, records: Sequence[Record]) -> None:
    names, rows, goal = arm_names(config.num_groups), [], as_goal(config.target)
    test, validation, worst_of = f"test_{goal.metric}", f"validation_{goal.metric}", np.nanmin if goal.above else np.nanmax
    also_loss = goal.metric != "loss" and any("test_loss" in record for record in records)
    for protocol in protocols_of(records):
        for arm in ARMS:
            if recorded_as(protocol, arm) != arm:
                rows.append([PROTOCOLS[protocol], names[arm], "same as (a)", *[""] * (3 + also_loss)])
                continue
            ends = final(records, protocol, arm, test)
            last = [curve(records, protocol, arm, seed)[-1] for seed in seeds_of(records, protocol)]
            worst = show(goal, [worst_of([*ends, np.inf if goal.above else -np.inf])])
            row = [PROTOCOLS[protocol], names[arm], show(goal, ends), worst]
            if also_loss:
                row.append(f"{interval(final(records, protocol, arm, 'test_loss')):.3f}")
            row.append(show(goal, [None if one["diverged"] else one[validation] for one in last]))
            rows.append([*row, f"{num_lost(records, protocol, arm, goal)}/{len(last)}"])
    title = f"At the end (the test set is used only here; lost: {lost_in_words(goal)})"
    columns = ["rates", "arm", heading(goal, "test {}"), "worst", *["test loss"] * also_loss, heading(goal), "lost"]
    print_table(console, title, columns, rows)


def _print_cost(console: Console, config, records: Sequence[Record]) -> None:
    rounds = [r for r in records if r["kind"] == "cost"]
    kinds = {
        "one": "ordinary step",
        "split": "split step",
        "small": f"{config.num_groups} small steps",
        "naive": f"naive split: {config.num_groups} masked backwards",
    }
    rows = []
    for kind, label in kinds.items():
        rows.append([label, f"{interval([r[f'{kind}_ms'] for r in rounds], np.median, scale='log'):.2f}", f"{cost_ratio(records, kind):.2f}"])
    print_table(console, f"Cost of one batch, median of {len(rounds)} rounds side by side", ["", "ms", "÷ ordinary step"], rows)


def _print_distances(console: Console, config, records: Sequence[Record]) -> None:
    distances = [r for r in records if r["kind"] == "distance"]
    seeds = seeds_of(records, "original")
    last = [max((r for r in distances if r["seed"] == seed), key=lambda r: r["segment"], default=None) for seed in seeds]
    rows = []
    for other, label in (("scaled", "(b) from (c)"), ("small", "(b) from (d)")):
        batch = interval([r[f"batch_split_{other}"] for r in distances])
        whole = interval([r[f"run_split_{other}"] for r in last if r])
        rows.append([label, f"{batch:.3f}", f"{whole:.3f}"])
    title = "At one rate: distance in parameter space ÷ distance moved by (b)"
    print_table(console, title, ["", "one batch, same start", "whole run"], rows)
    exact = sorted((r for r in records if r["kind"] == "exactness"), key=lambda r: r["num_groups"])
    rows = [[str(r["num_groups"]), *(tiny(r[key]) for key in ("relative_error", "rounding"))] for r in exact]
    title = "SGD without momentum: distance between a split step and one step at K × the rate"
    print_table(console, title, ["K", "relative distance", "float32 rounding"], rows)
