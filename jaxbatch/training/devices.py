"""Runs a step on several devices: each works on its share of every batch, gradients are summed, and all make one update.

The result is that of one device up to the order of summation, with the same global batch and the same order of examples. If
the number of devices N does not divide a batch, shares are filled up with *fillers*: masked copies of real examples, which
do not count in the loss and the gradient. Batch normalisation takes the moments (mean and variance) of a device's share, or
those of the global batch if its layers are given the axis :data:`AXIS`; fillers are left out of both. Running moments, like
any auxiliary output (aux) of a loss, are averaged over the devices, weighted by their numbers of examples.

A loss function gets its device's share, fillers included, and its losses of the fillers are dropped. A model of your own
that couples examples, for example by ``lax.pmean(..., AXIS)``, must ignore the fillers, or take a batch size that N divides.
:func:`jaxbatch.layers.example_mask` is False for fillers, and a mean over all devices is ``psum(sum of own values) /
psum(number of own values)``. The layers of :mod:`jaxbatch.layers` ignore fillers already.

Axes: S steps, B examples in a batch, N devices, M = ⌈B / N⌉ examples on each.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Bool, Int32, PyTree

from jaxbatch.data.stream_parts import checked_parts
from jaxbatch.data.streaming import prefetch
from jaxbatch.data.streams import Stream, is_stream
from jaxbatch.machine.cross_compiling import AXIS  # the axis name for collective operations inside a step
from jaxbatch.part_lengths import part_slices

Parallel = Literal["jit", "pmap"]


def share_batches(
    indices: Int32[np.ndarray, "S B"], num_devices: int, num_groups: int = 1
) -> tuple[Int32[np.ndarray, "N S M"], Bool[np.ndarray, "N S M"]]:
    """Each device's share of every batch, with a mask that is False for fillers.

    A share is contiguous. If a batch has K groups, a device's share is its share of each group in turn.

    Example:
        >>> shares, mask = share_batches(np.array([[5, 6, 7]], np.int32), 2)
        >>> shares.tolist(), mask.tolist()
        ([[[5, 6]], [[7, 5]]], [[[True, True]], [[True, False]]])
        >>> share_batches(np.array([[1, 2, 3, 4]], np.int32), 2, num_groups=2)[0].tolist()
        [[[1, 3]], [[2, 4]]]
    """
    if num_groups > 1:
        groups = indices.reshape(len(indices) * num_groups, -1)
        shares, mask = share_batches(groups, num_devices)
        return shares.reshape(num_devices, len(indices), -1), mask.reshape(num_devices, len(indices), -1)
    steps, size = indices.shape
    share = -(-size // num_devices)
    slots = np.arange(num_devices * share)
    filled = indices[:, slots % size].reshape(steps, num_devices, share)  # real examples, so that nothing is undefined
    mask = np.broadcast_to((slots < size).reshape(1, num_devices, share), filled.shape)
    return filled.transpose(1, 0, 2), mask.transpose(1, 0, 2)


def share_parts(groups: Int32[np.ndarray, "G B"], size: int, num_devices: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields each part, of ``size`` examples at most, of each group: its length, and the indices and mask of its shares.

    Example:
        >>> [(length, shares.tolist()) for length, shares, _ in share_parts(np.array([[5, 6, 7]], np.int32), 2, 1)]
        [(2, [5, 6]), (1, [7])]
    """
    for group in groups:
        for own in part_slices(len(group), size):
            shares, mask = share_batches(group[None, own], num_devices)
            lead = shares.shape[2:] if num_devices == 1 else (num_devices, -1)
            yield len(group[own]), shares.reshape(lead), mask.reshape(lead)


def decode_parts(stream: Stream, cut: Callable[[], Iterator], seed_epoch: tuple[int, int], deal: Callable) -> Iterator[tuple[int, tuple]]:
    """Yields the parts of a stream: the length, and examples, indices and mask on the devices; another thread decodes and moves them.

    Args:
        stream: the data set.
        cut: makes the same iterator of :func:`share_parts` at each call.
        seed_epoch: what the stream's own random changes depend on.
        deal: moves arguments to the devices; those of a part are its third and following.
    """

    def put(item):
        examples, (length, shares, mask) = item
        examples = jax.tree.map(lambda leaf: leaf.reshape(*shares.shape, *leaf.shape[1:]), examples)
        return length, deal(None, None, examples, shares, mask)[2:]

    flat = lambda: (shares.reshape(-1) for _, shares, _ in cut())
    yield from prefetch(zip(checked_parts(stream, flat, seed_epoch), cut(), strict=True), put=put)


def put_once(put: Callable[[PyTree], PyTree]) -> Callable[[PyTree], PyTree]:
    """``put``, whose last result is given again for the same arrays of JAX, which cannot have been changed since as NumPy's can.

    Example:
        >>> calls, data = [], np.ones(2)
        >>> once = put_once(lambda tree: calls.append(0) or jax.device_put(tree))
        >>> there = jax.device_put(data)
        >>> [len(calls) for tree in (data, data, there, there) for _ in [once(tree)]]
        [1, 2, 3, 3]
    """
    kept: tuple[list, Any, PyTree] | None = None

    def once(tree):
        nonlocal kept
        leaves, structure = jax.tree.flatten(tree)
        if kept is None or structure != kept[1] or any(one is not other for one, other in zip(leaves, kept[0], strict=True)):
            there = put(tree)
            kept = (leaves, structure, there) if all(isinstance(leaf, jax.Array) for leaf in leaves) else None
            return there
        return kept[2]

    return once


def put_data(data: PyTree | Stream, devices: Sequence[jax.Device]) -> PyTree | Stream:
    """A data set where every device has all of it, for many calls of :func:`jaxbatch.compile_epoch`, which then move nothing; a stream as it is.

    Example:
        >>> put_data(np.ones(2), jax.devices()[:1])
        Array([1., 1.], dtype=float32)
    """
    onto = None if len(devices) == 1 else NamedSharding(_mesh_of(devices), Spec())
    return data if is_stream(data) else jax.device_put(data, onto)


def _mesh_of(devices: Sequence[jax.Device]) -> Any:
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def provide_devices(count: int) -> None:
    """Makes sure that there are ``count`` devices. If JAX has not started yet, this splits a CPU into ``count`` virtual ones.

    Raises:
        ValueError: there are fewer devices.

    Example:
        >>> provide_devices(1)
    """
    if count > 1:
        with contextlib.suppress(RuntimeError):  # JAX has started: the number of devices cannot change any more
            jax.config.update("jax_num_cpu_devices", count)  # has no effect on an accelerator
    if count > jax.device_count():
        raise ValueError(f"{count} devices were asked for, but JAX finds {jax.device_count()} here.")


def find_devices(num_devices: int) -> list[jax.Device]:
    """The first ``num_devices`` devices.

    Raises:
        ValueError: the number is below 1, or there are fewer.

    Example:
        >>> len(find_devices(1))
        1
    """
    devices = jax.devices()
    if not 1 <= num_devices <= len(devices):
        raise ValueError(f"num_devices={num_devices} must be at least 1, and at most the {len(devices)} that JAX finds here.")
    return devices[:num_devices]


def alone(function: Callable[[Any, PyTree], PyTree]) -> Callable[[Any, PyTree], PyTree]:
    """``function(params, batch)`` along the axis :data:`AXIS` of one device, which layers that use the axis need to be traced.

    Example:
        >>> alone(lambda w, x: jax.lax.pmean(w * x, AXIS))(2.0, np.arange(3.0)).tolist()
        [0.0, 2.0, 4.0]
    """

    def along(params, batch):
        result = jax.vmap(lambda part: function(params, part), axis_name=AXIS)(jax.tree.map(lambda leaf: leaf[None], batch))
        return jax.tree.map(lambda leaf: leaf[0], result)

    return along


def over_devices(
    function: Callable[..., Any],
    devices: Sequence[jax.Device] | AbstractMesh,
    parallel: Parallel,
    split: Sequence[bool],
    *,
    outputs_split: bool = False,
    donate: tuple[int, ...] = (),
) -> tuple[Any, Callable[..., tuple]]:
    """Compiles ``function`` to run on every device under the axis :data:`AXIS`; on a single device, without an axis.

    Args:
        function: a function of pytrees. Unless ``outputs_split``, it must return the same on every device.
        devices: the N devices, or a mesh of N devices that are not here (:func:`jaxbatch.machine.cross_compiling.target_mesh`);
            its programs can only be compiled.
        parallel: ``"pmap"``, or ``"jit"``, which uses sharded arrays and ``shard_map``.
        split: for each argument, True if its leaves ``(N, ...)`` are split, one part for each device, and False if every device
            gets all of it. On a single device nothing is split, and leaves do not have the axis N.
        outputs_split: whether outputs are gathered to leaves ``(N, ...)``.
        donate: the numbers of the arguments whose memory is reused.

    Returns:
        The compiled function, which can also be lowered; and ``put(*arguments)``, which moves arguments to the devices that
        need them, in the order of ``split``.

    Raises:
        ValueError: ``parallel`` is unknown, or there is no device.

    Example:
        >>> double, put = over_devices(lambda x: 2 * x, jax.devices()[:1], "jit", [True])
        >>> float(double(*put(3.0)))
        6.0
    """
    here = None if isinstance(devices, AbstractMesh) else devices
    count = devices.size if isinstance(devices, AbstractMesh) else len(devices)
    if count < 1:
        raise ValueError("devices is empty: at least 1 is needed.")
    if parallel not in ("jit", "pmap"):
        raise ValueError(f"parallel={parallel!r} must be 'pmap' or 'jit'.")
    if count == 1:
        return jax.jit(function, donate_argnums=donate), lambda *arguments: jax.device_put(arguments)
    mesh: Any = devices if here is None else _mesh_of(here)
    specs = tuple(Spec(AXIS) if dealt else Spec() for dealt in split)

    def put(*arguments):
        return tuple(jax.device_put(one, NamedSharding(mesh, spec)) for one, spec in zip(arguments, specs, strict=False))

    if parallel == "pmap" and any(split) and here is not None:  # pmap needs an argument that is split; without one, jit does the same
        axes = tuple(0 if dealt else None for dealt in split)
        return jax.pmap(function, AXIS, in_axes=axes, out_axes=0 if outputs_split else None, devices=here, donate_argnums=donate), put

    def own_part(*arguments):
        taken = (jax.tree.map(lambda leaf: leaf[0], one) if dealt else one for one, dealt in zip(arguments, split, strict=True))
        result = function(*taken)
        return jax.tree.map(lambda leaf: leaf[None], result) if outputs_split else result

    out = Spec(AXIS) if outputs_split else Spec()
    shared = jax.shard_map(own_part, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    into, out_of = tuple(NamedSharding(mesh, spec) for spec in specs), NamedSharding(mesh, out)
    return jax.jit(shared, donate_argnums=donate, in_shardings=into, out_shardings=out_of), put
