"""Works through the parts of a batch: groups, microbatches, single examples. Other modules use its function ``fold``.

Each part is measured (usually: its gradient is computed), and the results are summed or kept. The order of work depends on the
platform: one part keeps a CPU busy, but not an accelerator, and inside a compiled loop XLA:CPU has no fast convolution.

Axes: B examples, P parts of m examples.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from jaxbatch.gradients.groups import LossFn, leading_axis, vary_along, varying_axes
from jaxbatch.layers import loops_are_slow
from jaxbatch.machine.compiling import compile_ahead
from jaxbatch.machine.constants import take_out_constants
from jaxbatch.machine.platform import compiled_platform
from jaxbatch.part_lengths import part_lengths
from jaxbatch.sums import add, widen, zero_sum

Method = Literal["map", "vmap", "unroll"]
Take = Callable[[PyTree], PyTree]  # a part of a batch of indices -> its examples
# Small parts of a batch that a compiled loop on CPU computes at the same time: while one is in an operation that uses a single
# core, the other keeps the other cores busy. Three or four are no faster and need more memory. Large parts keep all cores busy
# alone: two of 1,000 images of SimpleCNN are no faster than one after the other, and need twice the memory.
CPU_SIDE_BY_SIDE, CPU_SMALL_PART = 2, 128
CPU_VMAP = 64  # examples side by side whose activations stay in a CPU's cache


class Part(NamedTuple):
    """The results of one part, or the results of all parts together."""

    summed: PyTree = ()  # is added up over the parts, in float32 at least
    examples: PyTree = ()  # results for each example, leaves (m, ...); they are joined to (B, ...)
    each: PyTree = ()  # results for the whole part; they are stacked to leaves (P, ...)


def fold(
    measure: Callable[[PyTree], Part],
    batch: PyTree,
    size: int,
    *,
    method: Method = "map",
    at_a_time: int | None = None,
    in_python: bool = False,
    start: PyTree = None,
    combine: Callable[[PyTree, PyTree], PyTree] = add,
    combine_several: Callable[[PyTree, PyTree], PyTree] | None = None,
) -> Part:
    """Cuts a batch into parts of ``size`` examples, measures each, and sums.

    Args:
        measure: ``part -> Part``.
        batch: leaves ``(B, ...)``.
        size: m, the most examples in a part. It need not divide B: parts are then as equal as whole examples allow, and ``each``
            must have the same shape in all.
        method: ``"map"``: one after another in a compiled loop. ``"vmap"``: side by side. ``"unroll"``: one after another
            without a loop, which compiles P times as long.
        at_a_time: the number of parts computed together. ``None``: with ``"vmap"`` all, in the loop of ``"map"`` the number
            that suits the platform.
        in_python: whether a Python loop goes over the parts, with a compiled program that adds into the memory of the total before;
            whatever the method.
        start: the start value of the sum; ``None``: zeros.
        combine: ``(total, a part's summed) -> total``, to replace the addition, for example by an optimizer's update.
        combine_several: the same for any number of parts at a time, with a leading axis; then ``combine`` is not needed, and parts
            side by side are not kept.

    Raises:
        ValueError: ``method`` is unknown.

    Example:
        >>> whole = fold(lambda part: Part(part.sum(), 2 * part, part.max()), jnp.arange(5.0), 2)
        >>> float(whole.summed), whole.examples.tolist(), whole.each.tolist()
        (10.0, [0.0, 2.0, 4.0, 6.0, 8.0], [1.0, 3.0, 4.0])
    """
    if method not in ("map", "vmap", "unroll"):
        raise ValueError(f"method={method!r} must be 'map', 'vmap', 'unroll' or None.")
    batch_size = leading_axis(batch)
    lengths = part_lengths(batch_size, size)
    if start is None:
        shapes = jax.eval_shape(measure, jax.tree.map(lambda leaf: leaf[: max(lengths)], batch)).summed
        start = zero_sum(jax.tree.map(_zeros_of, shapes))

    if combine_several is not None:
        combine = lambda total, summed: combine_several(total, jax.tree.map(lambda leaf: leaf[None], summed))

    def one(total, part):
        measured = measure(part)
        return combine(total, measured.summed), (measured.examples, measured.each)

    total, kept, done = start, [], 0
    for length, count in lengths.items():  # one length, or two that differ by 1
        stop = done + count * length
        of = lambda start: jax.tree.map(lambda leaf: leaf[start : start + length], batch)
        stacked = lambda: jax.tree.map(lambda leaf: leaf[done:stop].reshape(count, length, *leaf.shape[1:]), batch)
        if method == "vmap" and not in_python:
            total, of_parts = _side_by_side(measure, stacked(), total, combine, combine_several, min(at_a_time or count, count))
        elif method == "map" and count > 1 and not in_python:
            total, of_parts = lax.scan(one, total, stacked(), unroll=at_a_time or side_by_side(length))
        else:
            one_by_one, run = [], one
            if in_python:  # traced anew for each fold, because by now another function may have the same hash
                run = _compiled(one, total, of(done))
            for start in range(done, stop, length):
                total, of_part = run(total, of(start))
                one_by_one.append(of_part)
            of_parts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one)
        kept.append((jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), of_parts[0]), of_parts[1]))
        done = stop
    examples, each = kept[0] if len(kept) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *kept)
    return Part(total, examples, each)


def _side_by_side(measure, parts, start, combine, combine_several, at_a_time: int):
    """Measures ``at_a_time`` parts at once; returns the total, and the kept results with an axis of parts."""
    adding, reduced = combine is add, combine is add or combine_several is not None

    def several(some):
        measured = jax.vmap(measure)(some)
        summed = jax.tree.map(lambda leaf: leaf.sum(0), widen(measured.summed)) if adding else measured.summed if reduced else ()
        return Part(summed, (measured.examples, measured.each, () if reduced else measured.summed))

    if at_a_time == leading_axis(parts):
        summed, kept, _ = several(parts)
        total = (combine_several or add)(start, summed) if reduced else start
    else:
        total, kept, _ = fold(several, parts, at_a_time, at_a_time=1, start=start if reduced else (), combine=combine_several or add)
    if not reduced:
        total = lax.scan(lambda total, one: (combine(total, one), None), start, kept[2])[0]
    return total, kept[:2]


def _zeros_of(shape: jax.ShapeDtypeStruct) -> jax.Array:
    zeros = jnp.zeros(shape.shape, jnp.int32 if shape.dtype == bool else shape.dtype)
    return vary_along(zeros, varying_axes(shape))


def _compiled(one: Callable[[PyTree, PyTree], PyTree], total: PyTree, part: PyTree) -> Callable[[PyTree, PyTree], PyTree]:
    run, constants = take_out_constants(one, total, part)
    return functools.partial(compile_ahead(jax.jit(run, donate_argnums=1), constants, total, part), constants)


def choose_method(loss_fn: LossFn, params: PyTree, batch: PyTree, size: int) -> Method:
    """The method for parts of ``size`` examples on this platform.

    Example:
        >>> loss_fn = lambda w, x: 0.5 * (x - w) ** 2
        >>> choose_method(loss_fn, jnp.array(0.0), jnp.ones(4), 1), choose_method(loss_fn, jnp.array(0.0), jnp.ones(4), 2)
        ('vmap', 'map')
    """
    if compiled_platform() != "cpu" or size == 1:
        return "vmap"
    part = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), batch)
    return "unroll" if loops_are_slow(loss_fn, params, part) else "map"


def vmap_at_a_time(size: int) -> int | None:
    """The number of parts side by side: on CPU as many single examples as fit in its cache, else None, which means all."""
    return CPU_VMAP if compiled_platform() == "cpu" and size == 1 else None


def side_by_side(size: int) -> int:
    """The number of parts of ``size`` examples that a compiled loop computes at the same time on this platform."""
    return CPU_SIDE_BY_SIDE if compiled_platform() == "cpu" and size <= CPU_SMALL_PART else 1
