"""Scores jaxbatch.advise against full sweeps: batch sizes, learning rates and seeds, case by case.

python scripts/score_advice.py sweep --output score     every case's sweep; hours of two cores
"""

import argparse
import json
import pathlib
import sys

import advice_cases
import jax.numpy as jnp
import numpy as np

import jaxbatch as jb

SEEDS = 3


def append(path: pathlib.Path, row: dict) -> None:
    """Writes one row at the end of a file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(path: pathlib.Path) -> list[dict]:
    """The rows of a file; none if it does not exist."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def sweep_size(case: advice_cases.Case, task: jb.Task, batch_size: int, pairs: list[tuple[float, int]], most_examples: float) -> list[dict]:
    """Trains all pairs of rate and seed at one batch size, until the rates that are left cannot be better than the best.

    A careful person gives up a size that has seen ``most_examples``, too. So the sweep costs less than it might, and advice
    that costs a tenth of it has less to spend.
    """
    goal, updates = jb.as_goal(case.goal), np.full(len(pairs), np.nan)
    rates = np.array([rate for rate, _ in pairs])
    records = jb.sweep(
        task,
        case.make_optimizer,
        jnp.asarray(rates),
        [seed for _, seed in pairs],
        batch_size=batch_size,
        duration=jb.epochs(case.max_epochs),
        evaluations_per_epoch=case.evaluations_per_epoch,
    )
    ran = np.zeros(len(pairs), int)
    for record in records:
        alive = np.isnan(updates) & (record["diverged_at_batch"] < 0)
        ran = np.where(alive, record["batches"], ran)  # what a user would run: no run goes on past the goal
        values = record[f"test_{goal.metric}"]
        reached = np.array([goal.reached(float(value)) for value in values]) & alive
        updates = np.where(reached, record["batches"], updates)
        complete = [updates[rates == rate].max() for rate in set(rates) if np.isfinite(updates[rates == rate]).all()]
        none_left = not (np.isnan(updates) & (record["diverged_at_batch"] < 0)).any()
        if none_left or record["examples"] >= most_examples or (complete and record["batches"] >= 1.5 * min(complete)):
            break
    rows = []
    for index, (rate, seed) in enumerate(pairs):
        to_goal = None if np.isnan(updates[index]) else int(updates[index])
        rows.append({"batch_size": batch_size, "learning_rate": rate, "seed": seed, "updates": to_goal, "ran": int(ran[index])})
    return rows


def by_setting(rows: list[dict]) -> dict[tuple[int, float], list[dict]]:
    """The rows of each batch size and learning rate."""
    found: dict[tuple[int, float], list[dict]] = {}
    for row in rows:
        found.setdefault((row["batch_size"], row["learning_rate"]), []).append(row)
    return found


def fewest_examples(rows: list[dict]) -> float:
    """The fewest examples to the goal of a setting whose seeds all reach it; infinite if none does."""
    complete = [of for of in by_setting(rows).values() if all(row["updates"] is not None for row in of)]
    return min((np.mean([row["updates"] * row["batch_size"] for row in of]) for of in complete), default=np.inf)


def run_sweeps(names: list[str], folder: pathlib.Path) -> None:
    """Makes the sweeps that are not in the folder yet."""
    for name in names:
        case = advice_cases.CASES[name]
        path, task = folder / f"{name}.sweep.jsonl", case.task()
        for size in sorted(case.batch_sizes, key=lambda size: abs(np.log(size / 48))):  # from the middle outwards
            known = read(path)
            if size <= task.num_examples and size not in {row["batch_size"] for row in known}:
                pairs = [(rate, seed) for rate in case.learning_rates for seed in range(SEEDS)]
                for row in sweep_size(case, task, size, pairs, 4 * fewest_examples(known)):
                    append(path, row)
                print(f"{name}: B = {size} done", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["sweep"])
    parser.add_argument("--output", default="score")
    parser.add_argument("--cases", nargs="*", default=list(advice_cases.CASES))
    options = parser.parse_args()
    folder = pathlib.Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    jb.keep_compiled_programs()
    run_sweeps(options.cases, folder)


if __name__ == "__main__":
    sys.exit(main())
