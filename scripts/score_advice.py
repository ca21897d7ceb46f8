"""Scores jaxbatch.advise against full sweeps over batch sizes, learning rates and seeds, case by case.

    python scripts/score_advice.py sweep --output score      every case's sweep; hours on two cores
    python scripts/score_advice.py time --output score       the time of an update by batch size; nothing else may run
    python scripts/score_advice.py advise --output score     advice for every case, for time and for examples
    python scripts/score_advice.py judge --output score      advised, best and usual settings, all on new seeds
    python scripts/score_advice.py table --output score      the table of docs/advice.md

Each stage skips what it finds in the folder. The cases are in scripts/advice_cases.py.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from experiments.harness.environment import settle

if __name__ == "__main__":
    settle()

import advice_cases
import advice_promises
import jax
import numpy as np
from score_table import print_score

import jaxbatch as jb
from experiments.advise import records as advise_records
from experiments.advise.verify import JUDGING_SEEDS, regret
from experiments.harness.resuming import is_whole, missing
from jaxbatch.advice.advice import cost_of_update
from jaxbatch.advice.full_sweep import RUN, by_setting, mean_costs, run_sweep, sweep_size
from jaxbatch.advice.probes import even_looks
from jaxbatch.intervals import Interval

SEEDS, JUDGES = 3, 10
JUDGING = range(JUDGING_SEEDS, JUDGING_SEEDS + JUDGES)  # the seeds on which settings are judged
OBJECTIVES = ("time", "examples")
USUAL = ("largest", "32", "linear from 32", "noise scale")


class Folder:
    """The files of a case."""

    def __init__(self, folder: str, name: str):
        self.root, self.name, self.case = pathlib.Path(folder), name, advice_cases.CASES[name]

    def read(self, kind: str) -> list[dict]:
        """The rows of a kind."""
        path = self.root / f"{self.name}.{kind}.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def append(self, kind: str, row: dict) -> None:
        """Writes one row."""
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.root / f"{self.name}.{kind}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def unit(self, objective: str) -> dict[int, float]:
        """The cost of an update at any size that may come up."""
        throughput = advise_records.read_throughput(self.read("time"))
        return dict(cost_of_update(objective, throughput, [2**power for power in range(14)]))  # type: ignore[arg-type]


def sweep(folder: Folder) -> None:
    """Makes the sweep."""
    case, task = folder.case, folder.case.task()

    def write(row):
        folder.append("sweep", row)

    run_sweep(
        task,
        case.make_optimizer,
        jb.as_goal(case.goal),
        batch_sizes=[size for size in case.batch_sizes if size <= task.num_examples],
        learning_rates=case.learning_rates,
        seeds=SEEDS,
        longest=jb.epochs(case.max_epochs),
        evaluations_per_epoch=case.evaluations_per_epoch,
        known=folder.read("sweep"),
        write=write,
    )


def time_updates(folder: Folder) -> None:
    """Times an update at every second size."""
    task = folder.case.task()
    sizes = [2**power for power in range(1, 12, 2) if 2**power <= task.num_examples]
    throughput = jb.measure_throughput(task, folder.case.make_optimizer(0.001), sizes, rounds=9)
    row = advise_records.write_throughput(throughput)
    folder.append("time", {key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in row.items()})


def advise(folder: Folder) -> None:
    """Asks for advice for each objective."""
    case, task = folder.case, folder.case.task()
    throughput = advise_records.read_throughput(folder.read("time"))
    for objective in OBJECTIVES:
        if not any(row["objective"] == objective for row in folder.read("advice")):
            advice = jb.advise(
                task,
                case.goal,
                optimizer=case.make_optimizer,
                objective=objective,  # type: ignore[arg-type]
                longest=jb.epochs(case.max_epochs),
                evaluations_per_epoch=case.evaluations_per_epoch,
                throughput=throughput,
                measure_noise=False,  # it changes no choice
                seed=500,
            )
            probes = [probe._asdict() for probe in advice.probes]
            row = {"objective": objective, "batch_size": advice.batch_size, "learning_rate": advice.learning_rate, "doubts": advice.doubts}
            row |= {"seconds": advice.cost_seconds, "probes": probes, "close_sizes": advice.close_sizes, "candidates": advice.candidates}
            row |= {"critical_batch_size": list(advice.critical_batch_size), "regret": advice.expected_regret}
            if advice.batch_size is not None:
                row["promised"] = {name: getattr(advice.choice, name) for name in advice_promises.FIELDS}
            folder.append("advice", row)
            print(f"{folder.name}, {objective}: B = {advice.batch_size}, rate {advice.learning_rate}", flush=True)


def noise_scale(folder: Folder, task: jb.Task, rate: float) -> float:
    """The gradient noise scale along a run at batch size 32."""
    config = jb.FitConfig(folder.case.make_optimizer(rate), 32, jb.epochs(folder.case.max_epochs), evaluations_per_epoch=4)
    statistics, random = [], np.random.default_rng(0)
    measure = jax.jit(lambda params, batch: jb.gradient_statistics(task.loss_fn, params, batch))
    for record in jb.fit_to_target(task, config, folder.case.goal):
        index = random.integers(0, task.num_examples, 256)
        statistics.append(measure(record["state"].params, jax.tree.map(lambda leaf: leaf[index], task.train_data)))
    return float(jb.gradient_noise_scale(jax.tree.map(lambda *leaves: np.stack(leaves), *statistics)))


def usual_settings(folder: Folder, task: jb.Task) -> dict[str, tuple[int, float]]:
    """What people do instead. All but the linear rule get the best rate of the sweep at their size."""
    best: dict[int, tuple[float, float]] = {}
    for (size, rate), cost in mean_costs(folder.read("sweep"), folder.unit("examples")).items():
        best[size] = min(best.get(size, (np.inf, rate)), (cost, rate))
    settings = {"largest": (max(best), best[max(best)][1])}  # of the sizes that reach the goal at all
    if 32 in best:
        rate = best[32][1]
        settings |= {"32": (32, rate), "linear from 32": (256, 8 * rate)}
        scale = noise_scale(folder, task, rate)
        if scale > 0:
            nearest = min(best, key=lambda size: abs(np.log(size / scale)))
            settings["noise scale"] = (nearest, best[nearest][1])
    return settings


def judge(folder: Folder) -> None:
    """Runs the advised settings, the sweep's best and the usual ones on seeds that none has seen."""
    case, task = folder.case, folder.case.task()
    wanted = {}
    for row in folder.read("advice"):
        wanted[f"advised {row['objective']}"] = row["batch_size"], row["learning_rate"]
    for objective in OBJECTIVES:
        costs = mean_costs(folder.read("sweep"), folder.unit(objective))
        if costs:  # else the best setting of an earlier sweep is named already
            wanted[f"best {objective}"] = min(costs, key=costs.__getitem__)
    if folder.read("sweep") and not is_whole(folder.read("named"), name=USUAL):
        wanted |= usual_settings(folder, task)
    named = [{"name": name, "batch_size": setting[0], "learning_rate": setting[1]} for name, setting in wanted.items()]
    for row in missing(folder.read("named"), named, ["name"]):
        folder.append("named", row)
    for row in folder.read("named"):
        size, rate = row["batch_size"], row["learning_rate"]
        if size is not None and not is_whole_setting(folder.read("judged"), size, rate):
            looks = even_looks(max(1, task.num_examples // size), case.evaluations_per_epoch)  # as the runs of the advice look
            settings: dict[str, Any] = {"longest": jb.epochs(case.max_epochs), "evaluations_per_epoch": looks}
            judged = sweep_size(task, case.make_optimizer, jb.as_goal(case.goal), size, [rate], JUDGING, **settings)
            for fresh in missing(folder.read("judged"), judged, RUN):
                folder.append("judged", fresh)


def is_whole_setting(judged: list[dict], size: int, rate: float) -> bool:
    """Whether a setting was judged on all seeds."""
    return is_whole(judged, batch_size=[size], learning_rate=[rate], seed=JUDGING)


def table(folder: Folder) -> list[dict]:
    """One row for each objective."""
    named = {row["name"]: (row["batch_size"], row["learning_rate"]) for row in folder.read("named")}
    judged, rows = by_setting(folder.read("judged")), []
    spent = lambda runs, count, unit: sum(run[count] * unit[run["batch_size"]] for run in runs)
    for advice in folder.read("advice"):
        objective, unit = advice["objective"], folder.unit(advice["objective"])
        mine, best = named[f"advised {objective}"], named[f"best {objective}"]
        row = {"case": folder.name, "building": folder.case.building, "objective": objective, "advised": mine, "best": best}
        row["regret"] = Interval(np.inf, np.nan, np.nan, 0) if mine[0] is None else regret(judged[mine], judged[best], unit)
        one = np.mean([np.inf if run["updates"] is None else run["updates"] * unit[best[0]] for run in judged[best]])
        row["price"] = spent(advice["probes"], "updates", unit) / one or np.nan  # a run of the best setting that misses the goal has no cost
        row["share"] = spent(advice["probes"], "updates", unit) / (spent(folder.read("sweep"), "ran", unit) or np.nan)
        row["probes"] = len(advice["probes"])
        for name in USUAL:
            row[name] = regret(judged[named[name]], judged[best], unit).value if name in named else np.nan
        if "promised" in advice:  # rows of earlier versions lack it
            row["promise"] = advice_promises.compare(advice["promised"], judged[mine])
        rows.append(row)
    return rows


def is_judged(folder: Folder) -> bool:
    """Whether every named setting of a case has been judged."""
    judged, named = folder.read("judged"), folder.read("named")
    return bool(named) and all(row["batch_size"] is None or is_whole_setting(judged, row["batch_size"], row["learning_rate"]) for row in named)


STAGES = {"sweep": sweep, "time": time_updates, "advise": advise, "judge": judge}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "table"])
    parser.add_argument("--output", default="score")
    parser.add_argument("--cases", nargs="*", default=list(advice_cases.CASES))
    options = parser.parse_args()
    jb.keep_compiled_programs()
    folders = [Folder(options.output, name) for name in options.cases]
    if options.stage == "table":
        print_score([row for folder in folders if is_judged(folder) for row in table(folder)], USUAL)
    for folder in folders if options.stage != "table" else []:
        if options.stage != "time" or not folder.read("time"):
            STAGES[options.stage](folder)
            print(f"{folder.name}: {options.stage} done", flush=True)


if __name__ == "__main__":
    sys.exit(main())
