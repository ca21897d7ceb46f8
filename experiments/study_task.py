"""The task of the studies of batch size: a network on a data set, or a task of the user's own; a part is held out to choose on."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

import jaxbatch
from experiments.user_task import find_place, load_user_task
from experiments.user_task_check import check_validation
from jaxbatch.data import Dataset, load_dataset
from jaxbatch.data.held_out import hold_out, hold_out_arrays
from jaxbatch.data.streams import is_stream
from jaxbatch.training.tasks import Task

NETWORKS = {"simple_cnn": jaxbatch.SimpleCNN, "mlp": functools.partial(jaxbatch.MLP, (128,))}
Network = Literal["simple_cnn", "mlp"]


def load_task(config, **settings) -> Task:
    """The study's network on its data set, or the user's task, whose training data must be arrays.

    Raises:
        ValueError: the user's training data are a stream.
    """
    if config.task is None:
        return _task_on(load_dataset(config.dataset, data_dir=config.data_dir), config, **settings)
    task = load_user_task(config.task)
    _refuse_stream(config.task, "train_data", task.train_data, "this study takes examples by number, which a stream does not give")
    return task


def load_choosing_task(config) -> tuple[Task, PyTree]:
    """The task on the training set without its validation part; and the test set, to be used once at the end of a run.

    What the task calls ``test_data`` is the validation part; the test set is not in it.

    Raises:
        ValueError: the user's task has no metrics or no test data, its data are a stream, or there are too few to hold some out.
    """
    if config.task is None:
        dataset = load_dataset(config.dataset, data_dir=config.data_dir)
        task = _task_on(hold_out(dataset, seed=config.validation_seed), config)
        return task, (jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels))
    task = load_user_task(config.task)
    return hold_out_of(config, task), task.test_data


def hold_out_of(config, task: Task) -> Task:
    """The user's task on its training data without a sixth, which becomes its test data."""
    text, reason = config.task, "a sixth of the examples is held out by number to choose on, which a stream does not allow"
    missing = [name for name in ("metrics_fn", "test_data") if getattr(task, name) is None]
    if missing:
        raise ValueError(f"--task {text}: {' and '.join(missing)} of the task must not be None, because the study needs a metric to judge runs by.")
    _refuse_stream(text, "train_data", task.train_data, reason)
    _refuse_stream(text, "test_data", task.test_data, "runs are judged on data of the same form as the held-out arrays")
    if task.num_examples < 6:
        raise ValueError(f"--task {text}: train_data hold {task.num_examples} examples, and at least 6 are needed to hold a sixth out.")
    check_validation(task, text, find_place(text).path)
    rest, held = hold_out_arrays(task.train_data, seed=config.validation_seed)
    return task._replace(train_data=rest, test_data=held)


def prepared_once(task: Task) -> Task:
    """The task with ``prepare`` applied to its training data once, for measurements of the loss at given batches."""
    if task.prepare is None:
        return task
    keys = jax.random.split(jax.random.key(0), task.num_examples)
    return task._replace(train_data=jax.jit(task.prepare)(keys, task.train_data), prepare=None)


def refuse_model_state(config, task: Task, reason: str) -> None:
    """Raises a ValueError for a task whose model has a state that batches change."""
    if task.update_model_state is not None:
        raise ValueError(f"--task {config.task} has update_model_state: {reason}.")


def _refuse_stream(text: str, name: str, data: PyTree, reason: str) -> None:
    if is_stream(data):
        raise ValueError(f"--task {text}: {name} are a stream, and {reason}. Give arrays.")


def _task_on(dataset: Dataset, config, **settings) -> Task:
    return jaxbatch.classification_task(NETWORKS[config.model](num_classes=dataset.num_classes), dataset, **settings)
