"""The arms of the AdaBatch study: the network, the batch sizes, and the optimizer with the rate coupled to them."""

import jax.numpy as jnp

import jaxbatch as jb
from experiments import adabatch_report
from experiments.optimizers import follow, kind_of
from experiments.study_task import NETWORKS
from jaxbatch.training.devices import AXIS

MODELS = NETWORKS | {"alexnet": jb.AlexNet, "vgg19_bn": jb.VGG19BN}


def make_model(config, num_classes: int, num_devices: int = 1):
    """The network, with batch normalisation over all devices if the flags ask for it."""
    model = MODELS[config.model](num_classes=num_classes, dtype=jnp.dtype(config.dtype))
    over_devices = config.batch_norm == "synchronised" and num_devices > 1 and hasattr(model, "axis_name")
    return model.clone(axis_name=AXIS) if over_devices else model


def make_schedule(config, arm: str) -> jb.BatchSizeSchedule:
    """The batch sizes of an arm."""
    if arm.startswith("adaptive"):
        return jb.adabatch_schedule(batch_size=config.batch_size, growth=config.growth, every=config.every, max_batch_size=config.max_batch_size)
    size = config.max_batch_size if arm == "large" else config.batch_size
    return jb.constant_schedule(size, every=config.every)


def make_fit_config(config, arm: str, rate: float, seed: int, num_examples: int) -> jb.FitConfig:
    """The batch sizes of an arm, and the optimizer with a rate that is coupled to them."""
    schedule = make_schedule(config, arm)
    power = 1.0 if kind_of(config).rule == "linear" else 0.5  # of the batch, with which the rate grows
    alone = config.decay / config.growth**power  # without a growing batch
    settings = {"decay": config.decay if arm.startswith("adaptive") else alone}
    if arm == "large" and config.warmup_epochs:
        settings |= {"warmup": jb.epochs(config.warmup_epochs), "warmup_init": rate}
        rate *= (config.max_batch_size / config.batch_size) ** power
    learning_rate = jb.coupled_learning_rate(schedule, init=rate, num_examples=num_examples, num_epochs=config.epochs, **settings)
    settings = {"seed": seed, "num_devices": adabatch_report.devices_of(arm), "parallel": config.parallel, "compile_first": True}
    return jb.FitConfig(follow(config, learning_rate, rate), schedule, jb.epochs(config.epochs), **settings)
