"""The memory that a training step needs on a device, which need not be here, by batch size.

The numbers are the compiler's, for the step that :func:`jaxbatch.fit` loops over. Nothing is run and nothing is allocated.

Axes: B examples in a batch.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jaxbatch.gradients.updates import Optimizer, check_optimizer
from jaxbatch.machine.cores import num_cores
from jaxbatch.machine.cross_compiling import compile_for, missing_compiler
from jaxbatch.machine.platform import compiling_for
from jaxbatch.machine.targets import Target, find_target
from jaxbatch.training.step_programs import StepProgram, step_programs
from jaxbatch.training.steps import start_shapes
from jaxbatch.training.tasks import Task

Effort = Literal["full", "least"]
# On CPU, matrix products pack their factors in memory of their own, which the compiler does not count. This is the most that
# MLP and SimpleCNN took on two cores, for each core; the other networks of docs/memory.md were not used to find it.
CPU_SCRATCH = 7 * 2**20
_LEAST_EFFORT = {"exec_time_optimization_effort": -1.0}
_UNMEASURED = "This is what the compiler says; it was not compared with a real {title}."
_GPU = (
    "On a real H200, steps of ResNets and VGG above 500 MiB needed within 5% of such a number, SimpleCNN up to 10% more, smaller steps up to "
    "110 MiB more, and AlexNet in float32 up to 12 times as much: kernels that are chosen on the device may take more workspace (docs/memory.md)."
)


class Memory(NamedTuple):
    """Bytes on each device that a step needs. The parts sum up to ``total``."""

    batch_size: int  # over all devices
    parameters: int
    optimizer_state: int
    model_state: int  # such as running moments
    data: int  # the data set if it lives on the device, else the parts of a stream that are there; and the batch's indices
    temporaries: int  # activations, gradients and the compiler's workspaces; for a function of the user's own also its padding
    results: int  # those that do not reuse the memory of arguments
    compile_seconds: float
    refused: str = ""  # why the compiler refused the program: it does not fit. Then ``temporaries`` is a lower bound

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self[1:7])


def memory_profile(
    task: Task | Callable[..., Any],
    batch_sizes: Iterable[int],
    *,
    optimizer: Optimizer | None = None,
    target: str | Target = "here",
    num_groups: int | None = None,
    microbatch_size: int | None = None,
    num_devices: int = 1,
    arguments: Callable[[int], Sequence[PyTree]] | None = None,
    donate: Sequence[int] = (),
    effort: Effort = "full",
) -> dict[int, Memory]:
    """The memory of a training step by batch size, as the target's compiler reports it.

    Args:
        task: what to train; or a step of your own, any function of pytrees, with ``arguments``.
        batch_sizes: sizes B, any integers.
        optimizer: any optax optimizer; not for a step of your own.
        target: a name of :data:`jaxbatch.TARGETS`, ``"here"`` (the device that JAX computes on) or ``"cpu"``.
        num_groups: K, the updates per batch, see :func:`jaxbatch.split_backward`; ``None``: one.
        microbatch_size: the most examples that a device works on at a time, as in :class:`jaxbatch.FitConfig`.
        num_devices: devices that share every batch. The memory is that of each.
        arguments: for a step of your own: ``batch_size -> its arguments``, arrays or ``jax.ShapeDtypeStruct``.
        donate: for a step of your own: the numbers of the arguments whose memory is reused.
        effort: "least" lets the TPU compiler optimize least. It is then 4 times as fast, and the memory comes out up to 5%
            larger with large batches, and more with small ones (docs/memory.md). For other targets it changes nothing.

    Raises:
        ValueError: the target is unknown, its compiler is not installed, or the settings are wrong.

    Example:
        >>> import optax
        >>> from jaxbatch import MLP, classification_task, load_dataset
        >>> task = classification_task(MLP(), load_dataset("digits"))
        >>> profile = memory_profile(task, [32, 64], optimizer=optax.adam(1e-3), target="cpu")
        >>> profile[32].optimizer_state >= 2 * profile[32].parameters, profile[64].total > profile[32].total
        (True, True)
    """
    settings = {"num_groups": num_groups, "microbatch_size": microbatch_size, "num_devices": num_devices}
    usual = {"num_groups": None, "microbatch_size": None, "num_devices": 1}
    changed = {name: value for name, value in settings.items() if value != usual[name]}
    measure = make_measure(task, optimizer=optimizer, target=target, arguments=arguments, donate=donate, effort=effort, **changed)
    if not isinstance(batch_sizes, Iterable):
        raise ValueError(f"batch_sizes={batch_sizes!r} must be a list of sizes, as [{batch_sizes}].")
    return {size: measure(size) for size in batch_sizes}


def make_measure(
    task: Task | Callable[..., Any],
    *,
    optimizer: Optimizer | None = None,
    target: str | Target = "here",
    arguments: Callable[[int], Sequence[PyTree]] | None = None,
    donate: Sequence[int] = (),
    effort: Effort = "full",
    **settings: Any,
) -> Callable[[int], Memory]:
    """``batch_size -> Memory`` with the arguments of :func:`memory_profile`, checked once."""
    device = find_target(target)
    missing = missing_compiler(device)
    if missing:
        raise ValueError(missing)
    if effort not in ("full", "least"):
        raise ValueError(f"effort={effort!r} must be 'full' or 'least'.")
    options = _LEAST_EFFORT if effort == "least" and device.platform == "tpu" else {}
    if not isinstance(task, Task):
        if arguments is None or not callable(arguments):
            raise ValueError(f"arguments={type(arguments).__name__}: a step of your own needs a function, batch_size -> (its arguments, ...).")
        if optimizer is not None or settings:
            given = ", ".join(["optimizer"] * (optimizer is not None) + list(settings))
            raise ValueError(f"{given}: this is for a jaxbatch.Task; a step of your own takes only arguments and donate.")
        return lambda size: _memory_of_function(device, task, _listed(arguments(_whole(size))), donate, size, options)
    unknown = sorted(set(settings) - {"num_groups", "microbatch_size", "num_devices"})
    if unknown:
        raise ValueError(f"{unknown[0]} is not a setting; the settings are num_groups, microbatch_size, num_devices, effort.")
    if optimizer is None:
        raise ValueError("optimizer=None: its state takes memory, so give the optax optimizer that you train with.")
    check_optimizer(optimizer, start_shapes(task))
    if device.is_here and settings.get("num_devices", 1) > 1:
        raise ValueError(
            f"num_devices={settings['num_devices']} needs an accelerator as target, such as 'h100'; {device.name!r} stands for one device."
        )
    if settings.get("num_groups") is not None and settings["num_groups"] < 1:
        raise ValueError(f"num_groups={settings['num_groups']} must be at least 1.")

    def measure(size: int) -> Memory:
        size = _whole(size)
        with compiling_for(device.platform):
            programs = step_programs(task, optimizer, size, **settings)
        count = settings.get("num_devices", 1)
        return max((_memory_of_program(device, program, size, count, options) for program in programs), key=lambda one: one.total)

    return measure


def _memory_of_program(target: Target, program: StepProgram, batch_size: int, count: int, options: dict) -> Memory:
    layout = program.layout
    # XLA calls arguments by place; None has no leaves and needs no memory.
    settings: dict[str, Any] = {"donate": layout.donated, "split": layout.is_split, "num_devices": count, "options": options}
    compiled = compile_for(target, layout.function, *layout.arguments.values(), **settings)
    own = {name: _bytes(tree) // (count if name in layout.split else 1) for name, tree in layout.arguments.items()}
    whole = compiled.total + max(0, sum(own.values()) - compiled.arguments) if not compiled.refused else compiled.total
    beside = {name: _bytes(tree) for name, tree in program.beside.items()}
    states = [tree["state"] for tree in (layout.arguments, program.beside) if "state" in tree]
    kinds = {**own, **beside}
    for state in states:
        kinds.pop("state")
        kinds |= {"params": _bytes(state.params), "opt_state": _bytes(state.opt_state)}
        kinds["model_state"] = _bytes((state.model_state, state.step))
    data = sum(kinds.get(name, 0) for name in ("data", "batch", "batch ahead", "index", "mask", "seed_epoch"))
    kept = (kinds.get("params", 0), kinds.get("opt_state", 0), kinds.get("model_state", 0), data)
    results = max(0, compiled.results - compiled.aliased)
    temporaries = max(0, whole + sum(beside.values()) - sum(kept) - results) + _scratch(target)
    return Memory(batch_size, *kept, temporaries, results, compiled.seconds, compiled.refused)


def _memory_of_function(target: Target, function, arguments, donate, batch_size: int, options: dict) -> Memory:
    compiled = compile_for(target, function, *arguments, donate=donate, options=options)
    own, results = _bytes(list(arguments)), max(0, compiled.results - compiled.aliased)
    temporaries = max(0, compiled.total - own - results) + _scratch(target)
    return Memory(batch_size, 0, 0, 0, own, temporaries, results, compiled.seconds, compiled.refused)


def _whole(size: Any) -> int:
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
        raise ValueError(f"batch_sizes: {size!r} must be a whole number of at least 1.")
    return int(size)


def _listed(arguments: Any) -> Sequence[PyTree]:
    if not isinstance(arguments, tuple | list):
        raise ValueError(f"arguments: the function must return a tuple of the step's arguments, not {type(arguments).__name__}.")
    return arguments


def _scratch(target: Target) -> int:
    return CPU_SCRATCH * num_cores() if target.platform == "cpu" else 0


def _bytes(tree: PyTree) -> int:
    return sum(_bytes_of_leaf(leaf) for leaf in jax.tree.leaves(tree))


def _bytes_of_leaf(leaf: Any) -> int:
    shape, dtype = jax.numpy.shape(leaf), leaf.dtype if hasattr(leaf, "dtype") else jax.numpy.result_type(leaf)
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return int(np.prod(shape, dtype=np.int64)) * jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).size * 4
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def caveats(target: Target) -> list[str]:
    """What has to be said beside a number for a target, in sentences; none where such numbers were compared with the device.

    Example:
        >>> caveats(find_target("v5e"))
        ['This is what the compiler says; it was not compared with a real TPU v5e.']
        >>> caveats(find_target("cpu"))
        []
    """
    sentences = [] if target.is_measured else [_UNMEASURED.format(title=target.title)]
    return sentences + ([_GPU] if target.platform == "gpu" and not target.is_here else [])
