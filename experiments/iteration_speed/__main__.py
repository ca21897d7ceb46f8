"""The study: its flags, what it measures and in which order. Its question stands in the docstring of the package."""

import dataclasses
from collections.abc import Sequence

from rich.console import Console

from experiments.harness.command_line import for_quick
from experiments.harness.optimizers import kind_of
from experiments.harness.speed import SpeedConfig, measure_missing_speed
from experiments.harness.study import check_positive, open_study, resolve_sizes, run_study, show_results
from experiments.harness.task import load_task
from experiments.iteration_speed import __doc__ as question
from experiments.iteration_speed import report
from jaxbatch.results.records import RunFolder
from jaxbatch.results.report import progress_bar
from jaxbatch.training.tasks import Task


@dataclasses.dataclass(frozen=True)
class Config(SpeedConfig):
    """Flags of the study."""


def resolve(config: Config, num_examples: int) -> Config:
    """Fills in what depends on the data set, shrinks for --quick, and checks."""
    config = resolve_sizes(for_quick(config, rounds=4, examples_per_round=600), num_examples)
    config = dataclasses.replace(config, learning_rate=kind_of(config).rate if config.learning_rate is None else config.learning_rate)
    check_positive(config, "learning_rate", "rounds", "examples_per_round")
    return config


def measure(config: Config, task: Task, run: RunFolder, console: Console) -> None:
    """Makes the measurements that are not in the run folder yet, round by round."""
    with progress_bar(console) as progress:
        bar = progress.add_task("rounds", total=config.rounds, rate="")
        for record in measure_missing_speed(task, config, run.records):
            run.append(record)
            progress.update(bar, completed=record.get("round", 0))


def study(config: Config, console: Console) -> None:
    """Measures what is missing, then shows what the files hold."""
    task = load_task(config)
    config = resolve(config, task.num_examples)
    run = open_study("iteration_speed", config, console, task)
    measure(config, task, run, console)
    show_results(console, config, run, report)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    run_study(Config, question, study, args)


if __name__ == "__main__":
    main()
