"""What advice promised of the updates to the goal, against judged runs on other seeds."""

from typing import NamedTuple

import numpy as np

from jaxbatch.intervals import Interval, interval

FIELDS = ("updates", "next_run", "look", "enough_updates", "runs", "reached")  # of a Choice, which are kept


class Promise(NamedTuple):
    """What advice said of the updates, against the judged runs, which looked at the goal on the same grid, or nearly so."""

    mean: Interval  # as promised
    judged: Interval  # the mean of the judged runs: a run met the goal half a look before it was noticed, on average
    inside: bool  # whether the judged mean lies in the promised interval
    agrees: bool  # whether it does so within the judged mean's own interval
    next_run: tuple[float, float]
    runs_inside: float  # the part of the judged runs that may lie between these ends
    steps: int  # of the snippet
    in_time: float  # the part of the judged runs that noticed the goal within them


def compare(promised: dict, judged: list[dict]) -> Promise:
    """Compares a promise with judged runs; one that missed the goal is outside of every promise."""
    mean, (_, low, high, _) = Interval(*promised["updates"][:4]), promised["next_run"][:4]
    noticed = np.array([np.inf if row["updates"] is None else row["updates"] for row in judged])
    met = interval(noticed - promised["look"] / 2) if np.isfinite(noticed).all() else Interval(np.inf, np.nan, np.nan, len(noticed))
    may_be_inside = (noticed >= low) & (np.maximum(noticed - promised["look"], 0) <= high)  # a run is known to its grid alone
    in_time = float((noticed <= promised["enough_updates"]).mean())
    inside = bool(mean.low <= met.value <= mean.high)
    agrees = inside or bool(mean.low <= met.high and met.low <= mean.high)
    return Promise(mean, met, inside, agrees, (low, high), float(may_be_inside.mean()), promised["enough_updates"], in_time)


def print_promises(rows: list[dict]) -> None:
    """Promised against judged updates in Markdown, and how often promises were kept."""
    print("\n| case | objective | promised updates | judged | inside | promised of one run | judged runs inside | steps | judged runs in time |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        promise, name = row["promise"], row["case"] + (" (building)" if row["building"] else "")
        inside = "yes" if promise.inside else "within the error of judging" if promise.agrees else "no"
        low, high = promise.next_run
        cells = [name, row["objective"], f"{promise.mean:,.0f}", f"{promise.judged:,.0f}", inside, f"{low:,.0f} to {high:,.0f}"]
        print("| " + " | ".join([*cells, f"{promise.runs_inside:.0%}", f"{promise.steps:,}", f"{promise.in_time:.0%}"]) + " |")
    scored = [row["promise"] for row in rows if not row["building"]]
    if scored:
        count = lambda name: sum(getattr(promise, name) for promise in scored)
        print(f"judged means inside the promised interval: {count('inside')} of {len(scored)}; within the error of judging: {count('agrees')}")
        print(
            f"judged runs inside the promise of one run: {count('runs_inside') / len(scored):.0%}; "
            f"in time by the snippet: {count('in_time') / len(scored):.0%}"
        )
