"""How batches are cut into parts: decided once for each size, for programs that run here and those compiled for elsewhere.

Axes: B examples in a batch, K groups, N devices.
"""

from typing import Any, NamedTuple

from jaxbatch.data.streams import is_stream
from jaxbatch.gradients.groups import check_microbatch_size, check_num_groups
from jaxbatch.gradients.independence import has_independent_prepare
from jaxbatch.gradients.part_norms import NoiseMonitor
from jaxbatch.gradients.parts import choose_method
from jaxbatch.layers import loops_are_slow
from jaxbatch.training.devices import alone
from jaxbatch.training.tasks import Task, smallest


class Cut(NamedTuple):
    """How batches of one size go through training."""

    task: Task  # bounded by the microbatch
    microbatch_size: int | None  # as asked for, or smaller so that noise can be measured; None: the task's own
    in_pieces: bool  # a Python loop runs the pieces of a step
    in_parts: bool  # a loss or ``prepare`` sees less than a device's share of a group
    to_measure: int | None  # a smaller microbatch for the batches whose noise is measured, within the same program
    by_part: bool  # a compiled step takes the examples of each part when it works on it


def choose_cut(
    task: Task,
    params: Any,
    batch_size: int,
    *,
    num_groups: int = 1,
    microbatch_size: int | None = None,
    num_devices: int = 1,
    monitor: NoiseMonitor | None = None,
) -> Cut:
    """Decides how batches of ``batch_size`` are cut, on the platform that is compiled for.

    Args:
        task: see :class:`jaxbatch.Task`.
        params: only their shapes are used.
        batch_size: B, over all devices.
        num_groups: K, the updates per batch.
        microbatch_size: the most examples that a device works on at a time; ``None``: as the task says.
        num_devices: N.
        monitor: a batch with fewer parts than it asks for is cut further.

    Raises:
        ValueError: K does not divide B, or a size is below 1.
    """
    check_num_groups(num_groups, batch_size)
    check_microbatch_size(microbatch_size)
    bounded = task._replace(microbatch_size=smallest(microbatch_size, task.microbatch_size))
    asked = microbatch_size is not None and batch_size // num_groups > microbatch_size * num_devices
    in_pieces = runs_in_pieces(bounded, params, batch_size, asked)
    at_a_time = microbatch_size if in_pieces else bounded.examples_at_a_time
    further = microbatch_for_noise(monitor, batch_size, num_groups, num_devices, at_a_time)
    if monitor is not None and further is not None:
        # Other batches stay whole where one program can hold both ways.
        always = monitor.every == 1 or num_devices > 1 or task.update_model_state is not None or runs_in_pieces(bounded, params, batch_size, True)
        if always:
            over: dict[str, Any] = {"num_groups": num_groups, "num_devices": num_devices, "monitor": monitor}
            return choose_cut(bounded, params, batch_size, microbatch_size=further, **over)
    by_part = not in_pieces and takes_by_part(bounded, params, batch_size, num_groups, num_devices, further)
    in_parts = num_devices > 1 or (in_pieces and (asked or num_groups > 1))
    return Cut(bounded, microbatch_size, in_pieces, in_parts, further, by_part)


def takes_by_part(task: Task, params: Any, batch_size: int, num_groups: int = 1, num_devices: int = 1, further: int | None = None) -> bool:
    """Whether a compiled step takes each part's examples when it works on it, so that the batch is never in memory whole.

    A batch is taken whole if its step has no loop over parts: if it has no parts, and if it has groups side by side or one after
    another without a loop, where the compiler keeps what all of them need anyway. So is one whose ``prepare`` changes an example
    with the others in its batch: on one device it sees all of them, and its numbers must not depend on the cut.
    """
    share = -(-batch_size // num_groups // max(1, num_devices))  # no device at all is refused where they are told apart
    loss_fn = task.loss_fn if num_devices == 1 else alone(task.loss_fn)
    cut = share > min(further or share, task.examples_at_a_time or share)
    in_turn = lambda: choose_method(loss_fn, params, task.shapes_of_batch(share), share) == "map"
    return (cut or (num_groups > 1 and in_turn())) and has_independent_prepare(task)


def microbatch_for_noise(monitor: NoiseMonitor | None, batch_size: int, num_groups: int, num_devices: int, at_a_time: int | None) -> int | None:
    """A smaller microbatch, if the batch has fewer parts than the monitor asks for and can be cut further; else None.

    Example:
        >>> microbatch_for_noise(NoiseMonitor(), 9, 1, 1, None), microbatch_for_noise(NoiseMonitor(), 9, 1, 1, 3)
        (5, None)
        >>> microbatch_for_noise(NoiseMonitor(parts=8), 16, 2, 2, None)  # each device's share of a group, 4 examples, is cut in 2
        2
    """
    if monitor is None:
        return None
    share = -(-batch_size // num_groups // max(1, num_devices))  # no device at all is refused where they are told apart
    each = -(-monitor.parts // (num_groups * num_devices))
    wanted = -(-share // each)
    return wanted if wanted < min(at_a_time or share, share) else None


def runs_in_pieces(task: Task, params: Any, batch_size: int, cut: bool) -> bool:
    """Whether a Python loop runs the pieces of a step: for a stream, and for a batch that is cut if compiled loops are slow."""
    slow = lambda: loops_are_slow(task.loss_fn, params, task.shapes_of_batch(task.examples_at_a_time or batch_size))
    return is_stream(task.train_data) or (cut and slow())
