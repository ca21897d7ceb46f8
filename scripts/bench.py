"""How fast jaxbatch is, side by side with what a user would use instead, in one run on one machine.

    python scripts/bench.py train       a training step of SimpleCNN by batch size, against PyTorch eager
    python scripts/bench.py split       K updates from one batch, against a plain step and PyTorch's ways
    python scripts/bench.py gradients   a gradient for each example, against torch.func and opacus
    python scripts/bench.py layers      convolutions one by one, against XLA's own and PyTorch's
    python scripts/bench.py adabatch    steps of AlexNet, ResNet-20 and VGG19_BN, against PyTorch eager
    python scripts/bench.py noise       a step whose noise is measured, against one without
    python scripts/bench.py huge        steps of 100,000 and 1,000,000 images in microbatches, against the microbatch's own steps
    python scripts/bench.py sweep       32 runs in one program, against one after another
    python scripts/bench.py ladder      what a change of batch size costs
    python scripts/bench.py target      SimpleCNN to 98% on MNIST
    python scripts/bench.py startup     importing, --help, a first and a second run
    python scripts/bench.py before --checkout DIR    the same steps by an earlier checkout, in the same rounds

PyTorch and opacus are timed where they are installed: pip install -e '.[bench]'. On a GPU both sides use it.
"""

import dataclasses
import json
import math
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed
os.environ.setdefault("PYTHONPATH", sys.path[0])  # for the processes that it starts

from experiments.environment import settle

if __name__ == "__main__":
    settle()

from typing import Annotated, Literal

import bench_before
import bench_gradients
import bench_huge
import bench_layers
import bench_noise
import bench_startup
import bench_training
import tyro
from rich.console import Console
from side_by_side import report

from experiments.command_line import one_line_errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """The flags that all benchmarks have."""

    rounds: int = 20
    """Rounds; each runs every contender once."""
    json: str | None = None
    """File to which each row is written as one flat JSON record."""


@dataclasses.dataclass(frozen=True)
class Train(Bench):
    """A training step of SimpleCNN, as epochs."""

    batch_sizes: tuple[int, ...] = (1, 6, 60, 600, 6000)
    """Batch sizes."""

    def run(self):
        return bench_training.train(self.rounds, self.batch_sizes)


@dataclasses.dataclass(frozen=True)
class Split(Bench):
    """K optimizer updates from one batch."""

    batch_size: int = 640
    """B."""
    num_groups: int = 10
    """K, a divisor of B."""

    def run(self):
        return bench_gradients.split(self.rounds, self.batch_size, self.num_groups)


@dataclasses.dataclass(frozen=True)
class Gradients(Bench):
    """Per-example gradients."""

    batch_size: int = 640
    """B."""

    def run(self):
        return bench_gradients.gradients(self.rounds, self.batch_size)


@dataclasses.dataclass(frozen=True)
class Layers(Bench):
    """Convolutions one by one."""

    rounds: int = 10
    batch_size: int = 128
    """B."""
    shapes: int | None = None
    """Time only this many shapes, the first ones."""

    def run(self):
        return bench_layers.layers(self.rounds, self.batch_size, bench_layers.SHAPES[: self.shapes])


@dataclasses.dataclass(frozen=True)
class Adabatch(Bench):
    """Training steps of the AdaBatch networks."""

    models: tuple[Literal["alexnet", "resnet20", "vgg19_bn"], ...] = ("alexnet", "resnet20", "vgg19_bn")
    """Networks."""
    batch_size: int = 128
    """B."""
    num_steps: int | None = None
    """Steps per round. Default: about a second's work on two cores; 390 make an epoch of CIFAR-10 at B = 128."""
    bfloat16: bool = False
    """Compute in bfloat16, PyTorch under autocast."""
    compiled_loop: bool = False
    """Also time the steps of a round in one lax.scan, which takes seconds per step on a CPU."""

    def run(self):
        sizes = self.batch_size, self.num_steps
        return bench_training.adabatch(self.rounds, self.models, *sizes, self.bfloat16, self.compiled_loop)


@dataclasses.dataclass(frozen=True)
class Noise(Bench):
    """A training step of SimpleCNN with and without a monitor of its noise."""

    batch_sizes: tuple[int, ...] = (60, 600, 6000)
    """Batch sizes."""

    def run(self):
        return bench_noise.noise(self.rounds, self.batch_sizes)


@dataclasses.dataclass(frozen=True)
class Huge(Bench):
    """Steps on huge batches in microbatches, against plain steps on a microbatch: time per example, and peak memory."""

    rounds: int = 5
    batch_sizes: tuple[int, ...] = (100_000, 1_000_000)
    """Batch sizes; the data set has as many images as the largest."""
    microbatch_size: int = 1000
    """Examples worked on at a time, and the batch of the plain steps."""
    models: tuple[Literal["simple_cnn", "mlp"], ...] = ("simple_cnn", "mlp")
    """Networks."""

    def run(self):
        return bench_huge.huge(self.rounds, self.batch_sizes, self.microbatch_size, self.models)


@dataclasses.dataclass(frozen=True)
class Sweep(Bench):
    """Learning rates × seeds in one program."""

    rounds: int = 3
    rates: int = 8
    """Learning rates."""
    seeds: int = 4
    """Seeds of each."""
    num_examples: int = 6000
    """Examples in an epoch."""
    batch_size: int = 60
    """B."""

    def run(self):
        return bench_training.many_runs(self.rounds, self.rates, self.seeds, self.num_examples, self.batch_size)


@dataclasses.dataclass(frozen=True)
class Ladder(Bench):
    """A schedule's changes of batch size, compiled ahead."""

    num_examples: int = 6144
    """Examples in an epoch."""
    sizes: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    """The schedule's batch sizes."""
    first_epochs: int = 200
    """Epochs at the first size."""
    epochs_each: int = 20
    """Epochs at each of the others."""

    def run(self):
        return bench_training.ladder(self.num_examples, self.sizes, self.first_epochs, self.epochs_each)


@dataclasses.dataclass(frozen=True)
class Target(Bench):
    """From the first step to a test accuracy."""

    dataset: str = "mnist"
    """Data set; the files are found in the same way as in the studies."""
    accuracy: float = 0.98
    """Test accuracy to reach."""
    batch_size: int = 60
    """B."""
    rate: float = 0.1
    """Learning rate."""
    max_epochs: int = 20
    """Largest number of passes over the data."""

    def run(self):
        return bench_training.target(self.dataset, self.accuracy, self.batch_size, self.rate, self.max_epochs)


@dataclasses.dataclass(frozen=True)
class Startup(Bench):
    """Importing and starting, as whole processes."""

    rounds: int = 10

    def run(self):
        return bench_startup.startup(self.rounds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Before(Bench):
    """Compares with the same steps in an earlier checkout of jaxbatch."""

    checkout: str
    """Folder of the earlier checkout."""
    batch_sizes: tuple[int, ...] = (1, 6, 60, 600, 6000)
    """Batch sizes of SimpleCNN's steps."""
    models: tuple[Literal["AlexNet", "ResNet20", "VGG19BN"], ...] = ("AlexNet", "ResNet20", "VGG19BN")
    """Networks whose steps at B = 128 are also compared."""

    def run(self):
        return bench_before.before(self.rounds, self.checkout, self.batch_sizes, self.models)


def finite(row: dict) -> dict:
    """The row with null in place of NaN, such as the interval of a single round, because JSON has no NaN."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def main() -> None:
    """The command line."""
    commands = Train | Split | Gradients | Layers | Adabatch | Noise | Huge | Sweep | Ladder | Target | Startup | Before
    config = tyro.cli(Annotated[commands, tyro.conf.OmitSubcommandPrefixes], description=__doc__)
    with one_line_errors():
        rows = config.run()
        report(rows, Console(highlight=False, width=150))
        if config.json:
            pathlib.Path(config.json).write_text("".join(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows))


if __name__ == "__main__":
    main()
