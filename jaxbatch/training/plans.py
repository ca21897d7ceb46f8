"""The settings of a run, and the batches of every epoch that a number or a schedule of batch sizes makes of them.

Everything here is counted on the host, in Python's integers.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, PyTree

from jaxbatch.batches import Duration, batches_left, check_seed, epochs, in_examples, steps
from jaxbatch.gradients.part_norms import NoiseMonitor
from jaxbatch.gradients.updates import Optimizer
from jaxbatch.schedules.policies import BatchSizePolicy
from jaxbatch.schedules.repeats import after_epochs, counted, whole_epochs
from jaxbatch.schedules.stretches import Progress, Stretch, batches_to, counted_in_examples, epoch_end, next_stretch, position_in_epochs
from jaxbatch.training.devices import Parallel


class FitConfig(NamedTuple):
    """How to train. ``duration`` carries its unit: ``epochs(5)``, ``steps(1000)``, ``examples(60_000)``,
    or ``tokens(10**9)`` for a task with ``tokens_per_example``.

    ``batch_size`` is a number or a schedule ``epoch -> number``, epochs counted from 0. The changes of a
    :class:`jaxbatch.BatchSizeSchedule` may also count steps, examples or tokens, and come within an epoch. The learning rate that goes
    with a schedule is an optax schedule inside ``optimizer``, which counts updates: ``num_groups`` of them a batch. A
    :class:`jaxbatch.BatchSizePolicy` names the size of the batches up to the next record from what the last one shows.
    ``evaluations_per_epoch`` says how often a record is made; it changes no number of the training itself.
    ``microbatch_size`` bounds the examples that a device works on at a time. The gradient of a larger batch is accumulated, and the
    schedule does not change. ``num_devices`` devices share every batch; ``parallel`` (``"jit"`` or ``"pmap"``) says how
    (:mod:`jaxbatch.training.devices`). ``compile_first`` compiles every batch size of the run before its first step, and of a
    policy what the first two records may need. Use it if stages are shorter than compilation, or to compare times. ``eval_params``
    is ``(opt_state, params) -> params`` and gives the parameters for the test metrics. Some optimizers need it because they average
    the parameters or train at others than the final ones, see ``optax.contrib.schedule_free_eval_params``. ``None`` takes the
    trained parameters. ``monitor`` measures the noise of the gradient from the parts of each batch; ``None`` measures nothing and
    costs nothing. ``evaluation_batch_size`` is the number of test examples that are evaluated at a time. ``None``: as many as
    training works on at a time where that is bounded, by ``microbatch_size`` or by the task, and 500 at most
    (:func:`jaxbatch.memory_plan` says whether they fit).
    """

    optimizer: Optimizer
    batch_size: int | Callable[[int], int] | BatchSizePolicy
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


def segments_from(config: FitConfig, num_examples: int, start: Progress) -> Iterator[Segment]:
    """The segments that are left to train from ``start``, as they are asked for. Each depends on nothing but the progress before it.

    An epoch has ``evaluations_per_epoch`` segments, of sizes as equal as whole batches allow, and at most one per batch; one more for
    each change of the batch size within it. If an epoch has already begun, its remaining examples are cut into batches, whatever the
    earlier batch sizes were.

    Raises:
        ValueError: a batch is larger than the data set, or the duration has no unit.

    Example:
        >>> doubling = FitConfig(None, lambda epoch: 2 * 2**epoch, epochs(3))
        >>> [(s.epoch, s.batch_size, s.num_batches) for s in segments_from(doubling, 8, Progress(1, 4, 5, 12))]
        [(1, 4, 1), (2, 8, 1)]
        >>> next(segments_from(FitConfig(None, 2, epochs(10**9)), 8, Progress(7, 4, 30, 60)))
        Segment(epoch=7, first=4, batch_size=2, num_batches=2, end=8.0, last=True)
    """
    duration = in_examples(config.duration, None)  # fit has converted tokens, which are not known here
    sizes: Any = config.batch_size  # no policy
    ends: tuple[int, int] | None = None  # an epoch, and the number of its examples that fill batches
    while counted(start, duration.unit) < duration.amount:
        stretch = next_stretch(sizes, num_examples, start)
        epoch, offset, size, per_epoch = stretch.start.epoch, stretch.start.offset, stretch.batch_size, stretch.per_epoch
        if ends is None or ends[0] != epoch:
            ends = epoch, epoch_end(sizes, num_examples, stretch)
        count = min(stretch.num_batches, within(duration, start, stretch, ends[1]))
        for first, stop in _cut_epoch(min(config.evaluations_per_epoch, per_epoch), per_epoch, offset, size, count):
            last = stretch.ends_epoch and stop == stretch.num_batches
            end = position_in_epochs(epoch, offset + stop * size, ends[1])
            yield Segment(epoch, offset + first * size, size, stop - first, end, last)
        if count < stretch.num_batches:
            break
        start = stretch.end


def within(duration: Duration, start: Progress, stretch: Stretch, end: int) -> int:
    """How many batches of a stretch's size a duration has left; of a run that has not begun at least one.

    Args:
        duration: in steps, examples or epochs.
        start: the progress before the stretch.
        stretch: see :class:`jaxbatch.schedules.stretches.Stretch`.
        end: how many examples of its epoch count as the whole of it, for a duration in epochs.

    Example:
        >>> within(epochs(0.5), Progress(), next_stretch(2, 9, Progress()), 8)
        2
    """
    if duration.unit == "epochs":  # they count from the epoch's beginning, and a part of one is a part of its examples
        if stretch.start.epoch + 1 <= duration.amount:
            return stretch.num_batches
        examples = batches_left(duration, stretch.start.epoch, batch_size=1, per_epoch=end)
        left = batches_to(examples, stretch.start.offset, stretch.batch_size)
    else:
        left = batches_left(duration, counted(start, duration.unit), batch_size=stretch.batch_size, per_epoch=stretch.per_epoch)
    return left if start.batches else max(left, 1)


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
    progress, sizes = Progress(), config.batch_size
    while (stretch := next_stretch(sizes, num_examples, progress)).end.batches < batches:  # type: ignore[arg-type]  # no policy
        times = whole_epochs(sizes, stretch, steps(batches))
        progress = after_epochs(stretch, times) if times else stretch.end
    count = batches - progress.batches
    return progress.after(count, stretch.batch_size, ends_epoch=stretch.ends_epoch and count == stretch.num_batches)


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
