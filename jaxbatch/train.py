"""Training: what is learned, a step for one batch size, a run that yields records.

Axes: N examples in the data set, S steps, B examples in a batch.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int32, PyTree

from jaxbatch.batches import Duration, check_duration, epoch_order, epochs, steps_per_epoch
from jaxbatch.compiling import Programs
from jaxbatch.data import Dataset
from jaxbatch.gradients import LossFn, check_loss, group_gradient_fn
from jaxbatch.layers import loops_are_slow
from jaxbatch.loops import compile_epoch, make_evaluate
from jaxbatch.losses import classification_loss, classification_metrics
from jaxbatch.split import split_backward

_INIT = 0x696E6974  # "init": keeps the keys of initialisation apart from those of shuffling
MetricsFn = Callable[[PyTree, PyTree], dict[str, Array]]
UpdateModelState = Callable[[PyTree, PyTree], PyTree]  # (model_state, aux) -> model_state


class Task(NamedTuple):
    """What is to be learned: how parameters start, the loss and metrics of each example, the data.

    A model with state of its own, as the running moments of batch normalisation, gives ``update_model_state``. Then
    ``init`` returns ``(params, model_state)``, ``loss_fn`` returns ``(losses, aux)``, the metrics are taken of
    ``(params, model_state)``, and after each step the state becomes ``update_model_state(model_state, aux)``.
    """

    init: Callable[[Array], PyTree]  # key -> params
    loss_fn: LossFn  # (params, batch) -> (B,) losses
    metrics_fn: MetricsFn  # (params, batch) -> {"loss": (B,), "accuracy": (B,)}
    train_data: PyTree  # leaves (N, ...)
    test_data: PyTree  # leaves (M, ...)
    microbatch_size: int | None = None  # examples whose activations stay in cache; None: all at once
    update_model_state: UpdateModelState | None = None

    @property
    def num_examples(self) -> int:
        """Examples in the training set."""
        return jax.tree.leaves(self.train_data)[0].shape[0]


class TrainState(NamedTuple):
    """Everything that a step changes."""

    params: PyTree
    opt_state: PyTree
    step: Int32[Array, ""]  # optimizer updates so far
    model_state: PyTree = ()  # what the model keeps beside its parameters


def classification_task(model, dataset: Dataset, *, microbatch_size: int | None = None) -> Task:
    """The task of a Flax Linen ``model`` on a data set, data moved to the device once.

    Args:
        model: a module whose ``apply(variables, images)`` returns logits. If it has a collection ``batch_stats``, it
            must take ``train=True`` and leave the batch's own moments there, as :class:`jaxbatch.layers.BatchNorm`.
        dataset: from :func:`jaxbatch.load_dataset`.
        microbatch_size: examples worked on at a time. ``None``: on CPU 64, where larger batches fall out of the cache,
            unless the model is built on XLA's convolutions or couples its examples; all at once elsewhere.

    Example:
        >>> from jaxbatch import SimpleCNN, load_dataset
        >>> classification_task(SimpleCNN(), load_dataset("digits")).num_examples
        1442
    """
    image = jnp.zeros((1, *dataset.train_images.shape[1:]))
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    stateful = "batch_stats" in variables

    def apply_train(params, images):
        return model.apply(params, images, train=True, mutable=["batch_stats"])

    def init(key):
        variables = model.init(key, image)
        return ({"params": variables["params"]}, {"batch_stats": variables["batch_stats"]}) if stateful else variables

    def evaluate(variables, images):
        return model.apply({**variables[0], **variables[1]} if stateful else variables, images)

    if microbatch_size is None and jax.default_backend() == "cpu" and not stateful:
        microbatch_size = None if loops_are_slow(model.apply, variables, image) else 64
    return Task(
        init=init,
        loss_fn=classification_loss(
            apply_train if stateful else model.apply, dataset.mean, dataset.std, has_aux=stateful
        ),
        metrics_fn=classification_metrics(evaluate, dataset.mean, dataset.std),
        train_data=(jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)),
        test_data=(jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels)),
        microbatch_size=microbatch_size,
        update_model_state=running_average if stateful else None,
    )


def running_average(model_state: PyTree, found: PyTree, momentum: float = 0.1) -> PyTree:
    """``(1 - momentum) * model_state + momentum * found``: PyTorch's rule for the moments of batch normalisation.

    Example:
        >>> running_average(jnp.array(1.0), jnp.array(3.0), 0.5).item()
        2.0
    """
    return jax.tree.map(lambda old, new: (1 - momentum) * old + momentum * new, model_state, found)


def init_state(task: Task, optimizer: optax.GradientTransformation, seed: int | Int32[Array, ""]) -> TrainState:
    """Parameters, optimizer state and model state at the start, a pure function of the seed.

    Example:
        >>> task = Task(lambda key: jax.random.normal(key, (2,)), None, None, jnp.zeros((4, 1)), None)
        >>> bool((init_state(task, optax.sgd(0.1), 3).params == init_state(task, optax.sgd(0.1), 3).params).all())
        True
    """
    start = jax.jit(task.init)(jax.random.fold_in(jax.random.key(seed), _INIT))
    params, model_state = (start, ()) if task.update_model_state is None else start
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), model_state)


def evaluated(task: Task, state: TrainState) -> PyTree:
    """What the task's ``metrics_fn`` takes: the parameters, or ``(params, model_state)``."""
    return state.params if task.update_model_state is None else (state.params, state.model_state)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    *,
    num_groups: int | None = None,
    microbatch_size: int | None = None,
    update_model_state: UpdateModelState | None = None,
) -> Callable[[TrainState, PyTree], tuple[TrainState, Float[Array, "B"]]]:
    """A training step for one batch size, jit-compiled and usable inside ``lax.scan``.

    Args:
        loss_fn: ``(params, batch) -> losses`` of shape ``(B,)``.
        optimizer: any optax optimizer.
        batch_size: B, static: another size needs another step.
        num_groups: None for one update on the mean gradient; K for K updates from K groups' gradients
            (:func:`jaxbatch.split_backward`).
        microbatch_size: examples worked on at a time; the result is the same, memory and cache differ.
        update_model_state: given, ``loss_fn`` returns ``(losses, aux)``, see :class:`Task`; with K groups it is
            called for each group's aux in turn.

    Returns:
        ``step(state, batch) -> (state, losses)``; the losses are those at the incoming parameters.

    Raises:
        ValueError: from the step, for a batch of another size.

    Example:
        >>> step = make_train_step(lambda w, x: 0.5 * (x - w) ** 2, optax.sgd(0.5), batch_size=2)
        >>> state = TrainState(jnp.array(0.0), optax.sgd(0.5).init(0.0), jnp.array(0))
        >>> state, losses = step(state, jnp.array([1.0, 3.0]))
        >>> float(state.params), int(state.step), losses.tolist()
        (1.0, 1, [0.5, 4.5])
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    has_aux = update_model_state is not None
    if num_groups is not None:
        split_step = split_backward(loss_fn, optimizer, num_groups, has_aux=has_aux, microbatch_size=microbatch_size)
    mean_gradient = group_gradient_fn(loss_fn, has_aux=has_aux, microbatch_size=microbatch_size)

    @jax.jit
    def step(state, batch):
        found = jax.tree.leaves(batch)[0].shape[0]
        if found != batch_size:
            raise ValueError(f"this step was made for batch_size={batch_size} and got a batch of {found} examples.")
        if num_groups is not None:
            params, opt_state, losses, *aux = split_step(state.params, state.opt_state, batch)
            model_state = state.model_state
            if has_aux:
                update = lambda old, found: (update_model_state(old, found), None)
                model_state, _ = lax.scan(update, model_state, aux[0])
            return TrainState(params, opt_state, state.step + num_groups, model_state), losses
        check_loss(loss_fn, state.params, batch, has_aux=has_aux)
        losses, gradient, aux = mean_gradient(state.params, batch)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        model_state = update_model_state(state.model_state, aux) if has_aux else state.model_state
        return TrainState(params, opt_state, state.step + 1, model_state), losses

    return step


class FitConfig(NamedTuple):
    """How to train. ``duration`` carries its unit: ``epochs(5)``, ``steps(1000)``, ``examples(60_000)``.

    ``batch_size`` is a number or a schedule ``epoch -> number``, epochs counted from 0. The learning rate that goes
    with a schedule is an optax schedule inside ``optimizer``.
    """

    optimizer: optax.GradientTransformation
    batch_size: int | Callable[[int], int]
    duration: Duration = epochs(1)
    num_groups: int | None = None
    seed: int = 0


class Segment(NamedTuple):
    """Batches of one size within one epoch."""

    epoch: int
    first: int  # the epoch's batch that comes first
    batch_size: int
    num_batches: int
    end: float  # where this ends, in epochs


def plan_segments(config: FitConfig, num_examples: int, *, done: int = 0) -> list[Segment]:
    """What is left to train after ``done`` batches: a segment for each epoch.

    Raises:
        ValueError: a batch larger than the data set, a duration without a unit.

    Example:
        >>> doubling = FitConfig(None, lambda epoch: 2 * 2**epoch, epochs(3))
        >>> [(s.epoch, s.batch_size, s.num_batches) for s in plan_segments(doubling, 8, done=5)]
        [(1, 4, 1), (2, 8, 1)]
    """
    check_duration(config.duration)
    amount, unit = config.duration
    segments, batches, examples = [], 0, 0
    for epoch in itertools.count():
        left = amount - {"steps": batches, "examples": examples, "epochs": epoch}[unit]
        if left <= 0:
            return segments
        size = config.batch_size(epoch) if callable(config.batch_size) else config.batch_size
        per_epoch = steps_per_epoch(num_examples, size)
        in_batches = {"steps": left, "examples": left / size, "epochs": left * per_epoch}[unit]
        count = min(per_epoch, math.ceil(round(in_batches, 6)))  # 0.1 * 30 is 3.0000000000000004
        skipped = min(count, max(0, done - batches))
        if skipped < count:
            segments.append(Segment(epoch, skipped, size, count - skipped, epoch + count / per_epoch))
        batches, examples = batches + count, examples + count * size


def fit(task: Task, config: FitConfig, *, state: TrainState | None = None) -> Iterator[dict[str, Any]]:
    """Trains and yields one record an epoch (and one at the end of a duration that ends within an epoch).

    An epoch is one compiled program, or a Python loop over a compiled step where that is faster
    (:mod:`jaxbatch.loops`). With a schedule of batch sizes the next size is compiled in the background while the
    run goes on.

    Args:
        task: see :func:`classification_task`, or any :class:`Task` made of plain functions.
        config: see :class:`FitConfig`.
        state: where to go on: the ``state`` of an earlier record, with its ``step`` and so its place in the
            order of examples. ``None``: start from the seed.

    Yields:
        ``batches`` and ``examples`` seen, ``total_batches`` to come to, ``batch_size``, optimizer ``updates``,
        ``epoch`` (a fraction), mean training ``loss`` since the last record, ``test_loss``, ``test_accuracy``,
        ``train_seconds`` (computation since the last record), ``compile_seconds`` of the programs first used in it
        and ``stall_seconds``, the part of those that the run had to wait for; ``diverged``, and ``state``. A loss that
        is not finite ends the run with a last record: ``diverged`` True, and ``diverged_at_batch``.

    Raises:
        ValueError: a batch larger than the data set, a duration without a unit.

    Example:
        >>> loss_fn = lambda w, x: 0.5 * (x - w) ** 2
        >>> metrics_fn = lambda w, x: {"loss": loss_fn(w, x), "accuracy": jnp.zeros(x.shape[0])}
        >>> data = jnp.array([1.0, 2.0, 3.0, 4.0])
        >>> task = Task(lambda key: jnp.array(0.0), loss_fn, metrics_fn, data, data)
        >>> records = fit(task, FitConfig(optax.sgd(0.5), batch_size=4, duration=epochs(3)))
        >>> [round(record["test_loss"], 4) for record in records]
        [1.4062, 0.8203, 0.6738]
    """
    num_examples = task.num_examples
    everything = plan_segments(config, num_examples)
    state = init_state(task, config.optimizer, config.seed) if state is None else state
    done = int(state.step) // (config.num_groups or 1)
    seen = _examples_in(everything, done)
    segments = plan_segments(config, num_examples, done=done)
    total = sum(segment.num_batches for segment in everything)
    evaluate = make_evaluate(task.metrics_fn, jax.tree.leaves(task.test_data)[0].shape[0])
    with Programs(_epoch_compiler(task, config, state)) as programs:
        used = set()
        for number, segment in enumerate(segments):
            state = jax.tree.map(jnp.copy, state)  # the caller may keep what was yielded; the program reuses its memory
            key, count = segment[2:4], segment.num_batches
            started = time.perf_counter()
            program = programs[key]
            stall_seconds = time.perf_counter() - started
            programs.ahead(later[2:4] for later in segments[number + 1 :])
            started = time.perf_counter()
            first = segment.first * segment.batch_size
            order = np.asarray(epoch_order(config.seed, segment.epoch, num_examples))
            indices = order[first : first + count * segment.batch_size].reshape(count, segment.batch_size)
            state, losses = jax.block_until_ready(program.run(state, task.train_data, indices))
            seconds = time.perf_counter() - started
            losses = np.asarray(losses)  # its length changes with the batch size: each would be another program
            done, seen = done + count, seen + count * segment.batch_size
            bad = first_nonfinite(losses)
            test = evaluate(evaluated(task, state), task.test_data)
            yield {
                "batches": done,
                "total_batches": total,
                "batch_size": segment.batch_size,
                "examples": seen,
                "updates": int(state.step),
                "epoch": segment.end,
                "loss": float(losses.mean()),
                "test_loss": float(test["loss"]),
                "test_accuracy": float(test["accuracy"]),
                "train_seconds": seconds,
                "compile_seconds": 0.0 if key in used else program.compile_seconds,
                "stall_seconds": stall_seconds,
                "diverged": bad is not None,
                "diverged_at_batch": None if bad is None else done - count + bad,
                "state": state,
            }
            used.add(key)
            if bad is not None:
                return


def _epoch_compiler(task: Task, config: FitConfig, state: TrainState):
    """``(batch_size, num_batches) -> program``; only shapes are kept of the state."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)

    def compile(key):
        size, count = key
        step = make_train_step(
            task.loss_fn,
            config.optimizer,
            size,
            num_groups=config.num_groups,
            microbatch_size=task.microbatch_size,
            update_model_state=task.update_model_state,
        )
        return compile_epoch(step, shapes, task.train_data, count, size)

    return compile


def _examples_in(segments: list[Segment], batches: int) -> int:
    """Examples in the first ``batches`` batches of a plan."""
    seen = 0
    for segment in segments:
        count = min(batches, segment.num_batches)
        seen, batches = seen + count * segment.batch_size, batches - count
    return seen


def first_nonfinite(losses: Float[Array, "S"] | Float[np.ndarray, "S"]) -> int | None:
    """Index of the first loss that is NaN or infinite, or None.

    Example:
        >>> first_nonfinite(jnp.array([0.5, jnp.inf, jnp.nan]))
        1
    """
    bad = np.flatnonzero(~np.isfinite(np.asarray(losses)))
    return int(bad[0]) if len(bad) else None
