"""Whether it matters how a batch is cut into parts.

Axes: B examples in a batch.
"""

import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxbatch.batches import even_part
from jaxbatch.gradients.independence import differ, on_host, without_zeros
from jaxbatch.machine.compiling import compile_ahead, take_out_constants
from jaxbatch.part_lengths import part_slices


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
            parts = [results(tried, jax.tree.map(lambda leaf: leaf[own], examples)) for own in part_slices(count, size)]
            if any(map(differ, whole, (np.concatenate(leaves) for leaves in zip(*parts, strict=True)))):
                return True
    return False


def parts_matter(
    whole: Callable[[PyTree, PyTree], PyTree], in_parts: Callable[[PyTree, PyTree], PyTree], params: PyTree, batch: PyTree
) -> Iterator[tuple[str, PyTree, PyTree]]:
    """The results of two ways to compute the same, one of them in parts: of a batch, and of copies of its first example.

    Where parameters are all zeros, those of random ones in their place follow.

    Args:
        whole, in_parts: ``(params, batch) -> results`` of one structure; both in one program.
        params: arrays, as training starts with them.
        batch: leaves ``(B, ...)``.

    Returns:
        What they were computed of, and both results on the host, one after another.

    Example:
        >>> halves = lambda w, x: jnp.concatenate([x[:1] / 1, x[1:] / 1])
        >>> [(of, one.tolist(), other.tolist()) for of, one, other in parts_matter(lambda w, x: x / len(x), halves, (), jnp.array([1.0, 3.0]))][:2]
        [('the batch', [0.5, 1.5], [1.0, 3.0]), ('copies', [0.5, 0.5], [1.0, 1.0])]
    """
    both, constants = take_out_constants(lambda params, batch: (whole(params, batch), in_parts(params, batch)), params, batch)
    program = compile_ahead(jax.jit(both), constants, params, batch)
    copies = jax.tree.map(lambda leaf: leaf[np.zeros(leaf.shape[0], np.int32)], batch)
    others = without_zeros(params)
    cases = itertools.product((params,) if others is None else (params, others), (("the batch", batch), ("copies", copies)))
    return ((of, *jax.tree.map(on_host, program(constants, tried, examples))) for tried, (of, examples) in cases)


def _disturbed(params: PyTree) -> PyTree:
    random = np.random.default_rng(0)

    def disturbed(leaf):
        scale = np.sqrt(np.mean(np.square(np.asarray(leaf, np.float64)))) or 0.1 if np.size(leaf) else 0.0
        return leaf + jnp.asarray(scale * random.normal(size=np.shape(leaf)), jnp.result_type(leaf))

    return jax.tree.map(disturbed, params)
