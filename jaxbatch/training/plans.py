"""The plan of a run: its settings, and the batches of every epoch.

Everything here is counted on the host, in Python's integers.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, PyTree

from jaxbatch.batches import Duration, batches_left, check_seed, epochs, in_examples
from jaxbatch.gradients.part_norms import NoiseMonitor
from jaxbatch.gradients.updates import Optimizer
from jaxbatch.schedules.stretches import Progress, batches_to, counted_in_examples, epoch_end, next_stretch, position_in_epochs
from jaxbatch.training.devices import Parallel


class FitConfig(NamedTuple):
    """How to train. ``duration`` carries its unit: ``epochs(5)``, ``steps(1000)``, ``examples(60_000)``,
    or ``tokens(10**9)`` for a task with ``tokens_per_example``.

    ``batch_size`` is a number or a schedule ``epoch -> number``, epochs counted from 0. The changes of a
    :class:`jaxbatch.BatchSizeSchedule` may also count steps, examples or tokens, and come within an epoch. The learning rate that goes
    with a schedule is an optax schedule inside ``optimizer``, which counts updates: ``num_groups`` of them a batch.
    ``evaluations_per_epoch`` says how often a record is made; it changes no number of the training itself.
    ``microbatch_size`` bounds the examples that a device works on at a time. The gradient of a larger batch is accumulated, and
    the schedule does not change. ``num_devices`` devices share every batch; ``parallel`` (``"jit"`` or ``"pmap"``) says how
    (:mod:`jaxbatch.training.devices`). ``compile_first`` compiles every batch size of the run before its first step. Use it if
    stages are shorter than compilation, or to compare times. ``eval_params`` is ``(opt_state, params) -> params`` and gives the
    parameters for the test metrics. Some optimizers need it because they average the parameters or train at others than the
    final ones, see ``optax.contrib.schedule_free_eval_params``. ``None`` takes the trained parameters. ``monitor`` measures the
    noise of the gradient from the parts of each batch; ``None`` measures nothing and costs nothing. ``evaluation_batch_size`` is
    the number of test examples that are evaluated at a time. ``None``: as many as training works on at a time where that is bounded,
    by ``microbatch_size`` or by the task, and 500 at most (:func:`jaxbatch.memory_plan` says whether they fit).
    """

    optimizer: Optimizer
    batch_size: int | Callable[[int], int]
    duration: Duration = epochs(1)
    num_groups: int | None = None
    seed: int = 0
    evaluations_per_epoch: int = 1
    microbatch_size: int | None = None
    num_devices: int = 1
    parallel: Parallel = "jit"
    compile_first: bool = False
    eval_params: Callable[[PyTree, PyTree], PyTree] | None = None
    monitor: NoiseMonitor | None = None
    evaluation_batch_size: int | None = None


def settled(config: FitConfig, tokens_per_example: int | None) -> FitConfig:
    """The settings as training takes them: in Python's numbers, which JSON knows, and with a duration and a schedule that count no tokens.

    Raises:
        ValueError: the seed is outside [0, 2**32), the duration has no unit, or ``parallel`` is unknown.

    Example:
        >>> settled(FitConfig(None, np.int64(4)), None).batch_size
        4
    """
    config = config._replace(**{name: value.item() for name, value in config._asdict().items() if isinstance(value, np.generic)})
    check_seed(config.seed)
    if config.parallel not in ("jit", "pmap"):
        raise ValueError(f"parallel={config.parallel!r} must be 'jit' or 'pmap'.")
    sizes = counted_in_examples(config.batch_size, tokens_per_example)
    return config._replace(batch_size=sizes, duration=in_examples(config.duration, tokens_per_example))


class Segment(NamedTuple):
    """Batches of one size within one epoch, with an evaluation at the end."""

    epoch: int
    first: int  # the place of its first example in the epoch's order
    batch_size: int
    num_batches: int
    end: float  # where this ends, in epochs
    last: bool  # whether the epoch has no further batch of this size

    @property
    def program(self) -> tuple[int, int]:
        """The number and the size of its batches, on which its program depends."""
        return self.num_batches, self.batch_size

    @property
    def num_examples(self) -> int:
        """Examples in all of its batches."""
        return self.num_batches * self.batch_size


def plan_segments(config: FitConfig, num_examples: int, *, start: Progress = Progress()) -> list[Segment]:
    """The segments that are left to train from ``start``, epoch by epoch.

    An epoch has ``evaluations_per_epoch`` segments, of sizes as equal as whole batches allow, and at most one per batch; one more for
    each change of the batch size within it. If an epoch has already begun, its remaining examples are cut into batches, whatever the
    earlier batch sizes were.

    Raises:
        ValueError: a batch is larger than the data set, the duration has no unit, or there is less than 1 evaluation an epoch.

    Example:
        >>> doubling = FitConfig(None, lambda epoch: 2 * 2**epoch, epochs(3))
        >>> [(s.epoch, s.batch_size, s.num_batches) for s in plan_segments(doubling, 8, start=Progress(1, 4, 5, 12))]
        [(1, 4, 1), (2, 8, 1)]
    """
    duration = in_examples(config.duration, None)  # fit has converted tokens, which are not known here
    if config.evaluations_per_epoch < 1:
        raise ValueError(f"evaluations_per_epoch={config.evaluations_per_epoch} must be at least 1.")
    amount, unit = duration
    segments: list[Segment] = []
    ends: tuple[int, int] | None = None  # an epoch, and the number of its examples that fill batches
    while (before := _counted(start, unit)) < amount:
        stretch = next_stretch(config.batch_size, num_examples, start)
        epoch, offset, size, per_epoch = stretch.start.epoch, stretch.start.offset, stretch.batch_size, stretch.per_epoch
        if ends is None or ends[0] != epoch:
            ends = epoch, epoch_end(config.batch_size, num_examples, stretch)
        if unit == "epochs":  # they count from the epoch's beginning, and a part of one is a part of its examples
            left = batches_to(batches_left(duration, before, batch_size=1, per_epoch=ends[1]), offset, size)
        else:
            left = batches_left(duration, before, batch_size=size, per_epoch=per_epoch)
        count = min(stretch.num_batches, left if start.batches else max(left, 1))
        for first, stop in _cut_epoch(min(config.evaluations_per_epoch, per_epoch), per_epoch, offset, size, count):
            last = stretch.ends_epoch and stop == stretch.num_batches
            end = position_in_epochs(epoch, offset + stop * size, ends[1])
            segments.append(Segment(epoch, offset + first * size, size, stop - first, end, last))
        if count < stretch.num_batches:
            break
        start = stretch.end
    return segments


def _counted(progress: Progress, unit: str) -> int:
    """How much of a duration's unit was seen, of epochs those that are over."""
    return {"steps": progress.batches, "examples": progress.examples, "epochs": progress.epoch}[unit]


@functools.lru_cache
def _cut_epoch(parts: int, per_epoch: int, offset: int, size: int, count: int) -> tuple[tuple[int, int], ...]:
    """The first and the last batch of each segment of an epoch; a run of a million epochs has few different ones."""
    ends = [per_epoch * part // parts * size for part in range(1, parts + 1)]
    stops = sorted({min(count, batches_to(end, offset, size)) for end in ends})
    return tuple((first, stop) for first, stop in zip([0, *stops], stops) if first < stop)


def advance(progress: Progress, segment: Segment) -> Progress:
    """The progress of a run after a segment.

    Example:
        >>> advance(Progress(), Segment(0, 0, 4, 2, 0.5, False)), advance(Progress(), Segment(0, 0, 4, 4, 1.0, True))
        (Progress(epoch=0, offset=8, batches=2, examples=8), Progress(epoch=1, offset=0, batches=4, examples=16))
    """
    begin = progress._replace(epoch=segment.epoch, offset=segment.first)
    return begin.after(segment.num_batches, segment.batch_size, ends_epoch=segment.last)


def progress_after(config: FitConfig, num_examples: int, batches: int) -> Progress:
    """The progress of a run with this plan after ``batches`` batches.

    Example:
        >>> progress_after(FitConfig(None, lambda epoch: 2 * 2**epoch), 8, 5)
        Progress(epoch=1, offset=4, batches=5, examples=12)
    """
    progress = Progress()
    while (stretch := next_stretch(config.batch_size, num_examples, progress)).end.batches < batches:
        progress = stretch.end
    count = batches - progress.batches
    return progress.after(count, stretch.batch_size, ends_epoch=stretch.ends_epoch and count == stretch.num_batches)


def plan_rest(config: FitConfig, num_examples: int, written: Any, updates: int) -> tuple[Progress, list[Segment]]:
    """How far a run has come, and the segments that are left.

    Args:
        config: see :func:`settled`.
        num_examples: examples in the data set.
        written: what the run's state holds of :func:`write_progress`. If it is not of these updates, the run is assumed to have
            followed the plan so far.
        updates: calls of the optimizer so far.

    Raises:
        ValueError: nothing is left of a duration above 0.

    Example:
        >>> doubling = FitConfig(None, lambda epoch: 2 * 2**epoch, epochs(2))
        >>> progress, segments = plan_rest(doubling, 8, (), 5)
        >>> progress, [(s.epoch, s.batch_size, s.num_batches) for s in segments]
        (Progress(epoch=1, offset=4, batches=5, examples=12), [(1, 4, 1)])
    """
    progress = read_progress(written, updates) or progress_after(config, num_examples, updates // (config.num_groups or 1))
    segments, (amount, unit) = plan_segments(config, num_examples, start=progress), config.duration
    if segments or amount == 0:
        return progress, segments
    asked = f"duration={unit}({amount}), which counts from the start of the run"
    if _counted(progress, unit) < amount:
        raise ValueError(
            f"state.step={updates} leaves {num_examples - progress.offset} examples of epoch {progress.epoch}, fewer than a batch, and "
            f"that epoch is the last of {asked}. Take a longer duration or a smaller batch."
        )
    raise ValueError(
        f"state.step={updates} is at or past the end of {asked} ({progress.batches} batches, {progress.examples} examples so far). "
        "Take a longer duration; or, to train these parameters as the start of another run, state._replace(step=jnp.zeros((), int))."
    )


_WORD = 2**30  # a state has no 64-bit integers, so the number of examples is stored in two parts


def write_progress(progress: Progress, updates: int) -> Int32[np.ndarray, "6"]:
    """Writes progress, and the number of updates that belongs to it, as an array, which a state can hold.

    Example:
        >>> write_progress(Progress(3, 8, 700, 10**12), 700).tolist()
        [700, 3, 8, 700, 931, 346361856]
    """
    epoch, offset, batches, examples = progress
    return np.array([updates, epoch, offset, batches, *divmod(examples, _WORD)], np.int32)


def read_progress(written: Any, updates: int) -> Progress | None:
    """Reads what :func:`write_progress` wrote; None if there is nothing, or if ``updates`` has changed since.

    Example:
        >>> read_progress(write_progress(Progress(3, 8, 700, 10**12), 700), 700)
        Progress(epoch=3, offset=8, batches=700, examples=1000000000000)
    """
    if np.shape(written) != (6,):
        return None
    of, epoch, offset, batches, high, low = np.asarray(written).tolist()
    return Progress(epoch, offset, batches, high * _WORD + low) if of == updates else None
