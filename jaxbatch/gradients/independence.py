"""Checks whether a function's result for an example depends on the other examples, by changing those other examples.

With batch normalisation, with weights divided by the batch's sum, or with a contrastive loss, an example has no loss of its
own, and so no gradient of its own. Without this check the result would be a number that means nothing.

Axes: B examples.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, PyTree

from jaxbatch.augment import Prepare, call_prepare
from jaxbatch.data.streams import is_stream
from jaxbatch.gradients.groups import Loss
from jaxbatch.machine.compiling import compile_ahead, take_out_constants
from jaxbatch.states import is_key

_LOOKED_AT = 64  # examples, from all over the batch, among which two are chosen
_AT_A_TIME = 4096  # examples compared at a time where those are all the same


def check_independent_losses(loss: Loss, params: PyTree, batch: PyTree) -> None:
    """Checks that an example's loss does not depend on the others.

    The check computes the losses of two examples in a batch of both, and each in a batch with a copy of itself, and compares
    them. The two differ in every array of the batch that is not the same for all examples; where no two do, there are several pairs.
    Parameters that are all zeros, as those of a last layer at its start, hide a dependence, so it is looked for with random ones in
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
    random = np.random.default_rng(0)
    # Within shard_map without jit, even new arrays would belong to its devices.
    nowhere = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))
    with nowhere, jax.core.eval_context():
        params = jax.tree.map(lambda leaf: _known_or_random(leaf, leaf.shape, 0, random), jax.tree.map(_as_shaped, params))
        batch = jax.tree.map(_as_shaped, batch)
        first, *seconds = [jax.tree.map(lambda leaf: _example(leaf, rows, random), batch) for rows in _rows(batch)]
        join = lambda *examples: jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *examples)
        run, constants = take_out_constants(function, params, join(first, seconds[0]))
        if any(isinstance(constant, jax.core.Tracer) for constant in constants):
            return False  # the function closes over traced values from outside, which are not known yet
        program = compile_ahead(jax.jit(run), constants, params, join(first, seconds[0]))
        nonzero = jax.tree.map(lambda leaf: _not_zeros(leaf, random), params)
        hidden = any(new is not old for new, old in zip(jax.tree.leaves(nonzero), jax.tree.leaves(params), strict=True))
        for values in (params, nonzero) if hidden else (params,):
            for second in seconds:
                together = program(constants, values, join(first, second))
                for number, one in enumerate((first, second)):  # both, because an example of weight 0 has no loss to compare
                    pairs = zip(*(jax.tree.leaves(result) for result in (together, program(constants, values, join(one, one)))), strict=True)
                    if any(differ(*(_example_of(leaf, number) for leaf in pair)) for pair in pairs):
                        return True
        return False


def some_examples(batch: PyTree, count: int) -> PyTree:
    """``count`` examples of a batch, among them some that differ; random ones in place of shapes, and again the same if there are fewer.

    Example:
        >>> some_examples(jnp.array([1.0, 1.0, 5.0, 1.0]), 2).tolist(), some_examples(jax.ShapeDtypeStruct((1,), jnp.int32), 3).tolist()
        ([1.0, 5.0], [0, 1, 0])
    """
    random, total = np.random.default_rng(0), min(leaf.shape[0] for leaf in jax.tree.leaves(batch))
    spread = np.linspace(0, total - 1, min(count, total)).astype(int).tolist()
    rows = np.resize([row for row in dict.fromkeys([*_rows(batch), *spread]) if row < total][:count], count)

    def taken(leaf):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return _known_or_random(leaf, (count, *leaf.shape[1:]), 0, random)
        return np.asarray(leaf)[rows] if _is_here(leaf) else leaf[rows]

    return jax.tree.map(taken, batch)


def _rows(batch: PyTree) -> list[int]:
    """The first example, and others that differ from it: one in all arrays that differ at all, else one for each array."""
    count = min((leaf.shape[0] for leaf in jax.tree.leaves(batch)), default=0)
    known = [leaf for leaf in jax.tree.leaves(batch) if not isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct)]
    some = np.unique(np.linspace(0, count - 1, _LOOKED_AT).astype(int)) if count > 1 else np.zeros(1, int)
    differing: list[np.ndarray] = []
    for leaf in known:
        differs = _differs(leaf, some)
        if not differs.any() and count > len(some):  # not among those looked at: all others
            starts = range(1, count, _AT_A_TIME)
            everywhere = (start + np.flatnonzero(_differs(leaf, np.arange(start, min(start + _AT_A_TIME, count)))) for start in starts)
            other = next((rows[0] for rows in everywhere if len(rows)), None)
            if other is not None:
                some = np.append(some, other)
                differing = [_differs(one, some) for one in known[: len(differing)]]
                differs = _differs(leaf, some)
        differing.append(differs)
    differing = [differs for differs in differing if differs.any()]
    if not differing:
        return [0, count]  # zeros as the second example
    in_all = np.stack(differing).sum(0)
    best = int(in_all.argmax())
    rows = [best] + [int(differs.argmax()) for differs in differing if not differs[best]]
    return [0, *dict.fromkeys(some[rows].tolist())]


def _differs(leaf, rows: np.ndarray) -> Bool[np.ndarray, "rows"]:
    """Which of an array's rows differ from the first."""
    leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
    leaf = np.asarray(leaf) if _is_here(leaf) else leaf  # no copy
    return np.asarray(np.asarray(leaf[rows] != leaf[:1]).reshape(len(rows), -1).any(1))


def _is_here(leaf) -> bool:
    return isinstance(leaf, np.ndarray) or (not is_key(leaf) and {device.platform for device in leaf.devices()} == {"cpu"})


def _not_zeros(leaf, random: np.random.Generator):
    if leaf.size == 0 or not jnp.issubdtype(leaf.dtype, jnp.floating) or np.asarray(leaf).any():
        return leaf
    return (0.1 * random.normal(size=leaf.shape)).astype(leaf.dtype)


def without_zeros(params: PyTree) -> PyTree | None:
    """Parameters with random numbers in place of leaves that are all zeros, which hide what they multiply; None if there are none.

    Example:
        >>> changed = without_zeros((jnp.ones(1), jnp.zeros(1)))
        >>> changed[0].item(), bool(changed[1].any()), without_zeros(jnp.ones(1))
        (1.0, True, None)
    """
    random = np.random.default_rng(0)
    changed = jax.tree.map(lambda leaf: _not_zeros(leaf, random), params)
    same = all(new is old for new, old in zip(jax.tree.leaves(changed), jax.tree.leaves(params), strict=True))
    return None if same else changed


def _example_of(leaf, number: int) -> np.ndarray:
    """By NumPy: within ``shard_map`` an array of a program compiled for other devices must not meet an operation of JAX."""
    return on_host(leaf)[number : number + 1]


def _as_shaped(leaf: Any) -> Any:
    return leaf if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else jnp.asarray(leaf)


def _known_or_random(leaf, shape: tuple[int, ...], number: int, random: np.random.Generator):
    if not isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
        return leaf
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(number), shape)
    if jnp.issubdtype(leaf.dtype, jnp.integer) and not (leaf.dtype == jnp.uint8 and len(shape) > 1):
        # Classes or tokens: 0 and 1 are always valid.
        return ((jnp.arange(np.prod(shape, dtype=int)) + number) % 2).reshape(shape).astype(leaf.dtype)
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return jnp.asarray(random.integers(0, 256, shape), leaf.dtype)  # an image
    return jnp.asarray(random.normal(size=shape) > 0 if leaf.dtype == bool else random.normal(size=shape), leaf.dtype)


def _example(leaf, row: int, random: np.random.Generator):
    """One example ``(1, ...)`` of a leaf ``(B, ...)``; beyond its end, zeros."""
    if isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
        return _known_or_random(leaf, (1, *leaf.shape[1:]), int(row > 0), random)
    if row < leaf.shape[0]:
        one = leaf[row : row + 1]
        return one if is_key(one) else jnp.asarray(one)
    return leaf[:1] if is_key(leaf) else jnp.zeros_like(leaf[:1])


def on_host(leaf) -> np.ndarray:
    """A leaf as an array of NumPy; of keys, their data."""
    return np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)


def differ(one, other) -> bool:
    """Whether two finite arrays differ by more than rounding."""
    if not jnp.issubdtype(one.dtype, jnp.inexact):
        return bool((one != other).any())
    rounding = float(jnp.finfo(one.dtype).eps) ** 0.5
    one, other = one.astype(np.float64), other.astype(np.float64)
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return False
    return bool(np.linalg.norm(one - other) > rounding * (np.linalg.norm(one) + np.linalg.norm(other)))
