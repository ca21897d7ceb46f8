"""Tasks. A task joins a model's functions (init, loss, metrics) with the data to learn from.

Axes: N examples in the data set, M in the test set, B in a batch.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PyTree

from jaxbatch.augment import Prepare, batch_shapes
from jaxbatch.batches import Duration, num_steps
from jaxbatch.data.streams import Stream, is_stream
from jaxbatch.gradients.groups import Loss, LossFn, check_count, check_params, leading_axis
from jaxbatch.hints import call_function, describe
from jaxbatch.kinds import check_kind
from jaxbatch.machine.platform import compiled_platform
from jaxbatch.states import check_integers, pack
from jaxbatch.sums import Weighted

MetricsFn = Callable[[PyTree, PyTree], Mapping[str, Array | Weighted]]
UpdateModelState = Callable[[PyTree, PyTree], PyTree]  # (model_state, aux) -> model_state


class Task(NamedTuple):
    """How parameters start, the loss and metrics of each example, and the data.

    A model with a state of its own, such as the running moments of batch normalisation, needs ``update_model_state``. Then
    ``init`` returns ``(params, model_state)``, ``loss_fn`` returns ``(losses, aux)``, the metrics get
    ``(params, model_state)``, and after each step the state becomes ``update_model_state(model_state, aux)``.

    ``prepare`` and ``loss_fn`` are called on parts of a batch: a group, a microbatch, a device's share. So their result for an
    example must not depend on the other examples. For example, a weight divided by the batch's sum of weights would depend on
    them, and each part has another sum. ``fit`` refuses such a ``prepare`` if it would get parts, and a loss that changes when a batch is
    cut, such as a contrastive one, where it would be cut into microbatches or over devices. Batch normalisation of
    :mod:`jaxbatch.layers` is taken, and so is every task that is ``coupled``: its parts are meant to be trained as parts.

    aux describes the part of a batch that it is of, as moments do. On several devices the mean of their aux is taken, weighted by their
    numbers of examples. What is to be added up over all examples, such as a count, is a :class:`jaxbatch.Weighted` in aux, with a total and
    a weight for each example: ``update_model_state`` gets their sums, and in parts it is called for each part. So what it adds up is the
    same on any number of devices, in any cut. An aux that is a sum itself is refused on several devices.

    Metrics that need random numbers, as those of a variational autoencoder or a diffusion model do, get them by ``prepare_test``.
    It is as ``prepare``, but the key of a test example depends on its number alone. So every evaluation sees the same noise,
    whatever the seed, the epoch, the batch size and the number of examples evaluated at a time.
    """

    init: Callable[[Array], PyTree]  # key -> params
    loss_fn: LossFn  # (params, batch) -> (B,) losses, or jaxbatch.Weighted
    metrics_fn: MetricsFn | None  # (params, batch) -> {"loss": (B,) or Weighted, "accuracy": (B,), ...}, any names
    train_data: PyTree | Stream  # leaves (N, ...)
    test_data: PyTree | Stream | None  # leaves (M, ...); None: no metrics are taken
    microbatch_size: int | None = None  # the most examples worked on at a time; None: all, or cpu_microbatch_size on CPU
    update_model_state: UpdateModelState | None = None
    prepare: Prepare | None = None  # (a key for each example, batch) -> batch, in training only: augmentation, keys for dropout
    cpu_microbatch_size: int | None = None  # on CPU, the number of examples whose activations fit in the cache
    tokens_per_example: int | None = None  # for durations in tokens, and records that count them
    prepare_test: Prepare | None = None  # (a key for each example, batch) -> batch, before metrics_fn: the same keys every time
    coupled: bool = False  # whether an example's loss is meant to depend on the others of its part of a batch, as in ghost batch norm

    @property
    def num_examples(self) -> int:
        """Examples in the training set."""
        return count_examples(self.train_data)

    @property
    def loss(self) -> Loss:
        """The loss in the one form."""
        return Loss(self.loss_fn, self.update_model_state is not None)

    @property
    def examples_at_a_time(self) -> int | None:
        """The most examples worked on at a time on the platform that is compiled for; None: all."""
        return smallest(self.microbatch_size, self.cpu_microbatch_size if compiled_platform() == "cpu" else None)

    def start(self, key: Array) -> PyTree:
        """What ``init`` returns, if training can begin with it.

        Raises:
            ValueError: it cannot be called with a key, returns no pair where there is ``update_model_state``, or parameters that
                are no floating-point arrays.
        """
        start = call_function("init", self.init, key, gets="one key")
        if self.update_model_state is None:
            check_params(start)
        elif isinstance(start, tuple) and len(start) == 2:
            check_params(start[0])
        else:
            raise ValueError(f"init must return (params, model_state) for a task with update_model_state, but returned {describe(start)}.")
        return start

    def shapes_of_batch(self, size: int) -> PyTree:
        """The shapes of ``size`` training examples as the loss gets them, after ``prepare``."""
        data = self.train_data
        if is_stream(data):
            data = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), data.example)
        return batch_shapes(data, size, self.prepare)


def tokens_seen(task: Task, num_examples: int) -> dict[str, int]:
    """The field of a record that counts tokens; none for a task without ``tokens_per_example``."""
    return {} if task.tokens_per_example is None else {"tokens": num_examples * int(task.tokens_per_example)}


def first_examples(task: Task, count: int) -> Task:
    """The task on the first of its training examples.

    Args:
        task: its training data are arrays.
        count: how many are kept.

    Raises:
        ValueError: the data are a stream, or there are not so many examples.

    Example:
        >>> task = Task(lambda key: None, lambda params, batch: batch, None, np.arange(5), None)
        >>> first_examples(task, 3).train_data
        array([0, 1, 2])
    """
    if is_stream(task.train_data):
        raise ValueError("train_data are a stream, which gives all its examples. Give arrays.")
    if not 1 <= count <= task.num_examples:
        raise ValueError(f"count={count} must be between 1 and {task.num_examples}, the number of training examples.")
    return task._replace(train_data=jax.tree.map(lambda leaf: leaf[:count], task.train_data))


def updates_of(task: Task, duration: Duration, batch_size: int) -> int:
    """The batches of a run of a task that ends with the duration.

    Example:
        >>> from jaxbatch.batches import epochs
        >>> updates_of(Task(None, None, None, np.zeros(10), None), epochs(3), 4)
        6
    """
    return num_steps(duration, num_examples=task.num_examples, batch_size=batch_size, tokens_per_example=task.tokens_per_example)


def smallest(*sizes: int | None) -> int | None:
    """The smallest size; None stands for no bound.

    Example:
        >>> smallest(None, 64, 8), smallest(None, None)
        (8, None)
    """
    return min((size for size in sizes if size is not None), default=None)


def check_data(task: Task) -> None:
    """Checks a task's sizes, and its arrays for integers of 64 bits that JAX would make others of.

    Raises:
        ValueError: a size is no whole number of at least 1, or ``coupled`` no bool; see also :func:`jaxbatch.states.check_integers`.
    """
    for name in ("microbatch_size", "cpu_microbatch_size", "tokens_per_example"):
        check_count(name, getattr(task, name), optional=True)
    check_kind("coupled", task.coupled, bool)
    for name, data in (("train_data", task.train_data), ("test_data", task.test_data)):
        check_integers(data, name)


def count_examples(data: PyTree | Stream, name: str = "train_data") -> int:
    """Examples in a data set, be it on the device or a stream.

    Raises:
        ValueError: leaves are no arrays or disagree on the number of examples, or the set is empty.
    """
    if not is_stream(data):
        if callable(getattr(data, "parts", None)):
            missing = " and ".join(field for field in ("num_examples", "example") if not hasattr(data, field))
            raise ValueError(f"{name} is a stream without {missing}: give it what jaxbatch.data.streams.Stream lists.")
        return leading_axis(data, name)
    if not isinstance(data.num_examples, int | np.integer) or data.num_examples < 1:
        raise ValueError(f"{name} is a stream of num_examples={data.num_examples!r}, and must hold a whole number of at least 1.")
    return int(data.num_examples)


def fingerprint(data: Any) -> str | None:
    """A digest of every leaf, which differs for other training data of the same size.

    For a stream it is the stream's ``fingerprint``, or None if it has none.

    Example:
        >>> fingerprint(np.arange(3)) == fingerprint(np.arange(3)), fingerprint(np.arange(3)) == fingerprint(np.arange(3)[::-1])
        (True, False)
    """
    if is_stream(data):
        return getattr(data, "fingerprint", None)
    digest = hashlib.blake2b(digest_size=16)
    for array in pack(data).values():
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
