"""What the arms of the AdaBatch study train: a network on a data set, or a task of the user's own; and what its passes cost."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jaxbatch as jb
from experiments.adabatch.arms import make_model
from experiments.adabatch.cost import measure_cost, measure_task_cost
from experiments.harness.task import hold_out_of, load_choosing_task, prepared_once
from experiments.harness.user_task import load_user_task
from jaxbatch.augment import crop_and_flip
from jaxbatch.data import pad_images
from jaxbatch.results.records import Record
from jaxbatch.training.goals import metric_names

SMALLEST = {"alexnet": 32, "vgg19_bn": 32}  # pixels each way: with 28, the last pool of these networks leaves no pixel
OF_NETWORKS = ("num_examples", "dtype", "augment", "batch_norm", "small")  # flags that a task of the user's own does not take


class Tasks(NamedTuple):
    """The tasks of the study, and ``cost(batch sizes by number of devices, rounds) -> records``."""

    whole: jb.Task  # on all training data
    over_devices: jb.Task  # the same, with an axis of devices where the network has one
    choosing: jb.Task  # on the training data without the validation part, which are its test data
    cost: Callable[[dict[int, list[int]], int], Iterator[Record]]


def load(config) -> jb.Dataset:
    """The data set, cut to ``num_examples``; its images are padded if they are too small for the network."""
    dataset = pad_images(jb.load_dataset(config.dataset, data_dir=config.data_dir), SMALLEST.get(config.model, 1))
    if config.num_examples is None:
        return dataset
    if not 10 <= config.num_examples <= len(dataset.train_labels):
        raise ValueError(f"--num-examples {config.num_examples} must be from 10 to {len(dataset.train_labels)}.")
    test = 2 * config.num_examples // 5
    return dataset._replace(
        train_images=dataset.train_images[: config.num_examples],
        train_labels=dataset.train_labels[: config.num_examples],
        test_images=dataset.test_images[:test],
        test_labels=dataset.test_labels[:test],
    )


def network_tasks(config, dataset: jb.Dataset) -> Tasks:
    """The tasks of a network on a data set."""
    augment = crop_and_flip if config.augment else None
    task = jb.classification_task(make_model(config, dataset.num_classes), dataset, augment=augment)
    shared = task
    if make_model(config, 1, 2) != make_model(config, 1):  # the same network, with a name for the axis of the devices
        model = make_model(config, dataset.num_classes, 2)
        shared = task._replace(loss_fn=jb.classification_task(model, dataset, augment=augment).loss_fn)
    choosing = jb.classification_task(make_model(config, dataset.num_classes), jb.hold_out(dataset, seed=config.validation_seed), augment=augment)

    def cost(sizes, rounds):
        models = {count: make_model(config, dataset.num_classes, count) for count in sizes}
        return measure_cost(models, dataset, sizes, config.parallel, rounds)

    return Tasks(task, shared, choosing, cost)


def text_tasks(config) -> Tasks:
    """The tasks of a language model on a text, which has a validation part of its own.

    Raises:
        ValueError: flags of the networks for images are given.
    """
    for name in OF_NETWORKS:
        if getattr(config, name) != type(config).__dataclass_fields__[name].default:
            raise ValueError(f"--{name.replace('_', '-')} is for images, and --dataset {config.dataset} is a text.")
    choosing, test_data = load_choosing_task(config)
    whole = choosing._replace(test_data=test_data)
    return Tasks(whole, whole, choosing, lambda sizes, rounds: measure_task_cost(whole, sizes, config.parallel, rounds))


def user_tasks(config) -> Tasks:
    """The tasks of the user's own.

    Raises:
        ValueError: flags of the networks are given, or the task has neither an accuracy nor a loss among its metrics.
    """
    defaults = {field: type(config).__dataclass_fields__[field].default for field in OF_NETWORKS}
    for name, default in defaults.items():
        if getattr(config, name) != default:
            raise ValueError(f"--task and --{name.replace('_', '-')} exclude each other: the task alone says how it computes and on which data.")
    task = load_user_task(config.task)
    choosing, names = hold_out_of(config, task), metric_names(task)
    if not {"accuracy", "loss"} & set(names):
        raise ValueError(f"--task {config.task}: the arms are judged by a metric named accuracy or loss, and the metrics are {', '.join(names)}.")
    return Tasks(task, task, choosing, lambda sizes, rounds: measure_task_cost(prepared_once(task), sizes, config.parallel, rounds))
