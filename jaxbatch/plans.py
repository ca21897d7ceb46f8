"""What a run is to do: its settings, and the batches of every epoch.

Everything here is counted on the host, in Python's integers.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree

from jaxbatch.batches import Duration, batches_left, check_duration, epochs, steps_per_epoch
from jaxbatch.updates import Optimizer


class FitConfig(NamedTuple):
    """How to train. ``duration`` carries its unit: ``epochs(5)``, ``steps(1000)``, ``examples(60_000)``.

    ``batch_size`` is a number or a schedule ``epoch -> number``, epochs counted from 0. The learning rate that goes
    with a schedule is an optax schedule inside ``optimizer``, which counts updates: ``num_groups`` of them a batch.
    ``evaluations_per_epoch`` says how often a record is made; it changes no number of the training itself. ``microbatch_size`` bounds the examples that the device works
    on at a time: a larger batch is accumulated and the schedule stays as it is. ``num_devices`` share every batch, by
    ``parallel``: ``"jit"`` or ``"pmap"`` (:mod:`jaxbatch.parallel`). ``compile_first`` has every batch size of the run
    compiled before its first step: for stages that are shorter than compilation, and where times are compared.
    ``eval_params``: ``(opt_state, params) -> params`` at which the test metrics are taken, for optimizers that train at other
    parameters than they end with, as ``optax.contrib.schedule_free_eval_params``, or average them. ``None``: those trained.
    """

    optimizer: Optimizer
    batch_size: int | Callable[[int], int]
    duration: Duration = epochs(1)
    num_groups: int | None = None
    seed: int = 0
    evaluations_per_epoch: int = 1
    microbatch_size: int | None = None
    num_devices: int = 1
    parallel: str = "jit"
    compile_first: bool = False
    eval_params: Callable[[PyTree, PyTree], PyTree] | None = None


def python_numbers(config: FitConfig) -> FitConfig:
    """The same with Python's numbers in place of NumPy's, which JSON does not know.

    Example:
        >>> python_numbers(FitConfig(None, np.int64(4))).batch_size
        4
    """
    return config._replace(**{name: value.item() for name, value in config._asdict().items() if isinstance(value, np.generic)})


class Segment(NamedTuple):
    """Batches of one size within one epoch, evaluated at the end."""

    epoch: int
    first: int  # the epoch's batch that comes first
    batch_size: int
    num_batches: int
    end: float  # where this ends, in epochs


def plan_segments(config: FitConfig, num_examples: int, *, done: int = 0) -> list[Segment]:
    """What is left to train after ``done`` batches: the segments of each epoch.

    An epoch has ``evaluations_per_epoch`` of them, as even as whole batches allow, and no more than it has batches.

    Raises:
        ValueError: a batch larger than the data set, a duration without a unit, fewer than 1 evaluation an epoch.

    Example:
        >>> doubling = FitConfig(None, lambda epoch: 2 * 2**epoch, epochs(3))
        >>> [(s.epoch, s.batch_size, s.num_batches) for s in plan_segments(doubling, 8, done=5)]
        [(1, 4, 1), (2, 8, 1)]
    """
    check_duration(config.duration)
    if config.evaluations_per_epoch < 1:
        raise ValueError(f"evaluations_per_epoch={config.evaluations_per_epoch} must be at least 1.")
    amount, unit = config.duration
    segments, batches, examples = [], 0, 0
    for epoch in itertools.count():
        before = {"steps": batches, "examples": examples, "epochs": epoch}[unit]
        if before >= amount:
            return segments
        size = config.batch_size(epoch) if callable(config.batch_size) else config.batch_size
        if not isinstance(size, int | np.integer):
            raise ValueError(f"batch_size={size!r} must be a whole number, or a schedule that gives one for an epoch.")
        size = int(size)  # NumPy's would overflow in the sums below
        per_epoch = steps_per_epoch(num_examples, size)
        left = batches_left(config.duration, before, batch_size=size, per_epoch=per_epoch)
        count = min(per_epoch, left if epoch else max(left, 1))
        parts = min(config.evaluations_per_epoch, per_epoch)
        stops = sorted({min(count, per_epoch * part // parts) for part in range(1, parts + 1)})
        for start, stop in zip([0, *stops], stops):
            start = max(start, done - batches)
            if start < stop:
                segments.append(Segment(epoch, start, size, stop - start, epoch + stop / per_epoch))
        batches, examples = batches + count, examples + count * size


def num_planned_examples(segments: list[Segment]) -> int:
    """Examples in all batches of a plan.

    Example:
        >>> num_planned_examples(plan_segments(FitConfig(None, 4, epochs(2)), 10))
        16
    """
    return sum(segment.num_batches * segment.batch_size for segment in segments)
