"""The benchmarks' flags; each ``run()`` measures and returns flat records."""

import dataclasses
from typing import Literal

import bench_before
import bench_coupled
import bench_gradients
import bench_huge
import bench_language
import bench_layers
import bench_noise
import bench_startup
import bench_training
import bench_updates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """The flags that all benchmarks have."""

    rounds: int = 20
    """Rounds; each runs every contender once."""
    json: str | None = None
    """File to which each row is written as one flat JSON record."""


@dataclasses.dataclass(frozen=True)
class Train(Bench):
    """A training step of SimpleCNN, timed over whole epochs."""

    batch_sizes: tuple[int, ...] = (1, 6, 60, 600, 6000)
    """Batch sizes."""

    def run(self):
        return bench_training.train(self.rounds, self.batch_sizes)


@dataclasses.dataclass(frozen=True)
class Updates(Bench):
    """An update of SimpleCNN by batch size, as jaxbatch.advise times it."""

    rounds: int = 10
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096, 16_384, 65_536)
    """Batch sizes; the data set has as many images as the largest."""

    def run(self):
        return bench_updates.updates(self.rounds, self.batch_sizes)


@dataclasses.dataclass(frozen=True)
class Split(Bench):
    """K optimizer updates from one batch."""

    batch_size: int = 640
    """Batch size."""
    num_groups: int = 10
    """Number of updates K, a divisor of the batch size."""

    def run(self):
        return bench_gradients.split(self.rounds, self.batch_size, self.num_groups)


@dataclasses.dataclass(frozen=True)
class Gradients(Bench):
    """Per-example gradients."""

    batch_size: int = 640
    """Batch size."""

    def run(self):
        return bench_gradients.gradients(self.rounds, self.batch_size)


@dataclasses.dataclass(frozen=True)
class Coupled(Bench):
    """A contrastive loss in microbatches, and a softmax in chunks of classes."""

    rounds: int = 10
    batch_size: int = 1024
    """Batch size; there are 16 times as many classes."""
    parts: int = 8
    """Examples in a microbatch, and classes in a chunk."""

    def run(self):
        return bench_coupled.coupled(self.rounds, self.batch_size, self.parts)


@dataclasses.dataclass(frozen=True)
class Layers(Bench):
    """Convolutions one by one."""

    rounds: int = 10
    batch_size: int = 128
    """Batch size."""
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
    """Batch size."""
    num_steps: int | None = None
    """Steps per round. Default: about a second's work on two cores; 390 make an epoch of CIFAR-10 at B = 128."""
    bfloat16: bool = False
    """Compute in bfloat16; PyTorch does so by autocast."""
    compiled_loop: bool = False
    """Also time the steps of a round in one lax.scan, which takes seconds per step on a CPU."""

    def run(self):
        sizes = self.batch_size, self.num_steps
        return bench_training.adabatch(self.rounds, self.models, *sizes, self.bfloat16, self.compiled_loop)


@dataclasses.dataclass(frozen=True)
class Language(Bench):
    """Training steps of a transformer on sequences of tokens, and a gradient for each sequence."""

    batch_sizes: tuple[int, ...] = (8, 64, 256)
    """Batch sizes, in sequences."""
    sequence_length: int = 128
    """Tokens to predict in a sequence."""
    bfloat16: bool = False
    """Compute in bfloat16; PyTorch does so by autocast."""

    def run(self):
        return bench_language.language(self.rounds, self.batch_sizes, self.sequence_length, self.bfloat16)


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
    """Batch sizes; the data set has as many images as the batch."""
    microbatch_size: int = 1000
    """Examples worked on at a time, and the batch of the plain steps."""
    budget: str | None = None
    """Memory, such as 1GiB; the huge step then takes the microbatch that jaxbatch.memory_plan chooses."""
    models: tuple[Literal["simple_cnn", "mlp"], ...] = ("simple_cnn", "mlp")
    """Networks."""

    def run(self):
        return bench_huge.huge(self.rounds, self.batch_sizes, self.microbatch_size, self.models, self.budget)


@dataclasses.dataclass(frozen=True)
class Sweep(Bench):
    """Learning rates × seeds in one program."""

    rounds: int = 3
    rates: int = 8
    """Learning rates."""
    seeds: int = 4
    """Number of seeds for each learning rate."""
    num_examples: int = 6000
    """Examples in an epoch."""
    batch_size: int = 60
    """Batch size."""

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
    """Batch size."""
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
    quick: bool = False
    """A few minutes: at most 6 rounds; and unless sizes or networks are given, B = 1, 60 and 600 and no networks."""

    def run(self):
        few = self.quick and (self.batch_sizes, self.models) == (Before.batch_sizes, Before.models)
        sizes, models = ((1, 60, 600), ()) if few else (self.batch_sizes, self.models)
        return bench_before.before(min(self.rounds, 6) if self.quick else self.rounds, self.checkout, sizes, models)


Command = Train | Updates | Split | Gradients | Coupled | Layers | Adabatch | Language | Noise | Huge | Sweep | Ladder | Target | Startup | Before
