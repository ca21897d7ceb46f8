"""The study: its flags, what it measures and in which order. Its question stands in the docstring of the package."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

from rich.console import Console

import jaxbatch as jb
from experiments.harness.command_line import for_quick
from experiments.harness.lengths import WithinFlag, check_within, longest_run
from experiments.harness.optimizers import OptimizerFlags, fill_optimizer, kind_of
from experiments.harness.resuming import append_missing, is_whole
from experiments.harness.schedules import ScheduleFlags, fill_schedule
from experiments.harness.study import TaskConfig, check_positive, open_study, run_study, show_results
from experiments.harness.task import few_for_quick, first_of, load_choosing_task
from experiments.large_batch import __doc__ as question
from experiments.large_batch import report
from experiments.large_batch.arms import ARMS, find_arm, nearest_divisor, why_undefined
from experiments.large_batch.records import best_rate, pairs, resolve_metric, rule_rate
from experiments.large_batch.training import make_judge, train
from jaxbatch.results.records import RunFolder
from jaxbatch.results.report import progress_bar
from jaxbatch.schedules.named_rates import RateName
from jaxbatch.training.goals import metric_names
from jaxbatch.training.tasks import first_examples, updates_of

OTHER_SEEDS = 1000  # added to the seeds of the runs that are reported, so that no rate is judged by the runs that chose it
# data set: (huge batch, small batch, epochs, longest), so that an epoch has few updates
PROTOCOLS = {"digits": (600, 24, 10, 25.0), "cifar10": (2048, 32, 15, 4.0), "cifar100": (2048, 32, 15, 4.0)}
USUAL = (6000, 60, 10, 4.0)
QUICK = ("linear rule", "cosine", "growth", "split", "noise")  # an arm of each form
QUICK_DEEP = ("cosine",)


@dataclasses.dataclass(frozen=True)
class Config(ScheduleFlags, WithinFlag, OptimizerFlags, TaskConfig):
    """Flags of the study."""

    schedule: RateName = "constant"
    """The learning rate along a run: constant; cosine or linear down to 0; wsd, which falls to 0 in the last fifth; step, a tenth from a
    half and a hundredth from three quarters on. It is stretched to the updates of each arm. Arms that are a schedule keep their own."""
    model: Literal["simple_cnn", "mlp", "transformer", "resnet20"] = "mlp"
    """The network: one hidden layer of 128 units, the studies' convolutions, ResNet-20 (which has batch statistics), or a small
    transformer for texts."""
    batch_size: int | None = None
    """The huge batch. Default: 600 for digits, 2048 for CIFAR, 6000 for the others, or less,
    so that two batches fit into an epoch."""
    small_batch_size: int | None = None
    """The small batch, a divisor of the huge one. Default: the divisor nearest to 24 for digits, 32 for CIFAR, 60 for the others."""
    num_groups: int | None = None
    """Updates from one huge batch in the arm "split". Default: the divisor of the batch nearest to 10."""
    epochs: int | None = None
    """Passes over the training set. Default: 15 for CIFAR, 10 for the others."""
    within: str | None = None
    """The data that every arm may see, in another unit than epochs: 50000examples or 1e6tokens, of which whole passes over the training set
    are made, rounded down. Default: --epochs."""
    longest: float | None = None
    """The arm "longer" trains for at most this many times the epochs. Default: 25 for digits, 4 for the others."""
    examples: int | None = None
    """Use only this many of the training examples. Default: all, down to a whole number of huge batches."""
    learning_rates: tuple[float, ...] | None = None
    """Learning rates that are tried for every arm. Default: two in each power of ten, over the powers that suit the optimizer; from 0.001 to
    1 for SGD, from 0.0001 to 0.1 for Adam."""
    optimizer: str = "momentum"
    """Optimizer of all arms but lars and lamb: sgd, momentum, nesterov, rmsprop, adam, adamw, lion, lars, lamb, muon; or a function of your
    own, learning rate -> optimizer, as my_optimizer.py:make_optimizer."""
    metric: str | None = None
    """The metric by which arms are judged, with > if larger values are better, else <, as "loss<" (quoted, because of the shell).
    Default: the accuracy if there is one, else the loss, else the first."""
    arms: tuple[str, ...] | None = None
    """Run only these arms, such as cosine lamb "step decay", besides small and plain. Default: all."""
    pairs: bool = True
    """Also run pairs of these: the best schedule of the rate, the best of LARS and LAMB, and the growing batch."""
    seeds: int = 10
    """Number of seeds that are reported; each has its own initial weights and its own order of examples."""
    tune_seeds: int = 3
    """Number of other seeds, on which the rates are chosen."""
    validation_seed: int = 0
    """Seed by which a sixth of the training set is held out for the choice of the rates."""


def epochs_within(config: Config, task: jb.Task) -> int | None:
    """The whole passes over the training set that ``--within`` allows; without it ``--epochs``.

    Raises:
        ValueError: ``--within`` counts updates, which the arms differ in, or is shorter than a pass.
    """
    check_within(config, task)
    if config.within is None:
        return config.epochs
    if longest_run(config).unit == "steps":
        raise ValueError(f"--within {config.within}: the arms make different numbers of updates from the same data; give examples, tokens or epochs.")
    passes = updates_of(task, longest_run(config), 1) // task.num_examples
    if passes < 1:
        raise ValueError(f"--within {config.within} is less than one pass over the {task.num_examples} training examples that are left.")
    return passes


def resolve(config: Config, task: jb.Task) -> Config:
    """Fills in what depends on the data, shrinks for --quick, and checks."""
    config = dataclasses.replace(config, epochs=epochs_within(config, task))
    rates = kind_of(config).rates
    few = {"arms": QUICK} if config.task or config.model == "mlp" else {"arms": QUICK_DEEP, "pairs": False}  # others compile long
    config = fill_optimizer(for_quick(config, epochs=2, longest=2.0, seeds=2, tune_seeds=1, learning_rates=rates[2:5:2], **few))
    config = fill_schedule(config)
    check_positive(config, "batch_size", "small_batch_size", "num_groups", "epochs", "longest", "learning_rates", "seeds", "tune_seeds")
    huge, small, epochs, longest = USUAL if config.task else PROTOCOLS.get(config.dataset, USUAL)
    most = max(1, task.num_examples // 2)
    size = config.batch_size or min(huge, most // 24 * 24 or most)
    if size > task.num_examples:
        raise ValueError(f"--batch-size {size} is larger than the {task.num_examples} training examples that are left.")
    config = dataclasses.replace(
        config,
        batch_size=size,
        small_batch_size=config.small_batch_size or nearest_divisor(size, min(small, size / 10)),
        num_groups=config.num_groups or nearest_divisor(size, 10),
        epochs=config.epochs or epochs,
        longest=config.longest or longest,
        learning_rates=tuple(sorted(set(config.learning_rates or rates))),
        metric=resolve_metric(config.metric, metric_names(task)),
    )
    for name in ("small_batch_size", "num_groups"):
        value = getattr(config, name)
        if size % value:
            near = nearest_divisor(size, value)
            raise ValueError(f"--{name.replace('_', '-')} {value} does not divide --batch-size {size}; the nearest that does is {near}.")
    for arm in config.arms or ():
        if arm not in ARMS:
            raise ValueError(f"--arms {arm} must be among {', '.join(name for name in ARMS if name not in ('small', 'plain'))}.")
    return config


def measure(config: Config, task: jb.Task, test_data, run: RunFolder, console: Console) -> None:
    """Makes the measurements that are not in the run folder yet: the choice of every arm's rate, then the runs that are reported."""
    names = [name for name in ARMS if config.arms is None or name in ("small", "plain", *config.arms)]
    for name in names:
        reason = why_undefined(task, name)
        if reason and not run.find(kind="left_out", arm=name):
            run.append({"kind": "left_out", "arm": name, "reason": reason})
    names = [name for name in names if not run.find(kind="left_out", arm=name)]
    judge = make_judge(task, test_data)
    settings = list(itertools.product(config.learning_rates, range(config.tune_seeds)))

    def write(kind, rows):
        append_missing(run, ({"kind": kind, **row} for row in rows), ("kind", "arm", "learning_rate", "seed"))

    with progress_bar(console) as progress:
        bar = progress.add_task("", total=2 * len(names) + 6, rate="")

        def tune(name):
            progress.update(bar, description=f"rates of {name}")
            wanted = {"learning_rate": config.learning_rates, "seed": range(config.tune_seeds)}
            if find_arm(name).rule is None and not is_whole(run.find(kind="tune", arm=name), **wanted):
                write("tune", train(task, config, name, *zip(*settings, strict=True)).records)
            progress.update(bar, advance=1)

        for name in names:
            tune(name)
        pair_names = pairs(config, run.records) if config.pairs else []
        for name in pair_names:
            tune(name)
        for name in [*names, *pair_names]:
            progress.update(bar, description=f"runs of {name}", advance=1)
            rate = rule_rate(config, run.records, name) if find_arm(name).rule else best_rate(config, run.records, name)
            seeds = range(OTHER_SEEDS, OTHER_SEEDS + config.seeds)
            if rate is not None and not is_whole(run.find(kind="run", arm=name), learning_rate=[rate], seed=seeds):
                write("run", judge(train(task, config, name, [rate] * config.seeds, seeds)))


def study(config: Config, console: Console) -> None:
    """Measures what is missing, then shows what the files hold."""
    task, test_data = load_choosing_task(config)
    task = few_for_quick(config, first_of(config, task), 48 if config.model == "resnet20" else 240)
    config = resolve(config, task)
    run = open_study("large_batch", config, console, task)
    task = first_examples(task, task.num_examples // config.batch_size * config.batch_size)
    measure(config, task, test_data, run, console)
    show_results(console, config, run, report)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    run_study(Config, question, study, args)


if __name__ == "__main__":
    main()
