"""The study: its flags, what it measures and in which order. Its question stands in the docstring of the package."""

import dataclasses
import math
import shutil
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from rich.console import Console

import jaxbatch as jb
from experiments.harness.command_line import for_quick
from experiments.harness.optimizers import OptimizerFlags, fill_optimizer, follow
from experiments.harness.study import StudyConfig, check_positive, open_study, run_study, show_results
from experiments.harness.training import train_into
from experiments.imagenet import __doc__ as question
from experiments.imagenet import report
from jaxbatch.results.records import RunFolder
from jaxbatch.results.report import progress_bar
from jaxbatch.schedules.stretches import count_steps
from jaxbatch.training.devices import provide_devices
from jaxbatch.training.run_programs import RunPrograms
from jaxbatch.training.tasks import Task


@dataclasses.dataclass(frozen=True)
class Config(OptimizerFlags, StudyConfig):
    """Flags of the study."""

    dataset: str = "imagenet2012"
    """Folder under --data-dir: prepared by TFDS as array_record, or train/<class>/*.jpeg and val/<class>/*.jpeg."""
    growths: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    """Factors by which the batch grows at each change; each factor is one arm."""
    epochs: int = 90
    """Passes over the training set."""
    every: int | None = None
    """Epochs between changes of batch and rate. Default: a third of all epochs."""
    batch_size: int | None = None
    """Batch size of all arms at the start. Default: 8192, or less if the largest batch would exceed the data set."""
    learning_rate: float | None = None
    """Learning rate after the warmup. Default: 0.1 for each 256 examples of the batch."""
    decay: float = 0.1
    """Factor by which rate ÷ batch is multiplied at each change, the same in all arms."""
    warmup_epochs: float = 5.0
    """Number of epochs over which the rate rises from 0."""
    optimizer: str = "momentum"
    """Optimizer: sgd, momentum, nesterov, rmsprop, adam, adamw, lion, lars, lamb, muon; or a function of your own, learning rate ->
    optimizer, as my_optimizer.py:make_optimizer."""
    weight_decay: float | None = 1e-4
    """Factor of the L2 term that is added to the gradient of all parameters, or of the optimizer's own weight decay."""
    microbatch_size: int = 256
    """Examples on each device at a time; gradients of larger batches are accumulated."""
    devices: int = 1
    """Devices that share every batch. On CPU they are virtual."""
    image_size: int = 224
    """Height and width of an image, in pixels."""
    num_workers: int | None = None
    """Number of processes that decode images. Default: one for each core; 0 decodes in the training process."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the network computes in; parameters are float32."""
    seeds: int = 1
    """Number of seeds; each has its own initial weights and its own order of examples."""


def resolve(config: Config, num_examples: int) -> Config:
    """Fills in what depends on the data set, shrinks for --quick, and checks."""
    config = fill_optimizer(for_quick(config, epochs=3, image_size=32, growths=(1.0, 2.0), warmup_epochs=1.0))
    names = ("growths", "epochs", "every", "batch_size", "learning_rate", "decay", "microbatch_size", "devices", "image_size", "seeds")
    check_positive(config, *names)
    for name in ("warmup_epochs", "num_workers"):
        value = getattr(config, name)
        if value is not None and not value >= 0:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 0.")
    every = config.every or max(1, config.epochs // 3)
    changes = (config.epochs - 1) // every
    allowed = math.exp(math.log(num_examples) - changes * math.log(max(config.growths)))  # logarithms: no overflow
    size = config.batch_size or max(1, min(8192, math.floor(allowed + 1e-9 * allowed)))
    config = dataclasses.replace(
        config,
        every=every,
        batch_size=size,
        learning_rate=config.learning_rate or 0.1 * size / 256,
        growths=tuple(sorted(set(config.growths))),
    )
    for growth in config.growths:
        count_steps(make_schedule(config, growth), num_examples, config.epochs)  # raises if a batch is too large
    return config


def make_schedule(config: Config, growth: float) -> jb.BatchSizeSchedule:
    """The batch sizes of an arm."""
    return jb.adabatch_schedule(batch_size=config.batch_size, growth=growth, every=config.every)


def make_fit_config(config: Config, growth: float, seed: int, num_examples: int) -> jb.FitConfig:
    """The batch sizes of an arm, and the optimizer with a rate that is coupled to them."""
    schedule = make_schedule(config, growth)
    learning_rate = jb.coupled_learning_rate(
        schedule,
        init=config.learning_rate,
        decay=config.decay * growth,
        num_examples=num_examples,
        num_epochs=config.epochs,
        warmup=jb.epochs(config.warmup_epochs),
    )
    return jb.FitConfig(
        follow(config, learning_rate, config.learning_rate),
        schedule,
        jb.epochs(config.epochs),
        seed=seed,
        microbatch_size=config.microbatch_size,
        num_devices=config.devices,
    )


def measure(config: Config, task: Task, run: RunFolder, console: Console) -> None:
    """Trains the arms that are not in the run folder yet."""
    with progress_bar(console) as progress:
        bar = progress.add_task("epochs", total=len(config.growths) * config.seeds * config.epochs, rate="")
        programs = {growth: RunPrograms(task, make_fit_config(config, growth, 0, task.num_examples).optimizer) for growth in config.growths}
        for seed in range(config.seeds):
            for growth in config.growths:

                def show(epochs, examples_per_second=0.0, about=f"growth {growth:g}, seed {seed}"):
                    progress.update(bar, advance=epochs, description=about, rate=f"{examples_per_second:,.0f} examples/s")

                identity = {"arm": report.name_of(growth), "seed": seed}
                train_into(run, programs[growth], make_fit_config(config, growth, seed, task.num_examples), identity, show)
    shutil.rmtree(run.path / "in_flight", ignore_errors=True)


def study(config: Config, console: Console) -> None:
    """Measures what is missing, then shows what the files hold."""
    check_positive(config, "devices")
    provide_devices(config.devices)
    dataset = jb.open_images(config.dataset, data_dir=config.data_dir)
    config = resolve(config, dataset.num_train)
    run = open_study("imagenet", config, console)
    model = jb.ResNet50(dataset.num_classes, dtype=jnp.dtype(config.dtype))
    task = jb.streamed_task(model, dataset, image_size=config.image_size, num_workers=config.num_workers)
    try:
        measure(config, task, run, console)
    finally:
        task.train_data.decoders.close()
    show_results(console, config, run, report)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    run_study(Config, question, study, args)


if __name__ == "__main__":
    main()
