"""The memory that training needs on a device, which need not be here, by batch size.

The numbers are the compiler's, for the step that :func:`jaxbatch.fit` loops over and for its evaluation. Nothing is run and nothing is
allocated.

Axes: B examples in a batch.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import PyTree

from jaxbatch.advice.memory_parts import Always, Memory, always_there, make_evaluation_memory, memory_of_function, memory_of_step
from jaxbatch.gradients.groups import check_count
from jaxbatch.gradients.part_norms import NoiseMonitor
from jaxbatch.gradients.updates import Optimizer, check_optimizer
from jaxbatch.machine.cross_compiling import missing_compiler
from jaxbatch.machine.platform import compiling_for
from jaxbatch.machine.targets import Target, find_target
from jaxbatch.training.cut import choose_evaluation_size
from jaxbatch.training.step_programs import step_programs
from jaxbatch.training.tasks import Task
from jaxbatch.training.train_state import start_shapes, state_shapes

Effort = Literal["full", "least"]
_SETTINGS = ("num_groups", "microbatch_size", "num_devices", "evaluation_batch_size", "monitor")
_LEAST_EFFORT = {"exec_time_optimization_effort": -1.0}
_UNMEASURED = "This is what the compiler says; it was not compared with a real {title}."
_GPU = (
    "On a real H200, steps of ResNets and VGG above 500 MiB needed within 5% of such a number, SimpleCNN up to 10% more, smaller steps up to "
    "110 MiB more, and AlexNet in float32 up to 12 times as much: kernels that are chosen on the device may take more workspace (docs/memory.md)."
)


def memory_profile(
    task: Task | Callable[..., Any],
    batch_sizes: Iterable[int],
    *,
    optimizer: Optimizer | None = None,
    target: str | Target = "here",
    num_groups: int | None = None,
    microbatch_size: int | None = None,
    num_devices: int = 1,
    evaluation_batch_size: int | None = None,
    monitor: NoiseMonitor | None = None,
    arguments: Callable[[int], Sequence[PyTree]] | None = None,
    donate: Sequence[int] = (),
    effort: Effort = "full",
) -> dict[int, Memory]:
    """The memory of :func:`jaxbatch.fit` by batch size: of a step and of the evaluation of the test set, as the target's compiler reports it.

    The state of the last record counts, because a loop ``for record in fit(...)`` holds it while training goes on. A list of records
    holds more states, and ``eval_params`` makes parameters of its own; these do not count.

    Args:
        task: what to train; or a step of your own, any function of pytrees, with ``arguments``.
        batch_sizes: sizes B, any integers.
        optimizer: any optax optimizer; not for a step of your own.
        target: a name of :data:`jaxbatch.TARGETS`, ``"here"`` (the device that JAX computes on) or ``"cpu"``.
        num_groups: K, the updates per batch, see :func:`jaxbatch.split_backward`; ``None``: one.
        microbatch_size: the most examples that a device works on at a time, as in :class:`jaxbatch.FitConfig`.
        num_devices: devices that share every batch. The memory is that of each; the test set is evaluated on the first of them.
        evaluation_batch_size, monitor: see :class:`jaxbatch.FitConfig`.
        arguments: for a step of your own: ``batch_size -> its arguments``, arrays or ``jax.ShapeDtypeStruct``.
        donate: for a step of your own: the numbers of the arguments whose memory is reused.
        effort: "least" lets the TPU compiler optimize least. It is then 4 times as fast, and the memory comes out up to 5%
            larger with large batches, and more with small ones (docs/memory.md). For other targets it changes nothing.

    Raises:
        ValueError: the target is unknown, its compiler is not installed, or an argument is wrong.

    Example:
        >>> import optax
        >>> from jaxbatch import MLP, classification_task, load_dataset
        >>> task = classification_task(MLP(), load_dataset("digits"))
        >>> profile = memory_profile(task, [32, 64], optimizer=optax.adam(1e-3), target="cpu")
        >>> profile[32].optimizer_state >= 2 * profile[32].parameters, profile[64].step > profile[32].step
        (True, True)
    """
    settings: dict[str, Any] = {"num_groups": num_groups, "microbatch_size": microbatch_size, "num_devices": num_devices}
    settings |= {"evaluation_batch_size": evaluation_batch_size, "monitor": monitor}
    changed = {name: value for name, value in settings.items() if value is not (1 if name == "num_devices" else None)}
    measure = make_measure(task, optimizer=optimizer, target=target, arguments=arguments, donate=donate, effort=effort, **changed)
    if not isinstance(batch_sizes, Iterable) or isinstance(batch_sizes, str):
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
    step_alone: bool = False,
    **settings: Any,
) -> Callable[[int], Memory]:
    """``batch_size -> Memory`` with the arguments of :func:`memory_profile`, checked once; ``step_alone`` leaves out the evaluation."""
    device = find_target(target)
    missing = missing_compiler(device)
    if missing:
        raise ValueError(missing)
    if effort not in ("full", "least"):
        raise ValueError(f"effort={effort!r} must be 'full' or 'least'.")
    options = _LEAST_EFFORT if effort == "least" and device.platform == "tpu" else {}
    if not isinstance(task, Task):
        if not callable(task):
            raise ValueError(f"task={type(task).__name__} must be a jaxbatch.Task, or a function: a step of your own.")
        if optimizer is not None or settings:
            given = ", ".join(["optimizer"] * (optimizer is not None) + list(settings))
            raise ValueError(f"{given}: this is for a jaxbatch.Task; a step of your own takes only arguments and donate.")
        return _measure_function(device, task, arguments, donate, options)
    for name, is_given in (("arguments", arguments is not None), ("donate", donate not in ((), []))):
        if is_given:
            raise ValueError(f"{name} is for a step of your own; of a jaxbatch.Task the arguments, and what is donated, are known.")
    _check_settings(task, optimizer, device, settings)
    bounds = (settings.get("microbatch_size"), settings.pop("evaluation_batch_size", None))
    with compiling_for(device.platform):
        examples = choose_evaluation_size(task, *bounds)
    count, always = settings.get("num_devices", 1), always_there(task, optimizer, settings.get("monitor"))
    evaluation = functools.cache(make_evaluation_memory(task, optimizer, device, options, always))  # whatever the batch size

    def measure(size: int) -> Memory:
        check_count("batch_size", size)
        with compiling_for(device.platform):
            programs = step_programs(task, optimizer, int(size), **settings)
        memories = [memory_of_step(device, program, int(size), count, options, always) for program in programs]
        memory = max(memories, key=lambda one: one.step)
        return memory if step_alone else with_evaluation(memory, examples, evaluation(examples), always)

    return measure


def with_evaluation(memory: Memory, examples: int, evaluation: int, always: Always) -> Memory:
    """The memory of a step, with those of an evaluation and of the order of an epoch."""
    return memory._replace(evaluation=evaluation, evaluation_batch_size=examples if evaluation else 0, ordering=always.ordering)


def _check_settings(task: Task, optimizer: Any, device: Target, settings: dict[str, Any]) -> None:
    unknown = sorted(set(settings) - set(_SETTINGS))
    if unknown:
        raise ValueError(f"{unknown[0]} is not a setting; the settings are {', '.join(_SETTINGS)}, effort.")
    if optimizer is None:
        raise ValueError("optimizer=None: its state takes memory, so give the optax optimizer that you train with.")
    check_optimizer(optimizer, start_shapes(task))
    for name in ("num_groups", "microbatch_size", "evaluation_batch_size"):
        check_count(name, settings.get(name), optional=True)
    count = settings.get("num_devices", 1)
    check_count("num_devices", count)
    if device.is_here and count > 1:
        raise ValueError(f"num_devices={count} needs an accelerator as target, such as 'h100'; {device.name!r} stands for one device.")
    if settings.get("monitor") is not None:
        state_shapes(task, optimizer, settings["monitor"])  # which refuses what cannot be measured


def _measure_function(device: Target, function: Any, arguments: Any, donate: Any, options: dict) -> Callable[[int], Memory]:
    if arguments is None or not callable(arguments):
        raise ValueError(f"arguments={type(arguments).__name__}: a step of your own needs a function, batch_size -> (its arguments, ...).")
    if not isinstance(donate, tuple | list):
        raise ValueError(f"donate={donate!r} must be a list of the numbers of arguments, as [0].")

    def measure(size: int) -> Memory:
        check_count("batch_size", size)
        given = arguments(int(size))
        if not isinstance(given, tuple | list):
            raise ValueError(f"arguments: the function must return a tuple of the step's arguments, not {type(given).__name__}.")
        for number in donate:
            if isinstance(number, bool) or not isinstance(number, int | np.integer) or not 0 <= number < len(given):
                raise ValueError(f"donate={donate!r} must hold numbers of arguments, counted from 0; the step has {len(given)}.")
        return memory_of_function(device, function, given, donate, int(size), options)

    return measure


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
