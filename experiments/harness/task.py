"""The task of the studies of batch size: a network on a data set, or a task of the user's own; a part is held out to choose on."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

import jaxbatch
from experiments.harness.user_task import find_source, load_user_task
from experiments.harness.user_task_check import check_validation
from jaxbatch.data import TEXTS, Dataset, load_dataset
from jaxbatch.data.held_out import hold_out, hold_out_arrays
from jaxbatch.data.streams import is_stream
from jaxbatch.data.text import load_text, sequences
from jaxbatch.training.language import language_task
from jaxbatch.training.tasks import Task, first_examples

NETWORKS = {"simple_cnn": jaxbatch.SimpleCNN, "mlp": functools.partial(jaxbatch.MLP, (128,)), "resnet20": jaxbatch.ResNet20}
DEEP = ("alexnet", "resnet20", "vgg19_bn")  # networks that take long to compile
Network = Literal["simple_cnn", "mlp", "transformer"]
TRANSFORMER = functools.partial(jaxbatch.TransformerLM, width=64, num_layers=2)  # about 0.1 million parameters, of texts
SEQUENCE_LENGTH, NUM_SEQUENCES, NUM_HELD_OUT = 64, 2048, 256  # an epoch takes seconds on a CPU; 64 tokens are two generated sentences


def load_task(config, **settings) -> Task:
    """The study's network on its data set, or the user's task, whose training data must be arrays.

    Raises:
        ValueError: the user's training data are a stream.
    """
    if config.task is None:
        return _text_task(config)[0] if has_text(config) else _task_on(load_dataset(config.dataset, data_dir=config.data_dir), config, **settings)
    task = load_user_task(config.task)
    _refuse_stream(config.task, "train_data", task.train_data, "this study picks examples by their number, which a stream does not allow")
    return task


def load_choosing_task(config) -> tuple[Task, PyTree]:
    """The task on the training set without its validation part; and the test set, to be used once at the end of a run.

    What the task calls ``test_data`` is the validation part; the test set is not in it. A text has a validation part of its own.

    Raises:
        ValueError: the user's task has no metrics or no test data, its data are a stream, or there are too few to hold some out.
    """
    if config.task is None and has_text(config):
        return _text_task(config)
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
    check_validation(task, text, find_source(text).path)
    rest, held = hold_out_arrays(task.train_data, seed=config.validation_seed)
    return task._replace(train_data=rest, test_data=held)


def prepared_once(task: Task) -> Task:
    """The task with ``prepare`` applied to its training data once, for measurements of the loss at given batches."""
    if task.prepare is None:
        return task
    keys = jax.random.split(jax.random.key(0), task.num_examples)
    return task._replace(train_data=jax.jit(task.prepare)(keys, task.train_data), prepare=None)


def first_of(config, task: Task) -> Task:
    """The task on the first --examples of its training examples, or on all.

    Raises:
        ValueError: there are not so many.
    """
    try:
        return task if config.examples is None else first_examples(task, config.examples)
    except ValueError:
        raise ValueError(f"--examples {config.examples} must be between 1 and {task.num_examples}.") from None


def few_for_quick(config, task: Task, count: int) -> Task:
    """The task on ``count`` of its training examples with --quick, from all over its data; on as many more as batch sizes that are given need.

    With the smallest network it keeps all of them, and where --examples says how many.
    """
    sizes = [*(getattr(config, "batch_sizes", None) or ()), *(getattr(config, name, None) or 0 for name in ("batch_size", "large_batch_size"))]
    count = max(count, 2 * max(sizes), getattr(config, "base_batch_size", 0) * max(getattr(config, "factors", None) or (0,)))
    smallest, is_set = config.task is None and config.model == "mlp", getattr(config, "examples", None) is not None
    if not config.quick or smallest or is_set or task.num_examples <= count:
        return task
    return task._replace(train_data=jax.tree.map(lambda leaf: _spread(leaf, count), task.train_data))


def refuse_model_state(config, task: Task, reason: str) -> None:
    """Raises a ValueError for a task whose model has a state that batches change."""
    if task.update_model_state is not None:
        raise ValueError(f"--task {config.task} has update_model_state: {reason}.")


def _refuse_stream(text: str, name: str, data: PyTree, reason: str) -> None:
    if is_stream(data):
        raise ValueError(f"--task {text}: {name} are a stream, and {reason}. Give arrays.")


def has_text(config) -> bool:
    """Whether the study's data are a named text, whose only network is the transformer.

    Raises:
        ValueError: the network does not go with the data.
    """
    if config.task is not None:
        return False
    is_text = config.dataset in TEXTS
    if is_text and config.model != "transformer":
        raise ValueError(f"--model {config.model} takes images, but --dataset {config.dataset} is a text. Use --model transformer.")
    if config.model == "transformer" and not is_text:
        raise ValueError(f"--model transformer takes a text, but --dataset {config.dataset} holds images. Use --dataset {' or '.join(TEXTS)}.")
    return is_text


def _text_task(config) -> tuple[Task, PyTree]:
    """The transformer on a part of a text's sequences, judged on a part of those for validation; and a part of those for the test."""
    dataset = load_text(config.dataset, data_dir=config.data_dir)
    task = language_task(TRANSFORMER(dataset.vocab_size), dataset, sequence_length=SEQUENCE_LENGTH)
    test_data = jnp.asarray(sequences(dataset.test_tokens, SEQUENCE_LENGTH))
    few = 2 if config.quick else 1
    train_data = _spread(task.train_data, NUM_SEQUENCES // few)
    return task._replace(train_data=train_data, test_data=_spread(task.test_data, NUM_HELD_OUT // few)), _spread(test_data, NUM_HELD_OUT // few)


def _spread(rows: Array, count: int) -> Array:
    """``count`` rows from all over a text, because its first ones alone would be one scene of it."""
    return rows[:: len(rows) // count][:count]


def _task_on(dataset: Dataset, config, **settings) -> Task:
    return jaxbatch.classification_task(NETWORKS[config.model](num_classes=dataset.num_classes), dataset, **settings)
