"""Whether it matters how a batch is cut into parts.

Axes: B examples in a batch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxbatch.batches import even_part
from jaxbatch.gradients.independence import differ, on_host
from jaxbatch.machine.compiling import compile_ahead, take_out_constants


def cut_matters(function: Callable[[PyTree, PyTree], PyTree], params: PyTree, batch: PyTree, size: int) -> bool:
    """Whether the results of ``function(params, batch)`` for the examples change when the batch is cut into parts of ``size`` examples.

    Besides company it finds results that depend on the size of the batch or on an example's number in it. A router with places for
    so many examples shows only where a place is missing, and parameters that start at 0 hide what they multiply. So the batch is
    also tried with copies of its first example alone, and with other parameters.

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
    size = even_part(count, size)
    copies = jax.tree.map(lambda leaf: leaf[jnp.zeros(count, jnp.int32)], batch)
    programs: dict[int, Callable[[PyTree, PyTree], PyTree]] = {}

    def results(params, examples):
        length = jax.tree.leaves(examples)[0].shape[0]
        if length not in programs:
            run, constants = take_out_constants(function, params, examples)
            compiled = compile_ahead(jax.jit(run), constants, params, examples)
            programs[length] = lambda params, examples: compiled(constants, params, examples)
        return [on_host(leaf) for leaf in jax.tree.leaves(programs[length](params, examples))]

    for tried in (params, _disturbed(params)):
        for examples in (batch, copies):
            whole = results(tried, examples)
            parts = [results(tried, jax.tree.map(lambda leaf: leaf[start : start + size], examples)) for start in range(0, count, size)]
            if any(map(differ, whole, (np.concatenate(leaves) for leaves in zip(*parts, strict=True)))):
                return True
    return False


def _disturbed(params: PyTree) -> PyTree:
    random = np.random.default_rng(0)

    def disturbed(leaf):
        scale = np.sqrt(np.mean(np.square(np.asarray(leaf, np.float64)))) or 0.1 if np.size(leaf) else 0.0
        return leaf + jnp.asarray(scale * random.normal(size=np.shape(leaf)), jnp.result_type(leaf))

    return jax.tree.map(disturbed, params)
