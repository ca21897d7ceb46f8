"""Tables of the split-backward study, from its records alone; the sentences are in split_backward_verdict."""

from collections.abc import Sequence

import numpy as np
from rich.console import Console

from experiments.split_backward_records import (
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
from experiments.split_backward_steps import ARMS, OWN_RULES
from experiments.split_backward_verdict import arm_names, other_seeds, tiny, verdict
from jaxbatch.intervals import interval
from jaxbatch.results.records import Record
from jaxbatch.results.report import print_table

__all__ = ["print_tables", "verdict"]


def print_tables(console: Console, config, records: Sequence[Record], provenance: Record) -> None:
    """Prints the rates tried, the way to the target, the end, the cost of a step, distances; with 95% bootstrap intervals."""
    where = f"{provenance['device']}, {provenance['num_cores']} cores, jax {provenance['jax']}"
    console.print(
        f"\n{config.dataset}, {config.model}, B = {config.batch_size}, K = {config.num_groups}, {config.optimizer} at rate "
        f"{config.learning_rate:g}"
        + (" and at each arm's best rate" if config.tune else "")
        + (f", momentum {config.momentum:g}" if config.optimizer == "sgd" else "")
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
    names, rows = arm_names(config.num_groups), []
    found = {arm: tried(records, arm) for arm in OWN_RULES}
    for rate in config.learning_rates:
        row = [f"{rate:g}"]
        for arm in OWN_RULES:
            result = found[arm][rate]
            text = f"{100 - 100 * result.error:.1f}%" if result.misses else f"{result.examples / 1000:.1f}"
            text = f"{text}, {result.lost} lost" if result.lost else text
            row.append(f"{text}  ← chosen" if rate == chosen_rate(records, arm) else text)
        rows.append(row)
    title = f"Choice of the rates on the validation part, {other_seeds(config)}: examples / 1000 to "
    title += f"{100 * config.target_accuracy:g}%, or the accuracy at the end where not all reach it"
    columns = ["rate", *(names[arm] + (", (c)" if arm == "one" else "") for arm in OWN_RULES)]
    print_table(console, title, columns, rows)


def _print_ways(console: Console, config, records: Sequence[Record]) -> None:
    names, target, rows = arm_names(config.num_groups), config.target_accuracy, []
    for protocol in protocols_of(records):
        for arm in ARMS:
            row = [PROTOCOLS[protocol], names[arm], f"{rate_of(records, protocol, arm):.3g}"]
            if recorded_as(protocol, arm) != arm:
                rows.append([*row, "is (a)", "", "", ""])
                continue
            reached = np.isfinite(to_target(records, protocol, arm, "examples", target)).sum()
            way = {key: to_target(records, protocol, arm, key, target) for key in ("examples", "updates", "seconds")}
            thousands = interval(np.divide(way["examples"], 1000))
            numbers = [f"{thousands:.1f}", f"{interval(way['updates']):,.0f}", f"{interval(way['seconds']):.2f}"]
            rows.append([*row, f"{reached}/{len(seeds_of(records, protocol))}", *numbers])
    title = f"To {100 * target:g}% validation accuracy, mean over the seeds that reach it"
    print_table(console, title, ["rates", "arm", "rate", "reached", "examples / 1000", "updates", "seconds"], rows)


def _print_ends(console: Console, config, records: Sequence[Record]) -> None:
    names, rows = arm_names(config.num_groups), []
    for protocol in protocols_of(records):
        for arm in ARMS:
            if recorded_as(protocol, arm) != arm:
                rows.append([PROTOCOLS[protocol], names[arm], "is (a)", "", "", "", ""])
                continue
            accuracies = np.multiply(final(records, protocol, arm, "test_accuracy"), 100)
            last = [curve(records, protocol, arm, seed)[-1] for seed in seeds_of(records, protocol)]
            validation = interval([np.nan if row["diverged"] else 100 * row["validation_accuracy"] for row in last])
            loss = interval(final(records, protocol, arm, "test_loss"))
            lost = f"{num_lost(records, protocol, arm)}/{len(last)}"
            worst = f"{np.nanmin([*accuracies, np.inf]):.2f}"
            rows.append([PROTOCOLS[protocol], names[arm], f"{interval(accuracies):.2f}", worst, f"{loss:.3f}", f"{validation:.2f}", lost])
    title = "At the end (the one look at the test set; lost: diverged, or below half of its own best validation accuracy)"
    columns = ["rates", "arm", "test accuracy, %", "worst", "test loss", "validation accuracy, %", "lost"]
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
        rows.append([label, f"{interval([r[f'{kind}_ms'] for r in rounds], np.median):.2f}", f"{cost_ratio(records, kind):.2f}"])
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
    title = "SGD without momentum: split step from one step at K × the rate"
    print_table(console, title, ["K", "relative distance", "float32 rounding"], rows)
