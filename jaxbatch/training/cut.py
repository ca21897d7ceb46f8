"""How a batch goes through a step: devices × groups × microbatches, one value that one function decides.

A batch has K groups with an update each, devices share every group, and a device works on its share in microbatches. Shares are filled up
where the number of devices does not divide a group. The cut of a size is the same for programs that run here and for those that are
compiled for elsewhere.

Axes: B examples in a batch, K groups, N devices.
"""

from typing import Any, NamedTuple

from jaxbatch.data.streams import is_stream
from jaxbatch.gradients.groups import check_microbatch_size, check_num_groups
from jaxbatch.gradients.independence import has_independent_prepare
from jaxbatch.gradients.part_norms import NoiseMonitor
from jaxbatch.gradients.parts import choose_method
from jaxbatch.layers import loops_are_slow
from jaxbatch.part_lengths import part_lengths, part_size
from jaxbatch.training.devices import AXIS, alone
from jaxbatch.training.tasks import Task, smallest


class Cut(NamedTuple):
    """How batches of one size go through training.

    Example:
        >>> cut = Cut(7, num_devices=2, microbatch_size=2)
        >>> cut.share, cut.has_fillers, cut.piece_lengths
        (4, True, {4: 1, 3: 1})
    """

    batch_size: int  # B, over all devices
    num_groups: int = 1
    num_devices: int = 1
    microbatch_size: int | None = None  # the most examples that a device works on at once; None: its whole share of a group
    to_measure: int | None = None  # a smaller one for the batches whose noise is measured, within the same program
    in_pieces: bool = False  # a Python loop runs the pieces of a step
    by_part: bool = False  # a compiled step takes the examples of each part when it works on it
    splits_prepare: bool = False  # ``prepare`` cannot see the batch of an update whole

    @property
    def axis(self) -> str | None:
        """The name of the axis of devices, if there are several."""
        return AXIS if self.num_devices > 1 else None

    @property
    def group_size(self) -> int:
        """The examples of an update, over all devices."""
        return self.batch_size // self.num_groups

    @property
    def share(self) -> int:
        """The examples of each group that a device works on, fillers included."""
        return -(-self.group_size // self.num_devices)

    @property
    def has_fillers(self) -> bool:
        """Whether a share is filled up."""
        return self.share * self.num_devices > self.group_size

    @property
    def piece_lengths(self) -> dict[int, int]:
        """The lengths, over all devices, of the parts that a group has in pieces, and how many have each; the longest first."""
        size = self.microbatch_size
        return part_lengths(self.group_size, part_size(self.group_size, None if size is None else size * self.num_devices))


def choose_cut(
    task: Task,
    params: Any,
    batch_size: int,
    *,
    num_groups: int | None = None,
    microbatch_size: int | None = None,
    num_devices: int = 1,
    monitor: NoiseMonitor | None = None,
    may_piece: bool = True,
) -> Cut:
    """Decides how batches of ``batch_size`` are cut, on the platform that is compiled for.

    A Python loop runs the pieces of a step for a stream, and for several parts if compiled loops are slow. If a batch has fewer parts
    than the monitor asks for, it is cut further: only to be measured, where one program can hold both forms of a step, else always.

    A compiled step takes each part's examples when it works on it, so that the batch is never in memory whole, except if it has no loop over
    parts: no parts at all, or groups side by side, or one after another without a loop, where the compiler keeps what all of them need
    anyway. A batch is also taken whole if ``prepare`` changes an example with the others in its batch: on one device it sees all of them, and
    its numbers must not depend on the cut.

    Args:
        task: see :class:`jaxbatch.Task`.
        params: only their shapes are used.
        batch_size: B, over all devices.
        num_groups: K, the updates per batch; ``None``: one.
        microbatch_size: the most examples that a device works on at a time; ``None``: as the task says.
        num_devices: N.
        monitor: how noise is measured.
        may_piece: False where steps are always whole, as in a sweep.

    Raises:
        ValueError: K does not divide B, a size is below 1, or there is no device.
    """
    groups, several_devices = 1 if num_groups is None else num_groups, num_devices > 1
    check_num_groups(groups, batch_size)
    check_microbatch_size(microbatch_size)
    if num_devices < 1:
        raise ValueError("devices is empty: at least 1 is needed.")
    loss_fn, streamed, in_cache = alone(task.loss_fn), is_stream(task.train_data), task._replace(microbatch_size=None).examples_at_a_time

    def cut_at(size: int | None) -> Cut:
        several = size is not None and batch_size // groups > size * num_devices
        in_pieces = may_piece and (streamed or (several and slow(size)))
        splits_prepare = several_devices or (in_pieces and (several or groups > 1))
        return Cut(batch_size, groups, num_devices, size if in_pieces else smallest(size, in_cache), None, in_pieces, False, splits_prepare)

    slow = lambda size: loops_are_slow(loss_fn, params, task.shapes_of_batch(smallest(size, in_cache) or batch_size))
    asked = smallest(microbatch_size, task.microbatch_size)
    cut = cut_at(asked)
    further = _finer(cut, monitor)
    if monitor is not None and further is not None:
        one_form = several_devices or task.update_model_state is not None or streamed
        always = monitor.every == 1 or one_form or slow(asked)
        cut = cut_at(further) if always else cut._replace(to_measure=further)
    if cut.in_pieces:
        return cut
    in_turn = lambda: choose_method(loss_fn, params, task.shapes_of_batch(cut.share), cut.share) == "map"
    parts = (smallest(cut.to_measure, cut.microbatch_size) or cut.share) < cut.share or (groups > 1 and in_turn())
    return cut._replace(by_part=parts and has_independent_prepare(task))


def _finer(cut: Cut, monitor: NoiseMonitor | None) -> int | None:
    """A smaller microbatch, if the batch has fewer parts than the monitor asks for and can be cut further; else None.

    Example:
        >>> _finer(Cut(9), NoiseMonitor()), _finer(Cut(9, microbatch_size=3), NoiseMonitor())
        (5, None)
        >>> _finer(Cut(16, 2, 2), NoiseMonitor(parts=8))  # each device's share of a group, 4 examples, is cut in 2
        2
    """
    if monitor is None:
        return None
    each = -(-monitor.parts // (cut.num_groups * cut.num_devices))
    wanted, there = -(-cut.share // each), -(-cut.share // part_size(cut.share, cut.microbatch_size))
    return wanted if there < each and wanted < cut.share else None
