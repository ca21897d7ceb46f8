"""Sentences that several reports use."""

from collections.abc import Sequence

from jaxbatch.intervals import Interval
from jaxbatch.results.records import Record

BETWEEN = "A run shows the target at its next evaluation: updates are counted to the middle between that one and the one before."


def between_looks(runs: Sequence[Record]) -> list[str]:
    """How the updates to a target are counted, if a run has more than one update between two evaluations; old records do not say when those were.

    Example:
        >>> len(between_looks([{"updates": 40, "more_than": 30}])), between_looks([{"updates": 40, "more_than": 39}, {"updates": 40}])
        (1, [])
    """
    waits = [row["updates"] - row["more_than"] for row in runs if row["updates"] is not None and "more_than" in row]
    return [BETWEEN] if max(waits, default=0) > 1 else []


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
