"""Finds divergence: the first loss that is not finite, or a state that is no longer finite.

A loss may be finite while its gradient is not, for example for a square root at 0. Then the parameters are lost although
every loss still looks right. So each record checks both.

Axes: S steps, R runs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree


def first_nonfinite(losses: Float[Array, "S"] | Float[np.ndarray, "S"]) -> int | None:
    """Index of the first loss that is NaN or infinite, or None.

    Example:
        >>> first_nonfinite(jnp.array([0.5, jnp.inf, jnp.nan]))
        1
    """
    bad = np.flatnonzero(~np.isfinite(np.asarray(losses)))
    return int(bad[0]) if len(bad) else None


def make_is_finite(start: PyTree, *, runs: bool = False) -> Callable[[PyTree], Bool[Array, "*R"]]:
    """Makes a compiled check whether all leaves of a state that were finite at the start are still finite.

    Parts of an optimizer's state may start as infinite, such as the best loss so far in ``optax.contrib.reduce_on_plateau``.
    Such parts are not checked.

    Args:
        start: the state at the start of training, any pytree. Leaves that are not floating-point, such as integers and keys,
            are not checked.
        runs: whether leaves have a leading axis R of runs; then each run is checked separately.

    Returns:
        ``is_finite(state)``, of shape ``()`` or ``(R,)``.

    Example:
        >>> is_finite = make_is_finite({"w": jnp.zeros(2), "best": jnp.array(jnp.inf)})
        >>> bool(is_finite({"w": jnp.ones(2), "best": jnp.array(jnp.inf)}))
        True
        >>> bool(is_finite({"w": jnp.array([0.0, jnp.nan]), "best": jnp.array(1.0)}))
        False
    """
    watched = [_is_floating(leaf) and bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(start)]

    def one(state):
        leaves = [leaf for leaf, wanted in zip(jax.tree.leaves(state), watched, strict=True) if wanted]
        finite = [jnp.isfinite(leaf).all() for leaf in leaves]
        return jnp.stack(finite).all() if finite else jnp.array(True)

    return jax.jit(jax.vmap(one) if runs else one)


def _is_floating(leaf) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf) if not hasattr(leaf, "dtype") else leaf.dtype, jnp.inexact)
