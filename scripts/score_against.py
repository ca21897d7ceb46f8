"""jaxbatch.advise_within against general tuners, on the same runs of the cases that it is scored on: regret as a function of what was spent.

    python scripts/score_against.py table --output against                       the runs of every setting; hours on two cores
    python scripts/score_against.py tune --output against                        every tuner from ten seeds, on the tables
    python scripts/score_against.py show --output against --score docs/measured/within    the answer; seconds

The tuners are those of Optuna (pip install -e '.[bench]'), see scripts/against_peers.py. Regret is told in data, as on docs/within_score.md.
"""

import argparse
import gzip
import json
import math
import pathlib
import sys
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from experiments.harness.environment import settle

if __name__ == "__main__":
    settle()

import numpy as np
from against_peers import PEERS
from against_tables import Table, file_of, make_table
from within_building import read
from within_cases import CASES
from within_curve import Regrets, group_ends, ratio

import jaxbatch as jb
from jaxbatch.advice.end_estimate import make_estimate
from jaxbatch.advice.end_request import first_size
from jaxbatch.advice.end_search import cost_of, search_endings

SEEDS, MOST, OURS = 10, 64.0, "jaxbatch"
BUDGETS = (2.0, 4.0, 8.0, 16.0)  # of ours, in whole runs


def answers_of_ours(table: Table, seed: int, budget: float) -> dict:
    """What the search of jaxbatch.advise_within answers for a budget."""
    space = table.space()
    endings = search_endings(table, space, first_size=first_size(space.payable_steps), most=budget, seed=1000 * seed)
    estimate = make_estimate(endings, space, final=True)
    size, rate = space.batch_sizes[estimate.best[0]], space.learning_rates[estimate.best[1]]
    return {"spent": sum(cost_of(ending, space) for ending in endings), "batch_size": size, "learning_rate": rate}


def tune(folder: str, name: str) -> None:
    """Lets every tuner choose its runs from a table."""
    table, path = Table(name, read(folder, file_of(name))), pathlib.Path(folder) / f"{name}.tuned.jsonl"
    done = {(row["tuner"], row["seed"], row["budget"]) for row in read_rows(path)}
    for seed in range(SEEDS):
        for budget in BUDGETS:
            if (OURS, seed, budget) not in done:
                write_row(path, {"tuner": OURS, "seed": seed, "budget": budget, "answers": [answers_of_ours(table, seed, budget)]})
        for peer, tuner in PEERS.items():
            if (peer, seed, MOST) not in done:
                answers = [answer._asdict() for answer in tuner(table, 100 * seed, MOST)]
                changes = [one for one, before in zip(answers, [None, *answers], strict=False) if before is None or changed(one, before)]
                write_row(path, {"tuner": peer, "seed": seed, "budget": MOST, "answers": changes})
    print(f"{name}: tuned", flush=True)


def changed(one: dict, before: dict) -> bool:
    """Whether two answers name different settings."""
    return (one["batch_size"], one["learning_rate"]) != (before["batch_size"], before["learning_rate"])


def read_rows(path: pathlib.Path) -> list[dict]:
    """The rows of a file of JSON lines, compressed or not; none if there is no such file."""
    if path.exists():
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    packed = path.with_name(path.name + ".gz")
    return [json.loads(line) for line in gzip.decompress(packed.read_bytes()).decode().splitlines()] if packed.exists() else []


def write_row(path: pathlib.Path, row: dict) -> None:
    """Appends a row."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


class Judge:
    """The regret, in data, of settings of a case.

    Args:
        score: the folder of scripts/score_within.py, which holds the curve of the case's best setting and its judged runs.
        folder: that of the tables.
        name: of the case.
    """

    def __init__(self, score: str, folder: str, name: str):
        case, rows = CASES[name], {kind: read_rows(pathlib.Path(score) / f"{name}.{kind}.jsonl") for kind in ("sweep", "curve", "judged")}
        self.table = Table(name, read(folder, file_of(name)))
        ends = {cell: self.table.mean(*cell) for cell in [(size, rate) for size in case.batch_sizes for rate in case.learning_rates]}
        self.best = min(ends, key=ends.__getitem__)
        judged = [row["value"] for row in rows["judged"] if (row["batch_size"], row["learning_rate"]) == self.best]
        best = [case.sign * value for value in judged] or [self.table.mean(*self.best)]
        self.curve = Regrets(group_ends(rows["curve"], case.sign), best).curve
        self.at_whole = float(np.mean(best))

    def regret(self, answer: dict) -> float:
        """Of a setting, by the mean of the table's runs; below 1 where these were luckier than the judged runs of the best."""
        value = self.table.mean(answer["batch_size"], answer["learning_rate"])
        return ratio(self.curve, value, self.at_whole) if math.isfinite(value) else math.inf


def regret_at(judge: Judge, answers: Sequence[dict], spent: float) -> float:
    """The regret of the last answer within what was spent; infinite before the first."""
    within = [answer for answer in answers if answer["spent"] <= spent + 0.5]
    return judge.regret(within[-1]) if within else math.inf


def show(folder: str, score: str, names: Sequence[str]) -> None:
    """Regret by what was spent, as a median over cases and seeds, and how much more the best peer spends to be as good as ours."""
    judges = {name: Judge(score, folder, name) for name in names}
    rows = {name: read_rows(pathlib.Path(folder) / f"{name}.tuned.jsonl") for name in names}
    print("| tuner | " + " | ".join(f"{budget:g} runs" for budget in (*BUDGETS, 32.0, MOST)) + " |\n|---|" + "---|" * (len(BUDGETS) + 2))
    table = {}
    for tuner in (OURS, *PEERS):
        for budget in (*BUDGETS, 32.0, MOST):
            mine = {name: [row for row in rows[name] if row["tuner"] == tuner and (tuner != OURS or row["budget"] == budget)] for name in names}
            table[tuner, budget] = {name: [regret_at(judges[name], row["answers"], budget) for row in of] for name, of in mine.items()}
        cells = [[one for of in table[tuner, budget].values() for one in of] for budget in (*BUDGETS, 32.0, MOST)]
        print(f"| {tuner} | " + " | ".join(f"{np.median(cell):.2f}, {np.quantile(cell, 0.9):.2f}" if cell else "" for cell in cells) + " |")
    for budget in BUDGETS[1:]:
        factors = [factor_of(judges[name], rows[name], budget) for name in names]
        print(f"- the best peer reaches the median regret of ours at {budget:g} runs with {np.median(factors):.1f} times as much (median over cases)")
        print("  " + ", ".join(f"{name} {factor:.1f}" for name, factor in zip(names, factors, strict=True)))


def factor_of(judge: Judge, rows: Sequence[dict], budget: float) -> float:
    """What the peer that is soonest as good spends, as a multiple of ours; infinite if none is within its budget."""
    ours = float(np.median([judge.regret(row["answers"][0]) for row in rows if row["tuner"] == OURS and row["budget"] == budget]))
    spent = float(np.median([row["answers"][0]["spent"] for row in rows if row["tuner"] == OURS and row["budget"] == budget]))
    costs = np.arange(1.0, MOST + 1)
    reached = []
    for peer in PEERS:
        answers = [row["answers"] for row in rows if row["tuner"] == peer]
        medians = [float(np.median([regret_at(judge, one, cost) for one in answers])) for cost in costs]
        reached.append(next((cost for cost, median in zip(costs, medians, strict=True) if median <= ours), math.inf))
    return min(reached) / spent


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["table", "tune", "show"])
    parser.add_argument("--output", default="against")
    parser.add_argument("--score", default="docs/measured/within")
    parser.add_argument("--cases", nargs="*", default=[name for name, case in CASES.items() if not case.building])
    options = parser.parse_args()
    if options.stage == "show":
        show(options.output, options.score, [name for name in options.cases if (pathlib.Path(options.output) / f"{name}.tuned.jsonl").exists()])
        return
    jb.keep_compiled_programs()
    for name in options.cases:
        (make_table if options.stage == "table" else tune)(options.output, name)


if __name__ == "__main__":
    sys.exit(main())
