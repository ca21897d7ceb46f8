"""Table, figure and verdict of the study of a language model, from its records alone."""

import math
import pathlib
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from experiments.harness.study import describe_setting
from jaxbatch.intervals import Interval, interval
from jaxbatch.results import plots
from jaxbatch.results.records import Record, as_number
from jaxbatch.results.report import print_table


def text_of(records: Sequence[Record]) -> Record:
    """What is known of the text and the network."""
    return next(record for record in records if record["kind"] == "text")


def by_epoch(records: Sequence[Record], key: str) -> dict[int, list[float]]:
    """The values of every seed after each epoch; NaN where a run diverged."""
    epoch_values: dict[int, list[float]] = {}
    for record in records:
        if record["kind"] == "epoch":
            epoch_values.setdefault(record["epoch"], []).append(math.nan if record["diverged"] else as_number(record[key]))
    return dict(sorted(epoch_values.items()))


def at_the_end(records: Sequence[Record]) -> Interval:
    """Bits per token of the test text, over seeds."""
    return interval([None if record["diverged"] else record["test_bits_per_token"] for record in records if record["kind"] == "end"])


def seconds(records: Sequence[Record]) -> Interval:
    """Seconds of training, over seeds, without compilation."""
    seeds = {record["seed"] for record in records if record["kind"] == "end"}
    return interval([sum(r["train_seconds"] for r in records if r["kind"] == "epoch" and r["seed"] == seed) for seed in sorted(seeds)])


def print_tables(console: Console, config, records: Sequence[Record], provenance: Record) -> None:
    """Bits per token after each epoch, and at the end."""
    text = text_of(records)
    network = f"transformer of {text['parameters']:,} parameters, {config.batch_size} sequences of {config.sequence_length} tokens"
    describe_setting(console, config, provenance, network, f"AdamW, rate {config.learning_rate:g}")
    tokens, training = by_epoch(records, "tokens"), by_epoch(records, "loss")
    rows = [
        [str(epoch), f"{tokens[epoch][0]:,.0f}", f"{interval(np.array(training[epoch]) / math.log(2)):.4f}", f"{interval(values):.4f}"]
        for epoch, values in by_epoch(records, "validation_bits_per_token").items()
    ]
    print_table(console, "Bits per token", ["epoch", "tokens seen", "training, mean of the epoch", "validation"], rows)
    rows = [["test", f"{at_the_end(records):.4f}", f"{seconds(records):.1f}"]]
    if text["entropy"] is not None:
        rows.append(["best possible", f"{text['entropy']:.4f}", ""])
    print_table(console, "At the end", ["", "bits per token", "seconds of training"], rows)


def verdict(config, records: Sequence[Record]) -> list[str]:
    """What was reached, and what is left."""
    test_bits, text = at_the_end(records), text_of(records)
    diverged = sum(record["diverged"] for record in records if record["kind"] == "end")
    sentences = [f"{diverged} of {config.seeds} runs diverged: lower --learning-rate."] if diverged else []
    if not test_bits.n:
        return sentences
    tokens = max(value for values in by_epoch(records, "tokens").values() for value in values)
    sentences.append(f"The test text takes {test_bits:.3f} bits per token after {tokens:,.0f} tokens and {seconds(records):.0f} s of training.")
    if text["entropy"] is not None:
        above = test_bits.less(text["entropy"])
        sentences.append(f"The best possible number is {text['entropy']:.4f}, so {above:.4f} bits are left.")
    return sentences


def draw_figure(config, records: Sequence[Record], folder: pathlib.Path) -> pathlib.Path:
    """Bits per token of training and validation by tokens seen, with the best possible number where it is known."""
    figure, axes = plots.subplots(figsize=(7, 4.8))
    tokens, text = by_epoch(records, "tokens"), text_of(records)
    for key, label, color, unit in (("loss", "training", 0, math.log(2)), ("validation_bits_per_token", "validation", 1, 1.0)):
        values = by_epoch(records, key)
        tokens_seen = [tokens[epoch][0] for epoch in values]
        plots.band(axes, tokens_seen, [interval(np.array(of) / unit) for of in values.values()], color=plots.COLORS[color], label=label)
    if text["entropy"] is not None:
        axes.axhline(text["entropy"], color="black", ls=":", label="best possible")
        # Two words of eight repeat earlier ones, so a model that looks at the word before only pays for them, too.
        axes.axhline(text["entropy"] * 8 / 6, color="grey", ls=":", label="best possible without copying")
    axes.set(xlabel="tokens seen", ylabel="bits per token", title=f"{config.dataset}, {text['parameters']:,} parameters, {config.seeds} seeds")
    axes.legend()
    return plots.save(figure, folder)
