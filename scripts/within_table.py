"""The score of advice for runs of a fixed length as tables in Markdown, and what they come to."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxbatch.intervals import Interval

QUESTIONS = ("fixed", "horizon")
USUAL = ("32", "linear", "square root", "short best", "Step Law", "Power Lines", "largest")
BANDS = {"1%": 1.01, "2%": 1.02, "5%": 1.05}  # of more data
NOISE = 1.96  # standard deviations from run to run


class Scored(NamedTuple):
    """What a case comes to."""

    case: str
    building: bool
    sign: float  # by which values of the metric are multiplied, so that less is better
    settings: dict[str, tuple[int, float]]  # of every name
    ends: dict[str, list[float | None]]  # what its judged runs end with, less is better
    regrets: dict[str, Interval]  # in data, against the sweep's best
    advice: dict[str, dict]  # by question
    runs: int  # of the sweep at the whole length
    equal: np.ndarray  # draws of the regret that a setting exactly as good as the sweep's best would be judged to have
    one_seed: Sequence[float] = ()  # the regrets of what each seed of the sweep alone chooses, judged by the others

    def regret(self, name: str) -> float:
        """The regret of a setting; infinite where there was no advice."""
        return self.regrets[name].value if name in self.regrets else np.inf

    def holds_best(self, question: str) -> bool:
        """Whether the interval of the best size holds the sweep's."""
        _, low, high, *_ = self.advice[question]["best_size"]
        return low <= self.settings["best"][0] <= high

    def is_within_noise(self, question: str) -> bool | None:
        """Whether the largest size in the noise really ends there.

        Its mean is not worse than the better one of the sweep's best and the advised setting by more than 1.96 standard deviations of that
        setting's runs. None: no size was named, or runs of both diverged.
        """
        name = f"{question} within noise"
        if name not in self.ends:
            return None
        if None in self.ends[name]:
            return False
        known = [self.ends[other] for other in ("best", "fixed") if other in self.ends and None not in self.ends[other]]
        if not known:
            return None
        best = min(known, key=np.mean)
        return bool(np.mean(self.ends[name]) - np.mean(best) <= NOISE * np.std(best, ddof=1))

    def promised(self, question: str, field: str) -> list[bool]:
        """Whether the mean of the judged runs (``"value"``), or each of them (``"next_run"``), lies in its promised interval."""
        advice = self.advice[question]
        if question not in self.ends:
            return []
        _, low, high, *_ = next(choice[field] for choice in advice["choices"] if choice["batch_size"] == advice["batch_size"])
        if None in self.ends[question]:
            return [False]
        values = self.sign * np.array(self.ends[question], float)
        return [bool(low <= value <= high) for value in (values if field == "next_run" else [values.mean()])]


def print_score(rows: Sequence[Scored]) -> None:
    """The scores of all cases as two tables in Markdown, and what the cases that are only scored come to."""
    print_advised(rows)
    print()
    print_usual(rows)
    print()
    scored = [row for row in rows if not row.building]
    if not scored:
        return
    for name in (*QUESTIONS, *USUAL):
        values = [row.regret(name) for row in scored]
        words = {"fixed": "advice for the length", "horizon": "advice for the horizon"}.get(name, name)
        print(f"{words}: median regret {_cell(float(np.median(values)))}, worst {_cell(max(values))}, over {len(values)} scored cases")
    equal = np.array([row.equal for row in scored])
    middle, worst = np.nanmedian(equal, axis=0), np.nanmax(equal, axis=0)
    print(
        f"a setting exactly as good as the sweep's best in every case: worst regret {np.median(worst):.2f} (median), above "
        f"{np.quantile(worst, 0.9):.2f} in one of ten; at most 1.15 in {100 * (worst <= 1.15).mean():.0f}% and at most 1.3 in "
        f"{100 * (worst <= 1.3).mean():.0f}%; median regret at most 1.03 in {100 * (middle <= 1.03).mean():.0f}%"
    )
    alone = [regret for row in scored for regret in row.one_seed]
    if alone:
        runs, least = np.median([row.runs / len(row.one_seed) for row in scored]), min(_worst_of(scored))
        print(
            f"what a sweep with one seed chooses, {runs:.0f} whole runs (median), judged by its other seeds: median regret {np.median(alone):.2f}, "
            f"worst {_cell(max(alone))}; the least worst case of a seed {_cell(least)}"
        )
    print(f"the sweeps: {np.median([row.runs for row in scored]):.0f} whole runs each (median)")
    for question in QUESTIONS:
        print_promises(question, scored)


def _worst_of(rows: Sequence[Scored]) -> list[float]:
    """By seed of the sweeps, the worst regret over cases of what it alone chooses."""
    return [max(of) for of in zip(*(row.one_seed for row in rows), strict=True)]


def print_promises(question: str, rows: Sequence[Scored]) -> None:
    """How well an advice kept what it said of sizes and ends."""
    cost = [row.advice[question]["cost_in_runs"] for row in rows]
    noise = [row.is_within_noise(question) for row in rows]
    lines = [
        f"cost {np.median(cost):.1f} whole runs (median), {max(cost):.1f} at most",
        f"the interval of the best size holds the sweep's in {_share([row.holds_best(question) for row in rows])}",
        f"the largest size in the noise ends there in {_share([held for held in noise if held is not None])} ({noise.count(None)} named none)",
        f"the mean end lies in its promised interval in {_share([held for row in rows for held in row.promised(question, 'value')])}",
        f"single runs do in {_share([held for row in rows for held in row.promised(question, 'next_run')])}",
    ]
    for band, most in BANDS.items():
        named = [row.regrets[f"{question} within {band}"] for row in rows if f"{question} within {band}" in row.regrets]
        may = [not one.low > most and np.isfinite(one.value) for one in named]
        kept = [one.value <= most for one in named]
        lines.append(f"the largest within {band} more data needs no more in {_share(kept)}; it may need no more in {_share(may)}")
    for line in lines:
        print(f"{question}: {line}")


def print_advised(rows: Sequence[Scored]) -> None:
    """The advised settings and what was promised of them."""
    heads = ["case", "sweep's best", "ends with"]
    for question in QUESTIONS:
        heads += [question, "regret", "cost", "best size", "largest in noise"]
    print_heads(heads)
    for row in rows:
        size, rate = row.settings["best"]
        ends = [value for value in row.ends["best"] if value is not None]
        cells = [_name(row), f"{size}, {rate:.3g}", f"{row.sign * float(np.mean(ends)):.4g}"]
        for question in QUESTIONS:
            advice, held = row.advice[question], row.is_within_noise(question)
            _, low, high, *_ = advice["best_size"]
            advised = f"{advice['batch_size']}, {advice['learning_rate']:.3g}" if question in row.settings else "none"
            holds = f"{low:.0f}–{high:.0f}" + ("" if row.holds_best(question) else " (misses)")
            noise = "none" if held is None else f"{advice['largest_in_noise']}" + ("" if held else " (no)")
            cells += [advised, _with_ends(row.regrets.get(question)), f"{advice['cost_in_runs']:.1f}", holds, noise]
        print("| " + " | ".join(cells) + " |")


def print_usual(rows: Sequence[Scored]) -> None:
    """The regrets of what people do instead."""
    print_heads(["case", *QUESTIONS, *USUAL])
    for row in rows:
        print("| " + " | ".join([_name(row), *(_cell(row.regret(name)) for name in (*QUESTIONS, *USUAL))]) + " |")


def print_heads(heads: Sequence[str]) -> None:
    """The head of a table."""
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))


def _name(row: Scored) -> str:
    return row.case + (" (building)" if row.building else "")


def _cell(value: float) -> str:
    return "no" if np.isinf(value) else f"{value:.2f}"


def _with_ends(one: Interval | None) -> str:
    if one is None or np.isinf(one.value):
        return "no"
    high = "∞" if np.isinf(one.high) else f"{one.high:.2f}"
    return f"{one.value:.2f}" if one.low == one.high else f"{one.value:.2f} [{one.low:.2f}, {high}]"


def _share(held: Sequence[bool], write: Callable[[int, int], str] = "{} of {}".format) -> str:
    return write(sum(held), len(held))
