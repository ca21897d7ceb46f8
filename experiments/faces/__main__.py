"""The study: its flags, what it measures and in which order. Its question stands in the docstring of the package."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console

from experiments.faces import __doc__ as question
from experiments.faces import report
from experiments.faces.cost import measure_memory, measure_times
from experiments.faces.identities import sources_of
from experiments.faces.report import chosen_rate
from experiments.faces.training import embeddings_of, init_params, make_arm_run, make_order, verification
from experiments.harness.command_line import for_quick
from experiments.harness.optimizers import OptimizerFlags, fill_optimizer, kind_of
from experiments.harness.study import StudyConfig, check_positive, open_study, run_study, show_results
from experiments.harness.tuned_runs import measure_arm
from jaxbatch.data import load_dataset
from jaxbatch.data.held_out import hold_out
from jaxbatch.results.records import RunFolder
from jaxbatch.results.report import progress_bar

RATES = (0.003, 0.01, 0.03, 0.1)  # of Adam
FIRST_IDENTITY = {"held_out": 1 << 24, "test": 1 << 25}  # numbers that no training set reaches


@dataclasses.dataclass(frozen=True)
class Config(OptimizerFlags, StudyConfig):
    """Flags of the study."""

    dataset: Literal["digits"] = "digits"
    """Data set whose images identities are made of: digits (embedded)."""
    identities: int = 1000
    """Identities that are learned."""
    passes: float = 80
    """Examples of each identity that a run sees; rounded up to whole batches of the largest size."""
    batch_sizes: tuple[int, ...] = (256, 4096)
    """Batch sizes; each divides the largest one."""
    losses: tuple[Literal["softmax", "cosface", "arcface"], ...] = ("softmax", "cosface", "arcface")
    """Losses: softmax (of scaled cosines, without a margin), cosface and arcface (with their margins)."""
    margin: float = 0.2
    """Margin of the cosine (CosFace), or of the angle in radians (ArcFace)."""
    scale: float = 16.0
    """Factor by which cosines are multiplied."""
    optimizer: str = "adam"
    """Optimizer: sgd, momentum, nesterov, rmsprop, adam, adamw, lion, lars, lamb, muon; or a function of your own, learning rate ->
    optimizer, as my_optimizer.py:make_optimizer."""
    learning_rates: tuple[float, ...] | None = None
    """Learning rates that are tried for every loss and batch size. Default: 0.003, 0.01, 0.03 and 0.1 for Adam; else two in each
    power of ten, over the powers that suit the optimizer."""
    choosing_seeds: int = 1
    """Number of seeds with which rates are chosen. They differ from the seeds of the reported runs."""
    seeds: int = 3
    """Number of seeds of the reported runs; each has its own initial weights, order and examples."""
    chunk_size: int = 512
    """Largest number of classes that are worked on at a time."""
    microbatch_size: int = 4096
    """Largest number of examples that are encoded at a time."""
    verified: int = 300
    """Identities that are verified, with 4 examples each."""
    false_accept_rate: float = 0.001
    """Share of the pairs of two different identities that is accepted. It sets the threshold at which true accepts are counted."""
    cost_rounds: int = 5
    """Rounds in which the gradient is timed, in chunks and with all logits at once."""
    huge_updates: int = 0
    """Updates of Adam with 65,536 examples of 100,000 identities, made in a process of their own, whose memory is measured; 0: none."""


def load(config: Config) -> dict[str, jax.Array]:
    """The digits of which identities are made: other ones for training, for choosing and for the report."""
    whole = load_dataset(config.dataset, data_dir=config.data_dir)
    choosing = hold_out(whole)
    parts = {"train": choosing.train_images, "held_out": choosing.test_images, "test": whole.test_images}
    return {part: sources_of(images) for part, images in parts.items()}


def resolve(config: Config) -> Config:
    """Shrinks for --quick, and checks."""
    rates = RATES if config.optimizer == "adam" else kind_of(config).rates
    short: dict[str, Any] = {"passes": 8, "identities": 200, "seeds": 2, "verified": 100, "cost_rounds": 2, "losses": ("softmax", "cosface")}
    config = fill_optimizer(for_quick(config, **short, batch_sizes=(256,), learning_rates=rates[1::2]))
    config = dataclasses.replace(config, learning_rates=config.learning_rates or rates)
    ordered = {name: tuple(sorted(set(getattr(config, name)))) for name in ("batch_sizes", "learning_rates")}
    config = dataclasses.replace(config, **ordered)
    check_positive(
        config, "identities", "passes", "batch_sizes", "learning_rates", "scale", "choosing_seeds", "seeds", "chunk_size", "microbatch_size"
    )
    check_positive(config, "cost_rounds")
    if config.verified < 2:
        raise ValueError(f"--verified {config.verified} must be at least 2: pairs of two identities are needed.")
    if not config.losses:
        raise ValueError("--losses needs at least one of softmax, cosface, arcface.")
    if not 0 <= config.margin < 1:
        raise ValueError(f"--margin {config.margin} must be at least 0 and below 1.")
    if not 0 < config.false_accept_rate < 1:
        raise ValueError(f"--false-accept-rate {config.false_accept_rate} must be above 0 and below 1.")
    if config.huge_updates < 0:
        raise ValueError(f"--huge-updates {config.huge_updates} must be at least 0.")
    for size in config.batch_sizes:
        if max(config.batch_sizes) % size:
            raise ValueError(f"--batch-sizes {size} must divide the largest size, {max(config.batch_sizes)}, so that all see equally many examples.")
    return config


def examples_of(config: Config) -> int:
    """The examples that every run sees."""
    largest = max(config.batch_sizes)
    return int(-(-config.passes * config.identities // largest)) * largest


def judge(config: Config, params, sources: dict[str, jax.Array], part: str) -> dict[str, float]:
    """Verification of the identities of a part."""
    embeddings = embeddings_of(params, sources[part], FIRST_IDENTITY[part], count=config.verified, examples=4)
    return verification(np.asarray(embeddings), config.false_accept_rate)


def measure_loss(config: Config, sources: dict[str, jax.Array], loss: str, batch_size: int, run: RunFolder, progress, bar) -> None:
    """Chooses the rate of a loss and a size, and trains the reported seeds."""
    total = examples_of(config)

    def start(seed):
        order = make_order(seed, config.identities, batch_size, total)
        return sources["train"], init_params(jax.random.key(seed), config.identities), order

    def show(seconds=None):
        progress.update(bar, advance=1, **({} if seconds is None else {"rate": f"{total / seconds:,.0f} examples/s"}))

    measure_arm(
        config,
        run,
        {"batch_size": batch_size, "loss_name": loss},
        make_arm_run(config, loss, batch_size, total // batch_size),
        start,
        lambda params, part: judge(config, params, sources, part),
        lambda records: chosen_rate(records, batch_size, loss),
        show,
    )


def measure_huge(config: Config, run: RunFolder) -> None:
    """Some updates of the largest case, in a process of their own, because the peak of memory holds for a whole process."""
    if config.huge_updates and not run.find(kind="huge"):
        command = [sys.executable, "-m", "experiments.faces.cost", str(config.huge_updates), *(["--quick"] if config.quick else [])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"the process of --huge-updates {config.huge_updates} ended with exit code {done.returncode}: {done.stderr[-300:]}")
        run.append({"kind": "huge", **json.loads(done.stdout.splitlines()[-1])})


def study(config: Config, console: Console) -> None:
    """Measures what is missing, then shows what the files hold."""
    config = resolve(config)
    sources = load(config)
    run = open_study("faces", config, console)
    with progress_bar(console) as progress:
        arms = [(loss, size) for loss in config.losses for size in config.batch_sizes]
        bar = progress.add_task("runs", total=len(arms) * (len(config.learning_rates) * config.choosing_seeds + config.seeds), rate="")
        if not run.find(kind="untrained"):
            run.append({"kind": "untrained", **judge(config, init_params(jax.random.key(0), 1), sources, "test")})
        for arm in arms:
            measure_loss(config, sources, *arm, run, progress, bar)
    measure_times(config, sources["train"], run)
    measure_memory(config, sources["train"], run)
    measure_huge(config, run)
    show_results(console, config, run, report)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    run_study(Config, question, study, args)


if __name__ == "__main__":
    main()
