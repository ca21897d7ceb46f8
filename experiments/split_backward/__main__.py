"""The study: its flags, what it measures and in which order. Its question stands in the docstring of the package."""

import dataclasses
from collections.abc import Sequence

from jaxtyping import PyTree
from rich.console import Console

import jaxbatch as jb
from experiments.harness.command_line import for_quick
from experiments.harness.optimizers import OptimizerFlags, kind_of, quick_rates
from experiments.harness.resuming import append_missing, first_missing_round
from experiments.harness.study import TaskConfig, check_positive, open_study, run_study, show_results
from experiments.harness.target import fill_target
from experiments.harness.task import Network, load_choosing_task, prepared_once, refuse_model_state
from experiments.split_backward import __doc__ as question
from experiments.split_backward import figure, report
from experiments.split_backward.cost import measure_cost, measure_exactness
from experiments.split_backward.records import chosen_rate
from experiments.split_backward.steps import ARMS, OWN_RULES
from experiments.split_backward.training import Trainer, measure_training, measure_tuning
from jaxbatch.batches import steps_per_epoch
from jaxbatch.gradients.groups import check_num_groups
from jaxbatch.results.records import RunFolder
from jaxbatch.results.report import progress_bar
from jaxbatch.training.goals import as_goal


@dataclasses.dataclass(frozen=True)
class Config(OptimizerFlags, TaskConfig):
    """Flags of the study."""

    model: Network = "simple_cnn"
    """The network: the study's convolutions, one hidden layer of 128 units, or a small transformer for texts."""
    batch_size: int = 64
    """B: examples in a large batch."""
    num_groups: int = 4
    """K: groups of a batch, a divisor of B."""
    learning_rate: float | None = None
    """The same learning rate for arms (a), (b) and (d); (c) uses K times this rate. Default: 0.02 for SGD, 0.001 for Adam, 0.01 for an
    optimizer of your own."""
    tune: bool = True
    """Also compare the arms at the best rate of each."""
    learning_rates: tuple[float, ...] | None = None
    """Rates from which each arm's best is chosen, the same for all arms. Default: two in each power of ten, over the powers that suit the
    optimizer; from 0.001 to 1 for SGD, from 0.0001 to 0.1 for Adam."""
    tune_seeds: int = 2
    """Number of seeds that choose the rates; they are different from the seeds of the compared runs."""
    epochs: int | None = None
    """Passes over the training set. Default: 30 for digits, 15 for the others."""
    target: str | None = None
    """Metric to reach on the validation part, with its direction, such as "accuracy>0.98" or "loss<0.4" (quoted, because of the
    shell). Default: accuracy>0.95 for digits, accuracy>0.98 for mnist. Needed with --task."""
    evaluations_per_epoch: int = 1
    """Number of times in an epoch that the arms are compared."""
    validation_seed: int = 0
    """Seed by which a sixth of the training set is held out for validation."""
    cost_rounds: int = 40
    """Rounds of the cost measurement; each runs every kind of step once."""

    sgd_momentum = 0.5


def resolve(config: Config, task: jb.Task) -> Config:
    """Fills in what depends on the data, shrinks for --quick, and checks."""
    config = fill_target(for_quick(config, learning_rates=quick_rates(config), tune_seeds=1, seeds=2, epochs=3, cost_rounds=5), task)
    kind = kind_of(config)
    rate, rates = config.learning_rate, config.learning_rates or kind.rates
    config = dataclasses.replace(config, learning_rate=kind.rate if rate is None else rate, learning_rates=tuple(sorted(set(rates))))
    names = ("batch_size", "num_groups", "learning_rate", "learning_rates", "tune_seeds", "epochs", "seeds")
    check_positive(config, *names, "evaluations_per_epoch", "cost_rounds")
    check_num_groups(config.num_groups, config.batch_size)
    steps_per_epoch(task.num_examples, config.batch_size)  # raises if the batch is too large
    return config


def measure(config: Config, task: jb.Task, test_data: PyTree, run: RunFolder, console: Console) -> None:
    """Makes the measurements that are not in the run folder yet."""

    def keep(records):
        append_missing(run, records, ("kind", "round", "num_groups", "protocol", "arm", "learning_rate", "seed", "segment"))

    ready = prepared_once(task)
    keep(measure_exactness(ready, config, {record["num_groups"] for record in run.find(kind="exactness")}))
    keep(measure_cost(ready, config, first_missing_round(run.find(kind="cost"), config.cost_rounds)))
    trainer = Trainer(task, config)
    tuning = len(OWN_RULES) * len(config.learning_rates) * config.tune_seeds if config.tune else 0
    with progress_bar(console) as progress:
        total = len(trainer.segments) * (tuning + config.seeds * (1 + config.tune))
        bar = progress.add_task("training", total=total, rate="")

        def show(segments, examples_per_second=0.0):
            progress.update(bar, advance=segments, rate=f"{examples_per_second:,.0f} examples/s")

        rate, groups = config.learning_rate, config.num_groups
        rates = {arm: groups * rate if arm == "scaled" else rate for arm in ARMS}
        keep(measure_training(trainer, test_data, "original", rates, run, show))
        if config.tune:
            tuned = {(record["arm"], record["learning_rate"], record["seed"]) for record in run.find(kind="tune")}
            keep(measure_tuning(trainer, OWN_RULES, tuned, show))
            rates = {arm: chosen_rate(run.records, arm, as_goal(config.target)) for arm in OWN_RULES}
            keep(measure_training(trainer, test_data, "tuned", rates, run, show))


def study(config: Config, console: Console) -> None:
    """Measures what is missing, then shows what the files hold."""
    task, test_data = load_choosing_task(config)
    refuse_model_state(config, task, "a group has another state than its batch, so the K gradients of one forward are not gradients of one loss")
    config = resolve(config, task)
    run = open_study("split_backward", config, console, task)
    measure(config, task, test_data, run, console)
    show_results(console, config, run, report, figure)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    run_study(Config, question, study, args)


if __name__ == "__main__":
    main()
