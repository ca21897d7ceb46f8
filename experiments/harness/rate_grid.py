"""The grid of learning rates at every batch size: its flags, its runs, and the rates that they choose."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from rich.console import Console

import jaxbatch as jb
from experiments.harness import in_flight
from experiments.harness.command_line import for_quick
from experiments.harness.optimizers import kind_of, quick_rates
from experiments.harness.schedules import ScheduleFlags, fill_schedule, make_for_length
from experiments.harness.study import check_positive
from experiments.harness.target import TargetConfig, num_updates, resolve_target
from jaxbatch.advice.critical import crossing
from jaxbatch.advice.learning_rates import RateResult
from jaxbatch.results.records import Record, RunFolder
from jaxbatch.results.report import progress_bar
from jaxbatch.training.goals import as_goal, metric_names
from jaxbatch.training.sweeps import start_states
from jaxbatch.training.tasks import Task


@dataclasses.dataclass(frozen=True)
class GridConfig(ScheduleFlags, TargetConfig):
    """Flags of the grid."""

    seeds: int = 3
    """Number of seeds; each has its own initial weights and its own order of examples."""
    learning_rates: tuple[float, ...] | None = None
    """Learning rates that are tried at every batch size. Default: two in each power of ten, over the powers that suit the optimizer; from
    0.001 to 1 for SGD, from 0.0001 to 0.1 for Adam."""
    evaluations_per_epoch: int = 2
    """Number of evaluations on the validation part in an epoch."""

    own_lengths = True


def resolve_grid(config: GridConfig, task: Task) -> GridConfig:
    """Fills in what depends on the data set, shrinks for --quick, and checks."""
    config = fill_schedule(resolve_target(for_quick(config, learning_rates=quick_rates(config), seeds=2), task))
    check_positive(config, "learning_rates")
    return dataclasses.replace(config, learning_rates=tuple(sorted(set(config.learning_rates or kind_of(config).rates))))


def file_of(run: RunFolder, batch_size: int) -> pathlib.Path:
    """The file that keeps the runs of a size until they have finished."""
    return run.path / f"in_flight_{batch_size}.msgpack"


def measure_size(task: Task, config: GridConfig, batch_size: int, run: RunFolder, progress) -> Iterator[dict]:
    """Trains all rates and seeds at one batch size; keeps in the run folder what is needed to continue."""
    shape = (len(config.learning_rates), config.seeds)
    updates = num_updates(config, task, batch_size)
    by_rate = make_for_length(config, updates)
    path, after = file_of(run, batch_size), None
    if path.exists():
        rates, seeds = np.repeat(np.float32(config.learning_rates), config.seeds), [*range(config.seeds)] * shape[0]
        start = start_states(task, by_rate, jnp.array(rates), seeds)
        state, rest = in_flight.from_bytes(start, path.read_bytes())
        after = {"state": state, **rest}
    records = jb.tune_learning_rate(
        task,
        by_rate,
        config.learning_rates,
        batch_size=batch_size,
        seeds=range(config.seeds),
        duration=jb.steps(updates),
        goal=config.target,
        evaluations_per_epoch=config.evaluations_per_epoch,
        after=after,
    )
    bar = progress.add_task(f"B = {batch_size}, {shape[0] * shape[1]} runs", rate="")
    before, names = after["batches"] if after else 0, metric_names(task)  # traces the task
    for record in records:
        for cell, (rate, seed) in zip(np.ndindex(shape), itertools.product(config.learning_rates, range(config.seeds)), strict=True):
            yield {
                "kind": "run",
                "batch_size": batch_size,
                "learning_rate": rate,
                "seed": seed,
                "updates": record["batches"],
                "epoch": record["epoch"],
                "loss": float(record["loss"][cell]),
                **{f"validation_{name}": float(record[f"test_{name}"][cell]) for name in names},
                "diverged_at_update": int(record["diverged_at_batch"][cell]),
            }
        rest = {key: record[key] for key in ("batches", "diverged_at_batch", "updates_to_goal")}
        run.write(path.name, in_flight.to_bytes(record["state"], **rest))
        fresh, before = record["batches"] - before, record["batches"]
        rate = fresh * batch_size * shape[0] * shape[1] / record["train_seconds"]
        progress.update(bar, completed=before, total=record["total_batches"], rate=f"{rate:,.0f} examples/s")
    run.append({"kind": "size", "batch_size": batch_size, "updates": before})
    path.unlink(missing_ok=True)
    progress.remove_task(bar)


def measure_grid(config: GridConfig, task: Task, run: RunFolder, console: Console) -> None:
    """Makes the measurements that are not in the run folder yet."""

    def identity(record):
        return tuple(record.get(key) for key in ("batch_size", "learning_rate", "seed", "updates"))

    known = {identity(record) for record in run.records}
    with progress_bar(console) as progress:
        for batch_size in sorted(config.batch_sizes, reverse=True):  # small sizes take longest
            if run.find(kind="size", batch_size=batch_size):
                file_of(run, batch_size).unlink(missing_ok=True)  # left by a kill right after the last record
                continue
            for record in measure_size(task, config, batch_size, run, progress):
                if identity(record) not in known:
                    run.append(record)


def results(config, records: Sequence[Record]) -> dict[int, RateResult]:
    """The results of each batch size; sizes whose runs have not all finished are left out. Goals are met in the middle between two looks."""
    finished = {record["batch_size"] for record in records if record["kind"] == "size"}
    curves: dict[tuple, list[Record]] = {}
    for record in records:
        if record["kind"] == "run" and record["batch_size"] in finished:
            key = (record["batch_size"], record["learning_rate"], record["seed"])
            curves.setdefault(key, []).append(record)
    rate_results, goal = {}, as_goal(config.target)
    name, shape = f"validation_{goal.metric}", (len(config.learning_rates), config.seeds)
    for size in sorted(finished):
        to_goal, metric, diverged = np.full(shape, np.nan), np.full(shape, np.nan), np.zeros(shape, bool)
        for cell in np.ndindex(shape):
            rows = sorted(curves[size, config.learning_rates[cell[0]], cell[1]], key=lambda row: row["updates"])
            looks = [0, *(row["updates"] for row in rows)]
            is_hit = [row["diverged_at_update"] < 0 and row[name] is not None and goal.reached(row[name]) for row in rows]
            to_goal[cell] = crossing(*looks[is_hit.index(True) :][:2]) if any(is_hit) else np.nan
            diverged[cell] = rows[-1]["diverged_at_update"] >= 0
            metric[cell] = np.nan if diverged[cell] or rows[-1][name] is None else rows[-1][name]
        rate_results[size] = RateResult(goal, tuple(config.learning_rates), to_goal, metric, diverged)
    return rate_results


def best_rates(config, records: Sequence[Record]) -> dict[int, float]:
    """Maps batch size to its best rate; sizes at which every run diverged are left out."""
    chosen = {size: result.best_rate for size, result in results(config, records).items()}
    return {size: rate for size, rate in chosen.items() if rate is not None}
