"""The cases on which jaxbatch.advise_within is built, as tables: what runs of every batch size, learning rate and length end with.

    python scripts/within_building.py table --output tables     makes the tables; half an hour on two cores
    python scripts/within_building.py advise --output tables    lets the search choose its runs from them, and says how good its advice is

No case is one of those it is scored on (scripts/within_cases.py): each has other examples, another network, or another optimizer and
schedule. A search that takes its runs from a table needs seconds, so that a change can be judged on all of them and on several seeds.
"""

import argparse
import functools
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from experiments.harness.environment import settle

if __name__ == "__main__":
    settle()

import advice_cases
import jax
import numpy as np
import optax
from score_within import RUN, end_values
from within_cases import MOMENTUM, Case, rates, sizes

import jaxbatch as jb
from experiments.harness.resuming import missing
from jaxbatch.advice.end_estimate import EndSpace, largest_within, make_estimate
from jaxbatch.advice.end_law import choose_scale
from jaxbatch.advice.end_request import first_size
from jaxbatch.advice.end_search import cost_of, search_endings
from jaxbatch.advice.ending import Ending
from jaxbatch.advice.request import LEARNING_RATES

PARTS = tuple(2.0**-power for power in range(8))  # the lengths of a table's runs, in whole lengths
SEEDS, TIMES = 3, 8
FEWEST = 8  # updates of the shortest run of a table


def image_task(name: str, first: int, num_examples: int, num_held: int, *widths: int) -> jb.Task:
    """A network with hidden layers of these widths on training examples from ``first`` on, of half the height and width."""
    dataset = jb.load_dataset(name)
    images, labels = (np.asarray(leaf[first : first + num_examples + num_held]) for leaf in (dataset.train_images, dataset.train_labels))
    count, height, width, channels = images.shape
    images = images.reshape(count, height // 2, 2, width // 2, 2, channels).mean((2, 4)).astype(images.dtype)
    dataset = dataset._replace(train_images=images, train_labels=labels)
    return jb.classification_task(jb.MLP(widths, num_classes=dataset.num_classes), jb.hold_out(dataset, num_held))


partial = functools.partial
ADAM, PLAIN = rates(0.0001, 0.178), rates(0.00316, 3.16)
CASES = {
    "digits_linear_sgd_constant": Case(partial(image_task, "digits", 0, 1200, 240), optax.sgd, "constant", "loss<", 8, PLAIN, sizes(4, 256)),
    "regression_adam_linear": Case(partial(advice_cases.regression_task, 8192), optax.adam, "linear", "excess<", 1, ADAM, sizes(4, 512)),
    "mnist_narrow_adamw_linear": Case(partial(image_task, "mnist", 20_000, 2048, 1024, 24), optax.adamw, "linear", "loss<", 3, ADAM, sizes(4, 512)),
    "mnist_deep_sgd_cosine": Case(
        partial(image_task, "mnist", 20_000, 2048, 1024, 48, 48), optax.sgd, "cosine", "accuracy>", 5, PLAIN, sizes(4, 512)
    ),
    "mnist_mlp_momentum_linear": Case(
        partial(image_task, "mnist", 30_000, 2048, 1024, 40), MOMENTUM, "linear", "loss<", 6, rates(0.000562, 0.562), sizes(4, 512), warmup=0.05
    ),
    "cifar100_mlp_momentum_cosine": Case(
        partial(image_task, "cifar100", 0, 2048, 1024, 24), MOMENTUM, "cosine", "loss<", 4, rates(0.000316, 0.1), sizes(4, 512)
    ),
}


def read(folder: str, name: str) -> list[dict]:
    """The rows of a table; the first says what the metric was before training."""
    path = pathlib.Path(folder) / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def append(folder: str, name: str, *rows: dict) -> None:
    """Writes rows."""
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    with open(pathlib.Path(folder) / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def first_row(case: Case, task: jb.Task) -> dict:
    """What the metric was before training, and how many examples there are."""
    metrics = task.metrics_fn(task.init(jax.random.key(0)), task.test_data)  # type: ignore[misc]
    values = np.asarray(metrics[case.metric[:-1]])
    return {"start": float(values.mean()), "num_examples": task.num_examples, "tests": len(values)}


def make_table(folder: str, name: str) -> None:
    """Makes the runs that a table lacks, all rates and seeds of a size and a length together."""
    case, task = CASES[name], CASES[name].task()
    if not read(folder, name):
        append(folder, name, first_row(case, task))
    for size in reversed(case.batch_sizes):
        for part in PARTS:
            if case.num_steps(task.num_examples, size, part) < FEWEST:
                continue
            wanted = [dict(zip(RUN, (part, size, *row), strict=True)) for row in itertools.product(case.learning_rates, range(SEEDS))]
            lacking = list(missing(read(folder, name)[1:], wanted, RUN))
            if lacking:
                values = end_values(case, task, part, size, [(row["learning_rate"], row["seed"]) for row in lacking])
                append(folder, name, *(row | {"value": value} for row, value in zip(lacking, values, strict=True)))
        print(name, size, flush=True)


class Table:
    """Runs taken from a table, in place of training.

    A rate below the table's is as good as the lowest, by as much less as it is lower; one above has diverged.

    Args:
        name: of the case.
        rows: of the table, its first one included.
    """

    def __init__(self, name: str, rows: list[dict]):
        self.case, self.start, self.num_examples = CASES[name], rows[0]["start"], rows[0]["num_examples"]
        self.tests, self.ends = rows[0]["tests"], dict[tuple[int, float, int], list[float | None]]()
        for row in rows[1:]:
            steps = self.case.num_steps(self.num_examples, row["batch_size"], row["part"])
            self.ends.setdefault((row["batch_size"], row["learning_rate"], steps), []).append(row["value"])

    def run(self, batch_size: int, learning_rate: float, num_steps: int, seed: int) -> Iterator[Ending]:
        """One look, at the end of the run."""
        lowest, highest = self.case.learning_rates[0], self.case.learning_rates[-1]
        lengths = {steps for size, _, steps in self.ends if size == batch_size}
        steps = min(lengths, key=lambda other: abs(math.log(other / num_steps)))  # as long as asked for, but for rounding
        taken = min(max(learning_rate, lowest), highest)
        values = self.ends[batch_size, taken, steps]
        value = values[seed % len(values)]  # runs that follow each other differ
        if value is None or learning_rate > highest:
            yield Ending(batch_size, learning_rate, seed, num_steps, max(1, num_steps // 4), True, math.nan, ())
            return
        value = self.start + min(1.0, learning_rate / lowest) * (value - self.start)
        yield Ending(batch_size, learning_rate, seed, num_steps, num_steps, False, value, ((num_steps, value),))

    def mean(self, size: int, rate: float, part: float = 1.0) -> float:
        """What a setting ends with as a mean over the table's seeds, less is better; infinite where a run diverged."""
        values = self.ends.get((size, rate, self.case.num_steps(self.num_examples, size, part)), [None])
        return math.inf if None in values else self.case.sign * float(np.mean(values))

    def space(self, times: int, sizes: tuple[int, ...]) -> EndSpace:
        """The settings to choose from, where the runs that may be made are ``times`` shorter than the length."""
        steps, payable = ({size: self.case.num_steps(self.num_examples, size, part) for size in sizes} for part in (1.0, 1 / times))
        middle, scale = sizes[len(sizes) // 2], choose_scale(self.case.sign < 0, self.start, [], self.tests)
        return EndSpace(sizes, LEARNING_RATES, steps, payable, scale, self.start, float(steps[middle] * middle))

    def regret(self, size: int, rate: float) -> float:
        """How many times the data a setting needs to end where the table's best one does, on the curve of the best values by length.

        The curve goes on beyond the length as it fell before.
        """
        lengths = [part for part in sorted(PARTS) if any(self.mean(*cell, part) < math.inf for cell in self.cells)]
        best = np.minimum.accumulate([min(self.mean(*cell, part) for cell in self.cells) for part in lengths])
        value = self.mean(size, rate)
        return math.inf if value > best[0] else float(np.exp(-np.interp(-value, -best, np.log(lengths))))

    @property
    def cells(self) -> list[tuple[int, float]]:
        """All settings."""
        return list(itertools.product(self.case.batch_sizes, self.case.learning_rates))


def ask(table: Table, times: int, seed: int) -> dict:
    """How good the search's advice is for a length, or for a length that is ``times`` that of the longest run."""
    case = table.case
    sizes = tuple(size for size in case.batch_sizes if case.num_steps(table.num_examples, size, 1 / times) >= FEWEST)
    space = table.space(times, sizes)
    endings = search_endings(table, space, first_size=first_size(space.payable_steps), most=8.0 if times == 1 else 12.0, seed=1000 * seed)
    estimate = make_estimate(endings, space, final=True)
    size, rate = space.batch_sizes[estimate.best[0]], space.learning_rates[estimate.best[1]]
    best = min(table.cells, key=lambda cell: table.mean(*cell))
    drawn = np.array(sizes)[estimate.value.min(2).argmin(1)]
    low, high = np.quantile(drawn, [0.05, 0.95], method="closest_observation")
    largest, held = largest_within(estimate, space, None), None
    if largest is not None:
        values = [table.case.sign * value if value is not None else math.inf for value in table.ends[best[0], best[1], space.num_steps[best[0]]]]
        spread = 1.96 * float(np.std(values, ddof=1))
        held = table.mean(largest, space.learning_rates[int(estimate.rates[sizes.index(largest)])]) <= table.mean(*best) + spread
    record = {"advised": (size, rate), "best": best, "regret": table.regret(size, rate)}
    record |= {"holds_size": bool(min(low, size) <= best[0] <= max(high, size)), "largest": largest, "held": held}
    return record | {"cost": sum(cost_of(ending, space) for ending in endings) / times, "runs": len(endings)}


def usual(table: Table, times: int) -> dict[str, float]:
    """The regret of what was best at the short length, as it is and moved by published exponents."""
    case, best = table.case, min(table.cells, key=lambda cell: table.mean(*cell, 1 / times))
    near = lambda grid, value: min(grid, key=lambda other: abs(math.log(other / value)))
    move = lambda size, rate: table.regret(near(case.batch_sizes, best[0] * times**size), near(case.learning_rates, best[1] * times**rate))
    return {
        "short best": move(0, 0),
        "Step Law": move(0.571, 0.307),
        "Power Lines": move(0.383, 0),
        "slower": move(0, -0.15),
        "larger, slower": move(0.383, -0.15),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["table", "advise"])
    parser.add_argument("--output", default="tables")
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    jb.keep_compiled_programs()
    for name in options.cases:
        if options.stage == "table":
            make_table(options.output, name)
            continue
        table = Table(name, read(options.output, name))
        for times in (1, TIMES):
            for seed in range(options.seeds):
                print(f"{name}, {times} times the longest run: {ask(table, times, seed)}", flush=True)
        print(f"{name}, instead: {usual(table, TIMES)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
