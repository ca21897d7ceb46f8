"""Finds slips in a user's task by tracing its functions on shapes alone, before anything is trained.

Axes: B examples in a batch.
"""

import functools
import pathlib
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxbatch as jb
from jaxbatch.augment import call_prepare
from jaxbatch.data.streams import is_stream
from jaxbatch.gradients.accumulators import next_model_state
from jaxbatch.gradients.groups import leading_axis, losses_and_aux
from jaxbatch.training.evaluation import call_metrics
from jaxbatch.training.tasks import count_examples

SIZES = (2, 3)  # batches that are traced: a result whose shape is right by chance is right for one of them


def line_in(error: BaseException, path: pathlib.Path) -> int | None:
    """The line of the user's file in which an error was raised, or from which what raised it was called."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return lines[-1] if lines else None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, which may be a page long.

    Example:
        >>> first_line(ValueError("dots differ.\\n\\nThe stack was")), first_line(KeyError())
        ('dots differ.', 'it says no more.')
    """
    lines = [line.strip() for line in str(error.msg if isinstance(error, SyntaxError) else error).splitlines() if line.strip()]
    return (lines[0][:300] if lines else "it says no more").rstrip(".") + "."


def check_task(task: jb.Task, text: str, path: pathlib.Path) -> None:
    """Traces ``init``, ``prepare``, ``loss_fn``, ``update_model_state`` and ``metrics_fn``; nothing is computed.

    Raises:
        ValueError: one line that names the function and the line of the user's file.
    """
    check = functools.partial(_check, text, path)
    check("train_data", None, lambda: _check_data(task.train_data, "train_data"))
    start = check("init", task.init, lambda: jax.eval_shape(task.start, jax.random.key(0)))
    params = start if task.update_model_state is None else start[0]
    for size in SIZES:
        batch = shapes_of(task.train_data, size)
        if task.prepare is not None:
            batch = check("prepare", task.prepare, functools.partial(_prepared, task.prepare, batch, size, "prepare"))
        _, aux = check("loss_fn", task.loss_fn, functools.partial(_losses, task, params, batch))
        if task.update_model_state is not None:
            check("update_model_state", task.update_model_state, functools.partial(_next_state, task.update_model_state, start[1], aux))
    if task.test_data is not None and task.metrics_fn is not None:
        check("test_data", None, lambda: _check_data(task.test_data, "test_data"))
        if task.prepare_test is not None:
            for size in SIZES:
                prepare = functools.partial(_prepared, task.prepare_test, shapes_of(task.test_data, size), size, "prepare_test")
                check("prepare_test", task.prepare_test, prepare)
        check("metrics_fn", task.metrics_fn, lambda: check_metrics(task, start, task.test_data))


def check_validation(task: jb.Task, text: str, path: pathlib.Path) -> None:
    """Checks that the metrics can be taken on a held-out part of the training data, which becomes the task's test data."""
    start = jax.eval_shape(task.start, jax.random.key(0))
    what = "metrics_fn on a part of train_data, which is held out to choose on"
    _check(text, path, what, task.metrics_fn, lambda: check_metrics(task, start, task.train_data))


def shapes_of(data: Any, size: int) -> Any:
    """The shapes of a batch of ``size`` examples of arrays or of a stream."""
    examples = data.example if is_stream(data) else jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], _dtype(leaf)), data)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), examples)


def check_metrics(task: jb.Task, start: Any, data: Any) -> None:
    """Raises a ValueError for metrics that are no dict of one number per example."""
    for size in SIZES:
        batch = shapes_of(data, size)
        if task.prepare_test is not None:
            batch = _prepared(task.prepare_test, batch, size, "prepare_test")
        metrics = jax.eval_shape(functools.partial(_metrics, task.metrics_fn), start, batch)
        if not metrics:
            raise ValueError("it must return a dict of metrics, but returns one that is empty.")
        for name, leaf in ((name, leaf) for name, values in metrics.items() for leaf in (values if isinstance(values, jb.Weighted) else [values])):
            shape = getattr(leaf, "shape", None)
            if shape != (size,):
                hint = " Leave out the mean." if shape == () else ""
                raise ValueError(f"it must return one value per example, shape {(size,)}, but {name!r} has shape {shape}.{hint}")


def _check(text: str, path: pathlib.Path, name: str, function: Callable | None, step: Callable[[], Any]) -> Any:
    """The result of a step; its error becomes one line that says whose it is."""
    try:
        return step()
    except Exception as error:
        line = line_in(error, path)
        if line is not None:
            raise ValueError(f"--task {text}: {name} raises {type(error).__name__} in line {line}: {first_line(error)}") from error
        # The library puts some errors of the user's function into other words.
        line = (line_in(error.__cause__, path) if error.__cause__ else None) or _line_of(function, path)
        where = "" if line is None else f" (line {line})"
        message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {first_line(error)}"
        if not where and message.startswith(name):
            raise ValueError(f"--task {text}: {message}") from error
        raise ValueError(f"--task {text}: {name}{where}: {message.removeprefix(name).lstrip(': ')}") from error


def _line_of(function: Callable | None, path: pathlib.Path) -> int | None:
    """The line in which a function of the user's file begins."""
    while isinstance(function, functools.partial) or hasattr(function, "__wrapped__"):
        function = function.func if isinstance(function, functools.partial) else function.__wrapped__
    code = getattr(function, "__code__", None)
    return code.co_firstlineno if code is not None and code.co_filename == str(path) else None


def _check_data(data: Any, name: str) -> None:
    count_examples(data, name)
    if not is_stream(data):
        for key_path, leaf in jax.tree_util.tree_leaves_with_path(data):
            if not (jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) or leaf.dtype.kind in "biufcV"):
                raise ValueError(f"{name}{jax.tree_util.keystr(key_path)} holds {leaf.dtype}, but a device computes only with numbers.")


def _metrics(metrics_fn: Callable, start: Any, batch: Any) -> dict:
    return dict(call_metrics(metrics_fn, start, batch))


def _prepared(prepare: Callable, batch: Any, size: int, name: str) -> Any:
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))
    prepared = jax.eval_shape(lambda *pair: call_prepare(prepare, *pair, name), keys, batch)
    length = leading_axis(prepared, "its result")
    if length != size:
        raise ValueError(f"it must return a batch of as many examples as it gets, {size}, but returned {length}.")
    return prepared


def _losses(task: jb.Task, params: Any, batch: Any) -> Any:
    return jax.eval_shape(lambda p, b: losses_and_aux(task.loss_fn, p, b, task.update_model_state is not None), params, batch)


def _next_state(update: Callable, model_state: Any, aux: Any) -> None:
    after = jax.eval_shape(functools.partial(next_model_state, update), model_state, aux)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (model_state, after)]
    if shapes[0] != shapes[1]:
        raise ValueError("it must return a state of the same structure, shapes and types as it gets.")


def _dtype(leaf: Any) -> Any:
    """The type that a leaf has on the device: NumPy's float64 becomes float32 unless JAX's 64 bits are on."""
    return leaf.dtype if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.result_type(leaf)
