"""The study: its flags, what it measures and in which order. Its question stands in the docstring of the package."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import jaxbatch as jb
from experiments.batch_shape import __doc__ as question
from experiments.batch_shape import report
from experiments.batch_shape.report import window
from experiments.harness.command_line import for_quick
from experiments.harness.optimizers import OptimizerFlags, fill_optimizer, kind_of, make_optimizer
from experiments.harness.resuming import first_missing_round
from experiments.harness.study import StudyConfig, check_positive, open_study, run_study, show_results
from jaxbatch.machine.timing import timed_rounds
from jaxbatch.results.records import Record, RunFolder
from jaxbatch.results.report import progress_bar
from jaxbatch.training.steps import make_task_step
from jaxbatch.training.train_state import init_state

MODELS = {"simple_cnn": jb.SimpleCNN, "mlp": jb.MLP}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Config(OptimizerFlags, StudyConfig):
    """Flags of the study."""

    centres: tuple[int, ...] = (64, 128, 256, 512)
    """Powers of two; each is timed among its neighbours."""
    models: tuple[str, ...] = ("simple_cnn", "mlp")
    """Networks: simple_cnn, mlp (784-1024-1024-10)."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Types that the networks compute in; parameters are float32."""
    rounds: int = 30
    """Rounds of the measurement; each times every size once, in random order."""
    seeds: int = 1
    """Not used by this study: it repeats its measurements in rounds, not with seeds."""

    sgd_momentum = 0.5


def resolve(config: Config, num_examples: int) -> Config:
    """Shrinks for --quick, and checks."""
    config = fill_optimizer(for_quick(config, centres=(64,), dtypes=("float32",), models=("mlp",), rounds=4))
    check_positive(config, "centres", "rounds")
    for flag, chosen, known in (("models", config.models, MODELS), ("dtypes", config.dtypes, DTYPES)):
        if not chosen or not set(chosen) <= set(known):
            raise ValueError(f"--{flag} {' '.join(chosen)}: choose from {', '.join(known)}.")
    for centre in config.centres:
        if centre < 32 or centre & (centre - 1):
            raise ValueError(f"--centres {centre} must be a power of two of at least 32.")
        if max(window(centre)) > num_examples:
            raise ValueError(f"--centres {centre} needs {max(window(centre))} examples; the data set has {num_examples}.")
    return dataclasses.replace(config, centres=tuple(sorted(set(config.centres))))


def compile_step(config: Config, dataset: jb.Dataset, model: str, dtype: str, batch_size: int) -> tuple[Any, tuple]:
    """A compiled training step on a batch of this size, and its arguments."""
    task = jb.classification_task(MODELS[model](num_classes=dataset.num_classes, dtype=DTYPES[dtype]), dataset)
    optimizer = make_optimizer(config)(kind_of(config).rate)
    state = init_state(task, optimizer, 0)
    batch = jax.tree.map(lambda leaf: leaf[:batch_size], task.train_data)
    return make_task_step(task, optimizer, batch_size).lower(state, batch).compile(), (state, batch)


def measure(config: Config, dataset: jb.Dataset, run: RunFolder, console: Console) -> Iterator[Record]:
    """Measures the memory of every step, then the times: one record for each round, model, type and size."""
    sizes = sorted(set().union(*(window(centre) for centre in config.centres)))
    pairs = [(model, dtype) for model in config.models for dtype in config.dtypes]
    per_round = len(sizes) * len(pairs)
    done = first_missing_round(run.find(kind="time"), config.rounds, model=config.models, dtype=config.dtypes, batch_size=sizes)
    if done >= config.rounds:
        return
    known = {(r["model"], r["dtype"], r["batch_size"]) for r in run.find(kind="memory")}
    kept = {(r["round"], r["model"], r["dtype"], r["batch_size"]) for r in run.find(kind="time")}
    functions = {}
    with progress_bar(console) as progress:
        bar = progress.add_task("compiling", total=per_round, rate="")
        for model, dtype in pairs:
            for size in sizes:
                program, arguments = compile_step(config, dataset, model, dtype, size)
                functions[model, dtype, size] = lambda program=program, arguments=arguments: program(*arguments)
                if (model, dtype, size) not in known:
                    key_fields = {"model": model, "dtype": dtype, "batch_size": size}
                    yield {"kind": "memory", **key_fields, "bytes": jb.program_memory(program)}
                progress.update(bar, advance=1)
        progress.remove_task(bar)
        bar = progress.add_task("timing", total=config.rounds, completed=done, rate="")
        for number, times in enumerate(timed_rounds(functions, config.rounds - done, seed=done), done):
            for (model, dtype, size), ms in times.items():
                if (number, model, dtype, size) not in kept:
                    yield {"kind": "time", "round": number, "model": model, "dtype": dtype, "batch_size": size, "ms": ms}
            progress.update(bar, advance=1)


def study(config: Config, console: Console) -> None:
    """Measures what is missing, then shows what the files hold."""
    dataset = jb.load_dataset(config.dataset, data_dir=config.data_dir)
    config = resolve(config, len(dataset.train_labels))
    run = open_study("batch_shape", config, console)
    for record in measure(config, dataset, run, console):
        run.append(record)
    show_results(console, config, run, report)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    run_study(Config, question, study, args)


if __name__ == "__main__":
    main()
