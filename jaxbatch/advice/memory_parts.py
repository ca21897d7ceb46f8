"""What the memory of training consists of: of a step, of an evaluation, of drawing an epoch's order; and of a function of the user's own.

These follow one another, so training needs the most that one of them needs. Parameters, states and data are there all the time.

Axes: N examples in the data set, B in a batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jaxbatch.data.streams import is_stream
from jaxbatch.gradients.part_norms import NoiseMonitor
from jaxbatch.gradients.updates import Optimizer
from jaxbatch.machine.cores import num_cores
from jaxbatch.machine.cross_compiling import CompiledProgram, compile_for
from jaxbatch.machine.platform import compiling_for
from jaxbatch.machine.targets import Target
from jaxbatch.training.step_programs import StepProgram, evaluation_program
from jaxbatch.training.tasks import Task
from jaxbatch.training.train_state import by_kind, state_shapes

# On CPU, matrix products pack their factors in memory of their own, which the compiler does not count. This is the most that
# MLP and SimpleCNN took on two cores, for each core; the other networks of docs/memory.md were not used to find it.
CPU_SCRATCH = 7 * 2**20
# A random permutation sorts keys and values, several times, into new arrays: on a CPU 55 to 60 bytes an example for a million and ten
# million examples. It was not measured on other devices, whose sorts make copies too.
ORDER_BYTES = 64


class Memory(NamedTuple):
    """Bytes on each device that training needs: ``total``, the most of ``step``, ``evaluation`` and ``ordering``.

    Evaluation and the drawing of an order happen on one device, the first.
    """

    batch_size: int  # over all devices
    parameters: int
    optimizer_state: int
    model_state: int  # such as running moments
    data: int  # the data set and its order if they live on the device, else the parts of a stream that are there, and their indices
    temporaries: int  # activations, gradients and the compiler's workspaces; for a function of the user's own also its padding
    results: int  # those that do not reuse the memory of arguments
    compile_seconds: float  # of the step
    refused: str = ""  # why the compiler refused the program: it does not fit. Then ``temporaries`` is a lower bound
    test_data: int = 0  # the test set if it lives on the device and is not the data set itself
    last_state: int = 0  # of the record before: whoever loops over fit holds it while fit trains a copy
    evaluation: int = 0  # in all while the test set is evaluated; 0: it is not
    evaluation_batch_size: int = 0  # examples at a time then
    ordering: int = 0  # in all while the order of an epoch is drawn

    @property
    def step(self) -> int:
        """Bytes during a step: the sum of its parts."""
        return sum(self[1:7]) + self.test_data + self.last_state

    @property
    def kept(self) -> int:
        """Bytes that are there all the time: states and data."""
        return sum(self[1:5]) + self.test_data + self.last_state

    @property
    def total(self) -> int:
        """Bytes that training needs."""
        return max(self.step, self.evaluation, self.ordering)


class Always(NamedTuple):
    """Bytes that are on the first device all the time."""

    state: int
    last_state: int
    train_data: int
    test_data: int
    num_examples: int

    @property
    def total(self) -> int:
        """Bytes of all of it."""
        return self.state + self.last_state + self.train_data + self.test_data

    @property
    def ordering(self) -> int:
        """Bytes in all while the order of an epoch is drawn."""
        return self.total + ORDER_BYTES * self.num_examples


def always_there(task: Task, optimizer: Optimizer, monitor: NoiseMonitor | None = None) -> Always:
    """What :func:`jaxbatch.fit` keeps on the device whatever it does; nothing is computed."""
    state = bytes_of(state_shapes(task, optimizer, monitor))
    train, test = ([] if data is None or is_stream(data) else jax.tree.leaves(data) for data in (task.train_data, task.test_data))
    known = set(map(id, train))  # who tests on the training set keeps it once
    return Always(state, state, bytes_of(train), bytes_of([leaf for leaf in test if id(leaf) not in known]), task.num_examples)


def memory_of_step(target: Target, program: StepProgram, batch_size: int, count: int, options: dict, always: Always) -> Memory:
    """The memory of a step on each of ``count`` devices, without evaluation."""
    layout = program.layout
    # XLA calls arguments by place; None has no leaves and needs no memory.
    settings: dict[str, Any] = {"donate": layout.donated, "split": layout.is_split, "num_devices": count, "options": options}
    compiled = compile_for(target, layout.function, *layout.arguments.values(), **settings)
    own = {name: bytes_of(tree) // (count if name in layout.split else 1) for name, tree in layout.arguments.items()}
    beside = {name: bytes_of(tree) for name, tree in program.beside.items()}
    states = [tree["state"] for tree in (layout.arguments, program.beside) if "state" in tree]
    kinds = {**own, **beside}
    kinds.pop("state", None)
    for name, tree in ((name, tree) for state in states for name, tree in by_kind(state).items()):
        kinds[name] = kinds.get(name, 0) + bytes_of(tree)
    data = sum(kinds.get(name, 0) for name in ("data", "batch", "batch ahead", "index", "mask", "seed_epoch"))
    state = (kinds.get("params", 0), kinds.get("opt_state", 0), kinds.get("model_state", 0))
    results = max(0, compiled.results - compiled.aliased)
    temporaries = max(0, _whole_of(compiled, own) + sum(beside.values()) - sum(state) - data - results) + _scratch(target)
    if "data" in kinds:  # fit gives the indices, and masks, of all batches up to the next record at once
        data += max(0, (4 + (count > 1)) * always.num_examples // count - kinds.get("index", 0) - kinds.get("mask", 0))
    own_parts = (batch_size, *state, data, temporaries, results, compiled.seconds, compiled.refused)
    return Memory(*own_parts, test_data=always.test_data, last_state=always.last_state)


def make_evaluation_memory(task: Task, optimizer: Optimizer, target: Target, options: dict, always: Always) -> Callable[[int], int]:
    """``examples at a time -> the bytes in all while fit evaluates the test set``; 0 where it evaluates nothing."""

    def measure(batch_size: int) -> int:
        with compiling_for(target.platform):
            program = evaluation_program(task, optimizer, batch_size)
        if program is None:
            return 0
        arguments = program.layout.arguments
        compiled = compile_for(target, program.layout.function, *arguments.values(), options=options)
        own = {name: bytes_of(tree) for name, tree in arguments.items()}
        more = _whole_of(compiled, own) - own["params"] - own.get("data", 0) + sum(map(bytes_of, program.beside.values()))
        return always.total + max(0, more) + _scratch(target)

    return measure


def memory_of_function(target: Target, function: Callable[..., Any], arguments: Sequence[PyTree], donate, batch_size: int, options: dict) -> Memory:
    """The memory of a function of the user's own."""
    compiled = compile_for(target, function, *arguments, donate=donate, options=options)
    own, results = bytes_of(list(arguments)), max(0, compiled.results - compiled.aliased)
    temporaries = max(0, compiled.total - own - results) + _scratch(target)
    return Memory(batch_size, 0, 0, 0, own, temporaries, results, compiled.seconds, compiled.refused)


def _whole_of(compiled: CompiledProgram, own: dict[str, int]) -> int:
    """The bytes of a program with all of its arguments, also those that the compiler leaves out because they are not used."""
    return compiled.total + (0 if compiled.refused else max(0, sum(own.values()) - compiled.arguments))


def _scratch(target: Target) -> int:
    return CPU_SCRATCH * num_cores() if target.platform == "cpu" else 0


def bytes_of(tree: PyTree) -> int:
    """The bytes of a tree's arrays, of which only shapes and types are used.

    Example:
        >>> bytes_of([jax.ShapeDtypeStruct((3, 2), np.float32), jax.eval_shape(lambda: jax.random.key(0))])
        32
    """
    return sum(_bytes_of_leaf(leaf) for leaf in jax.tree.leaves(tree))


def _bytes_of_leaf(leaf: Any) -> int:
    shape, dtype = jax.numpy.shape(leaf), leaf.dtype if hasattr(leaf, "dtype") else jax.numpy.result_type(leaf)
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return int(np.prod(shape, dtype=np.int64)) * jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).size * 4
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
