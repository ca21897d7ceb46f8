"""The study: its flags, what it measures and in which order. Its question stands in the docstring of the package."""

import dataclasses
import sys
from collections.abc import Sequence

from rich.console import Console

import jaxbatch as jb
from experiments.advise import __doc__ as question
from experiments.advise import command, figure, laws, records, report, within
from experiments.advise import verify as advise_verify
from experiments.harness.command_line import for_quick
from experiments.harness.schedules import ScheduleFlags, fill_schedule, make_scheduled, scheduled_code
from experiments.harness.study import check_positive, open_study, run_study, show_results
from experiments.harness.target import GoalConfig, fill_target
from experiments.harness.task import SEQUENCE_LENGTH, few_for_quick, load_choosing_task
from jaxbatch.advice.advice import Objective
from jaxbatch.advice.advising import Event, Ran, answer
from jaxbatch.advice.request import LEARNING_RATES, Question
from jaxbatch.data import TEXTS
from jaxbatch.results.records import RunFolder
from jaxbatch.results.report import progress_bar


@dataclasses.dataclass(frozen=True)
class Config(ScheduleFlags, GoalConfig):
    """Flags of the study."""

    objective: Objective = "time"
    """What to save: time, examples, or balanced for both."""
    device: str = "here"
    """The device to train on: here, or another accelerator, such as h100, whose times are then lower bounds from its data sheet."""
    memory: str | None = None
    """Memory that a step may need, such as 8GiB. Default: what the device has."""
    batch_sizes: tuple[int, ...] | None = None
    """Batch sizes to choose from. Default: powers of two up to half the training set."""
    learning_rates: tuple[float, ...] | None = None
    """Learning rates to choose from. Default: four in each power of ten, from 0.0001 to 3.16."""
    evaluations_per_epoch: int = 12
    """Number of times in an epoch that a run is compared with the target."""
    max_probes: int = 30
    """Largest number of runs."""
    budget: float | None = None
    """Largest number of seconds, from the first timing to the last run."""
    seeds: int = 3
    """Seeds of --verify; the advice itself gives each run a seed of its own."""
    verify: bool = False
    """Also make the full sweep, and compare the cost of the advised setting with that of the sweep's best."""

    own_lengths = True


def resolve(config: Config, task: jb.Task) -> Config:
    """Fills in the target, shrinks for --quick, and checks."""
    sizes = tuple(2**power for power in range(2, 24, 3) if 2**power <= max(32, task.num_examples // 2))
    short = {"max_probes": 9, "evaluations_per_epoch": 4, "seeds": 2, "batch_sizes": sizes, "learning_rates": LEARNING_RATES[::2]}
    config = fill_schedule(fill_target(for_quick(config, **short), task))
    check_positive(config, "epochs", "evaluations_per_epoch", "max_probes", "budget", "seeds", "batch_sizes", "learning_rates")
    return config


def measure(config: Config, task: jb.Task, run: RunFolder, console: Console) -> None:
    """Makes the measurements that are not in the run folder yet: the setting, the times of an update, then run after run."""
    by_rate = make_scheduled(config)
    question = Question(
        config.target or "",
        by_rate,
        objective=config.objective,
        batch_sizes=config.batch_sizes,
        learning_rates=config.learning_rates or LEARNING_RATES,
        longest=jb.epochs(config.epochs),
        evaluations_per_epoch=config.evaluations_per_epoch,
        target=config.device,
        memory=config.memory,
        budget=config.budget,
        max_probes=config.max_probes,
        measure_noise=not config.quick,
    )
    with progress_bar(console) as progress:
        bar = progress.add_task("runs", total=config.max_probes, rate="looking at the task")

        def on_event(event: Event) -> None:
            if isinstance(event, str):
                progress.update(bar, rate=event)
                return
            run.append(records.write(event))
            if isinstance(event, Ran):
                progress.update(bar, completed=event.number + 1)

        advice = answer(task, question, on_event, records.read_begun(run.records))
    if not run.find(kind="throughput"):
        raise ValueError(f"budget={config.budget:g} seconds were over before an update was timed: give more.")
    if config.verify and advice.batch_size is not None:
        advise_verify.verify(config, task, by_rate, advice, run, console)


def study(config: Config, console: Console) -> None:
    """Measures what is missing, then shows what the files hold."""
    task, _ = load_choosing_task(config)
    task = few_for_quick(config, task, 600)
    config = resolve(config, task)
    run = open_study("advise", config, console, task)
    measure(config, task, run, console)
    show_results(console, config, run, report, figure)
    advice = records.read_advice(run.records)
    if advice.batch_size is not None:
        if config.task is None and config.dataset in TEXTS:
            (advised,) = (choice for choice in advice.choices if choice.batch_size == advice.batch_size)
            console.print(laws.beside(task, advised.examples.value * SEQUENCE_LENGTH, SEQUENCE_LENGTH), soft_wrap=True)
        report.print_code(console, advice.snippet(scheduled_code(config)))


def main(args: Sequence[str] | None = None) -> None:
    """The command line; --laws, which trains nothing, --command and --within have other flags."""
    given = sys.argv[1:] if args is None else args
    if "--laws" in given:
        laws.main(args)
    elif any(flag.partition("=")[0] == "--command" for flag in given):
        command.main(args)
    elif any(flag.partition("=")[0] in ("--within", "--horizon") for flag in given):
        within.main(args)
    else:
        run_study(Config, question, study, args)


if __name__ == "__main__":
    main()
