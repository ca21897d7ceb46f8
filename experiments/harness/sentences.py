"""Sentences that several reports use."""

from jaxbatch.intervals import Interval


def compare_errors(one: str, other: str, difference: Interval, pronoun: str = "it", what: str = "error") -> str:
    """How the last test errors of two ways to train differ, in points, or their losses; if positive, the first way is worse.

    Example:
        >>> compare_errors("Growth 4", "2", Interval(1.5, 1.0, 2.0, 3))
        'Growth 4 against 2: last test error differs by +1.50 [+1.00, +2.00] points; it is worse.'
    """
    if difference.n == 0:
        return f"{one} against {other}: no seed has finite results with both."
    if difference.n < 3:
        verdict = "too few seeds to tell"
    elif not difference.excludes(0):
        verdict = "no difference shows"
    else:
        verdict = f"{pronoun} is {'worse' if difference.value > 0 else 'better'}"
    shown = f"{difference:+.2f} points" if what == "error" else f"{difference:+.3g}"
    return f"{one} against {other}: last test {what} differs by {shown}; {verdict}."
