"""Many steps, many batches: as one compiled loop where that is fastest, else as a Python loop over a compiled step.

Inside a compiled loop XLA:CPU has no fast convolution (:func:`jaxbatch.layers.loops_are_slow`); a network built on them
runs several times faster one compiled step at a time, and neither way waits for the host between steps.

Axes: S steps, B examples in a batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key, PyTree, UInt32

from jaxbatch.augment import example_keys
from jaxbatch.batches import cut_batches
from jaxbatch.compiling import compile_ahead
from jaxbatch.groups import leading_axis
from jaxbatch.layers import loops_are_slow
from jaxbatch.streaming import prefetch
from jaxbatch.streams import is_stream
from jaxbatch.sums import mean_loss, widen

Step = Callable[[Any, PyTree], tuple[Any, Float[Array, "B"]]]
Prepare = Callable[[Key[Array, "B"], PyTree], PyTree]  # (a key for each example, batch) -> batch
Loop = str  # "scan" or "python"


def make_epoch(step: Step, prepare: Prepare | None = None) -> Callable[..., tuple[Any, Array]]:
    """Any number of steps over data on the device, as one compiled program.

    Args:
        step: ``(state, batch) -> (state, losses)``.
        prepare: what happens to a batch first, as augmentation: ``(keys, batch) -> batch`` with one key for each
            example (:func:`jaxbatch.augment.example_keys`). Then ``run`` takes a fourth argument, the array
            ``[seed, epoch]``.

    Returns:
        ``run(state, data, indices) -> (state, losses)``: ``indices`` ``(S, B)`` say which examples go into
        which batch; ``losses`` ``(S,)`` are the batches' mean losses before each step. The incoming state's
        memory is reused for the outgoing one: do not use it again.

    Example:
        >>> import optax
        >>> from jaxbatch import TrainState, make_train_step
        >>> step = make_train_step(lambda w, x: 0.5 * (x - w) ** 2, optax.sgd(0.5), batch_size=1)
        >>> state = TrainState(jnp.array(0.0), optax.sgd(0.5).init(0.0), jnp.array(0))
        >>> state, losses = make_epoch(step)(state, jnp.array([2.0, 6.0]), jnp.array([[1], [0]]))
        >>> float(state.params), losses.tolist()
        (2.5, [18.0, 0.5])
    """

    def run(state, data, indices, place=None):
        leading_axis(data, "data")  # JAX would clamp an index beyond a shorter leaf, silently
        return lax.scan(lambda state, index: _one_step(step, prepare, state, data, index, place), state, indices)

    return jax.jit(run, donate_argnums=0)


def _one_step(step, prepare, state, data, index, place):
    batch = jax.tree.map(lambda leaf: leaf[index], data)
    if prepare is not None:
        batch = prepare(example_keys(place[0], place[1], index), batch)
    state, losses = step(state, batch)
    return state, mean_loss(losses)


def batch_shapes(data: PyTree, batch_size: int, prepare: Prepare | None = None) -> PyTree:
    """The shapes of a batch as the loss sees it: cut from the data, then prepared.

    Example:
        >>> batch_shapes(jnp.ones((5, 3)), 2, lambda keys, x: (x, keys))
        (ShapeDtypeStruct(shape=(2, 3), dtype=float32), ShapeDtypeStruct(shape=(2,), dtype=key<fry>))
    """
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch_size, *leaf.shape[1:]), leaf.dtype), data)
    if prepare is None:
        return batch
    keys = jax.eval_shape(lambda: example_keys(0, 0, jnp.zeros(batch_size, jnp.int32)))
    return jax.eval_shape(prepare, keys, batch)


def choose_loop(step: Step, state: Any, data: PyTree, batch_size: int, prepare: Prepare | None = None) -> Loop:
    """``"scan"`` unless the step holds convolutions that are slow in a compiled loop on this platform.

    Example:
        >>> choose_loop(lambda state, batch: (state, batch), 0.0, jnp.ones((4, 1)), 2)
        'scan'
    """
    return "python" if loops_are_slow(step, _shapes(state), batch_shapes(data, batch_size, prepare)) else "scan"


def compile_epoch(
    step: Step,
    state: Any,
    data: PyTree,
    num_steps: int,
    batch_size: int,
    *,
    prepare: Prepare | None = None,
    loop: Loop | None = None,
) -> Callable[..., tuple[Any, Array]]:
    """What :func:`make_epoch` does, compiled here and now for ``num_steps`` batches, looped the fastest way.

    Args:
        step: ``(state, batch) -> (state, losses)``.
        state: of which only shapes are used.
        data: leaves ``(N, ...)``, of which only shapes are used.
        num_steps: S; a Python loop takes any S whatever it was compiled for.
        batch_size: B.
        prepare: see :func:`make_epoch`.
        loop: ``"scan"``, ``"python"``, or ``None`` for :func:`choose_loop`.

    Returns:
        ``run(state, data, indices) -> (state, losses)``, as :func:`make_epoch`; with ``prepare`` it takes ``[seed,
        epoch]`` beside.

    Raises:
        ValueError: another ``loop``.
    """
    loop = loop or choose_loop(step, state, data, batch_size, prepare)
    state, data = _shapes(state), _shapes(data)
    place = () if prepare is None else (jax.ShapeDtypeStruct((2,), jnp.uint32),)
    if loop == "scan":
        indices = jax.ShapeDtypeStruct((num_steps, batch_size), jnp.int32)
        program = compile_ahead(make_epoch(step, prepare), state, data, indices, *place)
        return lambda state, data, indices, *place: program(state, data, indices, *as_place(*place))
    if loop != "python":
        raise ValueError(f"loop={loop!r} must be 'scan', 'python' or None.")

    def one(state, data, index, place=None):
        return _one_step(step, prepare, state, data, index, place)

    index = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    compiled = compile_ahead(jax.jit(one, donate_argnums=0), state, data, index, *place)

    def run(state, data, indices, *place):
        losses, place = [], as_place(*place)
        for index in np.asarray(indices):
            state, loss = compiled(state, data, index, *place)
            losses.append(loss)  # a promise: nothing is waited for here
        return state, jnp.asarray(np.array(jax.device_get(losses)))

    return run


def as_place(*place: Any) -> tuple[UInt32[np.ndarray, "2"], ...]:
    """``[seed, epoch]`` as a program takes it, which holds every seed that :func:`jaxbatch.batches.check_seed` allows.

    Example:
        >>> as_place([2**32 - 1, 3]), as_place()
        ((array([4294967295,          3], dtype=uint32),), ())
    """
    return tuple(np.asarray(one, np.uint32) for one in place)


def _shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree)


def make_evaluate(
    metrics_fn: Callable[[PyTree, PyTree], dict[str, Array]], num_examples: int, batch_size: int = 500
) -> Callable[[PyTree, PyTree], dict[str, Array]]:
    """Mean metrics over a data set: ``evaluate(params, data) -> {name: scalar}``, compiled.

    The last batch is padded and masked, so every example counts once; a metric must not couple examples, as batch
    normalisation with ``train=True`` does, or padding would count. ``data`` may be a :class:`jaxbatch.streams.Stream`.

    Example:
        >>> evaluate = make_evaluate(lambda w, x: {"loss": (x - w) ** 2}, num_examples=3, batch_size=2)
        >>> float(evaluate(jnp.array(0.0), jnp.array([1.0, 2.0, 2.0]))["loss"])
        3.0
    """

    def cut():
        return cut_batches(jnp.arange(num_examples, dtype=jnp.int32), min(batch_size, num_examples), partial="pad")

    def sums_of(params, examples, mask):
        found = metrics_fn(params, examples)
        for name, values in found.items():
            if jnp.shape(values) != mask.shape:
                raise ValueError(
                    f"metrics_fn must return one value per example, shape {mask.shape}, and {name!r} has shape {jnp.shape(values)}."
                    + (" Leave out the mean." if jnp.shape(values) == () else "")
                )
        return jax.tree.map(lambda values: jnp.where(mask, values, 0).sum(), widen(found))

    def sums(params, data, batch):
        return sums_of(params, jax.tree.map(lambda leaf: leaf[batch.indices], data), batch.mask)

    def mean(totals):
        return jax.tree.map(lambda total: total.sum() / num_examples, totals)

    @jax.jit
    def in_one_program(params, data):
        return mean(lax.map(lambda batch: sums(params, data, batch), cut()))  # cut here: closed over, it would be a constant

    one_batch, one_part = jax.jit(sums), jax.jit(sums_of)

    slow = None  # found out at the first call, from the shapes

    def evaluate(params, data):
        nonlocal slow
        found = data.num_examples if is_stream(data) else leading_axis(data, "data")
        if found != num_examples:
            raise ValueError(f"this evaluation was made for num_examples={num_examples} and got data of {found} examples.")
        if is_stream(data):
            batches = jax.tree.map(np.asarray, cut())
            examples = prefetch(data.parts(batches.indices), depth=1)
            # Each is waited for, or the host would pile up parts that the device has not come to.
            parts = [jax.block_until_ready(one_part(params, *pair)) for pair in zip(examples, batches.mask, strict=True)]
            return mean(_stack(parts))
        if slow is None:
            slow = loops_are_slow(sums, params, data, jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf[0], cut())))
        if not slow:
            return in_one_program(params, data)
        batches = cut()
        parts = [one_batch(params, data, jax.tree.map(lambda leaf: leaf[number], batches)) for number in range(len(batches.mask))]
        return mean(_stack(parts))

    return evaluate


def _stack(parts):
    """On the host unless traced: a program that joins thousands of scalars would have a line for each."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(parts)):
        return jax.tree.map(lambda *totals: jnp.stack(totals), *parts)
    return jax.tree.map(lambda *totals: jnp.asarray(np.stack(totals)), *jax.device_get(parts))
