"""Splits a validation part off the training set, to choose rates and sizes on, so that no choice sees the test set."""

import jax
import numpy as np
from jaxtyping import PyTree

from jaxbatch.data import Dataset
from jaxbatch.kinds import checked


@checked
def hold_out(dataset: Dataset, num_examples: int | None = None, *, seed: int = 0) -> Dataset:
    """A data set for making choices: a part of the training set replaces the test set, and the rest is for training.

    The result does not hold the test set, so that no choice can use it. After the choice, train the model, or test it once,
    on ``dataset`` itself.

    The part is drawn without replacement, and each class has its share in it to within one example. Both parts keep the
    order of the training set.

    Args:
        dataset: from :func:`jaxbatch.load_dataset`, N training examples.
        num_examples: V, the size of the validation part. ``None``: a sixth of N, which is 10,000 of MNIST's 60,000.
        seed: the seed of the draw; the parts are a pure function of ``dataset``, ``num_examples`` and ``seed``.

    Returns:
        A :class:`jaxbatch.Dataset` with N − V training examples and, as its test arrays, the V validation examples.

    Raises:
        ValueError: the part is below 1 example or leaves none to train on, or the seed is negative.

    Example:
        >>> from jaxbatch import load_dataset
        >>> choosing = hold_out(load_dataset("digits"))
        >>> len(choosing.train_labels), len(choosing.test_labels)
        (1202, 240)
    """
    total = len(dataset.train_labels)
    count = total // 6 if num_examples is None else num_examples
    _check_part(count, total, seed)
    random = np.random.default_rng(seed)
    shuffled = random.permutation(total)
    by_class = shuffled[np.argsort(dataset.train_labels[shuffled], kind="stable")]
    chosen = (np.arange(count) * total + random.integers(total)) // count  # evenly spaced: every class has its share
    held = np.zeros(total, bool)
    held[by_class[chosen]] = True
    return dataset._replace(
        train_images=dataset.train_images[~held],
        train_labels=dataset.train_labels[~held],
        test_images=dataset.train_images[held],
        test_labels=dataset.train_labels[held],
    )


def hold_out_arrays(arrays: PyTree, num_examples: int | None = None, *, seed: int = 0) -> tuple[PyTree, PyTree]:
    """Splits a validation part off any pytree of arrays, as the ``train_data`` of a :class:`jaxbatch.Task` are.

    The part is drawn without replacement; which arrays hold a class is not known, so that classes have their shares only on
    average. Both parts keep the order of the examples.

    Args:
        arrays: leaves ``(N, ...)``.
        num_examples: V, the size of the validation part. ``None``: a sixth of N.
        seed: the seed of the draw.

    Returns:
        The rest, leaves ``(N - V, ...)``, and the validation part, leaves ``(V, ...)``.

    Raises:
        ValueError: the leaves disagree on N; the part is below 1 example or leaves none to train on; or the seed is negative.

    Example:
        >>> rest, held = hold_out_arrays({"x": np.arange(12), "y": 10 * np.arange(12)})
        >>> len(rest["x"]), held["y"].tolist() == (10 * held["x"]).tolist(), sorted([*rest["x"], *held["x"]]) == list(range(12))
        (10, True, True)
    """
    sizes = sorted({leaf.shape[0] for leaf in jax.tree.leaves(arrays)})
    if len(sizes) != 1:
        raise ValueError(f"arrays: the leaves disagree on the number of examples: {sizes}.")
    count = sizes[0] // 6 if num_examples is None else num_examples
    _check_part(count, sizes[0], seed)
    held = np.zeros(sizes[0], bool)
    held[np.random.default_rng(seed).choice(sizes[0], count, replace=False)] = True
    rest, part = np.flatnonzero(~held), np.flatnonzero(held)
    return jax.tree.map(lambda leaf: leaf[rest], arrays), jax.tree.map(lambda leaf: leaf[part], arrays)


def _check_part(count: int, total: int, seed: int) -> None:
    if not 1 <= count < total:
        raise ValueError(f"num_examples={count} of {total} training examples must be at least 1 and leave at least 1 to train on.")
    if seed < 0:
        raise ValueError(f"seed={seed} must be at least 0.")
