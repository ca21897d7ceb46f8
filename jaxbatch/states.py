"""Moves a state through the host and to disk. A state may hold arrays of any type and shape, keys and plain numbers.

NumPy and file formats do not know JAX's arrays of keys. So a key is stored as its data and the name of its implementation,
and made a key again when it is read.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


def as_arrays(state: PyTree) -> PyTree:
    """Turns every leaf of the state into an array of its own on a device; a plain number gets its default type.

    Optimizers such as ``optax.contrib.prodigy`` keep the parameters at the start. A program that reuses a state's memory, as an epoch's
    does, cannot be given the same memory twice.

    Example:
        >>> as_arrays({"rate": 0.5, "count": np.int8(3), "nothing": None})
        {'count': Array(3, dtype=int8), 'nothing': None, 'rate': Array(0.5, dtype=float32)}
    """
    check_integers(state, "state")
    seen = set[int]()

    def own(leaf):
        leaf = leaf if is_key(leaf) else jnp.asarray(leaf, jnp.result_type(leaf))
        again = id(leaf) in seen
        seen.add(id(leaf))
        return jnp.copy(leaf) if again and is_known(leaf) else leaf

    return jax.tree.map(own, state)


def check_integers(tree: PyTree, name: str) -> None:
    """Raises a ValueError for NumPy's integers of 64 bits that JAX would cut to 32, which would make others of them.

    Args:
        tree: only NumPy's arrays and numbers are looked at, and of these only integers of 64 bits.
        name: what they are called in the message.

    Example:
        >>> check_integers({"id": np.array([2**31])}, "train_data")
        Traceback (most recent call last):
        ValueError: train_data['id'] goes from 2147483648 to 2147483648, and JAX keeps int64 as int32: take smaller numbers, or jax_enable_x64.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, np.ndarray | np.generic) or leaf.dtype.kind not in "iu" or leaf.size == 0:
            continue
        kept = jax.dtypes.canonicalize_dtype(leaf.dtype)
        if kept == leaf.dtype:
            continue
        low, high = int(leaf.min()), int(leaf.max())
        if low < np.iinfo(kept).min or high > np.iinfo(kept).max:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} goes from {low} to {high}, and JAX keeps {leaf.dtype} as {kept}: take smaller numbers, or "
                "jax_enable_x64."
            )


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of keys with a type of their own (not the older ones, which are plain uint32).

    Example:
        >>> is_key(jax.random.key(0)), is_key(jax.random.PRNGKey(0)), is_key(3)
        (True, False, False)
    """
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_known(value: Any) -> bool:
    """Whether a number has a value that can be looked at; one that is traced has none yet, so it cannot be checked.

    Example:
        >>> is_known(0.1), jax.jit(lambda x: x + is_known(x))(0.0).item()
        (True, 0.0)
    """
    return not isinstance(value, jax.core.Tracer)


def through_host(state: PyTree) -> PyTree:
    """Copies the state to the host and back. The copy belongs to no mesh of devices, so that a single device can use it.

    Example:
        >>> bool(through_host(jax.random.key(7)) == jax.random.key(7))
        True
    """
    leaves, structure = jax.tree.flatten(state)
    on_host = jax.device_get([jax.random.key_data(leaf) if is_key(leaf) else leaf for leaf in leaves])  # all at once
    back = (_wrap(data, leaf) if is_key(leaf) else jnp.asarray(data) for data, leaf in zip(on_host, leaves, strict=True))
    return jax.tree.unflatten(structure, back)


def _wrap(data, key):
    return jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(key))


def pack(state: PyTree) -> dict[str, np.ndarray]:
    """The leaves as arrays that a file can hold, each named by its number.

    Optimizer states are tuples of named tuples, which no file format knows. The name says what an array stands for. For keys
    it ends in ``_key_<implementation>``. For an array without elements, which orbax refuses, it ends in ``_empty_<type>``,
    and the stored array is the shape.

    Example:
        >>> {name: array.tolist() for name, array in pack((jnp.ones(2), jax.random.key(7), jnp.zeros((0, 3)))).items()}
        {'00000': [1.0, 1.0], '00001_key_threefry2x32': [0, 7], '00002_empty_float32': [0, 3]}
    """
    packed = {}
    for number, leaf in enumerate(jax.tree.leaves(state)):
        name = f"{number:05d}"
        if is_key(leaf):
            name, leaf = f"{name}_key_{jax.random.key_impl(leaf)}", jax.random.key_data(leaf)
        array = np.asarray(leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf))
        packed[name if array.size else f"{name}_empty_{array.dtype.name}"] = array if array.size else np.array(array.shape)
    return packed


def unpack(packed: dict[str, np.ndarray]) -> list[jax.Array]:
    """The leaves that :func:`pack` packed, in their order.

    Raises:
        ValueError: keys of an implementation that JAX does not have here.

    Example:
        >>> unpack(pack((jnp.zeros((0, 3)), 2)))
        [Array([], shape=(0, 3), dtype=float32), Array(2, dtype=int32)]
    """
    leaves = []
    for name in sorted(packed):
        kept, _, empty = name.partition("_empty_")
        array = jnp.zeros(tuple(int(length) for length in packed[name]), empty) if empty else jnp.asarray(packed[name])
        implementation = kept.partition("_key_")[2]
        leaves.append(jax.random.wrap_key_data(array, impl=implementation) if implementation else array)
    return leaves


def pack_fields(state: PyTree) -> dict[str, np.ndarray]:
    """:func:`pack` for each field of a named tuple, under its name; for another state as it is.

    Example:
        >>> import collections
        >>> list(pack_fields(collections.namedtuple("State", "params step")({"w": 0.5, "b": 0.1}, 3)))
        ['params.00000', 'params.00001', 'step.00000']
    """
    if not hasattr(state, "_fields"):
        return pack(state)
    return {f"{field}.{name}": array for field in state._fields for name, array in pack(getattr(state, field)).items()}


def unpack_like(packed: dict[str, np.ndarray], like: PyTree) -> PyTree | None:
    """The state that :func:`pack_fields` packed, or, before fields had names, :func:`pack`; None if it is of another form than ``like``.

    A field that is not there and has a default gets it.

    Example:
        >>> import collections
        >>> old, new = collections.namedtuple("State", "step"), collections.namedtuple("State", "step more", defaults=[()])
        >>> unpack_like(pack_fields(old(3)), new(0, 1)), unpack_like(pack(old(3)), old(0)), unpack_like(pack(old(3)), old(0.5))
        (State(step=Array(3, dtype=int32), more=()), State(step=Array(3, dtype=int32)), None)
    """
    if all("." in name for name in packed) and hasattr(like, "_fields"):
        fields: dict[str, dict] = {field: {} for field in like._fields}
        for name, array in packed.items():
            field, _, number = name.partition(".")
            fields.setdefault(field, {})[number] = array
        known = {field: value for field, value in like._asdict().items() if fields[field] or not jax.tree.leaves(value)}
        like = like._replace(**{field: default for field, default in like._field_defaults.items() if field not in known})
        leaves = [leaf for one in fields.values() for leaf in unpack(one)]
    else:
        leaves = unpack(packed)
    return jax.tree.unflatten(jax.tree.structure(like), leaves) if kinds(leaves) == kinds(jax.tree.leaves(like)) else None


def kinds(leaves: list[Any]) -> list[tuple]:
    """The shape and type of each leaf, for comparisons.

    Example:
        >>> kinds([jnp.ones(2), jax.random.key(0)])
        [((2,), 'float32'), ((), 'key<fry>')]
    """
    return [(tuple(jnp.shape(leaf)), str(leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf))) for leaf in leaves]


def difference(given: PyTree, wanted: PyTree, *, types: bool = True) -> str | None:
    """How a tree of arrays differs from another in what it holds, in words that follow its name; None: not at all.

    Args:
        given, wanted: arrays, or their shapes.
        types: whether types and containers count too, and not only names and shapes of arrays.

    Example:
        >>> difference({"w": jnp.ones(2)}, {"w": jnp.ones(3)}), difference({"w": 1}, {"w": 1, "b": 2}), difference((1,), (2,))
        ("['w'] has shape (2,) in place of (3,)", "lacks ['b']", None)
    """
    own, others = ({jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)} for tree in (given, wanted))
    for path in others:
        if path not in own:
            return f"lacks {path}" if path else "is no array"
    for path in own:
        if path not in others:
            return f"has {path} too" if path else "is an array"
        shape, other = (tuple(leaf.shape if hasattr(leaf, "shape") else np.shape(leaf)) for leaf in (own[path], others[path]))
        if shape != other:
            return f"{path} has shape {shape} in place of {other}".strip()
        kind, wanted_kind = (leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf) for leaf in (own[path], others[path]))
        if types and kind != wanted_kind:
            return f"{path} is {kind} in place of {wanted_kind}".strip()
    return "is made of other containers" if types and not same_containers(given, wanted) else None


def same_containers(one: PyTree, other: PyTree) -> bool:
    """Whether two trees are made of the same containers, whatever their leaves are.

    Example:
        >>> same_containers((1, 2), (3, 4)), same_containers((1, 2), [3, 4])
        (True, False)
    """
    structures: list[Any] = [jax.tree.structure(tree) for tree in (one, other)]
    return bool(structures[0] == structures[1])
