"""Mean metrics over a data set, computed in one program or part by part.

Axes: N examples in the data set.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxbatch.batches import cut_batches
from jaxbatch.data.streaming import prefetch
from jaxbatch.data.streams import is_stream
from jaxbatch.layers import loops_are_slow
from jaxbatch.sums import Weighted, as_floats, counted, divisor, sum_losses, totals
from jaxbatch.training.steps import TrainState
from jaxbatch.training.tasks import Task, count_examples


def make_evaluate(
    metrics_fn: Callable[[PyTree, PyTree], Mapping[str, Array | Weighted]], num_examples: int, batch_size: int = 500
) -> Callable[[PyTree, PyTree], dict[str, Array]]:
    """Makes a compiled ``evaluate(params, data) -> {name: scalar}``, which returns mean metrics over a data set.

    The last batch is padded and masked, so every example counts once. A metric of :class:`jaxbatch.Weighted` values has the
    mean sum of totals / sum of weights over the whole data set. A metric must not couple examples, as batch
    normalisation with ``train=True`` does; otherwise padding would count. ``data`` may be a
    :class:`jaxbatch.data.streams.Stream`.

    Example:
        >>> evaluate = make_evaluate(lambda w, x: {"loss": (x - w) ** 2}, num_examples=3, batch_size=2)
        >>> float(evaluate(jnp.array(0.0), jnp.array([1.0, 2.0, 2.0]))["loss"])
        3.0
    """

    def cut():
        return cut_batches(jnp.arange(num_examples, dtype=jnp.int32), min(batch_size, num_examples), partial="pad")

    def sums_of(params, examples, mask):
        metrics = metrics_fn(params, examples)
        for name, values in metrics.items():
            parts = dict(zip((" (total)", " (weight)"), values, strict=True)) if isinstance(values, Weighted) else {"": values}
            for part, leaf in parts.items():
                if jnp.shape(leaf) != mask.shape:
                    raise ValueError(
                        f"metrics_fn must return one value per example, shape {mask.shape}, but {name!r}{part} has shape {jnp.shape(leaf)}."
                        + (" Leave out the mean." if jnp.shape(leaf) == () else "")
                    )
        metrics = {name: counted(values) if isinstance(values, Weighted) else values for name, values in metrics.items()}
        return jax.tree.map(lambda values: jnp.where(mask, values, 0).sum(), as_floats(metrics))

    def sums(params, data, batch):
        return sums_of(params, jax.tree.map(lambda leaf: leaf[batch.indices], data), batch.mask)

    def mean(of_parts):
        summed = {name: sum_losses(values) for name, values in of_parts.items()}
        return {name: totals(values) / divisor(values, num_examples) for name, values in summed.items()}

    @jax.jit
    def in_one_program(params, data):
        return mean(lax.map(lambda batch: sums(params, data, batch), cut()))  # cut here: closed over, it would be a constant

    one_batch, one_part = jax.jit(sums), jax.jit(sums_of)

    slow = None  # set at the first call, from the shapes

    def evaluate(params, data):
        nonlocal slow
        size = count_examples(data, "data")
        if size != num_examples:
            raise ValueError(f"this evaluation was made for num_examples={num_examples} and got data of {size} examples.")
        if is_stream(data):
            batches = jax.tree.map(np.asarray, cut())
            examples = prefetch(data.parts(batches.indices), depth=1)
            # Wait for each part; otherwise parts that the device has not reached would fill the host's memory.
            parts = [jax.block_until_ready(one_part(params, *pair)) for pair in zip(examples, batches.mask, strict=True)]
            return mean(_stack(parts))
        if slow is None:
            slow = loops_are_slow(sums, params, data, jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf[0], cut())))
        if not slow:
            return in_one_program(params, data)
        batches = cut()
        parts = [one_batch(params, data, jax.tree.map(lambda leaf: leaf[number], batches)) for number in range(len(batches.mask))]
        return mean(_stack(parts))

    return evaluate


def _stack(parts):
    """Stacks on the host unless traced, because a program that joins thousands of scalars would have a line for each."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(parts)):
        return jax.tree.map(lambda *totals: jnp.stack(totals), *parts)
    return jax.tree.map(lambda *totals: jnp.asarray(np.stack(totals)), *jax.device_get(parts))


def make_test(
    task: Task, batch_size: int = 500, eval_params: Callable[[PyTree, PyTree], PyTree] | None = None
) -> Callable[[PyTree, TrainState], dict[str, Array]]:
    """Makes ``test(test_data, state) -> {name: mean over the test set}``; it returns ``{}`` for a task without ``test_data``.

    Args:
        task: only its metrics and test data are used.
        batch_size: examples at a time.
        eval_params: see :class:`jaxbatch.FitConfig`.

    Raises:
        ValueError: the leaves of the test data disagree on the number of examples, or there is no ``metrics_fn`` for them.
    """
    if task.test_data is None:
        return lambda data, state: {}
    if task.metrics_fn is None:
        raise ValueError("metrics_fn=None with test_data: give metrics_fn, or test_data=None to train without a test.")
    evaluate = make_evaluate(task.metrics_fn, count_examples(task.test_data, "test_data"), batch_size)

    def test(data, state):
        if eval_params is not None:
            state = state._replace(params=eval_params(state.opt_state, state.params))
        return evaluate(metrics_argument(task, state), data)

    return test


def metrics_argument(task: Task, state: TrainState) -> PyTree:
    """The first argument of the task's ``metrics_fn``: the parameters, or ``(params, model_state)``."""
    return state.params if task.update_model_state is None else (state.params, state.model_state)
