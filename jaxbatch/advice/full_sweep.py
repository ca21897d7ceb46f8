"""The full sweep over batch sizes, learning rates and seeds, which advice is to spare: how it is made, and what it says.

A row of a sweep is one run: ``batch_size``, ``learning_rate``, ``seed``, the ``updates`` at the look that showed the goal (None: not reached),
``more_than`` at the last look without it, and those that it ``ran``. Rows of an older sweep lack ``more_than``.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxbatch.advice.critical import crossing
from jaxbatch.advice.learning_rates import tune_learning_rate
from jaxbatch.batches import Duration
from jaxbatch.results.records import Record
from jaxbatch.training.goals import Goal
from jaxbatch.training.tasks import Task

RUN = ("batch_size", "learning_rate", "seed")  # what identifies a row


def sweep_size(
    task: Task,
    make_optimizer: Callable[..., Any],
    goal: Goal,
    batch_size: int,
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    *,
    longest: Duration,
    evaluations_per_epoch: int,
    most_examples: float = np.inf,
) -> list[Record]:
    """Trains all rates and seeds at one batch size, until the rates that are left cannot be better than the best.

    A careful person gives up a size that has seen ``most_examples``, too. So the sweep costs less than it might, and advice
    that is to cost a tenth of it has less to spend.

    Args:
        task: what is learned; the goal is judged on its ``test_data``.
        make_optimizer: learning rate -> optimizer, or (learning rate, updates of the longest run) -> optimizer.
        goal: the metric to reach.
        batch_size: of all runs.
        learning_rates: those that are tried.
        seeds: those of each rate.
        longest: the length of a run that does not reach the goal.
        evaluations_per_epoch: how often the goal is looked for.
        most_examples: of a run, after which no longer one is made.

    Returns:
        A row for each rate and seed, with the updates at the look that showed the goal (None: not reached), those at the look before, and
        those that were made until the goal, divergence, or the end.

    Raises:
        ValueError: what :func:`jaxbatch.tune_learning_rate` refuses.
    """
    limits: dict[str, Any] = {"duration": longest, "evaluations_per_epoch": evaluations_per_epoch, "goal": goal}
    looks = [0]
    for record in tune_learning_rate(task, make_optimizer, learning_rates, batch_size=batch_size, seeds=seeds, **limits):
        result = record["result"]
        looks.append(record["batches"])
        slowest = result.updates_to_goal.max(1)  # NaN where a seed has not reached the goal
        none_left = not (np.isnan(result.updates_to_goal) & ~result.diverged).any()
        if none_left or record["examples"] >= most_examples or record["batches"] >= 1.5 * np.fmin.reduce(slowest):
            break
    rows = []
    for position, (rate, seed) in zip(np.ndindex(result.diverged.shape), itertools.product(result.learning_rates, seeds), strict=True):
        updates, lost = result.updates_to_goal[position], record["diverged_at_batch"][position]
        ran = record["batches"] if lost < 0 else lost + 1
        known = None if np.isnan(updates) else int(updates)
        more_than = int(ran) if known is None else looks[looks.index(known) - 1]
        of_run = {"batch_size": batch_size, "learning_rate": rate, "seed": int(seed)}
        rows.append(of_run | {"updates": known, "more_than": more_than, "ran": known or int(ran)})
    return rows


def by_setting(rows: Sequence[Record]) -> dict[tuple[int, float], list[Record]]:
    """The rows of each batch size and learning rate.

    Args:
        rows: of a sweep.

    Example:
        >>> rows = [{"batch_size": 8, "learning_rate": 0.1, "seed": seed} for seed in range(2)]
        >>> list(by_setting(rows)), len(by_setting(rows)[8, 0.1])
        ([(8, 0.1)], 2)
    """
    rows_by_setting: dict[tuple[int, float], list[Record]] = {}
    for row in rows:
        rows_by_setting.setdefault((row["batch_size"], row["learning_rate"]), []).append(row)
    return rows_by_setting


def mean_costs(rows: Sequence[Record], unit: Mapping[int, float]) -> dict[tuple[int, float], float]:
    """The mean cost to the goal of every setting whose seeds all reach it.

    Args:
        rows: of a sweep.
        unit: the cost of an update, by batch size.

    Example:
        >>> rows = [{"batch_size": 8, "learning_rate": 0.1, "updates": updates} for updates in (10, 20)]
        >>> mean_costs(rows, {8: 2.0}), mean_costs([*rows, rows[0] | {"updates": None}], {8: 2.0})
        ({(8, 0.1): 30.0}, {})
    """
    return {
        setting: float(np.mean([row["updates"] * unit[setting[0]] for row in of]))
        for setting, of in by_setting(rows).items()
        if all(row["updates"] is not None for row in of)
    }


def fewest_examples(rows: Sequence[Record]) -> float:
    """The fewest examples to the goal of a setting whose seeds all reach it; infinite if none does.

    Args:
        rows: of a sweep.

    Example:
        >>> fewest_examples([{"batch_size": 8, "learning_rate": 0.1, "updates": 10}]), fewest_examples([])
        (80.0, inf)
    """
    return min(mean_costs(rows, {row["batch_size"]: row["batch_size"] for row in rows}).values(), default=np.inf)


def reached_at(row: Record) -> float:
    """The update at which the run of a row met the goal, see :func:`jaxbatch.advice.critical.crossing`; of an old row, the look that showed it.

    Args:
        row: of a run that reached the goal.

    Example:
        >>> reached_at({"updates": 40, "more_than": 30}), reached_at({"updates": 40})
        (35.5, 40.0)
    """
    return crossing(row.get("more_than", row["updates"] - 1), row["updates"])


def best_rates(rows: Sequence[Record]) -> dict[int, tuple[float, list[float]]]:
    """By batch size, the rate with the fewest updates of those whose seeds all reach the goal, and when they did (:func:`reached_at`).

    Args:
        rows: of a sweep.

    Example:
        >>> rows = [{"batch_size": 8, "learning_rate": rate, "updates": updates} for rate, updates in ((0.1, 20), (0.3, 10), (1.0, None))]
        >>> best_rates(rows)
        {8: (0.3, [10.0])}
    """
    best: dict[int, tuple[float, list[float]]] = {}
    for (size, rate), of in by_setting(rows).items():
        if any(row["updates"] is None for row in of):
            continue
        updates = [reached_at(row) for row in of]
        if size not in best or sum(updates) < sum(best[size][1]):
            best[size] = rate, updates
    return best


def run_sweep(
    task: Task,
    make_optimizer: Callable[..., Any],
    goal: Goal,
    *,
    batch_sizes: Sequence[int],
    learning_rates: Sequence[float],
    seeds: int,
    longest: Duration,
    evaluations_per_epoch: int,
    known: Sequence[Record],
    write: Callable[[Record], None],
) -> None:
    """Makes the runs that are not known, size by size from the middle outwards.

    A size of which some runs are known is trained again whole, because its runs end together, and only the others are written.

    Args:
        task: see :func:`sweep_size`, as for ``make_optimizer``, ``goal``, ``learning_rates``, ``longest`` and ``evaluations_per_epoch``.
        make_optimizer: learning rate -> optimizer, or (learning rate, updates of the longest run) -> optimizer.
        goal: the metric to reach.
        batch_sizes: those that are tried.
        learning_rates: those that are tried at each.
        seeds: the number of seeds of each rate.
        longest: the length of a run that does not reach the goal.
        evaluations_per_epoch: how often the goal is looked for.
        known: the rows that there are.
        write: gets each new row.
    """
    by_size = {size: {identity(row): row for row in known if row["batch_size"] == size} for size in batch_sizes}
    wanted = {size: {(size, rate, seed) for rate, seed in itertools.product(learning_rates, range(seeds))} for size in batch_sizes}
    whole = {size for size, of in by_size.items() if wanted[size] <= of.keys()}
    rows = [row for row in known if row["batch_size"] in whole]
    for size in sorted(set(batch_sizes) - whole, key=lambda size: abs(np.log(size / 48))):
        settings: dict[str, Any] = {"longest": longest, "evaluations_per_epoch": evaluations_per_epoch}
        most = 4 * fewest_examples(rows)
        fresh = sweep_size(task, make_optimizer, goal, size, learning_rates, range(seeds), most_examples=most, **settings)
        for row in fresh:
            if identity(row) not in by_size[size]:
                write(row)
        rows += fresh


def identity(row: Record) -> tuple[int, float, int]:
    """What identifies a row of a sweep.

    Args:
        row: of a sweep.

    Example:
        >>> identity({"batch_size": 8, "learning_rate": 0.1, "seed": 0, "updates": 20})
        (8, 0.1, 0)
    """
    return row["batch_size"], row["learning_rate"], row["seed"]
