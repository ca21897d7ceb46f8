"""Trains an arm of the huge-batch study: all rates and seeds in one compiled program, size after size where the batch grows."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import jaxbatch as jb
from experiments.large_batch.arms import batch_sizes, find_arm, make_optimizer, num_epochs, num_updates, task_of
from jaxbatch.results.records import Record
from jaxbatch.training.evaluation import make_task_evaluate, metrics_argument
from jaxbatch.training.goals import metric_names
from jaxbatch.training.train_state import TrainState


class Trained(NamedTuple):
    """R runs at their end."""

    records: list[Record]  # one for each run
    state: TrainState  # leaves (R, ...)


def train(task: jb.Task, config, name: str, rates: Sequence[float], seeds: Sequence[int]) -> Trained:
    """Trains an arm with R rates and R seeds side by side.

    Args:
        task: its test data are the validation part; every batch size of the arm divides its number of examples.
        config: of the study.
        name: the arm's.
        rates, seeds: of each run.

    Returns:
        Records with the metrics on the validation part and ``seconds``, the training time of all runs on all cores ÷ R.
    """
    arm = find_arm(name)
    sizes, epochs, total = batch_sizes(config, arm), num_epochs(config, arm), task.num_examples
    ends = [*list(sizes)[1:], epochs]
    after: dict[str, Any] | None = None
    seconds = 0.0
    for (start, size), end in zip(sizes.items(), ends, strict=True):
        if after is not None:
            after["batches"] = start * (total // size)  # as if the run had had this size from the start
        for record in jb.sweep(
            task_of(config, arm, task),
            make_optimizer(config, arm, total),
            jnp.asarray(rates, jnp.float32),
            seeds,
            batch_size=size,
            duration=jb.epochs(end),
            num_groups=config.num_groups if arm.split else None,
            after=after,
        ):
            seconds += record["train_seconds"]
        after = {name: record[name] for name in ("diverged_at_batch", "state")}
    rows = []
    for index, (rate, seed) in enumerate(zip(rates, seeds, strict=True)):
        diverged = bool(record["diverged_at_batch"][index] >= 0)
        measured = {f"validation_{key}": None if diverged else float(record[f"test_{key}"][index]) for key in metric_names(task)}
        row = {"arm": name, "learning_rate": float(rate), "seed": int(seed), "diverged": diverged, "updates": num_updates(config, arm, total)}
        rows.append(row | {"examples": epochs * total, **measured, "seconds": seconds / len(rates)})
    return Trained(rows, record["state"])


def make_judge(task: jb.Task, test_data: PyTree) -> Callable[[Trained], Iterator[Record]]:
    """Makes ``judge(trained) -> records`` with every metric on the training set and, once, on the test set."""
    names = metric_names(task)
    sets = {"train": task.train_data, "test": test_data}
    evaluate = {key: make_task_evaluate(task, data) for key, data in sets.items()}

    def judge(trained):
        for index, row in enumerate(trained.records):
            params = metrics_argument(task, jax.tree.map(lambda leaf: leaf[index], trained.state))
            metrics: dict[str, Any] = {}
            for key, data in sets.items():
                means = {} if row["diverged"] else evaluate[key](params, data)
                metrics |= {f"{key}_{name}": float(np.asarray(means[name])) if means else None for name in names}
            yield row | metrics

    return judge
