"""What every study's command line shares: flags, errors in one line, progress, the run folder."""

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro
from rich.console import Console

import jaxbatch
from jaxbatch.data import DATASETS
from jaxbatch.records import RunFolder, describe_commit, open_run

Config = TypeVar("Config", bound="StudyConfig")


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """The flags that all studies have."""

    dataset: str = "digits"
    """Data set: digits (embedded), mnist, fashion_mnist, kmnist; see the README for where files are looked for."""
    data_dir: str | None = None
    """Folder with the data set's official files, or a prepared TFDS folder. Default: JAXBATCH_DATA_DIR."""
    seeds: int = 10
    """Number of seeds; each has its own initial weights and its own order of examples."""
    output_dir: str = "results"
    """Where run folders are made."""
    quick: bool = False
    """A run of seconds: fewer epochs, seeds and repeats. Its numbers show that the study works, no more."""
    resume: bool = True
    """Go on from the measurements that an earlier call of the same command has made."""
    overwrite: bool = False
    """Remove an earlier call's measurements first."""
    keep_compiled: bool = True
    """Keep compiled programs in the user's cache folder, so that the next call starts at once."""


_NOT_RESULTS = ("data_dir", "output_dir", "resume", "overwrite", "keep_compiled")  # flags that do not change any number


def open_study(name: str, config: StudyConfig, console: Console) -> RunFolder:
    """The run folder of a study's configuration; says so when it goes on from earlier measurements."""
    fields = {key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_RESULTS}
    fields["jaxbatch"] = jaxbatch.__version__
    run = open_run(config.output_dir, name, fields, resume=config.resume, overwrite=config.overwrite)
    if run.records:
        then, now = run.provenance.get("commit"), describe_commit()["commit"]
        note = "" if then == now else f", begun at commit {then} (now {now})"
        console.print(f"Going on from {len(run.records)} records in {run.path}{note}; --overwrite starts afresh.", soft_wrap=True)
    return run


def check_positive(config: StudyConfig, *names: str) -> None:
    """Raises a ValueError for the first named field that is not above 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be above 0.")


def parse(config_type: type[Config], description: str, args: Sequence[str] | None = None) -> Config:
    """The configuration from the command line; a wrong flag ends the program with one line and exit code 2."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            config = tyro.cli(config_type, description=description, args=args)
    except SystemExit as error:
        if error.code == 2:
            print(f"error: {_first_paragraph(stderr.getvalue())}", file=sys.stderr)
        raise
    if config.dataset not in DATASETS:
        from jaxbatch.data import load_dataset

        with one_line_errors():
            load_dataset(config.dataset)  # raises, naming the nearest
    return config


def _first_paragraph(box: str) -> str:
    """The message inside tyro's box, without its frame and its repetition of the help text."""
    lines = []
    for line in box.splitlines()[1:]:
        text = line.strip("│ ")
        if not text or set(text) <= {"─"} or text.startswith("╰"):
            break
        lines.append(text)
    return " ".join(lines) or "unreadable command line; see --help"


@contextlib.contextmanager
def one_line_errors():
    """Bad input, missing files, a full disk: one line on stderr and exit code 2. Ctrl-C: exit code 130."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("JAXBATCH_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted: finished measurements are kept; the same command goes on from them.", file=sys.stderr)
        raise SystemExit(130) from None


def run_study(
    config_type: type[Config], description: str, study: Callable[[Config, Console], None], args: Sequence[str] | None
) -> None:
    """Parses, runs, and turns errors into one line."""
    config = parse(config_type, description, args)
    with one_line_errors():
        if config.keep_compiled:
            jaxbatch.keep_compiled_programs()
        study(config, Console(highlight=False))
