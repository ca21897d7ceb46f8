"""Lengths of runs on the command line: ``--epochs``, or ``--within`` in any unit."""

import dataclasses
import re
from typing import Any

import jaxbatch as jb
from experiments.harness.command_line import is_given
from jaxbatch.advice.end_advice import in_words
from jaxbatch.advice.end_lengths import Seconds
from jaxbatch.batches import Duration
from jaxbatch.training.tasks import updates_of

LENGTHS = {"epochs": jb.epochs, "examples": jb.examples, "tokens": jb.tokens, "steps": jb.steps, "seconds": jb.seconds}
_LENGTH = re.compile(r"\s*(\d{1,3}(?:[,_]\d{3})+|\d*\.?\d+(?:e[+-]?\d+)?|\d+\.)\s*(epochs?|examples?|tokens?|steps?|seconds?)\s*", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class WithinFlag:
    """The flag of studies whose longest run may be given in any unit."""

    within: str | None = None
    """The longest run in another unit than epochs, with its unit: 50000examples, 1e6tokens or 2000steps. Default: --epochs."""


def longest_run(config: Any) -> Duration:
    """The longest run that a configuration allows.

    Example:
        >>> from types import SimpleNamespace
        >>> longest_run(SimpleNamespace(within=None, epochs=3)), longest_run(SimpleNamespace(within="2000steps", epochs=3))
        (Duration(amount=3, unit='epochs'), Duration(amount=2000, unit='steps'))
    """
    length = None if getattr(config, "within", None) is None else read_length(config.within, "--within")
    return jb.epochs(config.epochs) if length is None else length  # type: ignore[return-value]


def length_words(config: Any) -> str:
    """The longest run in words.

    Example:
        >>> from types import SimpleNamespace
        >>> length_words(SimpleNamespace(within=None, epochs=3)), length_words(SimpleNamespace(within="2000steps", epochs=3))
        ('3 epochs', '2,000 steps')
    """
    return in_words(longest_run(config))


def check_within(config: Any, task: jb.Task) -> None:
    """Checks the flag ``--within``.

    Raises:
        ValueError: it has another form, is in seconds, is not above 0, or stands beside ``--epochs``; or it is in tokens, and the task
            does not say how many an example has.
    """
    if config.within is None:
        return
    if is_given(config, "epochs"):
        raise ValueError(f"--within {config.within} and --epochs both give the longest run: give one.")
    length = read_length(config.within, "--within")
    if isinstance(length, Seconds) or not length.amount > 0:
        raise ValueError(f"--within {config.within} must be above 0 and in epochs, examples, tokens or steps; seconds are for experiments.advise.")
    updates_of(task, length, 1)


def read_length(text: str, flag: str) -> Duration | Seconds:
    """A length with its unit.

    Args:
        text: as ``"5epochs"``.
        flag: its name, for the error.

    Raises:
        ValueError: it has another form, or is no length of its unit.

    Example:
        >>> read_length("5epochs", "--within"), read_length("1e6 tokens", "--within").amount
        (Duration(amount=5.0, unit='epochs'), 1000000)
        >>> read_length("5", "--within")
        Traceback (most recent call last):
        ValueError: --within 5 must be a number with its unit, as 5epochs, 50000examples, 1e6tokens, 2000steps or 600seconds.
        >>> read_length("2,000steps", "--within").amount, read_length("1e-1epochs", "--within").amount
        (2000, 0.1)
    """
    match = _LENGTH.fullmatch(text)
    if match is None:
        form = "as 5epochs, 50000examples, 1e6tokens, 2000steps or 600seconds"
        raise ValueError(f"{flag} {text} must be a number with its unit, {form}.")
    amount, unit = float(match[1].replace(",", "").replace("_", "")), match[2].lower().rstrip("s") + "s"
    try:
        return LENGTHS[unit](amount)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{flag} {text}: {error}") from None
