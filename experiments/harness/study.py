"""What all studies share: flags and their checks, the run folder, the order of the output."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import ClassVar, TypeVar

import jax
import tyro
from rich.console import Console

import jaxbatch
from experiments.harness.command_line import one_line_errors, parse
from experiments.harness.optimizers import OptimizerFlags, fill_optimizer, is_named
from experiments.harness.task import DEEP, SEQUENCE_LENGTH, Network
from experiments.harness.user_task import describe_user_optimizer, describe_user_task, title_of
from jaxbatch.data import TEXTS
from jaxbatch.results.records import Record, RunFolder, describe_commit, open_run

Config = TypeVar("Config", bound="StudyConfig")
BATCH_SIZES, LARGEST_QUICK = (1, 6, 60, 600, 6000), 600


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """The flags that all studies have."""

    dataset: str = "digits"
    """Data set: digits (embedded), mnist, fashion_mnist, kmnist, cifar10, cifar100; with --model transformer also the texts
    generated (embedded) and tiny_shakespeare. docs/data.md lists where files may be."""
    data_dir: str | None = None
    """Folder with the data set's official files, or a prepared TFDS folder. Default: JAXBATCH_DATA_DIR."""
    seeds: int = 10
    """Number of seeds; each has its own initial weights and its own order of examples."""
    output_dir: str = "results"
    """Folder in which run folders are made."""
    quick: bool = False
    """Run a short version with fewer epochs, seeds and repeats, except where flags say otherwise. Its numbers only show that the study works."""
    resume: bool = True
    """Continue from the measurements that an earlier call of the same command has made."""
    overwrite: bool = False
    """Remove the measurements of an earlier call first."""
    keep_compiled: bool = True
    """Keep compiled programs in the user's cache folder, so that the next call starts without compiling."""
    check_backend: bool = True
    """Stop if this machine fails one of jaxbatch.check_backend's checks, which take a second."""
    given: tyro.conf.Suppress[tyro.conf.Fixed[tuple[str, ...]]] = ()
    """The fields whose flags are given, which --quick does not change; no flag itself."""

    trains: ClassVar[bool] = True  # whether what is compiled is there to be run
    long_to_compile: ClassVar[tuple[str, ...]] = DEEP  # networks whose few examples take less time with --quick than the compiler


@dataclasses.dataclass(frozen=True)
class TaskConfig(StudyConfig):
    """The flags of studies that also take a task of the user's own."""

    task: str | None = None
    """A task of your own in place of data set and network, as my_task.py:make_task: a function of that file, which takes no
    arguments and returns a jaxbatch.Task. docs/own_model.md shows one."""


@dataclasses.dataclass(frozen=True)
class SizesConfig(OptimizerFlags, TaskConfig):
    """The flags of studies at several batch sizes."""

    model: Network = "simple_cnn"
    """The network: the study's convolutions, one hidden layer of 128 units, or a small transformer for texts."""
    batch_sizes: tuple[int, ...] | None = None
    """Batch sizes. Default: those of 1, 6, 60, 600 and 6000 that are not larger than the data set."""

    sgd_momentum = 0.5


_SINCE = {"schedule": "constant", "warmup": "0", "within": None}  # flags that are newer than run folders, and what these were made with
_NOT_RESULTS = ("given", "data_dir", "output_dir", "resume", "overwrite", "keep_compiled", "check_backend")  # change no number


def open_study(name: str, config: StudyConfig, console: Console, task: jaxbatch.Task | None = None) -> RunFolder:
    """The run folder of a study's configuration; prints a line if it continues from earlier measurements.

    ``task`` is the user's own: its file and data are a part of the configuration, in place of data set and network.
    """
    fields = {key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_RESULTS and _SINCE.get(key) != value}
    if fields.pop("task", None) is not None:
        fields = {key: value for key, value in fields.items() if key not in ("dataset", "model")} | describe_user_task(config.task, task)
    if fields.get("optimizer") is not None and not is_named(config):
        fields |= describe_user_optimizer(fields["optimizer"])
    fields["jaxbatch"] = jaxbatch.__version__
    facts = {"backend_checks": check_machine(config)}
    run = open_run(config.output_dir, name, fields, resume=config.resume, overwrite=config.overwrite, facts=facts)
    if run.records:
        then, now = run.provenance.get("commit"), describe_commit()["commit"]
        note = "" if then == now else f", begun at commit {then} (now {now})"
        console.print(f"Continuing from {len(run.records)} records in {run.path}{note}; --overwrite starts anew.", soft_wrap=True)
    return run


def check_machine(config: StudyConfig) -> dict[str, dict[str, float | bool | None]]:
    """What :func:`jaxbatch.check_backend` found, for the run folder.

    Raises:
        ValueError: a check failed, and --no-check-backend is not given.
    """
    checks = jaxbatch.check_backend()
    failed = [check for check in checks if not check.passed]
    if failed and config.check_backend:
        failures = "; ".join(f"{check.name}: relative error {check.error:.1g}, bound {check.bound:.1g}" for check in failed)
        raise ValueError(
            f"this machine computes wrong numbers ({failures}). python -m experiments.cross_check says more; --no-check-backend runs anyway."
        )
    finite = lambda number: number if math.isfinite(number) else None  # JSON has no NaN
    return {check.name: {"error": finite(check.error), "bound": check.bound, "passed": check.passed} for check in checks}


def resolve_sizes(config: Config, num_examples: int) -> Config:
    """Fills in batch sizes and optimizer, and checks the flags that all studies at several batch sizes share. --quick takes two sizes.

    Raises:
        ValueError: a batch size below 1 or above the data set, a wrong optimizer, or no seed.
    """
    config = fill_optimizer(config)
    check_positive(config, "seeds")
    sizes = resolve_batch_sizes(config.batch_sizes, num_examples)
    if config.quick and config.batch_sizes is None:
        sizes = tuple(size for size in sizes if size <= LARGEST_QUICK)[-2:]
    return dataclasses.replace(config, batch_sizes=sizes)


def resolve_batch_sizes(batch_sizes: Sequence[int] | None, num_examples: int) -> tuple[int, ...]:
    """The given sizes, sorted and without repeats; or those of the MNIST study that are not larger than the data set.

    Example:
        >>> resolve_batch_sizes(None, 1442), resolve_batch_sizes((60, 1, 60), 1442)
        ((1, 6, 60, 600), (1, 60))
    """
    if batch_sizes is None:
        return tuple(size for size in BATCH_SIZES if size <= num_examples)
    for size in batch_sizes:
        if size < 1:
            raise ValueError(f"--batch-sizes {size} must be at least 1.")
        if size > num_examples:
            raise ValueError(f"--batch-sizes {size} is larger than the data set ({num_examples} training examples).")
    if not batch_sizes:
        raise ValueError("--batch-sizes needs at least one number.")
    return tuple(sorted(set(batch_sizes)))


def check_positive(config: StudyConfig, *names: str) -> None:
    """Raises a ValueError for the first named field that is not above 0, or that contains a value not above 0."""
    for name in names:
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        if isinstance(value, tuple) and not value:
            raise ValueError(f"--{name.replace('_', '-')} needs at least one number.")
        for one in values:
            if not (one > 0 and math.isfinite(one)):
                raise ValueError(f"--{name.replace('_', '-')} {one} must be above 0 and finite.")


def size_label(batch_size: int) -> str:
    """A batch size as it is written in figures.

    Example:
        >>> size_label(600), size_label(6000), size_label(1442)
        ('600', '6k', '1442')
    """
    return f"{batch_size // 1000}k" if batch_size >= 1000 and batch_size % 1000 == 0 else str(batch_size)


def size_cell(config: StudyConfig, batch_size: int) -> str:
    """A batch size as it is written in tables; of a text in sequences and in tokens.

    Example:
        >>> size_cell(TaskConfig(), 6000), size_cell(TaskConfig(dataset="generated"), 16)
        ('6,000', '16 (1,024 tokens)')
    """
    is_text = getattr(config, "task", None) is None and config.dataset in TEXTS
    return f"{batch_size:,}" + (f" ({batch_size * SEQUENCE_LENGTH:,} tokens)" if is_text else "")


def describe_setting(console: Console, config: StudyConfig, provenance: Record, *rest: str) -> None:
    """Prints one line above the tables: data set, network, setting, machine."""
    machine = f"{provenance['device']}, {provenance['num_cores']} cores, jax {provenance['jax']}"
    seeds = [f"{config.seeds} seeds"] if config.seeds > 1 else []
    console.print(f"\n{', '.join([setting_of(config), *rest, *seeds])}; {machine}", soft_wrap=True)


def data_of(config: StudyConfig) -> str:
    """The data set, or ``FILE.py:FUNCTION`` for a task of the user's own."""
    task = getattr(config, "task", None)
    return title_of(task) if task else config.dataset


def setting_of(config: StudyConfig) -> str:
    """What is trained, above tables and figures: data set and network, or ``FILE.py:FUNCTION``."""
    own = getattr(config, "task", None) or not hasattr(config, "model")
    return data_of(config) if own else f"{data_of(config)}, {config.model}"


def show_results(console: Console, config: StudyConfig, run: RunFolder, report: ModuleType, figure: ModuleType | None = None) -> None:
    """Shows tables, figures and the closing sentences, from the records alone.

    Args:
        console: to print on.
        config: of the study.
        run: its run folder.
        report: the study's report: ``print_tables(console, config, records, provenance)``, ``draw_figure(config, records,
            folder)``, which returns one path or several, and ``verdict(config, records)``.
        figure: the module of ``draw_figure``, if it is not in the report.
    """
    report.print_tables(console, config, run.records, run.provenance)
    drawn = (figure or report).draw_figure(config, run.records, run.path)
    for sentence in report.verdict(config, run.records):
        console.print(sentence, style="bold", soft_wrap=True)
    paths = drawn if isinstance(drawn, list) else [drawn]
    console.print(f"{'Figures' if len(paths) > 1 else 'Figure'}: {', '.join(map(str, paths))}", soft_wrap=True)


@contextlib.contextmanager
def quick_to_compile(config: StudyConfig) -> Iterator[None]:
    """Within it, --quick compiles the networks that take long to compile for a CPU without most optimizations.

    Their few examples take less time than the compiler, which is three times as fast. Where memory is asked for, programs are compiled as they are.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    long = getattr(config, "model", None) in config.long_to_compile and getattr(config, "task", None) is None and config.trains
    if config.quick and long and jax.default_backend() == "cpu":
        jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def run_study(config_type: type[Config], description: str, study: Callable[[Config, Console], None], args: Sequence[str] | None) -> None:
    """Parses the flags, runs the study, and turns an error into one line."""
    config = parse(config_type, description, args)
    with one_line_errors():
        console = Console(highlight=False)
        if config.keep_compiled and jaxbatch.keep_compiled_programs() is None:
            console.print("No compiled programs are kept between runs: no home folder can be written to. Set HOME or XDG_CACHE_HOME.", soft_wrap=True)
        with quick_to_compile(config):
            study(config, console)
