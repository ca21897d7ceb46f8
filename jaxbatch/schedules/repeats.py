"""Epochs that are alike, counted at once: what a run of a million of them adds up to takes no longer than that of ten."""

import itertools
import math
from typing import Any

from jaxbatch.batches import Duration
from jaxbatch.schedules.batch_sizes import BatchSizeSchedule
from jaxbatch.schedules.stretches import Progress, Stretch


def counted(progress: Progress, unit: str) -> int:
    """How much of a duration's unit was seen, of epochs those that are over.

    Example:
        >>> counted(Progress(3, 8, 700, 5000), "epochs"), counted(Progress(3, 8, 700, 5000), "examples")
        (3, 5000)
    """
    return progress.epoch if unit == "epochs" else progress.batches if unit == "steps" else progress.examples


def whole_epochs(schedule: Any, stretch: Stretch, duration: Duration) -> int:
    """How many epochs from a stretch on are surely like it and within a duration; 0 if it is not a whole epoch itself.

    Example:
        >>> from jaxbatch import epochs, milestone_schedule, steps
        >>> from jaxbatch.schedules.stretches import next_stretch
        >>> whole_epochs(milestone_schedule({0: 2, steps(50): 4}), next_stretch(2, 8, Progress(1, 0, 4, 8)), epochs(100.5))
        11
    """
    start, per_epoch, size = stretch.start, stretch.num_batches, stretch.batch_size
    if start.offset or not stretch.ends_epoch or not per_epoch:
        return 0
    length = {"epochs": 1, "steps": per_epoch, "examples": per_epoch * size}
    ends = [(duration.amount - counted(start, duration.unit)) // length[duration.unit]]
    if isinstance(schedule, BatchSizeSchedule) and schedule.start is not None:
        begin = schedule.start(schedule.stage(stretch.position) + 1)  # an epoch before it may take a last batch of the size to come
        ends.append(math.inf if begin is None else (begin - counted(start, schedule.unit) - 1) // length[schedule.unit])
    elif callable(schedule):  # it may be another one in every epoch
        alike = itertools.takewhile(lambda epoch: schedule(epoch) == size, itertools.count(start.epoch))
        ends.append(sum(1 for _ in itertools.islice(alike, max(0, int(ends[0])))))
    return max(0, int(min(ends)))


def after_epochs(stretch: Stretch, times: int) -> Progress:
    """The progress after so many epochs like a stretch.

    Example:
        >>> from jaxbatch.schedules.stretches import next_stretch
        >>> after_epochs(next_stretch(2, 8, Progress(1, 0, 4, 8)), 10)
        Progress(epoch=11, offset=0, batches=44, examples=88)
    """
    epoch, _, batches, examples = stretch.start
    more = times * stretch.num_batches
    return Progress(epoch + times, 0, batches + more, examples + more * stretch.batch_size)
