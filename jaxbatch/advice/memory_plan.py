"""How to run a batch that does not fit: in microbatches, on several devices, and with activations that are computed again.

Axes: B examples in a batch, N devices.
"""

import functools
import math
from typing import Any, NamedTuple

import jax

from jaxbatch.advice.largest_batch import MARGIN, find_limit, search_largest
from jaxbatch.advice.memory import caveats, make_measure, with_evaluation
from jaxbatch.advice.memory_parts import Always, Memory, always_there, make_evaluation_memory
from jaxbatch.advice.time_bound import step_work
from jaxbatch.batches import even_part
from jaxbatch.data.streams import is_stream
from jaxbatch.gradients.groups import check_count
from jaxbatch.gradients.independence import has_independent_prepare
from jaxbatch.gradients.recompute import KEEPS, Keep, recompute
from jaxbatch.gradients.updates import Optimizer
from jaxbatch.machine.platform import compiling_for
from jaxbatch.machine.targets import Target, format_bytes
from jaxbatch.training.cut import choose_evaluation_size
from jaxbatch.training.cut_check import check_parts_elsewhere
from jaxbatch.training.tasks import Task


class Option(NamedTuple):
    """One way to fit a batch."""

    keep: Keep  # which activations are kept, see jaxbatch.recompute
    microbatch_size: int  # examples on a device at a time; 0: not even one fits, or fit refuses parts
    accumulation_steps: int
    operations: float  # floating-point operations of a step, relative to keeping everything
    memory: Memory


class MemoryPlan(NamedTuple):
    """What to set so that a batch fits."""

    batch_size: int
    num_devices: int
    target: Target
    limit: int  # bytes on each device
    chosen: Option
    options: tuple[Option, ...]  # in the order of their operations; without ``frontier`` it ends with the chosen one
    evaluation_batch_size: int | None = None  # the test examples at a time, for FitConfig; None: what fit takes by itself fits
    evaluation_is_cut: bool = False  # whether more test examples at a time do not fit
    is_checked: bool = True  # whether the loss was looked at for what parts of a batch would change

    def __str__(self) -> str:
        return " ".join([self.sentence, *caveats(self.target)])

    @property
    def sentence(self) -> str:
        """What to set, without what has to be said beside a number for the target."""
        keep, microbatch, parts, operations, memory = self.chosen
        devices = f" on each of {self.num_devices} devices" if self.num_devices > 1 else ""
        cut = f"with microbatch_size={microbatch}, {parts} parts{devices}" if parts > 1 else "without microbatches"
        extra = "" if keep == "everything" else f", loss_fn=jaxbatch.recompute(loss_fn, {keep!r}) at {operations:.2f} times the operations"
        each = f"each of {self.num_devices} devices" if self.num_devices > 1 else "a step"
        needs = f"{each} needs {format_bytes(memory.step)} of {format_bytes(self.limit)}"
        needs += f", an evaluation {format_bytes(memory.evaluation)}" if memory.evaluation else ""
        size = self.evaluation_batch_size
        because = ", because more test examples at a time do not fit" if self.evaluation_is_cut else ""
        evaluation = "" if size is None else f" with evaluation_batch_size={size}{because}"
        unchecked = (
            ""
            if self.is_checked or parts * self.num_devices == 1
            else " The parameters were too large to look whether parts change the loss, which fit would refuse."
        )
        return f"A batch of {self.batch_size:,} fits on {self.target.title} {cut}{extra}: {needs}{evaluation}.{unchecked}"


def memory_plan(
    task: Task,
    *,
    optimizer: Optimizer,
    batch_size: int,
    target: str | Target = "here",
    num_devices: int = 1,
    budget: str | float | None = None,
    margin: float = MARGIN,
    evaluation_batch_size: int | None = None,
    frontier: bool = False,
) -> MemoryPlan:
    """The largest microbatch that fits, and, only where not even one example does, which activations to compute again.

    The test set is evaluated with ``evaluation_batch_size`` examples at a time, or with as many as :func:`jaxbatch.fit` takes by itself;
    where these do not fit, with the most that do. A loss that couples the examples of a batch, which :func:`jaxbatch.fit` refuses in parts, is
    planned whole or not at all; for this, losses of a few examples are computed here.

    Args:
        task, optimizer, target, budget, margin: as :func:`jaxbatch.max_batch_size` takes them.
        batch_size: B, over all devices.
        num_devices: N.
        evaluation_batch_size: the test examples at a time that are asked for; ``None``: as :func:`jaxbatch.fit` takes by itself.
        frontier: whether to work out all ways to keep activations, not only the first that fits. Larger microbatches may be
            worth more operations.

    Returns:
        The plan. ``plan.chosen.microbatch_size`` and ``plan.evaluation_batch_size`` go into :class:`jaxbatch.FitConfig`; ``str(plan)`` is
        a sentence.

    Raises:
        ValueError: nothing fits; the message says how much memory is missing. Or only parts fit that :func:`jaxbatch.fit` refuses. Or an
            argument is wrong.

    Example:
        >>> import optax
        >>> from jaxbatch import MLP, classification_task, load_dataset
        >>> task = classification_task(MLP(), load_dataset("digits"), microbatch_size=10**6)
        >>> plan = memory_plan(task, optimizer=optax.sgd(0.1), batch_size=2**20, target="cpu", budget="1GiB")
        >>> plan.chosen.keep, plan.chosen.accumulation_steps > 1, plan.chosen.memory.total <= plan.limit
        ('everything', True, True)
    """
    if not isinstance(task, Task):
        raise ValueError(f"task={type(task).__name__} must be a jaxbatch.Task: only a task says how its batches can be cut.")
    check_count("batch_size", batch_size)
    check_count("num_devices", num_devices)
    check_count("evaluation_batch_size", evaluation_batch_size, optional=True)
    (device, limit), share = find_limit(target, budget, margin), -(-batch_size // num_devices)
    settings: dict[str, Any] = {"optimizer": optimizer, "target": device, "num_devices": num_devices, "step_alone": True}
    make_measure(task, **settings)  # raises an error if an argument is wrong, before anything is compiled
    is_checked = check_parts_elsewhere(task, batch_size, device.platform, num_devices=num_devices)
    options, refusal = list[Option](), None  # not yet asked for
    for keep in KEEPS:
        changed = task._replace(loss_fn=recompute(task.loss_fn, keep))
        known: dict[int, Memory] = {}

        def need(size: int, changed=changed, known=known) -> int:
            if size not in known:
                known[size] = make_measure(changed, microbatch_size=size, **settings)(batch_size)
            return known[size].step

        sizes = even_parts(share)
        whole_fits = need(share) <= limit
        if not whole_fits and refusal is None and share > 1:
            refusal = _refusal_of_parts(task, batch_size, device, -(-share // 2), num_devices)
        if whole_fits or refusal:  # where parts are refused, computing activations again may make room for the whole batch
            size = share if whole_fits else 0
        else:
            size = search_largest(need, limit, sizes[:-1] or [1], sizes[len(sizes) // 2])
        parts = -(-share // size) if size else 0
        options.append(Option(keep, size, parts, _relative_operations(task, optimizer, keep), known[size or (share if refusal else sizes[0])]))
        if size and not frontier:
            break
    fitting = [option for option in options if option.microbatch_size]
    if not fitting and refusal:
        raise ValueError(f"{refusal} Or take a smaller batch_size: whole, this one does not fit in the {format_bytes(limit)} of {device.title}.")
    if not fitting:
        raise ValueError(_no_way(min(options, key=lambda option: option.memory.step).memory, task, device, limit, share))
    evaluations = _Evaluations(task, optimizer, device, limit, evaluation_batch_size)
    options = [option._replace(memory=evaluations.beside(option)) for option in options]
    chosen = next(option for option in options if option.microbatch_size)
    fits = chosen.memory.evaluation_batch_size  # 0 without metrics
    is_cut = 0 < fits < evaluations.size_for(chosen)
    needed = fits if is_cut or (fits and evaluation_batch_size is not None) else None
    return MemoryPlan(batch_size, num_devices, device, limit, chosen, tuple(options), needed, is_cut, is_checked)


def _refusal_of_parts(task: Task, batch_size: int, device: Target, size: int, num_devices: int) -> str:
    """Why :func:`jaxbatch.fit` refuses microbatches of this size; an empty text: it takes them."""
    try:
        check_parts_elsewhere(task, batch_size, device.platform, microbatch_size=size, num_devices=num_devices)
    except ValueError as error:
        return str(error)
    return ""


class _Evaluations:
    """The memory of evaluations, of as many test examples at a time as are asked for or fit takes by itself, or of fewer where these do not fit."""

    def __init__(self, task: Task, optimizer: Optimizer, target: Target, limit: int, asked: int | None):
        self._task, self._target, self._limit, self._asked = task, target, limit, asked
        self._always: Always = always_there(task, optimizer)
        self._need = functools.cache(make_evaluation_memory(task, optimizer, target, {}, self._always))
        if self._always.ordering > limit:
            raise ValueError(f"drawing the order of an epoch {self._missing(self._always.ordering)} Take a part of the data at a time.")

    def size_for(self, option: Option) -> int:
        """The examples that fit would evaluate at a time if any number fitted."""
        with compiling_for(self._target.platform):
            return choose_evaluation_size(self._task, option.microbatch_size if option.accumulation_steps > 1 else None, self._asked)

    def beside(self, option: Option) -> Memory:
        """The memory of an option with its evaluation."""
        size = self.size_for(option)
        if self._need(size) > self._limit:
            largest = search_largest(self._need, self._limit, range(1, size), max(1, size // 8), lambda: self._always.total)
            if largest == 0:
                raise ValueError(f"evaluating one test example at a time {self._missing(self._need(1))} Take a larger device or a smaller model.")
            size = largest
        return with_evaluation(option.memory, size, self._need(size), self._always)

    def _missing(self, count: int) -> str:
        there, missing = format_bytes(self._limit), format_bytes(count - self._limit)
        return f"needs {format_bytes(count)} on {self._target.title}, {missing} more than the {there} that are there."


def _no_way(least: Memory, task: Task, device: Target, limit: int, share: int) -> str:
    kept = least.parameters + least.optimizer_state
    # A prepare that changes an example with the others in its batch needs all of them at once.
    whole = [] if is_stream(task.train_data) or has_independent_prepare(task) else jax.tree.leaves(task.train_data)
    batch = share * sum(leaf.dtype.itemsize * math.prod(leaf.shape[1:]) for leaf in whole)
    if kept + least.last_state + least.parameters > limit:  # the gradient is as large as the parameters
        remedy = "Parameters, optimizer state and gradient alone do not fit, whatever the batch"
    elif whole:
        remedy = (
            f"prepare changes an example with the others in its batch, whose examples alone are {format_bytes(batch)}: make it a function of one "
            "example, or take a smaller batch_size"
        )
    elif 16 * share > least.temporaries // 2:
        remedy = "The batch's indices and losses alone need a large part of it: take a smaller batch_size or more devices"
    else:
        remedy = "Take a larger device or a smaller model"
    return (
        f"batch_size={least.batch_size} does not fit on {device.title}, even with one example at a time and activations computed again: it needs "
        f"{format_bytes(least.step)}, {format_bytes(least.step - limit)} more than the {format_bytes(limit)} that are there. {remedy}. "
        f"(Parameters and optimizer state {format_bytes(kept)}, those of the last record {format_bytes(least.last_state)}, data "
        f"{format_bytes(least.data)}, test data {format_bytes(least.test_data)}, the rest {format_bytes(least.temporaries)}.)"
    )


def even_parts(share: int) -> list[int]:
    """The sizes of parts that a share is cut into, in ascending order; equal parts, where there is a divisor nearby.

    Example:
        >>> even_parts(12)
        [1, 2, 3, 4, 6, 12]
    """
    counts = {round(share ** (step / 400)) for step in range(401)} | set(range(1, min(share, 64) + 1))
    return sorted({even_part(share, -(-share // count)) for count in counts} | {1, share})


def _relative_operations(task: Task, optimizer: Optimizer, keep: Keep) -> float:
    if keep == "everything":
        return 1.0
    plain = task._replace(microbatch_size=None, cpu_microbatch_size=None)
    changed = plain._replace(loss_fn=recompute(task.loss_fn, keep))
    return step_work(changed, optimizer, 8).operations / step_work(plain, optimizer, 8).operations
