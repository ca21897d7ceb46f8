"""The full sweep over batch sizes, learning rates and seeds, and what advice costs against its best.

The sweep chooses its best setting by its own seeds; then both settings are judged on other seeds, so that neither gains from
the luck of the runs that chose it.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

import jaxbatch as jb
from experiments.advise.records import read_advice, read_throughput
from experiments.harness.optimizers import kind_of
from experiments.harness.resuming import append_missing, is_whole, missing
from jaxbatch.advice.advice import Advice, cost_of_update
from jaxbatch.intervals import Interval, interval
from jaxbatch.results.records import Record, RunFolder
from jaxbatch.results.report import progress_bar
from jaxbatch.separate_groups import ratio_of_separate_means

JUDGING_SEEDS = 1000  # added to the seeds on which settings are judged
RUN = ("batch_size", "learning_rate", "seed")  # what identifies one
SIZES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)


def sweep_size(
    task: jb.Task,
    make_optimizer: Callable[[Any], Any],
    goal: jb.Goal,
    batch_size: int,
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    *,
    epochs: float,
    evaluations_per_epoch: int,
    most_examples: float = np.inf,
) -> list[Record]:
    """Trains all rates and seeds at one batch size, until the rates that are left cannot be better than the best.

    A careful person gives up a size that has seen ``most_examples``, too. So the sweep costs less than it might, and advice
    that is to cost a tenth of it has less to spend.

    Returns:
        A row for each rate and seed, with the updates to the goal (None: not reached) and those that were made until the goal,
        divergence, or the end.
    """
    limits: dict[str, Any] = {"duration": jb.epochs(epochs), "evaluations_per_epoch": evaluations_per_epoch, "goal": goal}
    for record in jb.tune_learning_rate(task, make_optimizer, learning_rates, batch_size=batch_size, seeds=seeds, **limits):
        result = record["result"]
        slowest = result.updates_to_goal.max(1)  # NaN where a seed has not reached the goal
        none_left = not (np.isnan(result.updates_to_goal) & ~result.diverged).any()
        if none_left or record["examples"] >= most_examples or record["batches"] >= 1.5 * np.fmin.reduce(slowest):
            break
    rows = []
    for position, (rate, seed) in zip(np.ndindex(result.diverged.shape), itertools.product(result.learning_rates, seeds), strict=True):
        updates, lost = result.updates_to_goal[position], record["diverged_at_batch"][position]
        ran = record["batches"] if lost < 0 else lost + 1
        known = None if np.isnan(updates) else int(updates)
        rows.append({"batch_size": batch_size, "learning_rate": rate, "seed": int(seed), "updates": known, "ran": known or int(ran)})
    return rows


def by_setting(rows: Sequence[Record]) -> dict[tuple[int, float], list[Record]]:
    """The rows of each batch size and learning rate."""
    rows_by_setting: dict[tuple[int, float], list[Record]] = {}
    for row in rows:
        rows_by_setting.setdefault((row["batch_size"], row["learning_rate"]), []).append(row)
    return rows_by_setting


def mean_costs(rows: Sequence[Record], unit: Mapping[int, float]) -> dict[tuple[int, float], float]:
    """The mean cost to the goal of every setting whose seeds all reach it."""
    return {
        setting: float(np.mean([row["updates"] * unit[setting[0]] for row in of]))
        for setting, of in by_setting(rows).items()
        if all(row["updates"] is not None for row in of)
    }


def fewest_examples(rows: Sequence[Record]) -> float:
    """The fewest examples to the goal of a setting whose seeds all reach it; infinite if none does."""
    return min(mean_costs(rows, {row["batch_size"]: row["batch_size"] for row in rows}).values(), default=np.inf)


def run_sweep(
    task: jb.Task,
    make_optimizer: Callable[[Any], Any],
    goal: jb.Goal,
    *,
    batch_sizes: Sequence[int],
    learning_rates: Sequence[float],
    seeds: int,
    epochs: float,
    evaluations_per_epoch: int,
    known: Sequence[Record],
    write: Callable[[Record], None],
) -> None:
    """Makes the runs that are not known, size by size from the middle outwards.

    A size of which some runs are known is trained again whole, because its runs end together, and only the others are written.
    """
    by_size = {size: [row for row in known if row["batch_size"] == size] for size in batch_sizes}
    whole = {size for size, of in by_size.items() if is_whole(of, learning_rate=learning_rates, seed=range(seeds))}
    rows = [row for size in whole for row in by_size[size]]
    for size in sorted(set(batch_sizes) - whole, key=lambda size: abs(np.log(size / 48))):
        settings: dict[str, Any] = {"epochs": epochs, "evaluations_per_epoch": evaluations_per_epoch}
        most = 4 * fewest_examples(rows)
        fresh = sweep_size(task, make_optimizer, goal, size, learning_rates, range(seeds), most_examples=most, **settings)
        for row in missing(by_size[size], fresh, RUN):
            write(row)
        rows += fresh


def verify(config, task: jb.Task, make_optimizer: Callable[[Any], Any], advice: Advice, run: RunFolder, console: Console) -> None:
    """Makes the sweep and the judging runs that are not in the run folder yet."""
    sizes = [size for size in SIZES if size <= task.num_examples] if config.batch_sizes is None else config.batch_sizes
    rates = config.learning_rates or kind_of(config).rates
    common: dict[str, Any] = {"epochs": config.epochs, "evaluations_per_epoch": config.evaluations_per_epoch}
    with progress_bar(console) as progress:
        bar = progress.add_task("sweep", total=len(sizes) * len(rates) * config.seeds, completed=len(run.find(kind="sweep")), rate="")

        def write(row):
            run.append({"kind": "sweep", **row})
            progress.update(bar, advance=1)

        settings: dict[str, Any] = {"batch_sizes": sizes, "learning_rates": rates, "seeds": config.seeds, **common}
        run_sweep(task, make_optimizer, advice.goal, known=run.find(kind="sweep"), write=write, **settings)
        unit = cost_of_update(config.objective, advice.throughput, sizes)
        costs = mean_costs(run.find(kind="sweep"), unit)
        for size, rate in dict.fromkeys([(advice.batch_size, advice.learning_rate), *([min(costs, key=costs.__getitem__)] if costs else [])]):
            seeds = range(JUDGING_SEEDS, JUDGING_SEEDS + config.seeds)
            if not is_whole(run.find(kind="judged", batch_size=size, learning_rate=rate), seed=seeds):
                judged = sweep_size(task, make_optimizer, advice.goal, size, [rate], seeds, **common)
                append_missing(run, [{"kind": "judged", **row} for row in judged], ("kind", *RUN))


class Verification(NamedTuple):
    """The sweep's best setting and the advised one, judged on other seeds."""

    rows: list[tuple[str, int, float, Interval, Interval]]  # name, size, rate, updates, regret
    sentence: str


def regret(advised: Sequence[Record], best: Sequence[Record], unit: Mapping[int, float]) -> Interval:
    """The cost of the advised setting ÷ that of the sweep's best, with its interval over seeds; infinite where a run misses the goal."""
    costs = [[np.inf if row["updates"] is None else row["updates"] * unit[row["batch_size"]] for row in rows] for rows in (advised, best)]
    if not np.isfinite(costs).all():
        value = np.inf if np.isfinite(costs[1]).all() else np.nan
        return Interval(value, np.nan, np.nan, len(costs[0]))
    return ratio_of_separate_means(*costs)


def read_verification(config, records: Sequence[Record]) -> Verification | None:
    """What the sweep says of the advice; None without --verify."""
    rows, judged = ([record for record in records if record["kind"] == kind] for kind in ("sweep", "judged"))
    if not judged:
        return None
    advice, throughput = read_advice(records), read_throughput(records)
    sizes = {row["batch_size"] for row in (*rows, *judged)}
    unit = cost_of_update(config.objective, throughput, sorted(sizes))
    costs, of = mean_costs(rows, unit), by_setting(judged)
    if not costs or advice.batch_size is None or advice.learning_rate is None:
        return Verification([], "No setting of the sweep reached the goal with every seed, so there is nothing to compare with.")
    best, mine = min(costs, key=costs.__getitem__), (advice.batch_size, advice.learning_rate)
    known = lambda setting: interval([row["updates"] for row in of[setting]], scale="log")
    cost_ratio = regret(of[mine], of[best], unit)
    one = Interval(1.0, np.nan, np.nan, 1)
    seconds = sum(row["ran"] * throughput.seconds_at(row["batch_size"]) for row in rows)
    share = advice.cost_seconds / seconds
    sentence = (
        f"The advised setting costs {cost_ratio:.2f} times as much as the sweep's best (B = {best[0]}, rate {best[1]:g}), judged on {config.seeds} "
        f"other seeds; the advice took {100 * share:.2g}% of the sweep's training time."
    )
    return Verification([("advised", *mine, known(mine), cost_ratio), ("sweep's best", *best, known(best), one)], sentence)
