"""The study: its flags, what it measures and in which order. Its question stands in the docstring of the package."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console

import jaxbatch as jb
from experiments.critical_batch_size import __doc__ as question
from experiments.critical_batch_size import report
from experiments.harness.command_line import for_quick
from experiments.harness.lengths import WithinFlag, check_within, longest_run
from experiments.harness.optimizers import follow, kind_of, make_optimizer
from experiments.harness.resuming import append_missing
from experiments.harness.schedules import ScheduleFlags, fill_schedule, is_scheduled, make_for_length, make_scheduled, rate_at
from experiments.harness.study import check_positive, open_study, run_study, show_results
from experiments.harness.target import GoalConfig, fill_target
from experiments.harness.task import few_for_quick, first_of, load_choosing_task
from jaxbatch.advice.full_sweep import best_rates, run_sweep
from jaxbatch.results.records import Record, RunFolder
from jaxbatch.results.report import progress_bar
from jaxbatch.training.goals import metric_names
from jaxbatch.training.monitor import ChangesTraining, check_unchanged
from jaxbatch.training.tasks import updates_of

NOISE_PARTS = 8  # into which a batch is cut to see its noise
SIZES, FACTORS = (8, 16, 32, 64, 128, 256), (2, 4, 8, 16, 32)
STAGES = (0.25, 0.5, 1.0)  # of the updates to the target, where branches begin


@dataclasses.dataclass(frozen=True)
class Config(ScheduleFlags, WithinFlag, GoalConfig):
    """Flags of the study."""

    examples: int | None = None
    """Use only this many of the training examples. Default: all."""
    batch_sizes: tuple[int, ...] | None = None
    """Batch sizes whose updates to the target are fitted. Default: 8, 16, 32, 64, 128, 256."""
    base_batch_size: int = 16
    """Batch size of the run whose noise is measured, and from which branches begin."""
    factors: tuple[int, ...] | None = None
    """Factors by which the batches of branches are larger than --base-batch-size. Default: 2, 4, 8, 16, 32."""
    tolerance: float = 0.05
    """A branch loses nothing (it *holds*) if its validation loss (or, without one, the target's metric) is worse than that of the branch
    with the run's own batch by at most this fraction."""
    learning_rates: tuple[float, ...] | None = None
    """Learning rates that are tried at every size. Default: two in each power of ten, over six powers."""
    evaluations_per_epoch: int = 12
    """Number of evaluations on the held-out part in an epoch."""
    seeds: int = 3
    """Number of seeds; each has its own initial weights and its own order of examples."""


def resolve(config: Config, task: jb.Task) -> Config:
    """Fills in target and rates, shrinks for --quick, and checks."""
    check_within(config, task)
    short = {"learning_rates": kind_of(config).rates[2::2], "batch_sizes": SIZES[1::2], "factors": (2, 8), "seeds": 2, "epochs": 8}
    config = fill_schedule(fill_target(for_quick(config, **short, evaluations_per_epoch=4), task))
    settings = {"learning_rates": config.learning_rates or kind_of(config).rates, "batch_sizes": config.batch_sizes or SIZES}
    settings["factors"] = config.factors or FACTORS
    config = dataclasses.replace(config, **{name: tuple(sorted(set(values))) for name, values in settings.items()})
    check_positive(config, "epochs", "evaluations_per_epoch", "seeds", "batch_sizes", "learning_rates", "factors", "tolerance", "base_batch_size")
    sizes = (*config.batch_sizes, config.base_batch_size * max(config.factors))
    if max(sizes) > task.num_examples:
        raise ValueError(f"--batch-sizes and --factors go up to {max(sizes)}, but only {task.num_examples} training examples are left.")
    if config.base_batch_size not in config.batch_sizes or config.base_batch_size % NOISE_PARTS:
        raise ValueError(f"--base-batch-size {config.base_batch_size} must be one of --batch-sizes, and a multiple of {NOISE_PARTS}.")
    return config


def measure_run(config: Config, task: jb.Task, rate: float, seed: int, updates: int) -> Iterator[Record]:
    """The noise at every evaluation of a run at the base size, and branches from its states at a quarter, a half, and the end."""
    longest = updates_of(task, longest_run(config), config.base_batch_size)
    fit_config = jb.FitConfig(
        make_for_length(config, longest)(rate),
        config.base_batch_size,
        jb.steps(updates),
        seed=seed,
        evaluations_per_epoch=config.evaluations_per_epoch,
        monitor=jb.NoiseMonitor(parts=NOISE_PARTS),
    )
    try:
        check_unchanged(task, fit_config, jb.init_state(task, fit_config.optimizer, seed).params, [config.base_batch_size])
    except ChangesTraining:  # then the noise is not shown
        fit_config = fit_config._replace(monitor=None)
    stages, goal = list(STAGES), jb.as_goal(config.target or "")
    metric, above = ("loss", False) if "loss" in metric_names(task) else (goal.metric, goal.above)
    for record in jb.fit(task, fit_config):
        progress = record["updates"] / updates
        noise = {name: record.get(f"noise_{name}") for name in ("signal", "trace", "measurements")}
        yield {"kind": "noise", "seed": seed, "updates": record["updates"], "progress": progress, **noise}
        if record["diverged"]:
            return
        if stages and progress >= stages[0] - 1e-9:
            largest = config.base_batch_size * max(config.factors)
            branches = jb.branch(
                task,
                make_at_rest(config),
                record["state"],
                learning_rate=rate_now(config, rate, record["updates"], longest),
                batch_size=config.base_batch_size,
                examples=min(16 * largest, task.num_examples // largest * largest),
                factors=config.factors,
                rule=kind_of(config).rule,
                metric=metric,
                above=above,
                seeds=(seed,),
            )
            for size, (value,) in branches.metrics.items():
                cost = branches.examples // len(branches.metrics)
                key_fields = {"kind": "branch", "seed": seed, "stage": stages[0], "batch_size": size}
                yield key_fields | {"metric": metric, "above": above, "value": value, "examples": cost}
            stages.pop(0)
    yield {"kind": "run", "seed": seed, "learning_rate": rate, "updates": record["updates"]}


def make_at_rest(config: Config) -> Callable[[Any], Any]:
    """``rate -> optimizer`` whose rate stays, and which can go on from a state of the run's optimizer, be there a schedule or not."""
    return (lambda rate: follow(config, lambda count: rate, rate)) if is_scheduled(config) else make_optimizer(config)


def rate_now(config: Config, rate: float, updates: int, longest: int) -> float:
    """The rate of the last of so many updates, at which branches go on."""
    return float(rate_at(config, rate, longest)(updates - 1)) if is_scheduled(config) else rate


def measure(config: Config, task: jb.Task, run: RunFolder, console: Console) -> None:
    """Makes the measurements that are not in the run folder yet: the sweep, then a run with noise and branches for each seed."""
    rates, goal = config.learning_rates or (), jb.as_goal(config.target or "")
    with progress_bar(console) as progress:
        bar = progress.add_task("sweep", total=len(config.batch_sizes) * len(rates) * config.seeds, rate="")
        known = run.find(kind="sweep")
        progress.update(bar, completed=len(known))

        def write(row):
            run.append({"kind": "sweep", **row})
            progress.update(bar, advance=1)

        settings: dict[str, Any] = {"batch_sizes": config.batch_sizes, "learning_rates": rates, "seeds": config.seeds, "longest": longest_run(config)}
        settings["evaluations_per_epoch"] = config.evaluations_per_epoch
        run_sweep(task, make_scheduled(config), goal, known=known, write=write, **settings)
        best = best_rates(run.find(kind="sweep"))
        if config.base_batch_size not in best:
            return  # the report says that the target was not reached
        rate, updates = best[config.base_batch_size]
        bar = progress.add_task("noise and branches", total=config.seeds, rate="")
        for seed in range(config.seeds):
            if not run.find(kind="run", seed=seed):
                records = list(measure_run(config, task, rate, seed, round(float(np.mean(updates)))))  # written once it has ended
                append_missing(run, records, ("kind", "seed", "updates", "stage", "batch_size"))
            progress.update(bar, advance=1)


def study(config: Config, console: Console) -> None:
    """Measures what is missing, then shows what the files hold."""
    task, _ = load_choosing_task(config)
    task = few_for_quick(config, first_of(config, task), 480)
    config = resolve(config, task)
    run = open_study("critical_batch_size", config, console, task)
    measure(config, task, run, console)
    show_results(console, config, run, report)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    run_study(Config, question, study, args)


if __name__ == "__main__":
    main()
