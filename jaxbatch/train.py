"""Training: a step compiled for one batch size, an epoch compiled as one program, a run that yields records.

Axes: N examples in the data set, S steps, B examples in a batch.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int32, PyTree

from jaxbatch.batches import Duration, cut_batches, epoch_order, epochs, num_steps, steps_per_epoch
from jaxbatch.data import Dataset
from jaxbatch.gradients import LossFn, losses_and_mean_gradient
from jaxbatch.losses import classification_loss, classification_metrics
from jaxbatch.split import split_backward

_INIT = 0x696E6974  # "init": keeps the keys of initialisation apart from those of shuffling
MetricsFn = Callable[[PyTree, PyTree], dict[str, Array]]


class Task(NamedTuple):
    """What is to be learned: how parameters start, the loss and metrics of each example, the data."""

    init: Callable[[Array], PyTree]  # key -> params
    loss_fn: LossFn  # (params, batch) -> (B,) losses
    metrics_fn: MetricsFn  # (params, batch) -> {"loss": (B,), "accuracy": (B,)}
    train_data: PyTree  # leaves (N, ...)
    test_data: PyTree  # leaves (M, ...)
    microbatch_size: int | None = None  # examples whose activations stay in cache; None: all at once

    @property
    def num_examples(self) -> int:
        """Examples in the training set."""
        return jax.tree.leaves(self.train_data)[0].shape[0]


class TrainState(NamedTuple):
    """Everything that a step changes."""

    params: PyTree
    opt_state: PyTree
    step: Int32[Array, ""]  # optimizer updates so far


def classification_task(model, dataset: Dataset, *, microbatch_size: int | None = None) -> Task:
    """The task of a Flax Linen ``model`` on a data set, data moved to the device once.

    Args:
        model: a module whose ``apply(variables, images)`` returns logits.
        dataset: from :func:`jaxbatch.load_dataset`.
        microbatch_size: examples worked on at a time. ``None``: 64 on CPU, where larger batches fall out
            of the cache, all at once elsewhere.

    Example:
        >>> from jaxbatch import SimpleCNN, load_dataset
        >>> classification_task(SimpleCNN(), load_dataset("digits")).num_examples
        1442
    """
    if microbatch_size is None and jax.default_backend() == "cpu":
        microbatch_size = 64
    shape = (1, *dataset.train_images.shape[1:])
    return Task(
        init=lambda key: model.init(key, jnp.zeros(shape)),
        loss_fn=classification_loss(model.apply, dataset.mean, dataset.std),
        metrics_fn=classification_metrics(model.apply, dataset.mean, dataset.std),
        train_data=(jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)),
        test_data=(jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels)),
        microbatch_size=microbatch_size,
    )


def init_state(task: Task, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Parameters and optimizer state at the start, a pure function of the seed.

    Example:
        >>> task = Task(lambda key: jax.random.normal(key, (2,)), None, None, jnp.zeros((4, 1)), None)
        >>> bool((init_state(task, optax.sgd(0.1), 3).params == init_state(task, optax.sgd(0.1), 3).params).all())
        True
    """
    params = jax.jit(task.init)(jax.random.fold_in(jax.random.key(seed), _INIT))
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    *,
    num_groups: int | None = None,
    microbatch_size: int | None = None,
) -> Callable[[TrainState, PyTree], tuple[TrainState, Float[Array, "B"]]]:
    """A training step for one batch size, jit-compiled and usable inside ``lax.scan``.

    Args:
        loss_fn: ``(params, batch) -> losses`` of shape ``(B,)``.
        optimizer: any optax optimizer.
        batch_size: B, static: another size needs another step.
        num_groups: None for one update on the mean gradient; K for K updates from K groups' gradients
            (:func:`jaxbatch.split_backward`).
        microbatch_size: examples worked on at a time; the result is the same, memory and cache differ.

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
    if num_groups is not None:
        split_step = split_backward(loss_fn, optimizer, num_groups, microbatch_size=microbatch_size)

    @jax.jit
    def step(state, batch):
        found = jax.tree.leaves(batch)[0].shape[0]
        if found != batch_size:
            raise ValueError(f"this step was made for batch_size={batch_size} and got a batch of {found} examples.")
        if num_groups is not None:
            params, opt_state, losses = split_step(state.params, state.opt_state, batch)
            return TrainState(params, opt_state, state.step + num_groups), losses
        losses, gradient = losses_and_mean_gradient(loss_fn, state.params, batch, microbatch_size=microbatch_size)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1), losses

    return step


def make_epoch(step: Callable) -> Callable[[TrainState, PyTree, Int32[Array, "S B"]], tuple[TrainState, Array]]:
    """Any number of steps over data on the device, as one compiled program.

    Returns:
        ``run(state, data, indices) -> (state, losses)``: ``indices`` ``(S, B)`` say which examples go into
        which batch; ``losses`` ``(S,)`` are the batches' mean losses before each step. The incoming state's
        memory is reused for the outgoing one: do not use it again.

    Example:
        >>> step = make_train_step(lambda w, x: 0.5 * (x - w) ** 2, optax.sgd(0.5), batch_size=1)
        >>> state = TrainState(jnp.array(0.0), optax.sgd(0.5).init(0.0), jnp.array(0))
        >>> state, losses = make_epoch(step)(state, jnp.array([2.0, 6.0]), jnp.array([[1], [0]]))
        >>> float(state.params), losses.tolist()
        (2.5, [18.0, 0.5])
    """

    def run(state, data, indices):
        def body(state, index):
            state, losses = step(state, jax.tree.map(lambda leaf: leaf[index], data))
            return state, losses.mean()

        return lax.scan(body, state, indices)

    return jax.jit(run, donate_argnums=0)


def make_evaluate(
    metrics_fn: MetricsFn, num_examples: int, batch_size: int = 500
) -> Callable[[PyTree, PyTree], dict[str, Array]]:
    """Mean metrics over a data set: ``evaluate(params, data) -> {name: scalar}``, compiled.

    The last batch is padded and masked, so every example counts once.

    Example:
        >>> evaluate = make_evaluate(lambda w, x: {"loss": (x - w) ** 2}, num_examples=3, batch_size=2)
        >>> float(evaluate(jnp.array(0.0), jnp.array([1.0, 2.0, 2.0]))["loss"])
        3.0
    """
    batches = cut_batches(jnp.arange(num_examples), min(batch_size, num_examples), partial="pad")

    @jax.jit
    def evaluate(params, data):
        def sums(batch):
            metrics = metrics_fn(params, jax.tree.map(lambda leaf: leaf[batch.indices], data))
            return jax.tree.map(lambda values: jnp.where(batch.mask, values, 0).sum(), metrics)

        return jax.tree.map(lambda total: total.sum() / num_examples, lax.map(sums, batches))

    return evaluate


class FitConfig(NamedTuple):
    """How to train. ``duration`` carries its unit: ``epochs(5)``, ``steps(1000)``, ``examples(60_000)``."""

    optimizer: optax.GradientTransformation
    batch_size: int
    duration: Duration = epochs(1)
    num_groups: int | None = None
    seed: int = 0


def fit(task: Task, config: FitConfig, *, state: TrainState | None = None) -> Iterator[dict[str, Any]]:
    """Trains and yields one record an epoch (and one at the end of a duration that ends within an epoch).

    Args:
        task: see :func:`classification_task`, or any :class:`Task` made of plain functions.
        config: see :class:`FitConfig`.
        state: where to go on: the ``state`` of an earlier record, with its ``step`` and so its place in the
            order of examples. ``None``: start from the seed.

    Yields:
        ``batches`` and ``examples`` seen, ``total_batches`` to come to, optimizer ``updates``, ``epoch`` (a fraction), mean training ``loss``
        since the last record, ``test_loss``, ``test_accuracy``, ``train_seconds`` (computation since the last
        record, compiling apart), ``compile_seconds``, ``diverged``, and ``state``. A loss that is not
        finite ends the run with a last record: ``diverged`` True, and ``diverged_at_batch``.

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
    num_examples, batch_size = task.num_examples, config.batch_size
    per_epoch = steps_per_epoch(num_examples, batch_size)
    total = num_steps(config.duration, num_examples=num_examples, batch_size=batch_size)
    step = make_train_step(
        task.loss_fn,
        config.optimizer,
        batch_size,
        num_groups=config.num_groups,
        microbatch_size=task.microbatch_size,
    )
    run = make_epoch(step)
    evaluate = make_evaluate(task.metrics_fn, jax.tree.leaves(task.test_data)[0].shape[0])
    state = init_state(task, config.optimizer, config.seed) if state is None else state
    done = int(state.step) // (config.num_groups or 1)
    compiled = {}
    while done < total:
        epoch, offset = divmod(done, per_epoch)
        count = min(per_epoch - offset, total - done)
        order = epoch_order(config.seed, epoch, num_examples)
        indices = cut_batches(order, batch_size).indices[offset : offset + count]
        state = jax.tree.map(jnp.copy, state)  # the caller may keep what was yielded; the program reuses its memory
        compile_seconds = 0.0
        if count not in compiled:
            started = time.perf_counter()
            compiled[count] = run.lower(state, task.train_data, indices).compile()
            compile_seconds = time.perf_counter() - started
        started = time.perf_counter()
        state, losses = jax.block_until_ready(compiled[count](state, task.train_data, indices))
        seconds = time.perf_counter() - started
        done += count
        bad = first_nonfinite(losses)
        test = evaluate(state.params, task.test_data)
        yield {
            "batches": done,
            "total_batches": total,
            "examples": done * batch_size,
            "updates": int(state.step),
            "epoch": done / per_epoch,
            "loss": float(losses.mean()),
            "test_loss": float(test["loss"]),
            "test_accuracy": float(test["accuracy"]),
            "train_seconds": seconds,
            "compile_seconds": compile_seconds,
            "diverged": bad is not None,
            "diverged_at_batch": None if bad is None else done - count + bad,
            "state": state,
        }
        if bad is not None:
            return


def first_nonfinite(losses: Float[Array, "S"]) -> int | None:
    """Index of the first loss that is NaN or infinite, or None.

    Example:
        >>> first_nonfinite(jnp.array([0.5, jnp.inf, jnp.nan]))
        1
    """
    bad = np.flatnonzero(~np.isfinite(np.asarray(losses)))
    return int(bad[0]) if len(bad) else None
