"""The task of a Flax model that classifies images: of a data set in memory, or of a stream of compressed images.

Axes: B examples in a batch.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors
from flax import linen as nn
from jaxtyping import Array, Key, PyTree, Shaped

from jaxbatch.data import Dataset
from jaxbatch.data.checked import check_dataset
from jaxbatch.data.images import ImageDataset
from jaxbatch.data.streams import image_streams
from jaxbatch.hints import no_linen_module
from jaxbatch.kinds import checked
from jaxbatch.layers import loops_are_slow
from jaxbatch.losses.classification import classification_loss, classification_metrics
from jaxbatch.machine.platform import compiling_for
from jaxbatch.training.tasks import Task

AugmentFn = Callable[[Key[Array, "B"], Shaped[Array, "B ..."]], Shaped[Array, "B ..."]]


@checked
def classification_task(model, dataset: Dataset, *, microbatch_size: int | None = None, augment: AugmentFn | None = None) -> Task:
    """The task of a Flax Linen ``model`` on a data set; the data are moved to the device once.

    Args:
        model: a module whose ``apply(variables, images)`` returns logits. If it accepts ``train``, training passes
            ``train=True``. If it has a collection ``batch_stats``, it must store the batch's own moments there, as
            :class:`jaxbatch.layers.BatchNorm` does. It gets no random numbers, for example for dropout. A model that needs them
            needs a :class:`Task` of your own, whose batches hold the keys.
        dataset: from :func:`jaxbatch.load_dataset`.
        microbatch_size: examples worked on at a time. ``None``: 64 on CPU, where larger batches do not fit in the cache, unless
            the model has XLA's convolutions or couples its examples; all at once elsewhere.
        augment: ``(keys, images) -> images``, changes raw training images, as :func:`jaxbatch.augment.crop_and_flip` does.

    Raises:
        ValueError: the model is not a Flax Linen module, needs random numbers in training, has ``flax.linen.BatchNorm``, or keeps
            variables that are neither parameters nor in ``batch_stats``; or :func:`jaxbatch.data.checked.check_dataset` finds
            an error.

    Example:
        >>> from jaxbatch import SimpleCNN, load_dataset
        >>> classification_task(SimpleCNN(), load_dataset("digits")).num_examples
        1442
    """
    check_dataset(dataset)
    train_data = (jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels))
    test_data = (jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels))
    task = task_of_model(model, dataset.train_images.shape[1:], dataset, train_data, test_data, microbatch_size)
    if augment is None:
        return task
    return task._replace(prepare=lambda keys, batch: (augment(keys, batch[0]), batch[1]))


@checked
def streamed_task(model, dataset: ImageDataset, *, image_size: int = 224, num_workers: int | None = None, ahead: int | None = None) -> Task:
    """The task of a Flax Linen ``model`` on compressed images, which are decoded when training needs them.

    Every training image is cropped at random, see :func:`jaxbatch.data.images.random_crop`. ``fit`` sums gradients over parts
    of ``microbatch_size`` examples, so that memory is bounded whatever the batch size.

    Args:
        model: as :func:`classification_task` takes it.
        dataset: from :func:`jaxbatch.open_images`.
        image_size: pixels each way.
        num_workers, ahead: see :class:`jaxbatch.data.streams.Decoders`; ``task.train_data.decoders.close()`` ends the processes.
    """
    train, test = image_streams(dataset, image_size=image_size, num_workers=num_workers, ahead=ahead)
    return task_of_model(model, (image_size, image_size, 3), dataset, train, test, None)


def task_of_model(model, image_shape, dataset, train_data, test_data, microbatch_size: int | None) -> Task:
    """The task of a Flax Linen model on any data; of ``dataset`` only ``mean`` and ``std`` are used."""
    if not isinstance(model, nn.Module):
        raise ValueError(no_linen_module(model))
    image = jnp.zeros((1, *image_shape))
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    _check_collections(model, variables)
    stateful = "batch_stats" in variables
    training: dict[str, Any] = {"train": True} if "train" in inspect.signature(model.__call__).parameters else {}
    if stateful:
        training["mutable"] = ["batch_stats"]

    def apply_train(params, images):
        return model.apply(params, images, **training)

    _check_training(model, lambda: jax.eval_shape(apply_train, variables, image))

    def init(key):
        variables = model.init(key, image)
        return ({"params": variables["params"]}, {"batch_stats": variables["batch_stats"]}) if stateful else variables

    def evaluate(variables, images):
        return model.apply({**variables[0], **variables[1]} if stateful else variables, images)

    in_cache = None
    if microbatch_size is None and not stateful:
        with compiling_for("cpu"):
            in_cache = None if loops_are_slow(model.apply, variables, image) else 64
    return Task(
        init=init,
        loss_fn=classification_loss(apply_train, dataset.mean, dataset.std, has_aux=stateful),
        metrics_fn=classification_metrics(evaluate, dataset.mean, dataset.std),
        train_data=train_data,
        test_data=test_data,
        microbatch_size=microbatch_size,
        update_model_state=running_average if stateful else None,
        cpu_microbatch_size=in_cache,
    )


def _check_collections(model, variables: PyTree) -> None:
    """Refuses variables that are neither parameters nor moments, because an optimizer would change them."""
    others = sorted(set(variables) - {"params", "batch_stats"})
    if others:
        raise ValueError(
            f"model={type(model).__name__} keeps variables in {', '.join(map(repr, others))}. classification_task trains 'params' and "
            "averages 'batch_stats', and would not know what to do with others. Make fixed arrays attributes of the module; for "
            "others make a jaxbatch.Task with update_model_state."
        )


def _check_training(model, trace: Callable[[], object]) -> None:
    """Refuses models that would train without an error but wrongly."""
    name = type(model).__name__
    remedy = "Make a jaxbatch.Task whose batches hold a key for each example: docs/recipes.md shows how."

    def look(call, arguments, keywords, context):
        if isinstance(context.module, nn.BatchNorm):
            raise ValueError(
                f"model={name}: flax.linen.BatchNorm averages the running moments itself, and training would do so again. "
                "Take jaxbatch.layers.BatchNorm, which leaves the batch's own moments, or make a jaxbatch.Task: docs/recipes.md shows how."
            )
        if isinstance(context.module, nn.Dropout) and context.module.rate > 0:
            raise ValueError(f"model={name}: its dropout needs random numbers, which classification_task does not give. {remedy}")
        return call(*arguments, **keywords)

    try:
        with nn.intercept_methods(look):
            trace()
    except errors.InvalidRngError:
        raise ValueError(f"model={name} needs random numbers, which classification_task does not give. {remedy}") from None


def running_average(model_state: PyTree, moments: PyTree, momentum: float = 0.1) -> PyTree:
    """``(1 - momentum) * model_state + momentum * moments``: PyTorch's rule for the moments of batch normalisation.

    Example:
        >>> running_average(jnp.array(1.0), jnp.array(3.0), 0.5).item()
        2.0
    """
    return jax.tree.map(lambda old, new: (1 - momentum) * old + momentum * new, model_state, moments)
