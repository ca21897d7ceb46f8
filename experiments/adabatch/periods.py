"""How often a study's batch changes: after a number of epochs, or after another duration that is given on the command line."""

import jaxbatch as jb

UNITS = {"epochs": jb.epochs, "examples": jb.examples, "tokens": jb.tokens}


def read_period(text: int | str) -> int | str:
    """A whole number of epochs as such, another duration as one text for every way to write it.

    Raises:
        ValueError: there is no number, or another unit. Steps are refused: those of the arms see different numbers of examples.

    Example:
        >>> read_period("20"), read_period("2e6 tokens"), read_period("2.5 epochs")
        (20, '2000000 tokens', '2.5 epochs')
    """
    amount, _, unit = str(text).strip().partition(" ")
    try:
        number = float(amount)
        duration = UNITS[unit.strip() or "epochs"](number)
    except (ValueError, KeyError):
        raise ValueError(f'--every {text} must be a number of epochs, as 20, or a duration, as "1e6 examples" or "1e9 tokens".') from None
    if not number > 0:
        raise ValueError(f"--every {text} must be above 0.")
    if duration.unit == "epochs" and number == int(number):
        return int(number)
    return f"{duration.amount} {duration.unit}"


def duration_of(period: int | str) -> jb.Duration:
    """What :func:`read_period` has read.

    Example:
        >>> duration_of(20), duration_of("2000000 tokens")
        (Duration(amount=20, unit='epochs'), Duration(amount=2000000, unit='tokens'))
    """
    amount, _, unit = str(period).partition(" ")
    return UNITS[unit or "epochs"](float(amount) if unit == "epochs" else int(amount))
