"""The full sweep over batch sizes, learning rates and seeds, and what advice costs against its best.

The sweep chooses its best setting by its own seeds; then both settings are judged on other seeds, so that neither gains from
the luck of the runs that chose it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

import jaxbatch as jb
from experiments.advise.records import read_advice, read_throughput
from experiments.harness.optimizers import kind_of
from experiments.harness.resuming import append_missing, is_whole
from jaxbatch.advice.advice import Advice, cost_of_update
from jaxbatch.advice.full_sweep import RUN, by_setting, mean_costs, run_sweep, sweep_size
from jaxbatch.intervals import Interval, interval
from jaxbatch.results.records import Record, RunFolder
from jaxbatch.results.report import progress_bar
from jaxbatch.separate_groups import ratio_of_separate_means

JUDGING_SEEDS = 1000  # added to the seeds on which settings are judged
SIZES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)


def verify(config, task: jb.Task, make_optimizer: Callable[[Any], Any], advice: Advice, run: RunFolder, console: Console) -> None:
    """Makes the sweep and the judging runs that are not in the run folder yet."""
    sizes = [size for size in SIZES if size <= task.num_examples] if config.batch_sizes is None else config.batch_sizes
    rates = config.learning_rates or kind_of(config).rates
    common: dict[str, Any] = {"longest": jb.epochs(config.epochs), "evaluations_per_epoch": config.evaluations_per_epoch}
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
