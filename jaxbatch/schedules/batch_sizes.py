"""Batch sizes along a run: by epoch, or by the steps, examples or tokens seen. All are counted from 0.

Besides the size, a schedule knows its *stage* (the number of changes so far) and its *nominal* size (the size without
rounding and cap). A learning rate that is coupled to the schedule (:mod:`jaxbatch.schedules.rates`) needs both.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxbatch.batches import Duration, Unit, check_duration, epochs
from jaxbatch.kinds import checked

LARGEST = 2**53  # examples: above it a float cannot hold every whole number


@dataclasses.dataclass(frozen=True)
class BatchSizeSchedule:
    """``position -> batch size``, with the stage and nominal size that a coupled learning rate needs.

    A position is a number of ``unit`` seen so far. In epochs the size changes at the beginning of one, unless ``start`` says
    otherwise; in the other units it changes at the first batch that begins at ``start(stage)`` or later, within an epoch too.
    """

    size: Callable[[Any], int]
    stage: Callable[[Any], int]  # the number of changes up to this position, this position included
    nominal: Callable[[Any], float]  # the size without rounding and cap; infinite where no float holds it
    log_nominal: Callable[[Any], float] | None = None  # its logarithm, always finite; None: computed from ``nominal``
    unit: Unit = "epochs"
    start: Callable[[int], int | float | None] | None = None  # the position at which a stage begins; it is None for one that never does

    def __post_init__(self) -> None:
        if self.unit != "epochs" and self.start is None:
            raise ValueError(f"unit={self.unit!r} needs start, a function of the stage that gives where it begins: start=None is for whole epochs.")

    def __call__(self, position: int | float) -> int:
        """The batch size at a position, such as an epoch."""
        return self.size(position)


@checked
def adabatch_schedule(*, batch_size: int, growth: float = 2, every: float | Duration = 20, max_batch_size: int | None = None) -> BatchSizeSchedule:
    """A schedule whose batch grows by a factor every so often, up to a cap.

    Args:
        batch_size: the size at the start.
        growth: the factor of each change, at least 1. With 1 the batch keeps its size but the changes still count, as for
            the fixed arm of a comparison. Each size is the exact product rounded to the nearest whole number (halves
            up), so rounding errors do not add up.
        every: the duration between changes: a number of epochs, or ``steps(1000)``, ``examples(10**6)``, ``tokens(10**9)``,
            ``epochs(0.3)``. Every change is at the first batch that begins when so much has been seen.
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
        >>> from jaxbatch import tokens
        >>> schedule = adabatch_schedule(batch_size=256, every=tokens(10**9), max_batch_size=1024)
        >>> [schedule(seen) for seen in (0, 999_999_999, 1_000_000_000, 5_000_000_000)]
        [256, 256, 512, 1024]

    References:
        Devarakonda et al., `AdaBatch <https://arxiv.org/abs/1712.02029>`_, 2017: section 3.
    """
    _check_size("batch_size", batch_size)
    if not (growth >= 1 and is_finite(growth)):
        raise ValueError(f"growth={growth} must be at least 1 and finite: a batch that shrinks needs milestone_schedule.")
    period, unit = _duration_of("every", every)
    if max_batch_size is not None:
        _check_size("max_batch_size", max_batch_size)
        if max_batch_size < batch_size:
            raise ValueError(f"max_batch_size={max_batch_size} is below batch_size={batch_size}.")
    stage = lambda position: whole_periods(position, period)

    def nominal(position):
        try:
            return batch_size * float(growth) ** stage(position)
        except OverflowError:
            return math.inf

    def size(position):
        wanted, cap = nominal(position), LARGEST if max_batch_size is None else max_batch_size
        if max_batch_size is None and wanted > LARGEST:
            at = f"epoch {position}" if unit == "epochs" else f"{unit}({position})"
            raise ValueError(f"growth={growth} makes batch_size={batch_size} grow to more than {LARGEST:,} examples by {at}. Give a max_batch_size.")
        return int(cap) if wanted >= cap else math.floor(wanted + 0.5)

    log_nominal = lambda position: math.log(batch_size) + stage(position) * math.log(growth)
    start = None if unit == "epochs" and isinstance(period, int) else lambda stage: stage * period
    return BatchSizeSchedule(size, stage, nominal, log_nominal, unit, start)


def whole_periods(position: int | float, period: int | float) -> int:
    """How many whole periods there are up to a position; one whose end is reached up to rounding is whole.

    Example:
        >>> 33 // 1.1, whole_periods(33, 1.1), whole_periods(0.9, 0.3), whole_periods(10**18 - 1, 10**9)
        (29.0, 30, 3, 999999999)
    """
    if isinstance(period, int) and not isinstance(position, float):
        return position // period
    return math.floor(position / period * (1 + 2.0**-50))


@checked
def constant_schedule(batch_size: int, *, every: float | Duration = 20) -> BatchSizeSchedule:
    """The same size always; the learning rate decays every so many epochs, or after another duration, see :func:`adabatch_schedule`.

    Example:
        >>> constant_schedule(128)(99)
        128
    """
    return adabatch_schedule(batch_size=batch_size, growth=1, every=every)


@checked
def increase_instead_of_decay(*, batch_size: int, decay: float, every: float | Duration, max_batch_size: int | None = None) -> BatchSizeSchedule:
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
def milestone_schedule(sizes: Mapping[Any, int]) -> BatchSizeSchedule:
    """A schedule that changes the batch size at given epochs, or after given durations.

    Args:
        sizes: maps an epoch, or a duration such as ``steps(1000)``, ``examples(10**6)``, ``tokens(10**9)`` or ``epochs(2.5)``,
            to the size from there on. 0 must be among them; all others have one unit.

    Raises:
        ValueError: 0 is missing, a milestone is below 0, units are mixed, or a size is below 1.

    Example:
        >>> schedule = milestone_schedule({0: 128, 30: 512, 60: 256})
        >>> [schedule(epoch) for epoch in (0, 29, 30, 60)]
        [128, 128, 512, 256]
        >>> from jaxbatch import tokens
        >>> schedule = milestone_schedule({0: 128, tokens(10**9): 512})
        >>> schedule(999_999_999), schedule(1_000_000_000)
        (128, 512)
    """
    unit, by_position = _milestones(sizes)
    starts = sorted(by_position)
    stage = lambda position: bisect.bisect_right(starts, position) - 1
    size = lambda position: int(by_position[starts[stage(position)]])
    start = lambda stage: starts[stage] if stage < len(starts) else None
    at_whole_epochs = unit == "epochs" and all(isinstance(one, int) for one in starts)
    return BatchSizeSchedule(size, stage, lambda position: float(size(position)), None, unit, None if at_whole_epochs else start)


def _milestones(sizes: Mapping[Any, int]) -> tuple[Unit, dict[int | float, int]]:
    """The unit of all milestones, and the sizes by position."""
    begin = f"sizes={dict(sizes)} must begin at epoch 0, with milestones of at least 0, each given once, and sizes of at least 1."
    for milestone, wanted in sizes.items():
        _check_size(f"sizes[{milestone}]", wanted)
        if not isinstance(milestone, Duration) and not (is_finite(milestone) and milestone >= 0):
            raise ValueError(begin)
    durations = {milestone: milestone if isinstance(milestone, Duration) else epochs(milestone) for milestone in sizes}
    for duration in durations.values():
        check_duration(duration)
    units = {duration.unit for duration in durations.values() if duration.amount} or {"epochs"}
    if len(units) > 1:
        raise ValueError(f"sizes={dict(sizes)} has milestones in {' and in '.join(sorted(units))}. Give all in one unit.")
    by_position = {_exact(durations[milestone].amount): wanted for milestone, wanted in sizes.items()}
    if 0 not in by_position or len(by_position) < len(sizes):
        raise ValueError(begin)
    return units.pop(), by_position


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


def _duration_of(name: str, value: float | Duration) -> tuple[int | float, Unit]:
    """A duration's amount and unit; a bare number is one of epochs."""
    if not isinstance(value, Duration):
        if not (is_finite(value) and value >= 1):
            raise ValueError(f"{name}={value} epochs must be at least 1. For a part of an epoch give epochs({value}), or another duration.")
        return _exact(value), "epochs"
    check_duration(value)
    if not value.amount > 0:
        raise ValueError(f"{name}={value.unit}({value.amount}) must be above 0.")
    return _exact(value.amount), value.unit


def _exact(amount: Any) -> int | float:
    """A whole number as an integer."""
    return int(amount) if amount == int(amount) else float(amount)
