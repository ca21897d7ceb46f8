"""The study: its flags, what it measures and in which order. Its question stands in the docstring of the package."""

import dataclasses
from collections.abc import Sequence

from rich.console import Console

from experiments.harness.rate_grid import GridConfig, measure_grid, resolve_grid
from experiments.harness.study import open_study, run_study, show_results
from experiments.harness.task import load_choosing_task
from experiments.learning_rate_grid import __doc__ as question
from experiments.learning_rate_grid import report
from jaxbatch.training.tasks import Task


@dataclasses.dataclass(frozen=True)
class Config(GridConfig):
    """Flags of the study."""


def resolve(config: Config, task: Task) -> Config:
    """Fills in what depends on the data set, shrinks for --quick, and checks."""
    return resolve_grid(config, task)


def study(config: Config, console: Console) -> None:
    """Measures what is missing, then shows what the files hold."""
    task, _ = load_choosing_task(config)
    config = resolve(config, task)
    run = open_study("learning_rate_grid", config, console, task)
    measure_grid(config, task, run, console)
    show_results(console, config, run, report)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    run_study(Config, question, study, args)


if __name__ == "__main__":
    main()
