"""The plan of a run as a pure state machine: ``(progress, choice) -> the next segment, or the end``.

What is chosen follows from what was measured: after every record ``(choice, record) -> choice``. A number or a schedule is the special
case in which there is nothing to choose. Nothing is worked out before it is asked for.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxtyping import PyTree

from jaxbatch.batches import Duration, batches_left
from jaxbatch.gradients.groups import check_num_groups
from jaxbatch.schedules.policies import BatchSizePolicy, check_policy, first_choice, going_on, next_choice, with_rate
from jaxbatch.schedules.repeats import after_epochs, counted, whole_epochs
from jaxbatch.schedules.stretches import Progress, Stretch, batches_to, epoch_end, next_stretch, position_in_epochs
from jaxbatch.training.plans import FitConfig, Segment, advance, progress_after, read_progress, segments_from, within

_AHEAD = 1000  # segments that are looked at before they come, for the programs that they need
Choice = Any  # () where there is nothing to choose, else a jaxbatch.schedules.policies.Choice


class Plan(NamedTuple):
    """What a run is to do. Every function is pure."""

    batch_sizes: tuple[int, ...]  # all that may come, from the start of the run on
    begin: Callable[[PyTree], Choice]  # what the field ``policy`` of a state holds -> choice
    progress: Callable[[Any, int], Progress]  # what the field ``progress`` of a state holds, calls of the optimizer -> how far the run has come
    next: Callable[[Progress, Choice], Segment | None]
    react: Callable[[Choice, Mapping[str, Any]], Choice]  # a record without the state -> the choice after it
    with_rate: Callable[[Choice, PyTree], PyTree]  # the optimizer's state at the start of a segment
    batches_left: Callable[[Progress, Choice], int]  # if the choice stayed as it is
    programs: Callable[[Progress, Choice], Iterator[tuple[int, int]]]  # those that may be needed next, soonest first, as far as they are known
    about: Callable[[], Any]  # what tells runs with other sizes from this one, for JSON
    is_fixed: bool  # whether nothing is chosen, so that all follows from the number of updates


def make_plan(config: FitConfig, num_examples: int) -> Plan:
    """The plan of a run.

    Args:
        config: see :func:`jaxbatch.training.plans.settled`.
        num_examples: examples in the data set.

    Raises:
        ValueError: a batch is larger than the data set; of a policy see
            :func:`jaxbatch.schedules.policies.check_policy`.

    Example:
        >>> plan = make_plan(FitConfig(None, lambda epoch: 2 * 2**epoch, Duration(3, "epochs")), 8)
        >>> plan.next(Progress(1, 4, 5, 12), ()), plan.next(Progress(3, 0, 7, 24), ()), plan.batch_sizes
        (Segment(epoch=1, first=4, batch_size=4, num_batches=1, end=2.0, last=True), None, (2, 4, 8))
    """
    make = _reacting if isinstance(config.batch_size, BatchSizePolicy) else _fixed
    return make(config, num_examples)


def begin_or_go_on(plan: Plan, config: FitConfig, num_examples: int, state: Any) -> tuple[Progress, Choice]:
    """How far a run has come, and what it has chosen.

    Args:
        plan: of the run.
        config, num_examples: see :func:`make_plan`.
        state: a :class:`jaxbatch.TrainState`. If its progress is not of its number of updates, the run is assumed to have followed the plan.

    Raises:
        ValueError: nothing is left of a duration above 0; the state is that of another policy, or with a policy its progress is unknown.
    """
    updates, choice = int(state.step), plan.begin(state.policy)
    progress, (amount, unit) = plan.progress(state.progress, updates), config.duration
    if amount == 0 or plan.next(progress, choice) is not None:
        return progress, choice
    asked = f"duration={unit}({amount}), which counts from the start of the run"
    if counted(progress, unit) < amount:
        raise ValueError(
            f"state.step={updates} leaves {num_examples - progress.offset} examples of epoch {progress.epoch}, fewer than a batch, and "
            f"that epoch is the last of {asked}. Take a longer duration or a smaller batch."
        )
    raise ValueError(
        f"state.step={updates} is at or past the end of {asked} ({progress.batches} batches, {progress.examples} examples so far). "
        "Take a longer duration; or, to train these parameters as the start of another run, state._replace(step=jnp.zeros((), int))."
    )


def make_look_ahead(plan: Plan, progress: Progress, choice: Choice) -> Callable[[Progress, Choice], Iterator[tuple[int, int]]]:
    """Makes ``(progress, choice) -> programs`` that may be needed soon. It is to be called at each segment of a run that begins here."""
    if not plan.is_fixed:
        return plan.programs
    later, more = plan.programs(progress, choice), itertools.chain([_AHEAD], itertools.repeat(1))
    return lambda progress, choice: itertools.islice(later, next(more))  # a look at all of them at each segment would be quadratic


def batches_by_size(config: FitConfig, num_examples: int, start: Progress) -> list[tuple[int, int]]:
    """The batch sizes of a number or schedule from ``start`` on, each with the number of its batches, a row for each change.

    Epochs that are alike are counted at once.

    Example:
        >>> from jaxbatch import milestone_schedule, steps
        >>> batches_by_size(FitConfig(None, milestone_schedule({0: 2, steps(10**6): 4}), steps(3 * 10**6)), 8, Progress())
        [(2, 1000000), (4, 2000000)]
    """
    sizes: Any = config.batch_size
    duration, rows = config.duration, list[tuple[int, int]]()
    while counted(start, duration.unit) < duration.amount:
        stretch = next_stretch(sizes, num_examples, start)
        times = whole_epochs(sizes, stretch, duration)
        if times:
            count, after = times * stretch.num_batches, after_epochs(stretch, times)
        else:
            end = epoch_end(sizes, num_examples, stretch) if duration.unit == "epochs" else 0
            count, after = min(stretch.num_batches, within(duration, start, stretch, end)), stretch.end
        if rows and rows[-1][0] == stretch.batch_size:
            rows[-1] = stretch.batch_size, rows[-1][1] + count
        elif count:
            rows.append((stretch.batch_size, count))
        if not times and count < stretch.num_batches:
            break
        start = after
    return rows


def _fixed(config: FitConfig, num_examples: int) -> Plan:
    """The plan of a number or a schedule."""
    from_progress = lambda progress: segments_from(config, num_examples, progress)
    sizes = tuple(sorted({size for size, _ in batches_by_size(config, num_examples, Progress())}))  # raises an error if the plan is wrong

    def progress(written: Any, updates: int) -> Progress:
        return read_progress(written, updates) or progress_after(config, num_examples, updates // (config.num_groups or 1))

    return Plan(
        batch_sizes=sizes,
        begin=lambda kept: (),
        progress=progress,
        next=lambda progress, choice: next(from_progress(progress), None),
        react=lambda choice, record: choice,
        with_rate=lambda choice, opt_state: opt_state,
        batches_left=lambda progress, choice: sum(count for _, count in batches_by_size(config, num_examples, progress)),
        programs=lambda progress, choice: (segment.program for segment in from_progress(progress)),
        about=lambda: {"sizes": batches_by_size(config, num_examples, Progress()), "evaluations_per_epoch": config.evaluations_per_epoch},
        is_fixed=True,
    )


def _reacting(config: FitConfig, num_examples: int) -> Plan:
    """The plan of a policy."""
    policy: Any = config.batch_size
    sizes = check_policy(policy, num_examples)
    for size in sizes:
        check_num_groups(config.num_groups or 1, size)
    first_choice(policy)  # raises an error if it is wrong
    of_size = lambda progress, size: reacting_segment(config, num_examples, progress, size)

    def progress(written: Any, updates: int) -> Progress:
        known = read_progress(written, updates) or (None if updates else Progress())
        if known is None:
            raise ValueError(
                f"state.step={updates} is not of state.progress, and with a policy no plan says how far {updates} updates have come: "
                "give the state of a record, or state._replace(step=jnp.zeros((), int)) for the start of another run."
            )
        return known

    def programs(progress: Progress, choice: Choice) -> Iterator[tuple[int, int]]:
        segment = of_size(progress, int(choice.batch_size))
        if segment is not None:
            after = advance(progress, segment)
            following = (of_size(after, size) for size in dict.fromkeys([segment.batch_size, *sizes]))
            yield from (one.program for one in (segment, *following) if one is not None)

    return Plan(
        batch_sizes=sizes,
        begin=lambda kept: going_on(policy, kept),
        progress=progress,
        next=lambda progress, choice: of_size(progress, int(choice.batch_size)),
        react=lambda choice, record: next_choice(policy, choice, record),
        with_rate=lambda choice, opt_state: with_rate(policy, choice, opt_state),
        batches_left=lambda progress, choice: _batches_left(config.duration, num_examples, progress, int(choice.batch_size)),
        programs=programs,
        about=lambda: {"sizes": sorted(sizes), "duration": list(config.duration), "evaluations_per_epoch": config.evaluations_per_epoch},
        is_fixed=False,
    )


def reacting_segment(config: FitConfig, num_examples: int, progress: Progress, size: int) -> Segment | None:
    """The batches of ``size`` up to the next record of a run whose sizes are not known beforehand; None at its end.

    The records of an epoch come where they would come if all of it had this size, each at the batch boundary that is nearest. What is left
    of an epoch and fills no batch of ``size`` is left out. Where a run stands in an epoch is the part of *all* its examples that it has seen,
    because nobody knows yet how many of them will fill batches; the end of an epoch is a whole number.

    Example:
        >>> config = FitConfig(None, None, Duration(2, "epochs"), evaluations_per_epoch=2)
        >>> reacting_segment(config, 100, Progress(0, 48, 6, 48), 16)
        Segment(epoch=0, first=48, batch_size=16, num_batches=3, end=1.0, last=True)
        >>> reacting_segment(config, 100, Progress(0, 90, 12, 90), 16)
        Segment(epoch=1, first=0, batch_size=16, num_batches=3, end=1.48, last=False)
    """
    stretch = _stretch(num_examples, progress, size)
    (epoch, offset, *_), per_epoch = stretch.start, stretch.per_epoch
    if counted(progress, config.duration.unit) >= config.duration.amount or counted(stretch.start, config.duration.unit) >= config.duration.amount:
        return None
    parts = min(config.evaluations_per_epoch, per_epoch)
    ends = (per_epoch * part // parts * size for part in range(1, parts))
    to_record = next((count for end in ends if (count := (end - offset + size // 2) // size) >= 1), stretch.num_batches)
    count = min(to_record, stretch.num_batches, within(config.duration, progress, stretch, num_examples))
    if not count:
        return None
    last = count == stretch.num_batches
    end = epoch + 1.0 if last else position_in_epochs(epoch, offset + count * size, num_examples)
    return Segment(epoch, offset, size, count, end, last)


def _stretch(num_examples: int, progress: Progress, size: int) -> Stretch:
    """The whole batches of a size that are left of an epoch; of the next one, if this has none left."""
    if num_examples - progress.offset < size:
        progress = Progress(progress.epoch + 1, 0, progress.batches, progress.examples)
    return next_stretch(size, num_examples, progress)


def _batches_left(duration: Duration, num_examples: int, progress: Progress, size: int) -> int:
    """How many batches a run has left, if all of them had this size."""
    amount, unit = duration
    stretch = _stretch(num_examples, progress, size)
    if counted(progress, unit) >= amount or counted(stretch.start, unit) >= amount:
        return 0
    if unit != "epochs":
        return within(duration, progress, stretch, num_examples)
    here = min(stretch.num_batches, within(duration, progress, stretch, num_examples))
    if stretch.start.epoch + 1 >= amount:
        return here
    whole = max(0, int(amount) - stretch.start.epoch - 1)
    rest = batches_to(batches_left(duration, int(amount), batch_size=1, per_epoch=num_examples), 0, size)
    return here + whole * stretch.per_epoch + min(rest, stretch.per_epoch)
