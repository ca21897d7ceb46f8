"""How many updates, epochs, examples and seconds does each batch size need to reach a test accuracy?

Table 1 gives every size the same learning rate, as the study was once done; table 2 gives each size the rate that the
grid of rates (experiments.learning_rate_grid, run first where its results are not there) found best for it, on other
seeds than the grid's. The second is the fair one. Beside it: the critical batch size that the updates fit, and the gradient
noise scale measured on the way.

    python -m experiments.convergence                      about 4 minutes, the grid included
    python -m experiments.convergence --dataset mnist      about 8 minutes after the grid

The measured answer stands in the README and in docs/mnist_study.md.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import optax
from rich.console import Console

import jaxbatch as jb
from experiments import convergence_report, iteration_speed, learning_rate_grid
from experiments.learning_rate_grid_report import best_rates
from experiments.study import (
    TargetConfig,
    check_positive,
    load_task,
    num_updates,
    open_study,
    resolve_target,
    run_study,
    show_results,
)
from jaxbatch.records import Record, RunFolder
from jaxbatch.report import progress_bar
from jaxbatch.tasks import Task

OTHER_SEEDS = 1000  # added to the seeds, so that rates are not judged on the runs that they were chosen by
NOISE_EXAMPLES = 600  # drawn at each evaluation for the gradient noise scale
TABLES = ("same", "tuned")


@dataclasses.dataclass(frozen=True)
class Config(TargetConfig):
    """Flags of the study."""

    learning_rate: float = 0.02
    """Rate of table 1, the same for all sizes."""
    tuned_rates: tuple[float, ...] | None = None
    """Rates of table 2, in the order of the batch sizes. Default: the best of experiments.learning_rate_grid."""
    seeds: int = 3
    """Number of seeds; each has its own initial weights and its own order of examples."""
    grid_seeds: int = 3
    """Seeds of the grid of rates."""
    speed_rounds: int = 5
    """Rounds in which an iteration with loading is timed."""


def resolve(config: Config, num_examples: int) -> Config:
    """Fills in what depends on the data set, shrinks for --quick, and checks."""
    if config.tuned_rates is not None and config.batch_sizes is not None and len(config.tuned_rates) == len(config.batch_sizes):
        pairs = sorted(zip(config.batch_sizes, config.tuned_rates, strict=True))  # sizes are sorted below
        config = dataclasses.replace(config, tuned_rates=tuple(rate for _, rate in pairs))
    config = resolve_target(config, num_examples)
    if config.quick:
        config = dataclasses.replace(config, seeds=min(config.seeds, 2), speed_rounds=2)
    check_positive(config, "grid_seeds", "learning_rate", "speed_rounds", "tuned_rates")
    if config.tuned_rates is not None and len(config.tuned_rates) != len(config.batch_sizes):
        raise ValueError(f"--tuned-rates: {len(config.tuned_rates)} rates for {len(config.batch_sizes)} batch sizes.")
    return config


def find_tuned_rates(config: Config, task: Task, console: Console) -> dict[int, float]:
    """Batch size to its best rate, from the grid's own run folder; the grid is run where it is not finished."""
    if config.tuned_rates is not None:
        return dict(zip(config.batch_sizes, config.tuned_rates, strict=True))
    shared = {field.name for field in dataclasses.fields(TargetConfig)} - {"seeds", "overwrite", "resume", "evaluations_per_epoch"}
    grid = learning_rate_grid.Config(**{name: getattr(config, name) for name in shared}, seeds=config.grid_seeds)
    grid = learning_rate_grid.resolve(grid, task.num_examples)
    run = open_study("learning_rate_grid", grid, console)
    learning_rate_grid.measure(grid, task, run, console)
    return best_rates(grid, run.records)


def measure_run(task: Task, config: Config, table: str, batch_size: int, rate: float, seed: int) -> Iterator[Record]:
    """Trains until the target or the end; a last record of the run, and before it the noise at every evaluation."""
    optimizer = optax.sgd(rate, config.momentum)
    fit_config = jb.FitConfig(
        optimizer,
        batch_size,
        jb.steps(num_updates(config, task.num_examples, batch_size)),
        seed=OTHER_SEEDS + seed,
        evaluations_per_epoch=config.evaluations_per_epoch,
    )
    place = {"table": table, "batch_size": batch_size, "seed": seed}
    seconds, best, last = 0.0, 0.0, None
    for last in jb.fit(task, fit_config):
        seconds += last["train_seconds"]
        best = max(best, last["test_accuracy"])
        if table == "tuned" and not last["diverged"]:
            yield {"kind": "noise", **place, "updates": last["updates"], "test_accuracy": last["test_accuracy"]} | measure_noise(
                task, last["state"].params, OTHER_SEEDS + seed, last["updates"]
            )
        if last["test_accuracy"] >= config.target_accuracy:
            break
    yield {
        "kind": "run",
        **place,
        "learning_rate": rate,
        "reached": last["test_accuracy"] >= config.target_accuracy,
        "updates": last["updates"],
        "epochs": last["epoch"],
        "examples": last["examples"],
        "compute_seconds": seconds,
        "final_accuracy": last["test_accuracy"],
        "best_accuracy": best,
        "diverged": last["diverged"],
    }


def measure_noise(task: Task, params, seed: int, updates: int) -> Record:
    """Signal and trace of the gradient at ``params``, per example, on examples drawn with replacement."""
    key = jax.random.fold_in(jax.random.key(seed), updates)
    index = jax.random.randint(key, (NOISE_EXAMPLES,), 0, task.num_examples)
    batch = jax.tree.map(lambda leaf: leaf[index], task.train_data)
    found = _statistics(task.loss_fn, params, batch)
    return {"signal": float(found.signal), "trace": float(found.trace)}


_statistics = jax.jit(jb.gradient_statistics, static_argnums=0)  # compiled once for a loss function


def measure(config: Config, task: Task, rates: dict[str, dict[int, float]], run: RunFolder, console: Console) -> None:
    """Makes the measurements that are not in the run folder yet: the speed of an iteration, then run after run."""
    if len(run.find(kind="speed")) < config.speed_rounds * len(config.batch_sizes):
        done = len(run.find(kind="speed")) // len(config.batch_sizes)
        speed = iteration_speed.Config(batch_sizes=config.batch_sizes, rounds=config.speed_rounds)
        if config.quick:
            speed = dataclasses.replace(speed, examples_per_round=600)
        for record in iteration_speed.measure_speed(task, speed, first_round=done):
            if record["kind"] == "speed":
                run.append(record)
    known = {(r["table"], r["batch_size"], r["seed"], r["updates"]) for r in run.find(kind="noise")}
    with progress_bar(console) as progress:
        total = sum(len(sizes) for sizes in rates.values()) * config.seeds
        bar = progress.add_task("runs", total=total, rate="")
        for table, by_size in rates.items():
            for batch_size, rate in sorted(by_size.items(), reverse=True):
                for seed in range(config.seeds):
                    if not run.find(kind="run", table=table, batch_size=batch_size, seed=seed, learning_rate=rate):
                        for record in measure_run(task, config, table, batch_size, rate, seed):
                            if record["kind"] == "run" or (table, batch_size, seed, record["updates"]) not in known:
                                run.append(record)
                    progress.update(bar, advance=1)


def study(config: Config, console: Console) -> None:
    """Measures what is missing, then shows what the files hold."""
    task = load_task(config)
    config = resolve(config, task.num_examples)
    rates = {"same": dict.fromkeys(config.batch_sizes, config.learning_rate), "tuned": find_tuned_rates(config, task, console)}
    run = open_study("convergence", config, console)
    measure(config, task, rates, run, console)
    show_results(console, config, run, convergence_report)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    run_study(Config, __doc__, study, args)


if __name__ == "__main__":
    main()
