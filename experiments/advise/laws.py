"""What published rules say of a language model, side by side, as a table. Nothing is trained, and no run folder is made."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from rich.console import Console

import jaxbatch as jb
from experiments.harness.command_line import one_line_errors, parse
from jaxbatch.advice.published_rules import PublishedRule, PublishedRules
from jaxbatch.results.report import print_table

QUESTION = "What do published rules say of the batch size and learning rate of a language model, and how far do they disagree? Nothing is trained."
KINDS = {"best": "The batch that ends best", "critical": "The critical batch, about the largest that wastes few tokens"}
UNITS = {"num_parameters": "N", "num_tokens": "D", "compute": "C", "loss": "L", "tokens_per_parameter": "D/N"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags with --laws."""

    num_parameters: float
    """Parameters without embeddings, such as 124e6."""
    num_tokens: float
    """Tokens that training sees, such as 2.5e9."""
    sequence_length: int
    """Tokens in a sequence, such as 1024."""
    compute: float | None = None
    """Training FLOPs without embeddings. Default: 6 x parameters x tokens."""
    loss: float | None = None
    """Loss that is expected at the end, in nats per token, for the rules by loss."""
    laws: bool = True
    """Show published rules in place of training."""


def print_rules(console: Console, published: PublishedRules, sequence_length: int) -> None:
    """A table for the best and one for the critical batches, then each rule with its formula and source."""
    for kind, title in KINDS.items():
        columns = ["rule", "B in tokens", f"sequences of {sequence_length:,}", "rate", "asked outside the fitted range"]
        rows = [_row(rule) for rule in published.rules if rule.kind == kind]
        print_table(console, title, columns, rows)
    console.print("N parameters without embeddings, D tokens, C training FLOPs, L nats per token, B batch", soft_wrap=True)
    for rule in published.rules:
        console.print(f"{rule.name}: {rule.formula}. For {rule.optimizer}. {rule.source}; read in: {rule.verified}.", soft_wrap=True)


def _row(rule: PublishedRule) -> list[str]:
    rate = "–" if rule.learning_rate is None else f"{rule.learning_rate:.2e}"
    return [rule.name, f"{rule.batch_tokens:,.0f}", _number(rule.batch_sequences), rate, outside_words(rule)]


def _number(value: float) -> str:
    """Whole from 10 on.

    Example:
        >>> _number(1234.5), _number(1.26)
        ('1,234', '1.3')
    """
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def outside_words(rule: PublishedRule) -> str:
    """Which ranges of a rule the asked point leaves, and by how much.

    Example:
        >>> [step_law, *_] = jb.published_rules(num_parameters=30e6, num_tokens=2e11, sequence_length=1024).rules
        >>> outside_words(step_law)
        'N 2.0 times below 6e+07; D 2.0 times above 1e+11'
    """
    parts = []
    for name, ratio in rule.outside.items():
        low, high = rule.fitted[name]
        parts.append(f"{UNITS[name]} {1 / ratio:.1f} times below {low:.3g}" if ratio < 1 else f"{UNITS[name]} {ratio:.1f} times above {high:.3g}")
    parts += [f"range of {UNITS[name]} not read" for name in unread(rule)]
    return "; ".join(parts) or "no"


def unread(rule: PublishedRule) -> list[str]:
    """What a rule goes by within a range that is not known here."""
    return [name for name, ends in rule.fitted.items() if math.isnan(ends[0])]


def sentences(published: PublishedRules) -> list[str]:
    """How far the rules disagree, and what that means.

    Example:
        >>> print(sentences(jb.published_rules(num_parameters=124e6, num_tokens=2.5e9, sequence_length=1024))[0])
        The rules disagree by a factor of 2.0 on the best batch, 4.6 on the critical one and 3.6 on the learning rate.
    """
    best, critical, rate = (published.disagreement[name] for name in ("best", "critical", "learning_rate"))
    left = [rule.name for rule in published.rules if rule.outside]
    where = f"{', '.join(left)}: fitted elsewhere." if left else "No range that is known here excludes this point."
    return [
        f"The rules disagree by a factor of {best:.1f} on the best batch, {critical:.1f} on the critical one and {rate:.1f} on the learning rate.",
        f"{where} A rule holds for its authors' model, data, tokenizer and schedule: on yours, only runs can tell.",
    ]


def beside(task: jb.Task, num_tokens: float, sequence_length: int) -> str:
    """What published rules say of a text's task, to be read beside the measured answer.

    Args:
        task: whose embeddings have ``embed`` in their names.
        num_tokens: that the advised run trains on.
        sequence_length: tokens in an example.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.eval_shape(task.init, jax.random.key(0)))
    num_parameters = sum(math.prod(leaf.shape) for path, leaf in leaves if "embed" not in jax.tree_util.keystr(path))
    published = jb.published_rules(num_parameters=num_parameters, num_tokens=num_tokens, sequence_length=sequence_length)
    ends = {}
    for kind in KINDS:
        sizes = [rule.batch_sequences for rule in published.rules if rule.kind == kind]
        ends[kind] = f"{_number(min(sizes))} to {_number(max(sizes))}"
    fits = sum(not rule.outside and not unread(rule) for rule in published.rules)
    return (
        f"Published rules say {ends['best']} sequences for {num_parameters:,} parameters and {num_tokens:,.0f} tokens, and {ends['critical']} for "
        f"the critical batch; {fits} of {len(published.rules)} were fitted in a range that holds these numbers, and none to this text "
        f"(--laws shows them)."
    )


def main(args: Sequence[str] | None = None) -> None:
    """The command line with --laws."""
    config = parse(Config, QUESTION, args)
    with one_line_errors():
        console, wanted = Console(highlight=False), dataclasses.asdict(config)
        wanted.pop("laws")
        published = jb.published_rules(**wanted)
        print_rules(console, published, config.sequence_length)
        if config.loss is None:
            console.print("MiniCPM's rule needs --loss, the loss that training is expected to end with.", soft_wrap=True)
        for sentence in sentences(published):
            console.print(sentence, style="bold", soft_wrap=True)
