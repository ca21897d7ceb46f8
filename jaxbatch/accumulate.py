"""A batch larger than the device holds: gradients summed over microbatches by a Python loop, then one update.

For networks on XLA's convolutions, which are slow inside compiled loops on CPU; everything else accumulates in a compiled
loop within the step (:func:`jaxbatch.make_train_step` with ``microbatch_size``). The numbers are the same.

Axes: S steps, B examples in a batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jaxbatch.augment import example_keys
from jaxbatch.batches import even_part
from jaxbatch.tasks import Task
from jaxbatch.train import TrainState, apply_gradient


def compile_accumulating_epoch(
    task: Task, optimizer: optax.GradientTransformation, state: Any, batch_size: int, microbatch_size: int
) -> Callable[..., tuple[TrainState, Array]]:
    """Steps on batches of ``batch_size`` in the memory of ``microbatch_size``, compiled here and now.

    The last microbatch of a batch counts by its number of examples, so the gradient is that of the batch's mean loss.
    Batch normalisation takes the moments of a microbatch, and the running ones are updated by each in turn.

    Args:
        task: as :func:`jaxbatch.fit` takes it.
        optimizer: any optax optimizer; one update a batch.
        state: of which only shapes are used.
        batch_size: B.
        microbatch_size: examples on the device at a time, at most.

    Returns:
        ``run(state, data, indices) -> (state, losses)``, as :func:`jaxbatch.compile_epoch`; with ``task.prepare`` it takes
        ``[seed, epoch]`` beside. The incoming state's memory is reused.
    """
    has_aux = task.update_model_state is not None
    size = even_part(batch_size, microbatch_size)

    def begin(state):
        return jax.tree.map(jnp.zeros_like, state.params), state.model_state, jnp.zeros(())

    def add(total, params, data, index, place=None):
        summed, model_state, loss = total
        batch = jax.tree.map(lambda leaf: leaf[index], data)
        if task.prepare is not None:
            batch = task.prepare(example_keys(place[0], place[1], index), batch)

        def loss_sum(p):
            losses, aux = task.loss_fn(p, batch) if has_aux else (task.loss_fn(p, batch), None)
            return losses.sum(), aux

        (found, aux), gradient = jax.value_and_grad(loss_sum, has_aux=True)(params)
        model_state = task.update_model_state(model_state, aux) if has_aux else model_state
        return jax.tree.map(jnp.add, summed, gradient), model_state, loss + found

    def finish(state, total):
        summed, model_state, loss = total
        gradient = jax.tree.map(lambda leaf: leaf / batch_size, summed)
        return apply_gradient(state, optimizer, gradient, model_state), loss / batch_size

    shapes = jax.eval_shape(begin, state)
    begin = jax.jit(begin).lower(state).compile()
    finish = jax.jit(finish, donate_argnums=0).lower(state, shapes).compile()
    place = () if task.prepare is None else (jax.ShapeDtypeStruct((2,), jnp.int32),)
    adds = {}
    for count in {size, batch_size % size} - {0}:
        index = jax.ShapeDtypeStruct((count,), jnp.int32)
        program = jax.jit(add, donate_argnums=0).lower(shapes, state.params, _shapes(task.train_data), index, *place)
        adds[count] = program.compile()

    def run(state, data, indices, *place):
        losses = []
        for index in np.asarray(indices):
            total = begin(state)
            for start in range(0, batch_size, size):
                part = index[start : start + size]
                total = adds[len(part)](total, state.params, data, part, *place)
            state, loss = finish(state, total)
            losses.append(loss)  # a promise: nothing is waited for here
        return state, jnp.asarray(np.array(jax.device_get(losses)))

    return run


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
