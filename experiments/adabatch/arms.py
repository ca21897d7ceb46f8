"""The arms of the AdaBatch study: the network, the batch sizes, and the optimizer with the rate coupled to them."""

import jax.numpy as jnp

import jaxbatch as jb
from experiments.adabatch import report
from experiments.adabatch.periods import duration_of
from experiments.harness.optimizers import follow, kind_of
from experiments.harness.task import NETWORKS
from jaxbatch.schedules.stretches import counted_in_examples, stretches_of_epochs
from jaxbatch.training.devices import AXIS

MODELS = NETWORKS | {"alexnet": jb.AlexNet, "vgg19_bn": jb.VGG19BN}


def make_model(config, num_classes: int, num_devices: int = 1):
    """The network, with batch normalisation over all devices if the flags ask for it."""
    model = MODELS[config.model](num_classes=num_classes, dtype=jnp.dtype(config.dtype))
    over_devices = config.batch_norm == "synchronised" and num_devices > 1 and hasattr(model, "axis_name")
    return model.clone(axis_name=AXIS) if over_devices else model


def make_schedule(config, arm: str) -> jb.BatchSizeSchedule:
    """The batch sizes of an arm."""
    every = duration_of(config.every)
    if arm.startswith("adaptive"):
        return jb.adabatch_schedule(batch_size=config.batch_size, growth=config.growth, every=every, max_batch_size=config.max_batch_size)
    size = config.max_batch_size if arm == "large" else config.batch_size
    return jb.constant_schedule(size, every=every)


def sizes_of(config, arm: str, num_examples: int, tokens_per_example: int | None = None) -> list[int]:
    """The batch sizes that an arm has on so many examples.

    Raises:
        ValueError: one is larger than the data set, or a duration is in tokens and an example has no number of them.
    """
    schedule = counted_in_examples(make_schedule(config, arm), tokens_per_example)
    return sorted({stretch.batch_size for stretch in stretches_of_epochs(schedule, num_examples, config.epochs)})


def make_fit_config(config, arm: str, rate: float, seed: int, num_examples: int, tokens_per_example: int | None = None) -> jb.FitConfig:
    """The batch sizes of an arm, and the optimizer with a rate that is coupled to them."""
    schedule = make_schedule(config, arm)
    power = 1.0 if kind_of(config).rule == "linear" else 0.5  # of the batch, with which the rate grows
    alone = config.decay / config.growth**power  # without a growing batch
    settings = {"decay": config.decay if arm.startswith("adaptive") else alone}
    if arm == "large" and config.warmup_epochs:
        settings |= {"warmup": jb.epochs(config.warmup_epochs), "warmup_init": rate}
        rate *= (config.max_batch_size / config.batch_size) ** power
    sizes = {"num_examples": num_examples, "num_epochs": config.epochs, "tokens_per_example": tokens_per_example}
    learning_rate = jb.coupled_learning_rate(schedule, init=rate, **sizes, **settings)
    settings = {"seed": seed, "num_devices": report.devices_of(arm), "parallel": config.parallel, "compile_first": True}
    return jb.FitConfig(follow(config, learning_rate, rate), schedule, jb.epochs(config.epochs), **settings)
