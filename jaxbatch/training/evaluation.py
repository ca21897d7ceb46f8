"""Mean metrics over a data set, computed in one program or part by part.

Axes: N examples in the data set.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxbatch.augment import Prepare, prepared_for_metrics
from jaxbatch.batches import IndexBatches, cut_batches
from jaxbatch.data.stream_parts import checked_parts
from jaxbatch.data.streaming import prefetch
from jaxbatch.data.streams import is_stream
from jaxbatch.gradients.independence import check_independent_prepare_test
from jaxbatch.hints import call_function, describe
from jaxbatch.kinds import checked
from jaxbatch.layers import loops_are_slow
from jaxbatch.sums import Weighted, as_floats, counted, or_nan, sum_losses
from jaxbatch.training.cut import MOST_EVALUATED, choose_evaluation_size
from jaxbatch.training.layouts import Layout, shapes_of
from jaxbatch.training.tasks import MetricsFn, Task, count_examples
from jaxbatch.training.train_state import TrainState

_AHEAD = 1  # parts of a stream that wait on the device
PARTS_OF_A_TEST_STREAM = _AHEAD + 2  # on the device at a time: one in work, those that wait, and one that is offered to them


@checked
def make_evaluate(
    metrics_fn: MetricsFn, num_examples: int, batch_size: int = MOST_EVALUATED, prepare_test: Prepare | None = None
) -> Callable[[PyTree, PyTree], dict[str, Array]]:
    """Makes a compiled ``evaluate(params, data) -> {name: scalar}``, which returns mean metrics over a data set.

    The last batch is padded and masked, so every example counts once. A metric of :class:`jaxbatch.Weighted` values has the
    mean sum of totals / sum of weights over the whole data set, NaN if nothing in it counts. A metric must not couple examples, as batch
    normalisation with ``train=True`` does; otherwise padding would count. ``data`` may be a
    :class:`jaxbatch.data.streams.Stream`. ``prepare_test`` gives each example its key, see :class:`jaxbatch.Task`.

    Example:
        >>> evaluate = make_evaluate(lambda w, x: {"loss": (x - w) ** 2}, num_examples=3, batch_size=2)
        >>> float(evaluate(jnp.array(0.0), jnp.array([1.0, 2.0, 2.0]))["loss"])
        3.0
    """

    programs = _programs(metrics_fn, num_examples, batch_size, prepare_test)
    in_one_program, one_batch, one_part = jax.jit(programs.whole), jax.jit(programs.of_batch), jax.jit(programs.of_examples)
    slow = None  # set at the first call, from the shapes

    def evaluate(params, data):
        nonlocal slow
        size = count_examples(data, "data")
        if size != num_examples:
            raise ValueError(f"this evaluation was made for num_examples={num_examples} and got data of {size} examples.")
        if is_stream(data):
            batches = jax.tree.map(np.asarray, programs.cut())
            examples = prefetch(checked_parts(data, lambda: batches.indices, name="test_data"), depth=_AHEAD)
            # Wait for each part; otherwise parts that the device has not reached would fill the host's memory.
            rows = map(IndexBatches, batches.indices, batches.mask)
            parts = [jax.block_until_ready(one_part(params, *pair)) for pair in zip(examples, rows, strict=True)]
            return programs.mean(_stack(parts))
        if slow is None:
            slow = programs.are_slow_in_a_loop(params, data)
        if not slow or _is_traced(params, data):  # a loop here would be a line of the program for each part
            return in_one_program(params, data)
        batches = programs.cut()
        parts = [one_batch(params, data, jax.tree.map(lambda leaf: leaf[number], batches)) for number in range(len(batches.mask))]
        return programs.mean(_stack(parts))

    return evaluate


class _Programs(NamedTuple):
    """What an evaluation runs, as pure functions."""

    cut: Callable[[], IndexBatches]
    of_examples: Callable[..., Any]  # (params, examples, their places) -> sums: of a part of a stream
    of_batch: Callable[..., Any]  # (params, data, batch) -> sums: of one batch of arrays
    mean: Callable[[Any], Any]  # sums of all parts -> means
    whole: Callable[..., Any]  # (params, data) -> means: of arrays, in one loop

    def are_slow_in_a_loop(self, params: PyTree, data: PyTree) -> bool:
        """Whether a Python loop over batches is faster than the one program."""
        return loops_are_slow(self.of_batch, params, data, jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf[0], self.cut())))


def _programs(metrics_fn: MetricsFn, num_examples: int, batch_size: int, prepare_test: Prepare | None) -> _Programs:
    def cut():
        return cut_batches(jnp.arange(num_examples, dtype=jnp.int32), min(batch_size, num_examples), partial="pad")

    def of_examples(params, examples, batch):
        mask, metrics = batch.mask, call_metrics(metrics_fn, params, prepared_for_metrics(prepare_test, examples, batch.indices))
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

    def of_batch(params, data, batch):
        return of_examples(params, jax.tree.map(lambda leaf: leaf[batch.indices], data), batch)

    def mean(of_parts):
        summed = {name: sum_losses(values) for name, values in of_parts.items()}
        mean_of = lambda values: values.total / or_nan(values.weight) if isinstance(values, Weighted) else values / num_examples
        return {name: mean_of(values) for name, values in summed.items()}

    def whole(params, data):
        return mean(lax.map(lambda batch: of_batch(params, data, batch), cut()))  # cut here: closed over, it would be a constant

    return _Programs(cut, of_examples, of_batch, mean, whole)


def lay_out_evaluation(metrics_fn: MetricsFn, params: PyTree, data: PyTree, batch_size: int, prepare_test: Prepare | None = None) -> Layout:
    """The program with which :func:`make_evaluate` evaluates, of whose data only shapes are used, for the platform that is compiled for.

    Args:
        metrics_fn: see :func:`make_evaluate`.
        params: its first argument, of which only the shapes are used.
        data: arrays, their shapes, or a stream.
        batch_size: examples at a time.
        prepare_test: see :func:`make_evaluate`.

    Example:
        >>> laid = lay_out_evaluation(lambda w, x: {"loss": (x - w) ** 2}, jnp.array(0.0), jnp.ones(8), 4)
        >>> {name: jax.tree.map(jnp.shape, shapes) for name, shapes in laid.arguments.items()}
        {'params': (), 'data': (8,)}
    """
    programs, params = _programs(metrics_fn, count_examples(data, "test_data"), batch_size, prepare_test), shapes_of(params)
    batch = jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf[0], programs.cut()))
    if is_stream(data):
        examples = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*batch.mask.shape, *leaf.shape), leaf.dtype), data.example)
        return Layout(programs.of_examples, {"params": params, "batch": examples, "index": batch}, (), ())
    data = shapes_of(data)
    if programs.are_slow_in_a_loop(params, data):
        return Layout(programs.of_batch, {"params": params, "data": data, "index": batch}, (), ())
    return Layout(programs.whole, {"params": params, "data": data}, (), ())


def call_metrics(metrics_fn: Callable[[PyTree, PyTree], Any], params: PyTree, examples: PyTree) -> Mapping[str, Array | Weighted]:
    """``metrics_fn(params, examples)``.

    Raises:
        ValueError: it takes other arguments, or returns no dict.

    Example:
        >>> call_metrics(lambda w, x: x - w, 1.0, jnp.ones(2))
        Traceback (most recent call last):
        ValueError: metrics_fn must return a dict with one value per example for each name, but returned an array of shape (2,).
    """
    gets = "params ((params, model_state) if the task has update_model_state) and test examples (as prepare_test, not prepare, returns them)"
    metrics = call_function("metrics_fn", metrics_fn, params, examples, gets=gets)
    if not isinstance(metrics, Mapping):
        raise ValueError(f"metrics_fn must return a dict with one value per example for each name, but returned {describe(metrics)}.")
    return metrics


def _stack(parts):
    """Stacks on the host, because a program that joins thousands of scalars would have a line for each."""
    return jax.tree.map(lambda *totals: jnp.asarray(np.stack(totals)), *jax.device_get(parts))


def _is_traced(*trees: PyTree) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def make_task_evaluate(task: Task, data: PyTree, batch_size: int | None = None) -> Callable[[PyTree, PyTree], dict[str, Array]]:
    """:func:`make_evaluate` for the metrics of a task that has some, on data like its test data.

    Args:
        task: its metrics, its ``prepare_test`` and its bounds are used.
        data: of which only the number of examples is used.
        batch_size: examples at a time; ``None``: those of :func:`choose_evaluation_size`.

    Example:
        >>> task = Task(None, None, lambda w, x: {"loss": (x - w) ** 2}, None, None)
        >>> float(make_task_evaluate(task, jnp.ones(3))(jnp.array(0.0), jnp.array([1.0, 2.0, 2.0]))["loss"])
        3.0
    """
    assert task.metrics_fn is not None
    return make_evaluate(task.metrics_fn, count_examples(data, "test_data"), batch_size or choose_evaluation_size(task), task.prepare_test)


def make_test(
    task: Task, batch_size: int | None = None, eval_params: Callable[[PyTree, PyTree], PyTree] | None = None
) -> Callable[[PyTree, TrainState], dict[str, Array]]:
    """Makes ``test(test_data, state) -> {name: mean over the test set}``; it returns ``{}`` for a task without ``test_data``.

    Args:
        task: only its metrics and test data are used.
        batch_size: examples at a time; ``None``: those of :func:`choose_evaluation_size`.
        eval_params: see :class:`jaxbatch.FitConfig`.

    Raises:
        ValueError: the leaves of the test data disagree on the number of examples, or there is no ``metrics_fn`` for them.
    """
    if task.test_data is None:
        return lambda data, state: {}
    if task.metrics_fn is None:
        raise ValueError("metrics_fn=None with test_data: give metrics_fn, or test_data=None to train without a test.")
    check_independent_prepare_test(task)
    evaluate = make_task_evaluate(task, task.test_data, batch_size)

    def test(data, state):
        if eval_params is not None:
            state = state._replace(params=eval_params(state.opt_state, state.params))
        return evaluate(metrics_argument(task, state), data)

    return test


def metrics_argument(task: Task, state: TrainState) -> PyTree:
    """The first argument of the task's ``metrics_fn``: the parameters, or ``(params, model_state)``."""
    return state.params if task.update_model_state is None else (state.params, state.model_state)
