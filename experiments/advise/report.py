"""Tables and answer of the study that advises, from its records alone."""

import functools
from collections.abc import Callable, Sequence

from rich.console import Console

from experiments.advise.records import read_advice
from experiments.advise.verify import read_verification
from experiments.harness.schedules import rate_words
from experiments.harness.study import describe_setting, size_cell
from jaxbatch.advice.advice import Advice
from jaxbatch.results.records import Record
from jaxbatch.results.report import print_table


def print_tables(console: Console, config, records: Sequence[Record], provenance: Record) -> None:
    """What is expected of every batch size; with --verify, the sweep's best against it."""
    advice = read_advice(records)
    describe_setting(console, config, provenance, rate_words(config), f"to {advice.goal}, objective {config.objective}")
    print_choices(console, advice, functools.partial(size_cell, config))
    verification = read_verification(config, records)
    if verification is not None:
        title = f"The full sweep, judged on {config.seeds} other seeds: cost to {advice.goal}, objective {config.objective}"
        rows = [
            [name, size_cell(config, size), f"{rate:.3g}", f"{updates:,.0f}", f"{regret:.2f}"]
            for name, size, rate, updates, regret in verification.rows
        ]
        print_table(console, title, ["setting", "B", "rate", "updates", "cost ÷ sweep's best"], rows)


def print_choices(console: Console, advice: Advice, cell: Callable[[int], str]) -> None:
    """What is expected of every batch size, as a table.

    Args:
        console: to print on.
        advice: whose choices are shown.
        cell: a batch size as it is written.
    """
    rows = []
    for choice in advice.choices:
        mark = " ←" if choice.batch_size == advice.batch_size else ""
        one_run = f"{choice.next_run.low:,.0f} to {choice.next_run.high:,.0f}"
        numbers = f"{choice.updates:,.0f}", one_run, f"{choice.examples:,.0f}", f"{choice.seconds:.3g}", f"{choice.relative_cost:.2f}"
        row = [
            f"{cell(choice.batch_size)}{mark}",
            f"{choice.learning_rate:.3g}",
            *numbers,
            f"{100 * choice.chance:.0f}%",
            str(choice.probes),
            f"{choice.reached} of {choice.runs}",
        ]
        rows.append(row)
    if rows:
        cost = f"{advice.cost_seconds:.3g} s of training and {advice.cost_examples:,} examples in {len(advice.probes)} runs"
        title = f"What each batch size is expected to need for {advice.goal} at its best rate, as a mean over runs, from {cost}; 95% intervals"
        columns = ["B", "rate", "updates", "of one run", "examples", "seconds", "cost ÷ advised", "chance to be within 10% of the best", "runs"]
        columns.append("reached at this rate")
        print_table(console, title, columns, rows)


def verdict(config, records: Sequence[Record]) -> list[str]:
    """The answer, its reasons, its doubts, and what to do with the other hyperparameters."""
    advice = read_advice(records)
    sentences = advice.sentences()
    verification = read_verification(config, records)
    if verification is not None:
        sentences.append(verification.sentence)
    if advice.batch_size is not None:
        sentences.append("If the batch changes by a factor κ: " + " ".join(advice.rules))
    return sentences


def print_code(console: Console, snippet: str) -> None:
    """Code that trains with the advised setting, with its imports."""
    imports = [module for module in ("functools", "optax") if f"{module}." in snippet]
    lines = [f"import {', '.join(imports)}"] if imports else []
    console.print("\n".join(["", *lines, "import jaxbatch as jb", "", snippet]), soft_wrap=True, markup=False)
