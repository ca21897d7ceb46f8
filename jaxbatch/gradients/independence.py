"""Checks whether a function's result for an example depends on the other examples, by changing those other examples.

With batch normalisation, with weights divided by the batch's sum, or with a contrastive loss, an example has no loss of its
own, and so no gradient of its own. Without this check the result would be a number that means nothing.

Axes: B examples.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxbatch.augment import Prepare, call_prepare
from jaxbatch.batches import even_part
from jaxbatch.data.streams import is_stream
from jaxbatch.gradients.groups import Loss
from jaxbatch.gradients.tried import known_pairs, without_zeros
from jaxbatch.machine.compiling import compile_ahead
from jaxbatch.machine.constants import take_out_constants
from jaxbatch.part_lengths import part_slices
from jaxbatch.states import is_key


def check_independent_losses(loss: Loss, params: PyTree, batch: PyTree) -> None:
    """Checks that an example's loss does not depend on the others.

    The check computes the losses of two examples in a batch of both, and each in a batch with a copy of itself, and compares
    them. The two differ in every array of the batch that is not the same for all examples; where no two do, there are several pairs.
    Parameters that are zero, as those of a last layer at its start, hide a dependence, so it is looked for with random ones in
    their place too. Within ``jit`` there are no examples yet, so random ones of the same shapes are used. If a loss is not
    finite, or if the function closes over values that are not known yet, the check passes. Of :class:`jaxbatch.Weighted` losses
    totals and weights are compared; it passes too if both examples have the weight 0.

    Raises:
        ValueError: the two losses differ by more than rounding.

    Example:
        >>> loss = Loss(lambda w, x: w * (x - x.mean()))
        >>> check_independent_losses(loss, jnp.array(1.0), jnp.arange(3.0))
        Traceback (most recent call last):
        ValueError: the loss of an example changes with the others in its batch, as through batch normalisation, so one
        example has no gradient of its own. Take groups of several examples, or a model without such layers.
    """
    if company_matters(lambda params, batch: loss(params, batch)[0], params, batch):
        raise ValueError(
            "the loss of an example changes with the others in its batch, as through batch normalisation, so one example has no "
            "gradient of its own. Take groups of several examples, or a model without such layers."
        )


def check_independent_prepare(task: Any) -> None:
    """Checks that ``task.prepare`` gives the same result for an example in any part of a batch.

    Raises:
        ValueError: it does not, so the numbers would depend on how a batch is cut.
    """
    if not has_independent_prepare(task):
        raise ValueError(
            "prepare changes an example with the others in its batch, as by a batch's sum of weights, and here it sees parts of a batch "
            "(microbatches, devices, a stream): every cut would give other numbers. Make it a function of one example, or train on one device "
            "without microbatch_size."
        )


def has_independent_prepare(task: Any) -> bool:
    """Whether a task has no ``prepare``, or one that gives the same result for an example in any part of a batch."""
    return _is_independent(task.prepare, task.train_data, "prepare")


def _is_independent(prepare: Prepare | None, data: Any, name: str) -> bool:
    if prepare is None:
        return True
    if is_stream(data):
        data = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), data.example)
    keys = jax.random.split(jax.random.key(0), 2)
    return not company_matters(lambda _, batch: call_prepare(prepare, keys, batch, name), (), data)


def check_independent_prepare_test(task: Any) -> None:
    """Checks that ``task.prepare_test`` gives the same result for an example in any part of the test set.

    Raises:
        ValueError: it does not, so a metric would depend on how many examples are evaluated at a time.
    """
    if not _is_independent(task.prepare_test, task.test_data, "prepare_test"):
        raise ValueError(
            "prepare_test changes an example with the others in its batch, and it sees the test set in parts: metrics would depend on how it "
            "is cut. Make it a function of one example and its key."
        )


def company_matters(function: Callable[[PyTree, PyTree], PyTree], params: PyTree, batch: PyTree) -> bool:
    """Whether the result of ``function(params, batch)`` for one of two examples changes when the other example changes.

    Example:
        >>> x = jnp.array([1.0, 2.0])
        >>> [company_matters(f, jnp.array(1.0), x) for f in (lambda w, x: w * x, lambda w, x: w * x / x.sum())]
        [False, True]
    """
    # Within shard_map without jit, even new arrays would belong to its devices.
    nowhere = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))
    with nowhere, jax.core.eval_context():
        # Both are looked at, because an example of weight 0 has no loss to compare.
        results = whole_and_in_parts(function, *known_pairs(params, batch), [np.zeros(2, int), np.ones(2, int)])
        return any(_changed(_rows_of(whole, [k]), _rows_of(alone, [k])) for whole, parts in results for k, alone in enumerate(parts))


def cut_matters(function: Callable[[PyTree, PyTree], PyTree], params: PyTree, batch: PyTree, size: int) -> bool:
    """Whether the results of ``function(params, batch)`` for the examples change when the batch is cut into parts of ``size`` examples.

    Besides company it finds results that depend on the size of the batch or on an example's number in it. A router with places for
    so many examples shows only where a place is missing, so the batch is also tried with copies of its first example alone.

    Args:
        function: ``(params, batch) -> results``, leaves ``(B, ...)``.
        params: arrays, as training starts with them.
        batch: leaves ``(B, ...)``, as training works on them at once.
        size: the most examples in a part.

    Returns:
        True where results differ by more than rounding. Results that are not finite tell nothing.

    Example:
        >>> x = jnp.array([1.0, 2.0, 3.0, 4.0])
        >>> cuts = (lambda w, x: w * x, lambda w, x: w * (x - x.mean()), lambda w, x: w * x / len(x))
        >>> [cut_matters(function, jnp.array(0.0), x, 2) for function in cuts]
        [False, True, True]
    """
    count = jax.tree.leaves(batch)[0].shape[0]
    parts = [np.arange(count)[part] for part in part_slices(count, even_part(count, size))]
    return any(in_parts_differ(*results) for results in whole_and_in_parts(function, params, with_copies(batch), parts))


def whole_and_in_parts(
    function: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    batches: Sequence[PyTree],
    parts: Sequence[np.ndarray],
    of_part: Callable[[PyTree, PyTree], PyTree] | None = None,
) -> Iterator[tuple[PyTree, list[PyTree]]]:
    """The results of ``function(params, batch)`` for batches whole and for parts of them, one batch after another, on the host.

    Parameters that are zero, as those of a last layer at its start, hide a dependence: results with random ones in their place follow.
    There are none for a function that closes over values that are not known yet.

    Args:
        function: ``(params, batch) -> results``.
        params: arrays.
        batches: of one size, leaves ``(B, ...)``.
        parts: the numbers of the examples in each part.
        of_part: in place of ``function`` for a part.

    Example:
        >>> results = whole_and_in_parts(lambda w, x: x / len(x), (), [jnp.array([1.0, 3.0])], [np.array([0]), np.array([1])])
        >>> [(whole.tolist(), [part.tolist() for part in parts]) for whole, parts in results]
        [([0.5, 1.5], [[1.0], [3.0]])]
    """
    programs: dict[tuple, Callable[..., PyTree]] = {}

    def results(function, params, batch):
        key = id(function), jax.tree.leaves(batch)[0].shape[:1]
        if key not in programs:
            run, constants = take_out_constants(function, params, batch)
            if any(isinstance(constant, jax.core.Tracer) for constant in constants):
                return None
            programs[key] = functools.partial(compile_ahead(jax.jit(run), constants, params, batch), constants)
        return jax.tree.map(_on_host, programs[key](params, batch))

    others = without_zeros(params)
    for tried in (params,) if others is None else (params, others):
        for batch in batches:
            whole = results(function, tried, batch)
            if whole is None:
                return
            yield whole, [results(of_part or function, tried, _rows_of(batch, rows)) for rows in parts]


def with_copies(batch: PyTree) -> list[PyTree]:
    """A batch, and copies of its first example in its place.

    Example:
        >>> [one.tolist() for one in with_copies(jnp.array([1.0, 3.0]))]
        [[1.0, 3.0], [1.0, 1.0]]
    """
    return [batch, jax.tree.map(lambda leaf: leaf[np.zeros(leaf.shape[0], np.int32)], batch)]


def in_parts_differ(whole: PyTree, parts: Sequence[PyTree]) -> bool:
    """Whether results for the examples of parts, one part after another, are others than those of the whole.

    Example:
        >>> in_parts_differ(np.array([1.0, 2.0]), [np.array([1.0]), np.array([2.5])])
        True
    """
    return _changed(whole, jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts))


def _rows_of(tree: PyTree, rows: Any) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[rows], tree)


def _changed(one: PyTree, other: PyTree) -> bool:
    return any(map(_differ, jax.tree.leaves(one), jax.tree.leaves(other)))


def _on_host(leaf) -> np.ndarray:
    """A leaf as an array of NumPy; of keys, their data."""
    return np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)


def _differ(one, other) -> bool:
    """Whether two finite arrays differ by more than rounding."""
    if not jnp.issubdtype(one.dtype, jnp.inexact):
        return bool((one != other).any())
    rounding = float(jnp.finfo(one.dtype).eps) ** 0.5
    one, other = one.astype(np.float64), other.astype(np.float64)
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return False
    return bool(np.linalg.norm(one - other) > rounding * (np.linalg.norm(one) + np.linalg.norm(other)))
