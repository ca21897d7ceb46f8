"""What runs of every setting of a scored case look like, as tables: a search that takes its runs from one needs seconds.

A table holds, for every batch size, learning rate and seed, the metric at eight looks of a whole run, and what shorter runs, each with the
schedule of its own length, end with. So every tuner sees the same runs: those that are stopped early, too.
"""

import itertools
import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
from within_building import append, first_row, read
from within_cases import CASES, Case

import jaxbatch as jb
from experiments.harness.resuming import missing
from jaxbatch.advice.end_estimate import EndSpace
from jaxbatch.advice.end_law import choose_scale
from jaxbatch.advice.ending import Ending

PARTS = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)  # the lengths of a table's runs, in whole ones: those that the search of jaxbatch.advise_within makes
SEEDS, LOOKS, FEWEST = 3, 8, 8  # FEWEST: updates of a run
RUN = ("part", "batch_size", "learning_rate", "seed")  # what identifies a run


def file_of(name: str) -> str:
    """The name of a case's table among the files of a folder."""
    return f"{name}.table"


def make_table(folder: str, name: str) -> None:
    """Makes the runs that a table lacks, all rates and seeds of a size and a length together."""
    case, task, file = CASES[name], CASES[name].task(), file_of(name)
    if not read(folder, file):
        append(folder, file, first_row(case, task))
    for size, part in itertools.product(reversed(case.batch_sizes), PARTS):
        if case.num_steps(task.num_examples, size, part) < FEWEST:
            continue
        wanted = [dict(zip(RUN, (part, size, *row), strict=True)) for row in itertools.product(case.learning_rates, range(SEEDS))]
        lacking, started = list(missing(read(folder, file)[1:], wanted, RUN)), time.process_time()
        if lacking:
            looks = values_of(case, task, part, size, [(row["learning_rate"], row["seed"]) for row in lacking])
            append(folder, file, *(row | {"looks": values} for row, values in zip(lacking, looks, strict=True)))
            print(f"{name}: {len(lacking)} runs, B = {size}, part {part:g}, {time.process_time() - started:.0f} s of CPU", flush=True)


def values_of(case: Case, task: jb.Task, part: float, size: int, runs: Sequence[tuple[float, int]]) -> list[list]:
    """The metric at the looks of runs of one size and length, as ``(updates, value)``; None where one has diverged, after which it has no more."""
    steps, make = case.num_steps(task.num_examples, size, part), case.make_optimizer
    rates, seeds = zip(*runs, strict=True)
    settings = {"rate": np.array(rates, np.float32), "steps": np.full(len(rates), steps, np.int32)}  # traced, so that all lengths share programs
    looks = min(max(1, round(LOOKS / case.epochs)), task.num_examples // size)
    take = lambda setting: make(setting["rate"], setting["steps"])
    seen: list[list] = [[] for _ in runs]
    for record in jb.sweep(task, take, settings, seeds, batch_size=size, duration=jb.steps(steps), evaluations_per_epoch=looks):
        rows = zip(record[f"test_{case.metric[:-1]}"].tolist(), (record["diverged_at_batch"] >= 0).tolist(), seen, strict=True)
        for value, lost, mine in rows:
            if not mine or mine[-1][1] is not None:
                mine.append((record["updates"], None if lost or not math.isfinite(value) else float(f"{value:.6g}")))
    return seen


class Table:
    """Runs taken from a table, in place of training.

    Args:
        name: of the case.
        rows: of the table, its first one included.
    """

    def __init__(self, name: str, rows: Sequence[dict]):
        self.case, self.start, self.num_examples, self.tests = CASES[name], rows[0]["start"], rows[0]["num_examples"], rows[0]["tests"]
        self.runs = dict[tuple[int, float, int], list[list]]()  # by size, rate and updates, the looks of each seed
        for row in sorted(rows[1:], key=lambda row: row["seed"]):
            steps = self.case.num_steps(self.num_examples, row["batch_size"], row["part"])
            self.runs.setdefault((row["batch_size"], row["learning_rate"], steps), []).append(row["looks"])
        self.steps = {size: self.case.num_steps(self.num_examples, size) for size in self.case.batch_sizes}

    def looks(self, batch_size: int, learning_rate: float, num_steps: int, seed: int) -> list:
        """The looks of the run that is nearest to what is asked for."""
        lengths = {steps for size, _, steps in self.runs if size == batch_size}
        steps = min(lengths, key=lambda other: abs(math.log(other / num_steps)))
        seeds = self.runs[batch_size, learning_rate, steps]
        return [(max(1, round(updates / steps * num_steps)), value) for updates, value in seeds[seed % len(seeds)]]

    def run(self, batch_size: int, learning_rate: float, num_steps: int, seed: int) -> Iterator[Ending]:
        """The run so far at each look, for the search of :func:`jaxbatch.advise_within`."""
        seen = list[tuple[int, float]]()
        for updates, value in self.looks(batch_size, learning_rate, num_steps, seed):
            seen.append((updates, math.nan if value is None else value))
            yield Ending(batch_size, learning_rate, seed, num_steps, updates, value is None, seen[-1][1], tuple(seen))

    def mean(self, size: int, rate: float) -> float:
        """What whole runs of a setting end with as a mean over the table's seeds, less is better; infinite where one diverged."""
        ends = [looks[-1][1] for looks in self.runs[size, rate, self.steps[size]]]
        return math.inf if None in ends else self.case.sign * float(np.mean(ends))

    def space(self) -> EndSpace:
        """The settings to choose from."""
        sizes, scale = self.case.batch_sizes, choose_scale(self.case.sign < 0, self.start, [], self.tests)
        middle = sizes[len(sizes) // 2]
        return EndSpace(sizes, self.case.learning_rates, self.steps, self.steps, scale, self.start, float(self.steps[middle] * middle))
