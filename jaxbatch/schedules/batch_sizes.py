"""Batch sizes by epoch. Epochs are counted from 0.

Besides the size, a schedule knows its *stage* (the number of changes so far) and its *nominal* size (the size without
rounding and cap). A learning rate that is coupled to the schedule (:mod:`jaxbatch.schedules.rates`) needs both.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxbatch.batches import steps_per_epoch
from jaxbatch.kinds import checked

LARGEST = 2**53  # examples: above it a float cannot hold every whole number


@dataclasses.dataclass(frozen=True)
class BatchSizeSchedule:
    """``epoch -> batch size``, with the stage and nominal size that a coupled learning rate needs."""

    size: Callable[[int], int]
    stage: Callable[[int], int]  # the number of changes up to this epoch, this epoch included
    nominal: Callable[[int], float]  # the size without rounding and cap; infinite where no float holds it
    log_nominal: Callable[[int], float] | None = None  # its logarithm, always finite; None: computed from ``nominal``

    def __call__(self, epoch: int) -> int:
        """The batch size of an epoch."""
        return self.size(epoch)


@checked
def adabatch_schedule(*, batch_size: int, growth: float = 2, every: int = 20, max_batch_size: int | None = None) -> BatchSizeSchedule:
    """A schedule whose batch grows by a factor every ``every`` epochs, up to a cap.

    Args:
        batch_size: the size at the start.
        growth: the factor of each change, at least 1. With 1 the batch keeps its size but the changes still count, as for
            the fixed arm of a comparison. Each size is the exact product rounded to the nearest whole number (halves
            up), so rounding errors do not add up.
        every: epochs between changes.
        max_batch_size: the cap: no batch is larger.

    Raises:
        ValueError: a size or ``every`` is below 1, the growth is below 1, or the cap is below the start. Without a cap, the
            schedule raises it for an epoch whose size is too large to be held exactly.

    Example:
        >>> schedule = adabatch_schedule(batch_size=128, growth=2, every=20, max_batch_size=1000)
        >>> [schedule(epoch) for epoch in (0, 19, 20, 40, 60, 99)]
        [128, 128, 256, 512, 1000, 1000]
        >>> [adabatch_schedule(batch_size=10, growth=1.5, every=1)(epoch) for epoch in range(5)]
        [10, 15, 23, 34, 51]

    References:
        Devarakonda et al., `AdaBatch <https://arxiv.org/abs/1712.02029>`_, 2017: section 3.
    """
    _check_size("batch_size", batch_size)
    if not (growth >= 1 and is_finite(growth)):
        raise ValueError(f"growth={growth} must be at least 1 and finite: a batch that shrinks needs milestone_schedule.")
    if not every >= 1:
        raise ValueError(f"every={every} epochs must be at least 1.")
    if max_batch_size is not None:
        _check_size("max_batch_size", max_batch_size)
        if max_batch_size < batch_size:
            raise ValueError(f"max_batch_size={max_batch_size} is below batch_size={batch_size}.")
    stage = lambda epoch: epoch // every

    def nominal(epoch):
        try:
            return batch_size * float(growth) ** stage(epoch)
        except OverflowError:
            return math.inf

    def size(epoch):
        wanted, cap = nominal(epoch), LARGEST if max_batch_size is None else max_batch_size
        if max_batch_size is None and wanted > LARGEST:
            raise ValueError(
                f"growth={growth} makes batch_size={batch_size} grow to more than {LARGEST:,} examples by epoch {epoch}. Give a max_batch_size."
            )
        return int(cap) if wanted >= cap else math.floor(wanted + 0.5)

    log_nominal = lambda epoch: math.log(batch_size) + stage(epoch) * math.log(growth)
    return BatchSizeSchedule(size, stage, nominal, log_nominal)


@checked
def constant_schedule(batch_size: int, *, every: int = 20) -> BatchSizeSchedule:
    """The same size in every epoch; the learning rate decays every so many epochs.

    Example:
        >>> constant_schedule(128)(99)
        128
    """
    return adabatch_schedule(batch_size=batch_size, growth=1, every=every)


@checked
def increase_instead_of_decay(*, batch_size: int, decay: float, every: int, max_batch_size: int | None = None) -> BatchSizeSchedule:
    """A schedule that divides the batch size by ``decay`` where another would multiply the rate by ``decay``.

    Couple it with ``decay=1``: then the rate is constant until the batch reaches the cap, and decays after that.

    Example:
        >>> schedule = increase_instead_of_decay(batch_size=128, decay=0.2, every=60, max_batch_size=1000)
        >>> [schedule(epoch) for epoch in (0, 60, 120)]
        [128, 640, 1000]
        >>> from jaxbatch import coupled_learning_rate
        >>> rate = coupled_learning_rate(schedule, init=0.1, decay=1.0, num_examples=10_000, num_epochs=180)
        >>> [round(float(rate(step)), 5) for step in (0, 60 * 78, 60 * 78 + 60 * 15)]  # the third batch would be 3,200, and 1,000 is the cap
        [0.1, 0.1, 0.03125]

    References:
        Smith et al., `Don't Decay the Learning Rate, Increase the Batch Size <https://arxiv.org/abs/1711.00489>`_, 2018.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay={decay} must be above 0 and at most 1.")
    if not math.isfinite(1 / decay):
        raise ValueError(f"decay={decay} is too small: 1 / decay, by which the batch grows, is not a finite number.")
    return adabatch_schedule(batch_size=batch_size, growth=1 / decay, every=every, max_batch_size=max_batch_size)


@checked
def milestone_schedule(sizes: Mapping[int, int]) -> BatchSizeSchedule:
    """A schedule that changes the batch size at given epochs.

    Args:
        sizes: maps an epoch to the size from that epoch on; epoch 0 must be among them.

    Raises:
        ValueError: epoch 0 is missing, an epoch is below 0, or a size is below 1.

    Example:
        >>> schedule = milestone_schedule({0: 128, 30: 512, 60: 256})
        >>> [schedule(epoch) for epoch in (0, 29, 30, 60)]
        [128, 128, 512, 256]
    """
    if 0 not in sizes or min(sizes) < 0 or min(sizes.values()) < 1:
        raise ValueError(f"sizes={dict(sizes)} must begin at epoch 0, with epochs of at least 0 and sizes of at least 1.")
    for start, wanted in sizes.items():
        _check_size(f"sizes[{start}]", wanted)
    starts = sorted(sizes)
    stage = lambda epoch: sum(start <= epoch for start in starts) - 1
    size = lambda epoch: int(sizes[starts[stage(epoch)]])
    return BatchSizeSchedule(size, stage, lambda epoch: float(size(epoch)))


def as_schedule(schedule: int | Callable[[int], int]) -> BatchSizeSchedule:
    """Turns a number, or any function of the epoch, into a schedule; a new stage begins at each change of size.

    Example:
        >>> schedule = as_schedule(lambda epoch: 64 if epoch < 2 else 128)
        >>> [(schedule(epoch), schedule.stage(epoch)) for epoch in range(4)]
        [(64, 0), (64, 0), (128, 1), (128, 1)]
    """
    if isinstance(schedule, BatchSizeSchedule):
        return schedule
    if not callable(schedule):
        _check_size("batch_size", schedule)
        size = int(schedule)
        return BatchSizeSchedule(lambda epoch: size, lambda epoch: 0, lambda epoch: float(size))
    stage = lambda epoch: sum(schedule(e) != schedule(e - 1) for e in range(1, epoch + 1))
    return BatchSizeSchedule(schedule, stage, lambda epoch: float(schedule(epoch)))


def count_steps(schedule: int | Callable[[int], int], num_examples: int, num_epochs: int) -> list[int]:
    """The number of updates in each epoch; partial batches are dropped.

    Raises:
        ValueError: a batch is larger than the data set; the message names the first such epoch.

    Example:
        >>> count_steps(adabatch_schedule(batch_size=128, every=20), 50_000, 100)[::20]
        [390, 195, 97, 48, 24]
    """
    schedule, counts = as_schedule(schedule), []
    for epoch in range(num_epochs):
        if schedule(epoch) > num_examples:
            raise ValueError(
                f"the schedule's batch_size={schedule(epoch)} at epoch {epoch} is larger than the data set "
                f"(num_examples={num_examples}). Take smaller batches, or a smaller max_batch_size."
            )
        counts.append(steps_per_epoch(num_examples, schedule(epoch)))
    return counts


def is_finite(value: Any) -> bool:
    """Whether a number is neither infinite nor NaN, nor an integer that no float can hold.

    Example:
        >>> is_finite(1e308), is_finite(10**400), is_finite(math.nan)
        (True, False, False)
    """
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _check_size(name: str, size: float) -> None:
    if not (is_finite(size) and 1 <= size <= LARGEST and size == int(size)):
        shown = size if not isinstance(size, int) or size <= LARGEST else f"an integer of {len(str(size))} digits"
        raise ValueError(f"{name}={shown} must be a whole number of at least 1, and at most {LARGEST:,}.")
