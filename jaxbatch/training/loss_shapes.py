"""What a task's loss gets and returns, from shapes alone; nothing is computed."""

from typing import Any

import jax
from jaxtyping import PyTree

from jaxbatch.data.streams import is_stream
from jaxbatch.gradients.groups import LossFn, has_weights
from jaxbatch.training.devices import AXIS
from jaxbatch.training.loops import batch_shapes
from jaxbatch.training.tasks import Task


def shapes_of_batch(task: Task, size: int) -> PyTree:
    """The shapes of ``size`` training examples as the loss gets them."""
    data = task.train_data
    if is_stream(data):
        data = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), data.example)
    return batch_shapes(data, size, task.prepare)


def along_an_axis(loss_fn: LossFn) -> LossFn:
    """The loss along an axis of one device, which layers that use the axis need."""
    alone = lambda tree: jax.tree.map(lambda leaf: leaf[None], tree)
    along = lambda params, batch: jax.vmap(lambda part: loss_fn(params, part), axis_name=AXIS)(alone(batch))
    return lambda params, batch: jax.tree.map(lambda leaf: leaf[0], along(params, batch))


def task_has_weights(task: Task, params: Any, size: int, num_devices: int = 1) -> bool:
    """Whether the loss of a task returns :class:`jaxbatch.Weighted` for ``size`` examples, on one device or along an axis of several."""
    loss_fn = task.loss_fn if num_devices == 1 else along_an_axis(task.loss_fn)
    return has_weights(loss_fn, params, shapes_of_batch(task, size), task.update_model_state is not None)
