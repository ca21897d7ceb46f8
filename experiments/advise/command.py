"""Advice for a training script in any framework: each run is a command, whose looks are read from what it writes."""

import contextlib
import dataclasses
import hashlib
import math
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from experiments.advise import command_report
from experiments.advise.command_runs import CommandRuns, CommandSettings
from experiments.harness.children import stop_all
from experiments.harness.command_line import one_line_errors, parse
from experiments.harness.lengths import read_length
from experiments.harness.study import check_positive
from jaxbatch.advice.advice import Advice
from jaxbatch.advice.advise_runs import advise_runs
from jaxbatch.advice.choices import Objective
from jaxbatch.advice.end_advice import EndAdvice
from jaxbatch.advice.end_advise_runs import advise_runs_within
from jaxbatch.advice.end_lengths import Seconds
from jaxbatch.advice.end_request import as_metric, first_size
from jaxbatch.advice.end_search import race_next
from jaxbatch.advice.request import LEARNING_RATES
from jaxbatch.advice.run_search import next_run
from jaxbatch.batches import Duration
from jaxbatch.results.records import RunFolder, open_run
from jaxbatch.training.goals import as_goal

QUESTION = """Which batch size and learning rate does my training script want, in whatever framework it is written?

Every run is your command, with a batch size, a rate and a seed filled in. Let it print one JSON object a line now and then, such as
{"step": 200, "val_loss": 0.41}; nothing else need change. Runs are made one after another, and ended as soon as they cannot matter.

    python -m experiments.advise --command "python train.py --batch-size {batch_size} --lr {learning_rate} --seed {seed}" --target "val_loss<0.4"
    python -m experiments.advise --command "python train.py --bs {batch_size} --lr {lr} --steps {num_steps}" --target "val_loss<" --within 2000steps
"""
_NOT_RESULTS = ("given", "devices", "silence", "grace", "budget", "output_dir", "resume", "overwrite", "dry_run")  # change no number
_PROGRAMS = (".py", ".sh", ".r", ".R", ".jl", ".lua", ".js", ".yaml", ".yml", ".toml", ".cfg", ".ini")  # files whose change makes another script


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags with --command."""

    command: str
    """The command of a run, quoted, with {batch_size}, {learning_rate} or {lr}, and as you need them {seed}, {num_steps}, {run}, {log}."""
    target: str
    """What to reach, as "val_loss<0.4" or "accuracy>0.9" (quoted, because of the shell); with --within the metric and its direction alone."""
    within: str | None = None
    """The length of a run, if it is fixed: 2000steps, 50000examples, or 5epochs with --num-examples. {num_steps} in the command is its updates."""
    horizon: str | None = None
    """The length that the answer is for, if it is too long to be tried; runs are made up to --within."""
    longest: str | None = None
    """The longest run, should none reach the target sooner, with its unit. Default: until the command ends by itself."""
    num_examples: int | None = None
    """Examples in the training set, for lengths in epochs, and for scripts that print epochs in place of steps."""
    batch_sizes: tuple[int, ...] | None = None
    """Batch sizes to choose from. Default: powers of two from 8 to 1,024, or up to half of --num-examples."""
    learning_rates: tuple[float, ...] | None = None
    """Learning rates to choose from. Default: four in each power of ten, from 0.0001 to 3.16."""
    objective: Objective = "time"
    """What to save: time, examples, or balanced for both."""
    metrics: str | None = None
    """A file to which the command appends what it measures, as JSON lines or, by its name, .csv; {run} may stand in its name."""
    pattern: str | None = None
    """A regular expression for lines of the command's output, with groups such as (?P<step>\\d+) and (?P<val_loss>\\S+)."""
    fields: str | None = None
    """Names of fields that are not the usual ones, as step=iter,seconds=t."""
    silence: float = 600.0
    """Seconds without output after which a run is given up; ten times as many without a look."""
    grace: float = 10.0
    """Seconds from SIGTERM to SIGKILL, where a run is ended."""
    jobs: int = 1
    """Runs at a time, without --within. The next ones begin when all have ended."""
    devices: tuple[str, ...] = ()
    """With --jobs, the device that each run sees, as CUDA_VISIBLE_DEVICES names it: 0 1 2 3."""
    max_probes: int = 40
    """Largest number of runs, without --within."""
    full_runs: float = 8.0
    """What all runs together may cost with --within, in runs of that length."""
    budget: float | None = None
    """Largest number of seconds."""
    dry_run: bool = False
    """Print the first command, and run nothing."""
    output_dir: str = "results"
    """Folder in which run folders are made; each keeps the output of its runs."""
    resume: bool = True
    """Continue from the runs that an earlier call of the same command has made."""
    overwrite: bool = False
    """Remove the runs of an earlier call first."""
    given: tuple[str, ...] = ()
    """The fields whose flags are given."""


def resolve(config: Config) -> Config:
    """Checks the flags that no later part checks."""
    check_positive(config, "jobs", "silence", "grace", "max_probes", "full_runs", "budget", "batch_sizes", "learning_rates", "num_examples")  # type: ignore[arg-type]
    if config.horizon is not None and config.within is None:
        raise ValueError(f"--horizon {config.horizon} needs --within, the longest run that may be made.")
    if config.within is not None and "{num_steps}" not in config.command:
        raise ValueError("--command must hold {num_steps}, the updates of a run, where --within fixes its length.")
    if "{num_steps}" in config.command and config.within is None and config.longest is None:
        raise ValueError("--command holds {num_steps}, the updates of a run: give --longest, such as 5000steps, or leave it out.")
    if config.within is not None and config.longest is not None:
        raise ValueError("--longest and --within exclude each other: with --within, every run has that length.")
    if config.jobs > 1 and config.within is not None:
        raise ValueError(f"--jobs {config.jobs} and --within exclude each other: the search over runs of a fixed length makes one at a time.")
    if config.jobs > 1 and config.metrics is not None and not re.search(r"\{(run|log|seed)\}", config.metrics):
        raise ValueError(f"--metrics {config.metrics} is one file for --jobs {config.jobs} runs at a time: let its name hold {{run}}.")
    if config.devices and len(config.devices) < config.jobs:
        raise ValueError(f"--devices names {len(config.devices)} devices for --jobs {config.jobs} runs at a time.")
    return dataclasses.replace(config, learning_rates=config.learning_rates or LEARNING_RATES)


def length_of(config: Config, name: str) -> Duration | None:
    """The length that a flag gives."""
    text = getattr(config, name)
    length = None if text is None else read_length(text, f"--{name}")
    if isinstance(length, Seconds) or (length is not None and length.unit == "tokens"):
        raise ValueError(f"--{name} {text}: a script's length is counted in steps, examples or epochs.")
    return length


def identity(config: Config) -> dict[str, Any]:
    """What names the run folder: the flags that change a result, and the files that the command names, since an edited script is another one."""
    fields = {key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_RESULTS}
    named = [word for word in shlex.split(config.command) if "{" not in word and word != config.metrics and os.path.isfile(word)]
    programs = [pathlib.Path(word) for word in named if word.endswith(_PROGRAMS) and os.path.getsize(word) < 1 << 20]
    files = {str(path): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in programs}
    return fields | {"files": files}


def measure(config: Config, runs: CommandRuns, run: RunFolder, console: Console) -> Advice | EndAdvice:
    """Makes the runs that are not in the run folder yet; the advice that follows."""
    shared: dict[str, Any] = {name: getattr(config, name) for name in ("batch_sizes", "learning_rates", "num_examples", "budget")}
    with contextlib.ExitStack() as ends:
        ends.callback(stop_all)  # before the threads of --jobs, which wait for their commands, are waited for
        board = ends.enter_context(command_report.Board(console, config))

        def on_run(one: Any, number: int) -> None:
            run.append(command_report.write(one, number))
            board.add(one, number)

        known = command_report.without_last_failures(command_report.read_runs(run.records))
        shared |= {"on_run": on_run, "on_progress": board.say}
        for number, one in known.items():
            board.add(one, number)
        if config.within is None:
            question: dict[str, Any] = {"objective": config.objective, "longest": length_of(config, "longest"), "max_probes": config.max_probes}
            return advise_runs(runs.run, config.target, jobs=config.jobs, known=known, **question, **shared)
        lengths = length_of(config, "within"), length_of(config, "horizon")
        assert lengths[0] is not None
        shared |= {"horizon": lengths[1], "full_runs": config.full_runs, "known": list(known.values())}
        return advise_runs_within(runs.run, config.target, lengths[0], **shared)


def first_command(config: Config, runs: CommandRuns) -> str:
    """The command of the first run."""
    if config.within is None:
        question = command_report.question_of(config)
        following = next_run((), question)
        assert following is not None
        steps = question.num_steps[following.batch_size]
        return shlex.join(runs.words(following.batch_size, following.learning_rate, 0, None if math.isinf(steps) else int(steps)))
    space = command_report.setting_of_lengths(config).space
    first = race_next([], space, first_size(space.payable_steps), config.full_runs)
    assert first is not None
    return shlex.join(runs.words(first.batch_size, first.learning_rate, 0, first.num_steps))


def study(config: Config, console: Console) -> None:
    """Makes the runs that are missing, then shows what the files hold."""
    config = resolve(config)
    metric = as_goal(config.target).metric if config.within is None else as_metric(config.target).name
    settings: dict[str, Any] = {
        name: getattr(config, name) for name in ("metrics", "pattern", "fields", "silence", "grace", "num_examples", "devices")
    }
    if config.dry_run:
        console.print(first_command(config, CommandRuns(CommandSettings(config.command, metric, ".", **settings))), soft_wrap=True, markup=False)
        return
    CommandRuns(CommandSettings(config.command, metric, ".", **settings))  # what cannot work makes no folder
    run = open_run(config.output_dir, "advise_command", identity(config), resume=config.resume, overwrite=config.overwrite)
    if run.records:
        console.print(f"Continuing from {len(run.records)} runs in {run.path}; --overwrite starts anew.", soft_wrap=True)
    runs = CommandRuns(CommandSettings(config.command, metric, run.path / "logs", **settings))
    command_report.show(console, config, run, runs, measure(config, runs, run, console))


def main(args: Sequence[str] | None = None) -> None:
    """The command line with --command."""
    config = parse(Config, QUESTION, sys.argv[1:] if args is None else args)
    with one_line_errors():
        study(config, Console(highlight=False))
