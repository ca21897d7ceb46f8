"""The arms of the AdaBatch study: the network, the batch sizes, and the optimizer with the rate coupled to them."""

import jax.numpy as jnp
import optax

import jaxbatch as jb
from experiments import adabatch_report
from experiments.study_task import NETWORKS
from experiments.training import sgd_config
from jaxbatch.training.devices import AXIS

MODELS = NETWORKS | {"alexnet": jb.AlexNet, "resnet20": jb.ResNet20, "vgg19_bn": jb.VGG19BN}


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
    alone = config.decay / (config.growth if config.optimizer == "momentum" else config.growth**0.5)  # without a growing batch
    settings = {"decay": config.decay if arm.startswith("adaptive") else alone}
    if arm == "large" and config.warmup_epochs:
        settings |= {"warmup": jb.epochs(config.warmup_epochs), "warmup_init": rate}
        larger = config.max_batch_size / config.batch_size
        rate *= larger if config.optimizer == "momentum" else larger**0.5
    learning_rate = jb.coupled_learning_rate(schedule, init=rate, num_examples=num_examples, num_epochs=config.epochs, **settings)
    settings = {"seed": seed, "num_devices": adabatch_report.devices_of(arm), "parallel": config.parallel, "compile_first": True}
    if config.optimizer == "adamw":
        optimizer = optax.adamw(learning_rate, weight_decay=config.weight_decay)
        return jb.FitConfig(optimizer, schedule, jb.epochs(config.epochs), **settings)
    return sgd_config(config, schedule, learning_rate, **settings)
