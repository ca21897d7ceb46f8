"""The same steps over several devices: each takes its share of every batch, gradients are summed, all make one update.

What a step computes is that of one device up to the order of summation: the same global batch in the same order of
examples. A batch that the number of devices N does not divide is filled up with masked examples, which count for
nothing in the loss and the gradient. Batch normalisation takes the moments of a device's share unless its layers are
given the axis :data:`AXIS` (then they are those of the global batch); fillers enter none of them. Running moments, as any
aux of a loss, are averaged over the devices, each weighing by its number of examples.

What a loss sees: its device's share, fillers included. They are real examples a second time, and what the loss returns
for them is dropped. A model of your own that couples examples, as by ``lax.pmean(..., AXIS)``, would count them: let it leave
out those where :func:`jaxbatch.layers.example_mask` is False (a mean over all devices is ``psum(sum of own values) /
psum(number of own values)``), or take a batch size that N divides. Layers of :mod:`jaxbatch.layers` do this themselves.

Axes: S steps, B examples in a batch, N devices, M = ⌈B / N⌉ examples on each.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, Bool, Int32, PyTree

from jaxbatch.augment import example_keys
from jaxbatch.compiling import compile_ahead
from jaxbatch.groups import losses_and_aux
from jaxbatch.layers import loops_are_slow, own_examples
from jaxbatch.loops import as_place, batch_shapes
from jaxbatch.states import through_host
from jaxbatch.sums import cast_like, widen
from jaxbatch.tasks import Task
from jaxbatch.train import TrainState, apply_gradient, mean_gradient
from jaxbatch.updates import Optimizer

AXIS = "devices"  # the name that collective operations inside a step go by
Method = str  # "pmap" or "jit"


def share_batches(
    indices: Int32[np.ndarray, "S B"], num_devices: int
) -> tuple[Int32[np.ndarray, "N S M"], Bool[np.ndarray, "N S M"]]:
    """Each device's share of every batch, contiguous, with a mask that is False where a slot holds no example of its own.

    Example:
        >>> shares, mask = share_batches(np.array([[5, 6, 7]], np.int32), 2)
        >>> shares.tolist(), mask.tolist()
        ([[[5, 6]], [[7, 5]]], [[[True, True]], [[True, False]]])
    """
    steps, size = indices.shape
    share = -(-size // num_devices)
    slots = np.arange(num_devices * share)
    filled = indices[:, slots % size].reshape(steps, num_devices, share)  # real examples, so that nothing is undefined
    mask = np.broadcast_to((slots < size).reshape(1, num_devices, share), filled.shape)
    return filled.transpose(1, 0, 2), mask.transpose(1, 0, 2)


def provide_devices(count: int) -> None:
    """Makes sure of ``count`` devices: before JAX has started, a CPU is split into as many virtual ones.

    Raises:
        ValueError: there are fewer.

    Example:
        >>> provide_devices(1)
    """
    if count > 1:
        with contextlib.suppress(RuntimeError):  # JAX has started: what there is will have to do
            jax.config.update("jax_num_cpu_devices", count)  # has no part where there is an accelerator
    if count > jax.device_count():
        raise ValueError(f"{count} devices were asked for, and JAX finds {jax.device_count()} here.")


def over_devices(
    function: Callable[..., Any],
    devices: Sequence[jax.Device],
    method: Method,
    split: Sequence[bool],
    *,
    outputs_split: bool = False,
    donate: tuple[int, ...] = (),
) -> tuple[Any, Callable[..., tuple]]:
    """``function`` on every device, under the axis :data:`AXIS`.

    Args:
        function: of pytrees. Unless ``outputs_split`` it must return the same on every device.
        devices: N of them.
        method: ``"pmap"``, or ``"jit"``: sharded arrays and ``shard_map``.
        split: for each argument, whether its leaves ``(N, ...)`` are dealt out, one part a device, or all have it whole.
        outputs_split: whether outputs are gathered to leaves ``(N, ...)``.
        donate: numbers of the arguments whose memory is reused.

    Returns:
        The compiled function, which can also be lowered; and ``place(*arguments)``, which moves arguments to where the
        function wants them, in the order of ``split``.

    Raises:
        ValueError: another ``method``.

    Example:
        >>> total, place = over_devices(lambda x: lax.psum(x, AXIS), jax.devices()[:1], "jit", [True])
        >>> float(total(*place(jnp.array([3.0]))))
        3.0
    """
    mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    specs = tuple(Spec(AXIS) if dealt else Spec() for dealt in split)

    def place(*arguments):
        return tuple(jax.device_put(one, NamedSharding(mesh, spec)) for one, spec in zip(arguments, specs, strict=False))

    if method == "pmap":
        axes = tuple(0 if dealt else None for dealt in split)
        out = 0 if outputs_split else None
        return jax.pmap(function, AXIS, in_axes=axes, out_axes=out, devices=devices, donate_argnums=donate), place
    if method != "jit":
        raise ValueError(f"method={method!r} must be 'pmap' or 'jit'.")

    def own_part(*arguments):
        taken = (jax.tree.map(lambda leaf: leaf[0], one) if dealt else one for one, dealt in zip(arguments, split, strict=True))
        found = function(*taken)
        return jax.tree.map(lambda leaf: leaf[None], found) if outputs_split else found

    out = Spec(AXIS) if outputs_split else Spec()
    shared = jax.shard_map(own_part, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
    shardings = {"in_shardings": shardings, "out_shardings": NamedSharding(mesh, out)}
    return jax.jit(shared, donate_argnums=donate, **shardings), place


def compile_parallel_epoch(
    task: Task,
    optimizer: Optimizer,
    state: Any,
    num_steps: int,
    batch_size: int,
    devices: Sequence[jax.Device],
    *,
    method: Method = "jit",
) -> Callable[..., tuple[TrainState, Array]]:
    """What :func:`jaxbatch.compile_epoch` does, over several devices, compiled here and now.

    Args:
        task: as :func:`jaxbatch.fit` takes it; its data are copied to every device.
        optimizer: any optax optimizer; every device makes the same update.
        state: of which only shapes are used.
        num_steps: S.
        batch_size: B, over all devices.
        devices: N of them.
        method: ``"pmap"``, or ``"jit"``: sharded arrays and ``shard_map``.

    Returns:
        ``run(state, data, indices) -> (state, losses)``, with ``[seed, epoch]`` beside where the task prepares its batches;
        state and losses are those of one device.

    Raises:
        ValueError: no device, another ``method``.
    """
    count = len(devices)
    if count < 1:
        raise ValueError("devices is empty: at least 1 is needed.")
    step = make_shared_step(task, optimizer, batch_size)
    filled_up = batch_size % count > 0  # then some slots hold no example of their own

    def epoch(state, data, indices, mask, place):
        """On one device: its share of every batch."""

        def one(state, share):
            index, kept = share
            batch = jax.tree.map(lambda leaf: leaf[index], data)
            if task.prepare is not None:
                batch = task.prepare(example_keys(place[0], place[1], index), batch)
            return step(state, batch, kept if filled_up else None)

        return lax.scan(one, state, (indices, mask))

    share, shapes = -(-batch_size // count), jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    # Networks on XLA's convolutions, which are slow inside compiled loops on CPU, go step by step.
    some = jax.eval_shape(lambda batch: jax.tree.map(lambda leaf: leaf[None], batch), batch_shapes(task.train_data, share, task.prepare))
    under_axis = lambda params, batch: jax.vmap(lambda part: task.loss_fn(params, part), axis_name=AXIS)(batch)
    at_a_time = 1 if loops_are_slow(under_axis, shapes.params, some) else num_steps
    wanted = [jax.ShapeDtypeStruct((count, at_a_time, share), dtype) for dtype in (jnp.int32, jnp.bool_)]
    wanted = (shapes, task.train_data, *wanted, jax.ShapeDtypeStruct((2,), jnp.uint32))
    program, place_on_all = over_devices(epoch, devices, method, (False, False, True, True, False))
    program = compile_ahead(program, *wanted)
    placed = {}  # the data, moved to all devices once

    def run(state, data, indices, place=(0, 0)):
        if placed.get("from") is not data:
            placed.update({"from": data, "data": place_on_all(data)[0]})
        shares, mask = share_batches(np.asarray(indices, np.int32), count)
        (state,), (place,), losses = place_on_all(state), as_place(place), []
        for start in range(0, len(indices), at_a_time):
            part = slice(start, start + at_a_time)
            state, found = program(state, placed["data"], shares[:, part], mask[:, part], place)
            losses.append(found)  # a promise: nothing is waited for here
        return through_host(state), jnp.asarray(np.concatenate(jax.device_get(losses)))

    return run


def make_shared_step(task: Task, optimizer: Optimizer, batch_size: int):
    """``step(state, share, mask or None) -> (state, mean loss of the batch)``, to be run under the axis :data:`AXIS`."""
    has_aux = task.update_model_state is not None

    def masked(params, pair):
        """The loss with zeros for fillers, which repeat real examples, so that no zero meets a value that is not finite."""
        batch, mask = pair
        with own_examples(mask):
            losses, aux = losses_and_aux(task.loss_fn, params, batch, has_aux)
        losses = losses if mask is None else jnp.where(mask, losses, 0)
        return (losses, (aux, count_own(mask))) if has_aux else losses

    def step(state, batch, mask):
        losses, gradient, model_state = mean_gradient(
            masked,
            state,
            (batch, mask),
            microbatch_size=task.microbatch_size,
            update_model_state=task.update_model_state,
            across=lambda found: mean_over_devices(*found),
        )
        # The mean over a share, as a part of the mean over the batch.
        part = jax.tree.map(lambda leaf: len(losses) / batch_size * leaf, widen(gradient))
        loss, gradient = lax.psum((widen(losses).sum() / batch_size, part), AXIS)
        return apply_gradient(state, optimizer, cast_like(gradient, state.params), model_state, loss), loss

    return step


def count_own(mask: Bool[Array, "M"] | None) -> Int32[Array, ""] | None:
    """How many slots hold an example of their own; None where all do."""
    return None if mask is None else mask.sum(dtype=jnp.int32)


def mean_over_devices(aux: PyTree, own: Int32[Array, "*parts"] | None) -> PyTree:
    """The mean of the devices' aux, each weighing by its own examples (None: all have as many), under the axis :data:`AXIS`."""
    if own is None:
        return lax.pmean(aux, AXIS)
    whole = jnp.maximum(lax.psum(own, AXIS), 1)

    def mean(leaf):
        wide = jnp.promote_types(leaf.dtype, jnp.float32)
        weight, total = (count.astype(wide).reshape(*count.shape, *(1,) * (leaf.ndim - own.ndim)) for count in (own, whole))
        # What a device without an example found is left out, whatever it is.
        return (lax.psum(jnp.where(weight > 0, leaf.astype(wide) * weight, 0), AXIS) / total).astype(leaf.dtype)

    return jax.tree.map(mean, aux)
