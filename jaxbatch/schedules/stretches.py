"""How a schedule of batch sizes cuts a run into stretches, each of batches of one size within one epoch.

Everything here is counted on the host, in Python's integers. What comes next depends only on the schedule and on what was seen so far, so
a run can go on from anywhere.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxbatch.batches import Duration, batches_left, in_examples, steps_per_epoch, tokens
from jaxbatch.schedules.batch_sizes import BatchSizeSchedule, as_schedule, whole_periods


class Progress(NamedTuple):
    """How far a run has come, in Python's integers. A run can continue from here with any batch size."""

    epoch: int = 0
    offset: int = 0  # the number of examples of this epoch that it has seen
    batches: int = 0
    examples: int = 0

    def after(self, num_batches: int, batch_size: int, *, ends_epoch: bool) -> "Progress":
        """The progress after further batches of this epoch."""
        more = num_batches * batch_size
        epoch, offset = (self.epoch + 1, 0) if ends_epoch else (self.epoch, self.offset + more)
        return Progress(epoch, offset, self.batches + num_batches, self.examples + more)


class Stretch(NamedTuple):
    """Batches of one size within one epoch, up to its end or to a change."""

    start: Progress
    position: int | float  # with which the schedule is called to tell of these batches
    batch_size: int
    num_batches: int  # 0: what is left of the epoch fills no batch
    per_epoch: int  # batches of this size in a whole epoch
    ends_epoch: bool

    @property
    def end(self) -> Progress:
        """The progress after it."""
        return self.start.after(self.num_batches, self.batch_size, ends_epoch=self.ends_epoch)


def next_stretch(schedule: int | Callable[[int], int], num_examples: int, start: Progress, *, by_stage: bool = False) -> Stretch:
    """The batches that follow on ``start``.

    Args:
        schedule: a number, a function of the epoch, or a :class:`BatchSizeSchedule`, of which one in tokens has gone through
            :func:`counted_in_examples`.
        num_examples: examples in the data set.
        start: what was seen so far.
        by_stage: whether a change ends it that leaves the size as it is, such as that of a batch that has reached its cap.

    Raises:
        ValueError: the batch is larger than the data set, or its size is no whole number.

    Example:
        >>> from jaxbatch import examples, milestone_schedule
        >>> schedule = milestone_schedule({0: 2, examples(11): 4})
        >>> first = next_stretch(schedule, 8, Progress(1, 0, 4, 8))
        >>> first.num_batches, first.batch_size, first.ends_epoch, first.end
        (2, 2, False, Progress(epoch=1, offset=4, batches=6, examples=12))
        >>> second = next_stretch(schedule, 8, first.end)
        >>> second.num_batches, second.batch_size, second.ends_epoch
        (1, 4, True)
    """
    stage, position, size = _stage_at(schedule, num_examples, start)
    per_epoch = _per_epoch(num_examples, size, start)
    whole = max(0, num_examples - start.offset) // size
    if not isinstance(schedule, BatchSizeSchedule) or schedule.start is None:
        return Stretch(start, position, size, whole, per_epoch, True)
    left = _batches_to_stage(schedule, stage + 1, size, per_epoch, start)
    while not by_stage and left is not None and left < whole and _whole_number(schedule.size(schedule.start(stage + 1))) == size:
        stage += 1
        left = _batches_to_stage(schedule, stage + 1, size, per_epoch, start)
    count = whole if left is None else min(left, whole)
    after = start.after(count, size, ends_epoch=False)
    ends = num_examples - after.offset < _stage_at(schedule, num_examples, after)[2]  # what is left fills no batch of the size to come
    return Stretch(start, position, size, count, per_epoch, ends)


def epoch_end(schedule: int | Callable[[int], int], num_examples: int, stretch: Stretch) -> int:
    """How many examples of a stretch's epoch fill batches, those of later stretches included.

    Example:
        >>> from jaxbatch import examples, milestone_schedule
        >>> schedule = milestone_schedule({0: 3, examples(5): 1})
        >>> epoch_end(3, 8, next_stretch(3, 8, Progress())), epoch_end(schedule, 8, next_stretch(schedule, 8, Progress()))
        (6, 8)
    """
    while not stretch.ends_epoch:
        stretch = next_stretch(schedule, num_examples, stretch.end)
    return stretch.start.offset + stretch.num_batches * stretch.batch_size


def position_in_epochs(epoch: int, offset: int, end: int) -> float:
    """Where a run stands, in epochs: an epoch's part is that of its examples that fill batches, so it grows whatever the batch sizes are.

    Args:
        epoch: epochs that are over.
        offset: examples of this one so far.
        end: those that it will have, see :func:`epoch_end`.

    Example:
        >>> position_in_epochs(2, 3, 6), position_in_epochs(2, 6, 6)
        (2.5, 3.0)
    """
    return epoch + offset / end


def stretches_of_epochs(schedule: int | Callable[[int], int], num_examples: int, num_epochs: int) -> list[Stretch]:
    """A run of whole epochs, cut at every change of the schedule's stage.

    Example:
        >>> from jaxbatch import epochs, milestone_schedule
        >>> cut = stretches_of_epochs(milestone_schedule({0: 2, epochs(0.5): 4}), 8, 2)
        >>> [(stretch.start.epoch, stretch.batch_size, stretch.num_batches) for stretch in cut]
        [(0, 2, 2), (0, 4, 1), (1, 4, 2)]
    """
    cut, progress = [], Progress()
    while progress.epoch < num_epochs:
        stretch = next_stretch(schedule, num_examples, progress, by_stage=True)
        cut += [stretch] if stretch.num_batches else []
        progress = stretch.end
    return cut


def positions_of_stretches(schedule: int | Callable[[int], int], num_examples: int, cut: list[Stretch]) -> Float[np.ndarray, "3 stretches"]:
    """Where each stretch begins and ends, in epochs, and how many batches of its size the epoch's examples are.

    Example:
        >>> positions_of_stretches(2, 8, stretches_of_epochs(2, 8, 2)).tolist()
        [[0.0, 1.0], [1.0, 2.0], [4.0, 4.0]]
    """
    ends: dict[int, int] = {}
    for one in cut:
        if one.start.epoch not in ends:
            ends[one.start.epoch] = epoch_end(schedule, num_examples, one)
    at = lambda one, more: position_in_epochs(one.start.epoch, one.start.offset + more, ends[one.start.epoch])
    rows = [(at(one, 0), at(one, one.num_batches * one.batch_size), ends[one.start.epoch] / one.batch_size) for one in cut]
    return np.array(rows, np.float32).reshape(-1, 3).T


def count_steps(schedule: int | Callable[[int], int], num_examples: int, num_epochs: int) -> list[int]:
    """The number of updates in each epoch; partial batches are dropped.

    Raises:
        ValueError: a batch is larger than the data set; the message names the first such epoch.

    Example:
        >>> from jaxbatch import adabatch_schedule
        >>> count_steps(adabatch_schedule(batch_size=128, every=20), 50_000, 100)[::20]
        [390, 195, 97, 48, 24]
    """
    counts = [0] * num_epochs
    for stretch in stretches_of_epochs(as_schedule(schedule), num_examples, num_epochs):
        counts[stretch.start.epoch] += stretch.num_batches
    return counts


def counted_in_examples(schedule: Any, tokens_per_example: Any) -> Any:
    """A schedule in tokens as one in examples, which changes at the same batches; anything else as it is.

    Raises:
        ValueError: ``tokens_per_example`` is no whole number of at least 1.

    Example:
        >>> from jaxbatch import milestone_schedule
        >>> schedule = counted_in_examples(milestone_schedule({0: 8, tokens(1025): 16}), 512)
        >>> schedule.unit, schedule(2), schedule(3), schedule.start(1)
        ('examples', 8, 16, 3)
    """
    if not isinstance(schedule, BatchSizeSchedule) or schedule.unit != "tokens":
        return schedule
    begins: Callable[[int], Any] = schedule.start  # type: ignore[assignment]  # only epochs need none
    in_examples(tokens(begins(1) or 0), tokens_per_example)  # raises where there is no number of tokens
    of = lambda function: lambda position: function(position * int(tokens_per_example))
    start = lambda stage: None if (begin := begins(stage)) is None else in_examples(tokens(begin), tokens_per_example).amount
    log_nominal = None if schedule.log_nominal is None else of(schedule.log_nominal)
    return BatchSizeSchedule(of(schedule.size), of(schedule.stage), of(schedule.nominal), log_nominal, "examples", start)


def batches_to(end: int, offset: int, size: int) -> int:
    """The number of batches between two points in an epoch's order, rounded up.

    Example:
        >>> batches_to(10, 4, 4), batches_to(3, 4, 4)
        (2, 0)
    """
    return max(0, -(-(end - offset) // size))


def _stage_at(schedule: Any, num_examples: int, progress: Progress) -> tuple[int, int | float, int]:
    """The stage that a schedule is in (0 if it has no need of one), the position that stands for it, and the batch size."""
    epoch = progress.epoch
    if not isinstance(schedule, BatchSizeSchedule):
        return 0, epoch, _whole_number(schedule(epoch) if callable(schedule) else schedule)
    if schedule.unit == "tokens":
        counted_in_examples(schedule, None)  # raises: fit has converted tokens, which are not known here
    if schedule.start is None:
        return 0, epoch, _whole_number(schedule.size(epoch))
    position = {"steps": progress.batches, "examples": progress.examples, "epochs": epoch}[schedule.unit]
    stage = schedule.stage(position)
    if schedule.unit == "epochs":  # it may have begun within the epoch
        while True:
            position = schedule.start(stage)  # type: ignore[assignment]  # this stage has begun
            size = _whole_number(schedule.size(position))
            if _batches_to_stage(schedule, stage + 1, size, max(1, num_examples // size), progress) != 0:
                break
            stage += 1
    return stage, position, _whole_number(schedule.size(position))


def _batches_to_stage(schedule: BatchSizeSchedule, stage: int, size: int, per_epoch: int, progress: Progress) -> int | None:
    """How many batches of a size there are before a stage begins; None: it never does, or in a later epoch."""
    begin = None if schedule.start is None else schedule.start(stage)
    if begin is None:
        return None
    if schedule.unit != "epochs":
        done = progress.batches if schedule.unit == "steps" else progress.examples
        return batches_left(Duration(begin, schedule.unit), done, batch_size=size, per_epoch=per_epoch)
    if whole_periods(begin, 1) != progress.epoch:
        return None if begin > progress.epoch else 0
    left = batches_left(Duration(begin, "epochs"), progress.epoch, batch_size=size, per_epoch=per_epoch)
    return batches_to(left * size, progress.offset, size)  # they count from the epoch's beginning


def _per_epoch(num_examples: int, size: int, progress: Progress) -> int:
    if progress.batches and size > num_examples:
        raise ValueError(
            f"the schedule's batch_size={size} at epoch {progress.epoch} is larger than the data set (num_examples={num_examples}). "
            "Take smaller batches, or a smaller max_batch_size."
        )
    return steps_per_epoch(num_examples, size)


def _whole_number(size: Any) -> int:
    if not isinstance(size, int | np.integer):
        raise ValueError(f"batch_size={size!r} must be a whole number, or a schedule that gives one for an epoch.")
    return int(size)  # NumPy's integers would overflow in sums
