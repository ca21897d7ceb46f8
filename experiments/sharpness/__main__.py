"""The study: its flags, what it measures and in which order. Its question stands in the docstring of the package."""

import dataclasses
from collections.abc import Sequence

from rich.console import Console

from experiments.harness.command_line import for_quick
from experiments.harness.optimizers import kind_of
from experiments.harness.resuming import append_missing, is_whole
from experiments.harness.study import check_positive, open_study, run_study, show_results
from experiments.harness.target import GoalConfig, fill_target
from experiments.harness.task import DEEP, few_for_quick, load_choosing_task, refuse_model_state
from experiments.sharpness import __doc__ as question
from experiments.sharpness import figure, report
from experiments.sharpness.measures import continued, line, solution, way_point
from experiments.sharpness.training import Setup, choose_rate, find_states, train
from jaxbatch.advice.full_sweep import best_rates
from jaxbatch.results.records import Record, RunFolder
from jaxbatch.results.report import progress_bar
from jaxbatch.training.goals import as_goal
from jaxbatch.training.tasks import Task

TRAIN_LOSS = 0.02  # of the named data sets
TUNING_SEEDS = 1000  # the seeds on which rates are chosen begin here


@dataclasses.dataclass(frozen=True)
class Config(GoalConfig):
    """Flags of the study."""

    seeds: int = 3
    """Number of seeds; each has its own initial weights, which both batch sizes share, and its own order of examples."""
    small_batch_size: int = 16
    """The small batch."""
    large_batch_size: int | None = None
    """The huge batch. Default: the largest power of two in the training set, at most 4096; 1024 for digits."""
    learning_rates: tuple[float, ...] | None = None
    """Learning rates that are tried at both sizes. Default: two in each power of ten, from 0.01 to 1 (Adam: from 0.000316 to 0.0316)."""
    epochs: int | None = None
    """Passes over the training set after which the solutions are compared. Default: 30 for digits, 15 for the others."""
    train_loss: float | None = None
    """Mean training loss at which the solutions are compared as well. Default: 0.02. Needed with --task."""
    max_epochs: int | None = None
    """Largest number of epochs that a run may take to --train-loss. Default: 20 times --epochs."""
    lanczos_steps: int = 20
    """Number of products of the Hessian with vectors from which its eigenvalues are computed."""
    trace_samples: int = 12
    """Number of such products from which its trace is estimated."""
    points: int = 31
    """Number of points on the line between two solutions. The line extends beyond both by a quarter of its length."""
    continue_epochs: int = 10
    """Epochs of further training from each solution with the small batch. With the large batch, from its own solution, it is --epochs."""

    long_to_compile = (*DEEP, "simple_cnn")  # curvature, lines and runs have a dozen programs, and nothing is timed


def resolve(config: Config, task: Task) -> Config:
    """Fills in what depends on the data set, shrinks for --quick, and checks."""
    refuse_model_state(config, task, "a loss that depends on a state of the model, or on a batch's moments, has the curvature of that batch alone")
    if config.task and config.train_loss is None:
        raise ValueError("--train-loss is needed with --task: a mean training loss that both batch sizes reach.")
    usual, quick = kind_of(config).rates, config.quick
    short = {"lanczos_steps": 4, "trace_samples": 3, "points": 13, "continue_epochs": 1, "seeds": 2, "epochs": 4, "max_epochs": 40}
    few = config.model != "mlp"  # few_for_quick: a loss that the huge batch reaches on few examples too
    config = for_quick(config, **short, learning_rates=usual[3:5], train_loss=1.5 if few else 0.5)
    own_target, config = config.target, fill_target(config, task)
    goal = as_goal(config.target or "")
    if quick and own_target is None and goal.metric == "accuracy":  # a few epochs of a huge batch do not reach the usual one
        config = dataclasses.replace(config, target=f"accuracy>{goal.value / 2:g}")
    rates = config.learning_rates or (usual[1:6] if kind_of(config).rule == "sqrt" else usual[2:])
    config = dataclasses.replace(
        config,
        learning_rates=tuple(sorted(set(rates))),
        large_batch_size=config.large_batch_size or min(4096, 2 ** (task.num_examples.bit_length() - 1)),
        train_loss=TRAIN_LOSS if config.train_loss is None else config.train_loss,
        max_epochs=20 * (config.epochs or 1) if config.max_epochs is None else config.max_epochs,
    )
    names = ("small_batch_size", "large_batch_size", "learning_rates", "epochs", "train_loss", "max_epochs", "lanczos_steps", "trace_samples")
    check_positive(config, "seeds", "points", "continue_epochs", *names)
    if not config.small_batch_size < (config.large_batch_size or 0) <= task.num_examples:
        raise ValueError(
            f"--large-batch-size {config.large_batch_size} must be above --small-batch-size {config.small_batch_size} and at most the "
            f"{task.num_examples} training examples that are left."
        )
    if (config.max_epochs or 0) < (config.epochs or 0):
        raise ValueError(f"--max-epochs {config.max_epochs} must be at least --epochs {config.epochs}.")
    if config.points < 7 or (config.points - 1) % 6:
        raise ValueError(f"--points {config.points} must be one more than a multiple of 6, so that both solutions are among them.")
    return config


def append_new(run: RunFolder, rows: Sequence[Record]) -> None:
    """Writes rows without those that a call which was stopped has written already, found by all that is no measurement."""
    append_missing(run, rows, ("kind", "comparison", "batch_size", "seed", "updates", "epoch", "point", "learning_rate", "with_batch_size"))


def measure(config: Config, task: Task, test_data, run: RunFolder, console: Console) -> None:
    """Makes the measurements that are not in the run folder yet."""
    sizes, rates = (config.small_batch_size, config.large_batch_size), config.learning_rates or ()
    seeds = range(TUNING_SEEDS, TUNING_SEEDS + min(config.seeds, 2))
    with progress_bar(console) as progress:
        bar = progress.add_task("choosing rates", total=len(sizes), rate="")
        for size in sizes:
            if not is_whole(run.find(kind="sweep", batch_size=size), learning_rate=rates, seed=seeds):
                append_new(run, choose_rate(config, task, size, seeds))
            progress.update(bar, advance=1)
        best = best_rates(run.find(kind="sweep"))
        if not set(sizes) <= set(best):
            return  # the report says that the target was not reached
        setup = Setup(config, task, test_data, {size: best[size][0] for size in sizes})
        bar = progress.add_task("training", total=len(sizes) * config.seeds, rate="")
        for seed in range(config.seeds):
            for size in sizes:
                if not run.find(kind="trained", batch_size=size, seed=seed):
                    append_new(run, train(setup, size, seed, run))
                progress.update(bar, advance=1)
        for name, function in (("curvature on the way", way_point), ("solutions", solution), ("lines", line), ("going on", continued)):
            states = find_states(run, setup, name)
            bar = progress.add_task(name, total=len(states), rate="")
            for identity, params in states:
                rows = run.find(**identity)
                if not rows or (name in ("lines", "going on") and not any(row.get("last") for row in rows)):
                    append_new(run, function(setup, identity, params()))
                progress.update(bar, advance=1)


def study(config: Config, console: Console) -> None:
    """Measures what is missing, then shows what the files hold."""
    task, test_data = load_choosing_task(config)
    task = few_for_quick(config, task, 128)  # two batches of 16 between two looks, always: one program
    config = resolve(config, task)
    run = open_study("sharpness", config, console, task)
    measure(config, task, test_data, run, console)
    show_results(console, config, run, report, figure)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    run_study(Config, question, study, args)


if __name__ == "__main__":
    main()
