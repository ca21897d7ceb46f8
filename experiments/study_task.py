"""The task of the studies of batch size: one of two networks on a data set, with a part held out to choose on."""

import functools
from typing import Literal

import jax.numpy as jnp
from jaxtyping import PyTree

import jaxbatch
from jaxbatch.data import Dataset, load_dataset
from jaxbatch.data.held_out import hold_out
from jaxbatch.training.tasks import Task

NETWORKS = {"simple_cnn": jaxbatch.SimpleCNN, "mlp": functools.partial(jaxbatch.MLP, (128,))}
Network = Literal["simple_cnn", "mlp"]


def load_task(config, **settings) -> Task:
    """The study's network on its data set."""
    return _task_on(load_dataset(config.dataset, data_dir=config.data_dir), config, **settings)


def load_choosing_task(config) -> tuple[Task, PyTree]:
    """The task on the training set without its validation part; and the test set, to be used once at the end of a run.

    What the task calls ``test_data`` is the validation part; the test set is not in it.
    """
    dataset = load_dataset(config.dataset, data_dir=config.data_dir)
    task = _task_on(hold_out(dataset, seed=config.validation_seed), config)
    return task, (jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels))


def _task_on(dataset: Dataset, config, **settings) -> Task:
    return jaxbatch.classification_task(NETWORKS[config.model](num_classes=dataset.num_classes), dataset, **settings)
