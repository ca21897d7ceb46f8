"""The examples and parameters with which a function is tried before training.

Axes: B examples.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, PyTree

from jaxbatch.states import is_key

_LOOKED_AT = 64  # examples, from all over the batch, among which two are chosen
_AT_A_TIME = 4096  # examples compared at a time where those are all the same


def known_pairs(params: PyTree, batch: PyTree) -> tuple[PyTree, list[PyTree]]:
    """Parameters, random ones in place of those that are not known yet, and pairs of examples that differ, each as a batch of two.

    The two differ in every array of the batch that is not the same for all examples; where no two do, there are several pairs.

    Example:
        >>> known_pairs(jnp.ones(()), jnp.array([1.0, 1.0, 5.0]))[1]
        [Array([1., 5.], dtype=float32)]
    """
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: _known_or_random(leaf, leaf.shape, 0, random), jax.tree.map(_as_shaped, params))
    batch = jax.tree.map(_as_shaped, batch)
    first, *seconds = [jax.tree.map(lambda leaf: _example(leaf, rows, random), batch) for rows in _rows(batch)]
    return params, [jax.tree.map(lambda *leaves: jnp.concatenate(leaves), first, second) for second in seconds]


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


def without_zeros(params: PyTree) -> PyTree | None:
    """Parameters with random numbers in place of zeros, which hide what they multiply; None if there are none.

    Example:
        >>> changed = without_zeros((jnp.ones(1), jnp.array([0.0, 2.0])))
        >>> changed[0].item(), (changed[1] != 0).tolist(), changed[1][1].item(), without_zeros(jnp.ones(1))
        (1.0, [True, True], 2.0, None)
    """
    random = np.random.default_rng(0)

    def not_zeros(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or not (zeros := np.asarray(leaf) == 0).any():
            return leaf
        return jnp.where(zeros, (0.1 * random.normal(size=leaf.shape)).astype(leaf.dtype), leaf)

    changed = jax.tree.map(not_zeros, params)
    same = all(new is old for new, old in zip(jax.tree.leaves(changed), jax.tree.leaves(params), strict=True))
    return None if same else changed


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
