"""Keeps states of any model and optimizer in a run folder until their runs have finished, to the bit."""

from collections.abc import Mapping
from typing import Any

import flax.serialization
import jax
from jaxtyping import PyTree

from jaxbatch.states import pack, unpack


def to_bytes(state: PyTree, **rest: Any) -> bytes:
    """A file's content with a state, whose leaves alone are kept, and with numbers, arrays or dicts of them.

    Example:
        >>> import jax.numpy as jnp
        >>> from_bytes((0.0, {"w": 0.0}), to_bytes((jnp.ones(()), {"w": jnp.zeros(1)}), done=3))
        ((Array(1., dtype=float32), {'w': Array([0.], dtype=float32)}), {'done': 3})
    """
    return flax.serialization.msgpack_serialize({"state": pack(state), "rest": rest})


def from_bytes(template: PyTree, blob: bytes) -> tuple[PyTree, Mapping[str, Any]]:
    """The state, of the same structure as ``template``, and the rest."""
    kept = flax.serialization.msgpack_restore(blob)
    return jax.tree.unflatten(jax.tree.structure(template), unpack(kept["state"])), kept["rest"]
