"""Runs of a fixed length: which batch size and rate end best, how large the batch may be, and what a run too long to repeat wants."""

import dataclasses
import re
from collections.abc import Sequence

from rich.console import Console

import jaxbatch as jb
from experiments.advise import laws, within_figure, within_records, within_report
from experiments.advise.report import print_code
from experiments.harness.command_line import for_quick
from experiments.harness.lengths import read_length
from experiments.harness.optimizers import OptimizerFlags, fill_optimizer, is_named, kind_of
from experiments.harness.schedules import ScheduleFlags, fill_schedule, make_scheduled, scheduled_code
from experiments.harness.study import TaskConfig, check_positive, open_study, run_study, show_results
from experiments.harness.target import PROTOCOLS
from experiments.harness.task import SEQUENCE_LENGTH, Network, few_for_quick, load_choosing_task
from jaxbatch.advice.end_advising import EndEvent, EndRan, answer_within
from jaxbatch.advice.end_lengths import Seconds
from jaxbatch.advice.end_request import EndQuestion, as_metric
from jaxbatch.advice.request import LEARNING_RATES
from jaxbatch.data import TEXTS
from jaxbatch.gradients.run_lengths import takes_num_steps
from jaxbatch.results.records import RunFolder
from jaxbatch.results.report import progress_bar
from jaxbatch.schedules.named_rates import RateName
from jaxbatch.training.goals import metric_names

QUESTION = """Which batch size and learning rate end best when the length of the run is fixed, and how large may the batch be?

Short runs, each with the schedule of its own length, come first, then longer ones, then whole ones. All enter one law of what a run ends
with, by batch size, rate and length. With --horizon the answer is for a run that is too long to be made: the law is read there.

    python -m experiments.advise --within 5epochs --schedule cosine
    python -m experiments.advise --within 5epochs --horizon 40epochs --optimizer adamw --target "loss<"
    python -m experiments.advise --within 20seconds
"""


@dataclasses.dataclass(frozen=True)
class Config(ScheduleFlags, OptimizerFlags, TaskConfig):
    """Flags with --within."""

    within: str = "5epochs"
    """The length of the run: such as 5epochs, 50000examples, 1e6tokens, 2000steps or 600seconds (of training, without compilation)."""
    horizon: str | None = None
    """The length of the run that the answer is for, if it is too long to be made here; runs are made up to --within."""
    model: Network = "simple_cnn"
    """The network: the study's convolutions, one hidden layer of 128 units, or a small transformer for texts."""
    optimizer: str = "momentum"
    """Optimizer: sgd, momentum, nesterov, rmsprop, adam, adamw, lion, lars, lamb, muon; or a function of your own, learning rate ->
    optimizer, or (learning rate, updates) -> optimizer, as my_optimizer.py:make_optimizer."""
    schedule: RateName = "cosine"
    """The learning rate along a run: constant; cosine or linear down to 0; wsd, which falls to 0 in the last fifth; step, a tenth from a
    half and a hundredth from three quarters on. It is stretched to the length of each run."""
    target: str | None = None
    """Metric on the held-out part and its direction, without a value, as "accuracy>" or "loss<" (quoted, because of the shell). Default:
    that of the data set's usual target. With --task: loss< if there is one."""
    batch_sizes: tuple[int, ...] | None = None
    """Batch sizes to choose from. Default: powers of two up to half the training set."""
    learning_rates: tuple[float, ...] | None = None
    """Learning rates to choose from. Default: four in each power of ten, from 0.0001 to 3.16."""
    full_runs: float = 8.0
    """What all runs together may cost, in runs of the length --within."""
    memory: str | None = None
    """Memory that a step may need, such as 8GiB. Default: what the device has."""
    budget: float | None = None
    """Largest number of seconds from the call on; when they are over, no further run begins."""
    seeds: int = 1
    """Always 1: the search gives every run a seed of its own."""
    validation_seed: int = 0
    """Seed by which a sixth of the training set is held out for validation."""

    own_lengths = True


def resolve(config: Config, task: jb.Task) -> Config:
    """Fills in optimizer, schedule and metric, shrinks for --quick, and checks."""
    sizes = tuple(2**power for power in range(3, 24, 2) if 2**power <= max(32, task.num_examples // 8))
    config = for_quick(config, full_runs=3.0, batch_sizes=sizes, learning_rates=LEARNING_RATES[::2], within="2epochs")
    config = fill_optimizer(config)
    if not is_named(config) and takes_num_steps(kind_of(config).make):
        config = dataclasses.replace(config, schedule="constant")  # it has its own
    config = fill_schedule(config)
    if config.seeds != 1:
        raise ValueError(f"--seeds {config.seeds}: the search gives every run a seed of its own; leave the flag out.")
    check_positive(config, "full_runs", "budget", "batch_sizes", "learning_rates")
    names = metric_names(task)
    usual = None if config.task else PROTOCOLS[config.dataset][1]
    target = config.target or (re.split("(?<=[<>])", usual)[0] if usual else "loss<" if "loss" in names else None)
    if target is None:
        raise ValueError(f"--target is needed: give a metric ({', '.join(names)}) and its direction, as --target '{names[0]}<'.")
    try:
        metric = as_metric(target)
    except ValueError:
        raise ValueError(f"--target {target} must name a metric and its direction without a value, as 'accuracy>' or 'loss<'.") from None
    if metric.name not in names:
        raise ValueError(f"--target {target}: the metrics are {', '.join(names)}.")
    for flag, text in (("--within", config.within), ("--horizon", config.horizon)):
        if text is not None and isinstance(read_length(text, flag), Seconds) and (flag == "--horizon" or config.horizon is not None):
            raise ValueError(f"{flag} {text}: with a horizon, both lengths are in epochs, examples, tokens or steps.")
    return dataclasses.replace(config, target=str(metric))


def measure(config: Config, task: jb.Task, run: RunFolder, console: Console) -> None:
    """Makes the runs that are not in the run folder yet."""
    horizon = None if config.horizon is None else read_length(config.horizon, "--horizon")
    assert not isinstance(horizon, Seconds)
    question = EndQuestion(
        config.target or "",
        make_scheduled(config),
        read_length(config.within, "--within"),
        horizon,
        batch_sizes=config.batch_sizes,
        learning_rates=config.learning_rates or LEARNING_RATES,
        full_runs=config.full_runs,
        memory=config.memory,
        budget=config.budget,
    )
    with progress_bar(console) as progress:
        bar = progress.add_task("runs", total=None, rate="looking at the task")

        def on_event(event: EndEvent) -> None:
            if isinstance(event, str):
                progress.update(bar, rate=event)
                return
            run.append(within_records.write(event))
            if isinstance(event, EndRan):
                progress.update(bar, completed=event.number + 1)

        answer_within(task, question, on_event, within_records.read_begun(run.records))


def study(config: Config, console: Console) -> None:
    """Measures what is missing, then shows what the files hold."""
    task, _ = load_choosing_task(config)
    task = few_for_quick(config, task, 600)
    config = resolve(config, task)
    run = open_study("advise_within", config, console, task)
    measure(config, task, run, console)
    show_results(console, config, run, within_report, within_figure)
    advice = within_report.read_advice(config, run.records)
    if advice.batch_size is not None:
        if config.task is None and config.dataset in TEXTS:
            num_tokens = next(one.num_steps * one.batch_size for one in advice.choices if one.batch_size == advice.batch_size) * SEQUENCE_LENGTH
            console.print(laws.beside(task, num_tokens, SEQUENCE_LENGTH), soft_wrap=True)
        print_code(console, advice.snippet(scheduled_code(config), with_steps=takes_num_steps(make_scheduled(config))))


def main(args: Sequence[str] | None = None) -> None:
    """The command line with --within."""
    run_study(Config, QUESTION, study, args)
