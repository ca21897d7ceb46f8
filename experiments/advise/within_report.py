"""Table and answer of advice for runs of a fixed length, from its records alone."""

import functools
from collections.abc import Callable, Sequence

from rich.console import Console

from experiments.advise import within_records
from experiments.harness.lengths import read_length
from experiments.harness.schedules import rate_words
from experiments.harness.study import describe_setting, size_cell
from jaxbatch.advice.end_advice import EndAdvice, in_words
from jaxbatch.advice.end_advising import conclude_within
from jaxbatch.advice.end_lengths import Seconds
from jaxbatch.results.records import Record
from jaxbatch.results.report import print_table


def read_advice(config, records: Sequence[Record]) -> EndAdvice:
    """The advice that follows from the records."""
    begun = within_records.read_begun(records)
    horizon = None if config.horizon is None else read_length(config.horizon, "--horizon")
    assert begun.setting is not None and not isinstance(horizon, Seconds)
    return conclude_within(read_length(config.within, "--within"), horizon, begun.setting, begun.throughput, begun.endings)


def print_tables(console: Console, config, records: Sequence[Record], provenance: Record) -> None:
    """What a run of every batch size is expected to end with."""
    advice = read_advice(config, records)
    length = in_words(advice.within if advice.horizon is None else advice.horizon)
    describe_setting(console, config, provenance, rate_words(config), f"{length}, {advice.metric}")
    print_choices(console, advice, functools.partial(size_cell, config))


def print_choices(console: Console, advice: EndAdvice, cell: Callable[[int], str]) -> None:
    """What a run of every batch size is expected to end with, as a table.

    Args:
        console: to print on.
        advice: whose choices are shown.
        cell: a batch size as it is written.
    """
    length = in_words(advice.within if advice.horizon is None else advice.horizon)
    rows = []
    for choice in advice.choices:
        mark = " ←" if choice.batch_size == advice.batch_size else ""
        rows.append(
            [
                f"{cell(choice.batch_size)}{mark}",
                f"{choice.learning_rate:.3g}",
                f"{choice.num_steps:,}",
                f"{choice.value:.4g}",
                f"{choice.next_run.low:.4g} to {choice.next_run.high:.4g}",
                f"{choice.more_data:.3g}",
                f"{100 * choice.chances[0]:.0f}%",
                f"{100 * choice.chances[-1]:.0f}%",
                str(choice.runs),
                str(choice.whole),
            ]
        )
    if rows:
        title = f"What a run of {length} is expected to end with at each batch size's best rate, as a mean over runs; 95% intervals"
        columns = ["B", "rate", "updates", advice.metric.name, "of one run", "times the data", "in the noise", "in 5% more data", "runs", "whole"]
        print_table(console, title, columns, rows)
        console.print(
            "times the data: what it needs to end where the best setting does, whichever that is. In the noise, in 5% more data: the chance to end "
            "within the range of 95% of the best setting's runs, and within 5% more data. Runs: of any length and rate; whole: of this rate, to "
            "the end.",
            soft_wrap=True,
        )


def verdict(config, records: Sequence[Record]) -> list[str]:
    """The answer, its doubts, and what to do with the other hyperparameters."""
    advice = read_advice(config, records)
    rules = [] if advice.batch_size is None else ["If the batch changes by a factor κ: " + " ".join(advice.rules)]
    return [*advice.sentences(), *rules]
