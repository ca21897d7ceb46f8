"""Compiles a program for an accelerator that is not here and tells the memory that it needs there.

The program is traced and lowered in this process, for the target's platform, which needs no compiler of that platform. A
worker process (:mod:`jaxbatch.machine.target_worker`) compiles the lowered program. So this process keeps its own backend, and
the compilers' messages do not reach the user.
"""

import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import export

from jaxbatch.machine.constants import take_out_constants
from jaxbatch.machine.platform import compiling_for, is_installed
from jaxbatch.machine.target_process import CompilationError, ask_compiler
from jaxbatch.machine.targets import Target

AXIS = "devices"  # the name of the axis of devices


class CompiledProgram(NamedTuple):
    """What a compiler says of a program, in bytes on each device."""

    arguments: int
    results: int
    aliased: int  # results that reuse the memory of donated arguments
    temporaries: int
    peak: int  # what the compiler calls the peak; on CPU it holds the arguments only
    seconds: float  # that compiling took
    text: str = ""  # the compiled program, if asked for
    refused: str = ""  # why the compiler refused: the program does not fit. Then ``peak`` is what it would need

    @property
    def total(self) -> int:
        """Bytes that the program needs while it runs: the larger of the parts' sum and the compiler's peak."""
        return max(self.arguments + self.results - self.aliased + self.temporaries, self.peak)


def missing_compiler(target: Target) -> str | None:
    """What has to be installed before programs can be compiled for a target; None: nothing.

    Example:
        >>> from jaxbatch.machine.targets import find_target
        >>> missing_compiler(find_target("cpu")) is None
        True
    """
    if target.compiler is None:
        return None
    choices = ("libtpu",) if target.compiler == "tpu-compiler" else ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
    if any(map(is_installed, choices)) and is_installed("flatbuffers"):
        return None
    return f"target={target.name!r} needs its compiler (but not the device): pip install 'jaxbatch[{target.compiler}]'"


def compile_for(
    target: Target,
    function: Callable[..., Any],
    *arguments: Any,
    donate: Sequence[int] = (),
    split: Sequence[bool] | None = None,
    num_devices: int = 1,
    with_text: bool = False,
    options: dict[str, Any] | None = None,
) -> CompiledProgram:
    """Compiles ``function(*arguments)`` for a target.

    Args:
        target: from :func:`jaxbatch.find_target`.
        function: a function of pytrees. On several devices it is what :func:`jaxbatch.training.devices.over_devices` made for
            the mesh of :func:`target_mesh`.
        arguments: only their shapes are used.
        donate: the numbers of the arguments whose memory is reused.
        split: on several devices, for each argument whether its leaves are split over them; None: none is.
        num_devices: the number of devices that it runs on.
        with_text: whether the compiled program's text is wanted.
        options: options for the compiler.

    Raises:
        ValueError: the target's compiler is not installed, or the target has no topology of so many devices.
        CompilationError: the compiler refuses the program, and not because of its size.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbatch.machine.targets import find_target
        >>> compile_for(find_target("cpu"), lambda x: 2 * x, jnp.ones(1000, jnp.float32)).total
        8000
    """
    missing = missing_compiler(target)
    if missing:
        raise ValueError(missing)
    shapes = jax.tree.map(_shape, arguments)
    with compiling_for(target.platform):
        flat, leaves, donated, dealt = _flatten(function, shapes, donate, split)
        if target.is_here:
            return _compile_here(target, flat, leaves, donated, with_text)
        program = jax.jit(flat, donate_argnums=donated)
        try:
            exported = export.export(program, platforms=["tpu" if target.platform == "tpu" else "cuda"])(*leaves).serialize()
        except NotImplementedError as error:  # JAX has an operation for other platforms only
            raise CompilationError(" ".join(str(error).split())[:500]) from None
    request = {"platform": target.platform, "topology": _topology(target, num_devices), "count": num_devices, "exported": bytes(exported)}
    request |= {"donate": donated, "axis": AXIS, "split": dealt, "x64": bool(jax.config.jax_enable_x64)}  # type: ignore[attr-defined]
    return _read_answer(ask_compiler({**request, "with_text": with_text, "options": options or {}}))


def target_mesh(num_devices: int) -> jax.sharding.AbstractMesh:
    """A mesh of devices that are not here, along the axis :data:`AXIS`."""
    return jax.sharding.AbstractMesh((num_devices,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jax.numpy.shape(leaf), leaf.dtype if hasattr(leaf, "dtype") else jax.numpy.result_type(leaf))


def _flatten(function, shapes, donate, split):
    """The function of flat leaves; arrays that it closes over come first, and are neither donated nor split."""
    run, constants = take_out_constants(function, *shapes)
    leaves, structure = jax.tree.flatten(shapes)
    owners = [number for number, one in enumerate(shapes) for _ in jax.tree.leaves(one)]
    first = len(constants)
    donated = tuple(first + number for number, owner in enumerate(owners) if owner in donate)
    dealt = [False] * first + [bool(split and split[owner]) for owner in owners]

    def flat(*leaves):
        return jax.tree.leaves(run(list(leaves[:first]), *jax.tree.unflatten(structure, leaves[first:])))

    return flat, [*map(_shape, constants), *leaves], donated, dealt


def _compile_here(target, flat, leaves, donated, with_text) -> CompiledProgram:
    device = jax.devices("cpu" if target.name == "cpu" else None)[0]
    where = jax.sharding.SingleDeviceSharding(device)
    shapes = [jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=where) for one in leaves]
    started = time.perf_counter()
    # The program is never run, and this changes no buffer; it halves the time of compiling.
    quickly: Any = {"xla_backend_optimization_level": 0} if device.platform == "cpu" else None
    compiled = jax.jit(flat, donate_argnums=donated).lower(*shapes).compile(compiler_options=quickly)
    seconds, memory = time.perf_counter() - started, compiled.memory_analysis()
    if memory is None:
        raise CompilationError(f"the compiler of {target.title} does not report the memory of a program.")
    sizes = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.alias_size_in_bytes, memory.temp_size_in_bytes)
    return CompiledProgram(*sizes, memory.peak_memory_in_bytes, seconds, compiled.as_text() or "" if with_text else "")


def _topology(target: Target, count: int) -> str:
    """The compiler's name of the smallest topology of a target that has so many chips."""
    if target.platform != "tpu":
        return target.topology
    kind, shape = target.topology.split(":")
    flat = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"}
    deep = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}
    chips = next((size for size in flat if size >= count), None)
    if chips is None or (count > 4 and chips != count):
        raise ValueError(f"num_devices={count}: the TPU compiler knows slices of {target.name} with 1 to 4, 8, 16, 32 or 64 chips here.")
    return f"{kind}:{(deep if shape.count('x') == 2 else flat)[chips]}"


def _read_answer(answer: dict) -> CompiledProgram:
    error = answer.get("error")
    if error is None:
        return CompiledProgram(*(answer[key] for key in ("argument", "output", "alias", "temp", "peak", "seconds", "text")))
    needed = _bytes_needed(error)
    if needed is None:
        raise CompilationError(error.splitlines()[0][:500])
    return CompiledProgram(0, 0, 0, 0, needed, answer.get("seconds", 0.0), "", error.splitlines()[0][:300])


def _bytes_needed(error: str) -> int | None:
    """The bytes that a refused program would need, from the compiler's message.

    Example:
        >>> _bytes_needed("RESOURCE_EXHAUSTED: Ran out of memory. Used 16.50G of 15.75G hbm.") / 2**30
        16.5
        >>> _bytes_needed("INVALID_ARGUMENT: no such instruction") is None
        True
    """
    if "RESOURCE_EXHAUSTED" not in error:
        return None
    if match := re.search(r"Used ([\d.]+)([KMGT]) of", error):
        return int(float(match[1]) * 1024 ** ("KMGT".index(match[2]) + 1))
    if match := re.search(r"Allocation \(size=(\d+)\) would exceed memory", error):
        return int(match[1])
    return 2**62  # it does not say how much
