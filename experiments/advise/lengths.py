"""Lengths of runs on the command line."""

import re

import jaxbatch as jb
from jaxbatch.advice.end_request import Seconds
from jaxbatch.batches import Duration

LENGTHS = {"epochs": jb.epochs, "examples": jb.examples, "tokens": jb.tokens, "steps": jb.steps, "seconds": jb.seconds}
_LENGTH = re.compile(r"\s*([0-9.,_e+]+)\s*(epochs?|examples?|tokens?|steps?|seconds?)\s*", re.IGNORECASE)


def read_length(text: str, flag: str) -> Duration | Seconds:
    """A length with its unit.

    Args:
        text: as ``"5epochs"``.
        flag: its name, for the error.

    Raises:
        ValueError: it has another form.

    Example:
        >>> read_length("5epochs", "--within"), read_length("1e6 tokens", "--within").amount
        (Duration(amount=5.0, unit='epochs'), 1000000)
        >>> read_length("5", "--within")
        Traceback (most recent call last):
        ValueError: --within 5 must be a number with its unit, as 5epochs, 50000examples, 1e6tokens, 2000steps or 600seconds.
    """
    match = _LENGTH.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        amount, unit = float(match[1].replace(",", "").replace("_", "")), match[2].lower().rstrip("s") + "s"
        length = LENGTHS[unit](amount)
    except (ValueError, OverflowError):
        form = "as 5epochs, 50000examples, 1e6tokens, 2000steps or 600seconds"
        raise ValueError(f"{flag} {text} must be a number with its unit, {form}.") from None
    return length
