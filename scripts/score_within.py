"""Scores jaxbatch.advise_within against full sweeps over batch sizes, learning rates and seeds, case by case.

    python scripts/score_within.py sweep --output within     every case's sweep, and what its best setting ends with at other lengths
    python scripts/score_within.py advise --output within    advice for the length, and for it as a horizon 8 times longer than any run
    python scripts/score_within.py judge --output within     advised, best and usual settings, all on new seeds
    python scripts/score_within.py table --output within     the table of docs/within.md

Each stage skips what it finds in the folder. The cases are in scripts/within_cases.py.
"""

import argparse
import itertools
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterable, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from experiments.harness.environment import settle

if __name__ == "__main__":
    settle()

import numpy as np
import within_cases
from within_cases import SHORT
from within_curve import Regrets, group_ends
from within_exponents import exponents, print_exponents
from within_table import Scored, print_score

import jaxbatch as jb
from experiments.advise.verify import JUDGING_SEEDS
from experiments.harness.resuming import is_whole, missing

SEEDS, JUDGES = 3, 10
CURVE = range(SEEDS, 2 * SEEDS)  # those of runs at other lengths; at none of these was the best setting chosen
JUDGING = range(JUDGING_SEEDS, JUDGING_SEEDS + JUDGES)  # the seeds on which settings are judged
PARTS = (1 / 8, 1 / 4, 1 / 2, 1.0, 1.5, 2.0, 3.0)  # of the length, at which the sweep's best setting is run
RUN = ("part", "batch_size", "learning_rate", "seed")  # what identifies a run


class Folder:
    """The files of a case."""

    def __init__(self, folder: str, name: str):
        self.root, self.name, self.case = pathlib.Path(folder), name, within_cases.CASES[name]

    def read(self, kind: str) -> list[dict]:
        """The rows of a kind."""
        path = self.root / f"{self.name}.{kind}.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def append(self, kind: str, *rows: dict) -> None:
        """Writes rows."""
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.root / f"{self.name}.{kind}.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def run(self, kind: str, task: jb.Task, part: float, size: int, rates: Sequence[float], seeds: Iterable[int]) -> None:
        """Makes the runs of a size and a length that the folder lacks, together, and writes what they end with."""
        wanted = [dict(zip(RUN, (part, size, rate, seed), strict=True)) for rate, seed in itertools.product(rates, seeds)]
        lacking, started = list(missing(self.read(kind), wanted, RUN)), time.process_time()
        if not lacking:
            return
        values = end_values(self.case, task, part, size, [(row["learning_rate"], row["seed"]) for row in lacking])
        self.append(kind, *(row | {"value": value} for row, value in zip(lacking, values, strict=True)))
        print(f"{self.name}: {len(lacking)} runs, B = {size}, part {part:g}, {time.process_time() - started:.0f} s of CPU", flush=True)


def end_values(case: within_cases.Case, task: jb.Task, part: float, size: int, runs: Sequence[tuple[float, int]]) -> list[float | None]:
    """What runs of one size and length end with; None where one has diverged."""
    steps, make = case.num_steps(task.num_examples, size, part), case.make_optimizer
    rates, seeds = zip(*runs, strict=True)
    settings = {"rate": np.array(rates, np.float32), "steps": np.full(len(rates), steps, np.int32)}  # traced, so that all lengths share programs
    looks = max(1, round(SHORT**-1 / case.epochs))  # one look in every eighth of the length, or every epoch
    looks = min(looks, task.num_examples // size)
    take = lambda setting: make(setting["rate"], setting["steps"])
    *_, record = jb.sweep(task, take, settings, seeds, batch_size=size, duration=jb.steps(steps), evaluations_per_epoch=looks)
    values = record[f"test_{case.metric[:-1]}"]
    lost = record["diverged_at_batch"] >= 0
    return [None if bad or not math.isfinite(value) else float(f"{value:.6g}") for value, bad in zip(values.tolist(), lost.tolist(), strict=True)]


def mean_ends(case: within_cases.Case, rows: Iterable[dict], part: float = 1.0) -> dict[tuple[int, float], float]:
    """The mean of what every setting ends with, less is better; settings of which a run diverged are left out."""
    ends = dict[tuple[int, float], list]()
    for row in rows:
        if row["part"] == part:
            ends.setdefault((row["batch_size"], row["learning_rate"]), []).append(row["value"])
    return {setting: case.sign * float(np.mean(values)) for setting, values in ends.items() if None not in values}


def best_setting(ends: dict[tuple[int, float], float], size: int | None = None) -> tuple[int, float]:
    """The setting that ends best, of those of one size if it is given."""
    return min((setting for setting in ends if size in (None, setting[0])), key=ends.__getitem__)


def sweep(folder: Folder) -> None:
    """Makes the sweep at the length and at the short length, and runs its best setting at other lengths."""
    case, task = folder.case, folder.case.task()
    for size in reversed(case.batch_sizes):
        folder.run("sweep", task, 1.0, size, case.learning_rates, range(SEEDS))
        if size in case.short_sizes(task.num_examples):
            folder.run("sweep", task, SHORT, size, case.learning_rates, range(SEEDS))
    size, rate = best_setting(mean_ends(case, folder.read("sweep")))
    near = nearest(case.learning_rates, rate)
    for part in PARTS:
        folder.run("curve", task, part, size, near, CURVE)


def nearest(rates: Sequence[float], rate: float) -> list[float]:
    """The three rates that are nearest to one, which may lie at the end of the grid."""
    return sorted(sorted(rates, key=lambda other: abs(math.log(other / rate)))[:3])


def advise(folder: Folder) -> None:
    """Asks for advice for the length, and for the length as a horizon of which no more than an eighth is run."""
    case, task = folder.case, folder.case.task()
    short = {"within": case.length(SHORT), "horizon": case.length(), "batch_sizes": case.short_sizes(task.num_examples), "full_runs": 12}
    questions = {"fixed": {"within": case.length(), "batch_sizes": case.batch_sizes, "full_runs": 8}, "horizon": short}
    for question, asked in questions.items():
        if any(row["question"] == question for row in folder.read("advice")):
            continue
        started = time.process_time()
        advice = jb.advise_within(task, case.metric, optimizer=case.make_optimizer, seed=500, on_progress=None, **asked)
        row = {"question": question, "batch_size": advice.batch_size, "learning_rate": advice.learning_rate, "best_size": list(advice.best_size)}
        row |= {name: getattr(advice, name) for name in ("largest_in_noise", "largest_within", "cost_in_runs", "start", "doubts")}
        row |= {"growth": list(advice.growth), "cpu_seconds": round(time.process_time() - started, 1)}
        row["choices"] = [choice._asdict() for choice in advice.choices]
        row["endings"] = [ending._asdict() | {"looks": []} for ending in advice.endings]  # the looks would fill megabytes
        folder.append("advice", row)
        print(f"{folder.name}, {question}: B = {advice.batch_size}, rate {advice.learning_rate}, {row['cpu_seconds']} s of CPU", flush=True)


def usual_settings(folder: Folder) -> dict[str, tuple[int, float]]:
    """What people do instead.

    ``32``: with its best rate at the short length; ``linear`` and ``square root``: the largest size with the best rate of 32 at the whole
    length, scaled by the rule; ``short best``: what ended best at the short length, as it is; ``Step Law`` and ``Power Lines``: the same, its
    size and rate scaled by their exponents of the length; ``largest``: the largest size with its best rate.
    """
    rows, largest = folder.read("sweep"), folder.case.batch_sizes[-1]
    long, short = mean_ends(folder.case, rows), mean_ends(folder.case, rows, SHORT)
    (size, rate), (_, at_32) = best_setting(short), best_setting(long, 32)
    return {
        "32": best_setting(short, 32),
        "linear": (largest, at_32 * largest / 32),
        "square root": (largest, at_32 * math.sqrt(largest / 32)),
        "short best": (size, rate),
        "Step Law": (round(size * SHORT**-0.571), rate * SHORT**-0.307),
        "Power Lines": (round(size * SHORT**-0.383), rate),
        "largest": best_setting(long, largest),
    }


def promised_settings(advice: dict) -> dict[str, tuple[int, float]]:
    """The settings that an advice names: the one to take, and the largest sizes with their rates."""
    rates, name = {choice["batch_size"]: choice["learning_rate"] for choice in advice["choices"]}, advice["question"]
    largest = {"noise": advice["largest_in_noise"]} | dict(zip(("1%", "2%", "5%"), advice["largest_within"], strict=True))
    named = {name: (advice["batch_size"], advice["learning_rate"])} if advice["batch_size"] is not None else {}
    return named | {f"{name} within {band}": (size, rates[size]) for band, size in largest.items() if size is not None}


def named_settings(folder: Folder) -> dict[str, tuple[int, float]]:
    """All settings that are judged: the sweep's best, the usual and the advised ones."""
    settings = {"best": best_setting(mean_ends(folder.case, folder.read("sweep")))} | usual_settings(folder)
    for row in folder.read("advice"):
        settings |= promised_settings(row)
    return settings


def judge(folder: Folder) -> None:
    """Runs the advised settings, the sweep's best and the usual ones on seeds that none has seen."""
    task, rates = folder.case.task(), dict[int, list[float]]()
    for size, rate in dict.fromkeys(named_settings(folder).values()):
        rates.setdefault(size, []).append(rate)
    for size, of in sorted(rates.items()):
        folder.run("judged", task, 1.0, size, of, JUDGING)


def judged_ends(folder: Folder) -> dict[str, list[float | None]]:
    """What the judged runs of every named setting end with, less is better; None where one diverged."""
    ends: dict[tuple[int, float], list] = {}
    for row in folder.read("judged"):
        value = row["value"]
        ends.setdefault((row["batch_size"], row["learning_rate"]), []).append(None if value is None else folder.case.sign * value)
    return {name: ends[setting] for name, setting in named_settings(folder).items()}


def is_judged(folder: Folder) -> bool:
    """Whether there is a whole sweep and advice, and every named setting of a case has been judged."""
    if not is_whole(folder.read("advice"), question=["fixed", "horizon"]) or not folder.read("curve"):
        return False
    judged = folder.read("judged")
    return all(is_whole(judged, batch_size=[size], learning_rate=[rate], seed=JUDGING) for size, rate in named_settings(folder).values())


def score(folder: Folder) -> Scored:
    """What a case comes to."""
    case, settings, ends = folder.case, named_settings(folder), judged_ends(folder)
    regrets = Regrets(group_ends(folder.read("curve"), case.sign), ends["best"])
    runs = sum(row["part"] == 1 for row in folder.read("sweep"))
    known = {name: regrets.regret(values) for name, values in ends.items()}
    advice = {row["question"]: row for row in folder.read("advice")}
    sweep_ends: dict[tuple[int, float], dict[int, float | None]] = {}
    for row in folder.read("sweep"):
        if row["part"] == 1:
            value = None if row["value"] is None else case.sign * row["value"]
            sweep_ends.setdefault((row["batch_size"], row["learning_rate"]), {})[row["seed"]] = value
    alone = regrets.of_one_seed(sweep_ends)
    return Scored(folder.name, case.building, case.sign, settings, ends, known, advice, runs, regrets.of_an_equal(), alone)


STAGES = {"sweep": sweep, "advise": advise, "judge": judge}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "table"])
    parser.add_argument("--output", default="within")
    parser.add_argument("--cases", nargs="*", default=list(within_cases.CASES))
    options = parser.parse_args()
    jb.keep_compiled_programs()
    folders = [Folder(options.output, name) for name in options.cases]
    if options.stage == "table":
        judged = [folder for folder in folders if is_judged(folder)]
        print_score([score(folder) for folder in judged])
        print_exponents({folder.name: exponents(folder.read("sweep"), SHORT, folder.case.sign) for folder in judged})
    for folder in folders if options.stage != "table" else []:
        STAGES[options.stage](folder)
        print(f"{folder.name}: {options.stage} done", flush=True)


if __name__ == "__main__":
    sys.exit(main())
