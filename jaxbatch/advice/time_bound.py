"""A lower bound on the time of a training step on a device that need not be here, by batch size.

See :mod:`jaxbatch.machine.roofline`. Only ratios of bounds say something about speed-ups, and they say what hardware allows, not
what programs reach: a step that leaves a device idle takes longer than its bound.

Axes: B examples in a batch.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxbatch.advice.memory_parts import Memory
from jaxbatch.augment import batch_shapes
from jaxbatch.data.streams import is_stream
from jaxbatch.gradients.updates import Optimizer
from jaxbatch.machine.roofline import Bound, Work, count_work, time_bound
from jaxbatch.machine.targets import Target
from jaxbatch.training.steps import make_task_step
from jaxbatch.training.tasks import Task
from jaxbatch.training.train_state import state_shapes

_COUNTED = (8, 16)  # sizes whose operations are counted; the others lie on their line


class StepBound(NamedTuple):
    """Least seconds of a step, and of an example."""

    batch_size: int
    bound: Bound

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.bound.seconds

    @property
    def seconds_per_example(self) -> float:
        """Of an example."""
        return self.bound.seconds / self.batch_size


def step_work(task: Task, optimizer: Optimizer, batch_size: int) -> Work:
    """The operations of a step whose batch is worked on at once; augmentation does not count."""
    data = task.train_data
    if is_stream(data):
        data = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), data.example)
    step = make_task_step(task._replace(microbatch_size=None, cpu_microbatch_size=None), optimizer, batch_size)
    return count_work(step, state_shapes(task, optimizer), batch_shapes(data, batch_size, task.prepare))


def work_by_batch_size(task: Task, optimizer: Optimizer) -> Callable[[int], Work]:
    """``batch_size -> the operations of a step``, on a line through two sizes that are counted."""
    small, large = (step_work(task, optimizer, size) for size in _COUNTED)
    slope = (large.operations - small.operations) / (_COUNTED[1] - _COUNTED[0])
    return lambda size: Work(max(small.operations + slope * (size - _COUNTED[0]), slope * size), small.precision)


def make_step_bound(task: Task, target: Target, work: Callable[[int], Work]) -> Callable[[Memory], StepBound]:
    """``memory -> the bound on a step's time``, where the memory is that of a step on one device of ``target``.

    ``work`` is from :func:`work_by_batch_size`. A step reads and writes the parameters and the optimizer's state, and reads its
    batch. Activations that are alive when memory is fullest were written and will be read, unless they fit in the cache.

    Raises:
        ValueError: the target's figures are not known.
    """
    streamed = is_stream(task.train_data)
    leaves = jax.tree.leaves(task.train_data.example if streamed else task.train_data)
    example_bytes = sum(leaf.dtype.itemsize * math.prod(leaf.shape if streamed else leaf.shape[1:]) for leaf in leaves)

    def bound(memory: Memory) -> StepBound:
        size = memory.batch_size
        kept = memory.parameters + memory.optimizer_state + memory.model_state
        moved = 2 * kept + size * example_bytes + 2 * max(0, memory.temporaries - target.cache)
        return StepBound(size, time_bound(target, work(size), moved))

    return bound


def compute_takes_over(small: StepBound, large: StepBound) -> float | None:
    """The batch from which on operations, not bytes, bound a step; 1 if always, None if never. Both lie on lines in B.

    Example:
        >>> compute_takes_over(StepBound(10, Bound(1.0, 2.0)), StepBound(30, Bound(3.0, 2.0)))
        20.0
    """
    (a, (compute_a, transfer_a)), (b, (compute_b, transfer_b)) = small, large
    gap = (compute_a - transfer_a, compute_b - transfer_b)
    if gap[0] >= 0:
        return 1.0
    slope = (gap[1] - gap[0]) / (b - a)
    return a - gap[0] / slope if slope > 0 else None
