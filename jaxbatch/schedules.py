r"""Batch sizes by epoch, and the learning rates coupled to them as optax schedules over update steps.

What SGD feels of the pair is the *effective* rate, learning rate ÷ batch size. A fixed batch whose rate falls by
:math:`\beta` and a batch that grows by :math:`\gamma` while its rate falls by :math:`\gamma\beta` have the same. So a batch-size
schedule knows, beside the size, which *stage* it is in (how many changes came before) and its *nominal* size, what
growth alone would have made of it; the coupled rate is

.. math:: \eta(e) = \eta_0\, \delta^{\text{stage}(e)}\, \frac{\text{size}(e)}{\text{nominal}(e)},

with the rate's own decay :math:`\delta` at each change. Where rounding or a cap keeps the batch smaller than it should have
become, the rate takes over what is missing, and the effective rate is exact.

Epochs are counted from 0. The number of updates in an epoch falls as the batch grows, so every rate here is a function of
the place in the run in epochs, looked up by update step.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxbatch.batches import Duration, check_duration, steps_per_epoch

RateByEpoch = Callable[[Float[Array, ""]], Float[Array, ""]]  # place in epochs, a fraction -> rate


@dataclasses.dataclass(frozen=True)
class BatchSizeSchedule:
    """``epoch -> batch size``, with what a coupled learning rate has to know of it."""

    size: Callable[[int], int]
    stage: Callable[[int], int]  # changes up to and with this epoch
    nominal: Callable[[int], float]  # what the size would be without rounding and cap

    def __call__(self, epoch: int) -> int:
        """The batch size of an epoch."""
        return self.size(epoch)


def adabatch_schedule(
    *, batch_size: int, growth: float = 2, every: int = 20, max_batch_size: int | None = None
) -> BatchSizeSchedule:
    """The batch grows by a factor every so many epochs, up to a cap.

    Args:
        batch_size: at the start.
        growth: factor of each change, at least 1; 1 keeps the batch and still counts the changes, which makes the
            fixed arm of a comparison. Sizes are rounded to the nearest whole number, halves up, from the exact product:
            rounding does not add up.
        every: epochs between changes.
        max_batch_size: no batch is larger; a product above it becomes it.

    Raises:
        ValueError: sizes or ``every`` below 1, a growth below 1, a cap below the start.

    Example:
        >>> schedule = adabatch_schedule(batch_size=128, growth=2, every=20, max_batch_size=1000)
        >>> [schedule(epoch) for epoch in (0, 19, 20, 40, 60, 99)]
        [128, 128, 256, 512, 1000, 1000]
        >>> [adabatch_schedule(batch_size=10, growth=1.5, every=1)(epoch) for epoch in range(5)]
        [10, 15, 23, 34, 51]

    References:
        Devarakonda et al., `AdaBatch <https://arxiv.org/abs/1712.02029>`_, 2017: section 3.
    """
    if batch_size < 1 or batch_size != int(batch_size):
        raise ValueError(f"batch_size={batch_size} must be a whole number of at least 1.")
    if not (growth >= 1 and math.isfinite(growth)):
        raise ValueError(f"growth={growth} must be at least 1 and finite: a batch that shrinks needs milestone_schedule.")
    if every < 1:
        raise ValueError(f"every={every} epochs must be at least 1.")
    if max_batch_size is not None and max_batch_size < batch_size:
        raise ValueError(f"max_batch_size={max_batch_size} is below batch_size={batch_size}.")
    stage = lambda epoch: epoch // every
    nominal = lambda epoch: batch_size * float(growth) ** stage(epoch)
    cap = math.inf if max_batch_size is None else max_batch_size
    return BatchSizeSchedule(lambda epoch: int(min(math.floor(nominal(epoch) + 0.5), cap)), stage, nominal)


def constant_schedule(batch_size: int, *, every: int = 20) -> BatchSizeSchedule:
    """The same size in every epoch; the learning rate decays every so many epochs.

    Example:
        >>> constant_schedule(128)(99)
        128
    """
    return adabatch_schedule(batch_size=batch_size, growth=1, every=every)


def increase_instead_of_decay(
    *, batch_size: int, decay: float, every: int, max_batch_size: int | None = None
) -> BatchSizeSchedule:
    """Where a schedule would multiply the rate by ``decay``, the batch is divided by it.

    Couple it with ``decay=1``: the rate stays as it is until the cap is reached, and decays from there on.

    Example:
        >>> schedule = increase_instead_of_decay(batch_size=128, decay=0.2, every=60, max_batch_size=1000)
        >>> [schedule(epoch) for epoch in (0, 60, 120)]
        [128, 640, 1000]
        >>> rate = coupled_learning_rate(schedule, init=0.1, decay=1.0, num_examples=10_000, num_epochs=180)
        >>> [round(float(rate(step)), 5) for step in (0, 60 * 78, 60 * 78 + 60 * 15)]  # 3,200 asked, 1,000 had
        [0.1, 0.1, 0.03125]

    References:
        Smith et al., `Don't Decay the Learning Rate, Increase the Batch Size <https://arxiv.org/abs/1711.00489>`_, 2018.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay={decay} must be above 0 and at most 1.")
    return adabatch_schedule(batch_size=batch_size, growth=1 / decay, every=every, max_batch_size=max_batch_size)


def milestone_schedule(sizes: Mapping[int, int]) -> BatchSizeSchedule:
    """Batch sizes from given epochs on.

    Args:
        sizes: epoch to the size from there on; epoch 0 must be among them.

    Raises:
        ValueError: no epoch 0, an epoch below 0, a size below 1.

    Example:
        >>> schedule = milestone_schedule({0: 128, 30: 512, 60: 256})
        >>> [schedule(epoch) for epoch in (0, 29, 30, 60)]
        [128, 128, 512, 256]
    """
    if 0 not in sizes or min(sizes) < 0 or min(sizes.values()) < 1:
        raise ValueError(f"sizes={dict(sizes)} must begin at epoch 0, with epochs of at least 0 and sizes of at least 1.")
    starts = sorted(sizes)
    stage = lambda epoch: sum(start <= epoch for start in starts) - 1
    size = lambda epoch: sizes[starts[stage(epoch)]]
    return BatchSizeSchedule(size, stage, lambda epoch: float(size(epoch)))


def as_schedule(schedule: int | Callable[[int], int]) -> BatchSizeSchedule:
    """A number, or any function of the epoch, as a schedule whose stages are its changes.

    Example:
        >>> schedule = as_schedule(lambda epoch: 64 if epoch < 2 else 128)
        >>> [(schedule(epoch), schedule.stage(epoch)) for epoch in range(4)]
        [(64, 0), (64, 0), (128, 1), (128, 1)]
    """
    if isinstance(schedule, BatchSizeSchedule):
        return schedule
    if not callable(schedule):
        size = int(schedule)
        return BatchSizeSchedule(lambda epoch: size, lambda epoch: 0, lambda epoch: float(size))
    stage = lambda epoch: sum(schedule(e) != schedule(e - 1) for e in range(1, epoch + 1))
    return BatchSizeSchedule(schedule, stage, lambda epoch: float(schedule(epoch)))


def coupled_learning_rate(
    schedule: int | Callable[[int], int],
    *,
    init: float,
    decay: float = 1.0,
    num_examples: int,
    num_epochs: int,
    shape: RateByEpoch | None = None,
    warmup: Duration | None = None,
    warmup_init: float = 0.0,
    num_groups: int | None = None,
) -> Callable[[Int[Array, ""] | int], Float[Array, ""]]:
    r"""The learning rate that goes with a batch-size schedule, as an optax schedule over update steps.

    Args:
        schedule: of batch sizes; a number is one that never changes.
        init: rate at the start.
        decay: factor of the rate at each change, beside what a cap or rounding of the batch asks for. AdaBatch's
            adaptive arm: 0.75, with growth 2; its fixed arm: 0.375, with growth 1.
        num_examples: in the training set; with the batch size it gives the updates in an epoch, partial batches
            dropped.
        num_epochs: of the run. Later steps have the last epoch's rate.
        shape: a further factor by the place in the run in epochs, such as :func:`cosine` or :func:`cyclic`.
        warmup: a linear rise over this long, in ``steps``, ``examples`` or ``epochs``, up to what the rate would be
            anyway.
        warmup_init: where the rise starts, as a rate.
        num_groups: that of :class:`jaxbatch.FitConfig`. A batch is K updates then, all of them at its batch's rate.

    Returns:
        ``count -> rate``, usable inside jit; ``count`` is the optimizer's number of updates so far.

    Raises:
        ValueError: a rate or decay not above 0, a warmup without a unit, a batch larger than the data set (naming the epoch).

    Example:
        >>> schedule = adabatch_schedule(batch_size=2, growth=2, every=1)
        >>> rate = coupled_learning_rate(schedule, init=1.0, decay=0.75, num_examples=8, num_epochs=3)
        >>> [float(rate(step)) for step in range(7)]  # 4 updates of 2, 2 of 4, 1 of 8
        [1.0, 1.0, 1.0, 1.0, 0.75, 0.75, 0.5625]

    References:
        Devarakonda et al., `AdaBatch <https://arxiv.org/abs/1712.02029>`_, 2017: eq. 6 and section 4.1. Warmup: Goyal et
        al., `Accurate, Large Minibatch SGD <https://arxiv.org/abs/1706.02677>`_, 2017.
    """
    if not (init > 0 and math.isfinite(init)):
        raise ValueError(f"init={init} must be above 0 and finite.")
    if not (decay > 0 and math.isfinite(decay)):
        raise ValueError(f"decay={decay} must be above 0 and finite; 1 leaves the rate alone.")
    if num_epochs < 1:
        raise ValueError(f"num_epochs={num_epochs} must be at least 1.")
    if num_groups is not None and num_groups < 1:
        raise ValueError(f"num_groups={num_groups} must be at least 1.")
    schedule = as_schedule(schedule)
    ladder = count_steps(schedule, num_examples, num_epochs)
    scales = [decay ** schedule.stage(e) * schedule(e) / schedule.nominal(e) for e in range(num_epochs)]
    starts, lengths = np.cumsum([0, *ladder])[:-1], np.array(ladder)
    seen = np.cumsum([0, *(count * schedule(e) for e, count in enumerate(ladder))])[:-1]
    sizes = np.array([schedule(e) for e in range(num_epochs)])
    if warmup is not None:
        check_duration(warmup)

    def rate(count):
        count = jnp.asarray(count) // (num_groups or 1)  # batches from here on
        epoch = jnp.clip(jnp.searchsorted(jnp.asarray(starts), count, side="right") - 1, 0, num_epochs - 1)
        within = jnp.minimum(count - jnp.asarray(starts)[epoch], jnp.asarray(lengths)[epoch])
        place = epoch + within / jnp.asarray(lengths)[epoch]
        value = init * jnp.asarray(scales, jnp.float32)[epoch]
        if shape is not None:
            value = value * shape(place)
        if warmup is not None and warmup.amount > 0:
            examples = jnp.asarray(seen)[epoch] + within * jnp.asarray(sizes)[epoch]
            done = {"steps": count, "examples": examples, "epochs": place}[warmup.unit]
            part = jnp.clip(done / warmup.amount, 0.0, 1.0)
            value = jnp.where(part < 1, warmup_init + part * (value - warmup_init), value)
        return value

    return rate


def count_steps(schedule: int | Callable[[int], int], num_examples: int, num_epochs: int) -> list[int]:
    """Updates in each epoch, partial batches dropped.

    Raises:
        ValueError: a batch larger than the data set; the message names the first such epoch.

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


def cosine(num_epochs: float, end: float = 0.0) -> RateByEpoch:
    """A factor that falls from 1 to ``end`` along half a cosine; ``end`` after that.

    Example:
        >>> [round(float(cosine(10)(place)), 3) for place in (0.0, 5.0, 10.0)]
        [1.0, 0.5, 0.0]

    References:
        Loshchilov and Hutter, `SGDR <https://arxiv.org/abs/1608.03983>`_, 2017: eq. 5.
    """
    _check_length("num_epochs", num_epochs)
    return lambda place: end + (1 - end) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(place / num_epochs, 0.0, 1.0)))


def cyclic(period: float, low: float = 0.1) -> RateByEpoch:
    """A factor that rises from ``low`` to 1 and falls back within each ``period`` epochs, in straight lines.

    Example:
        >>> [round(float(cyclic(4, low=0.5)(place)), 3) for place in (0.0, 1.0, 2.0, 3.0, 4.0)]
        [0.5, 0.75, 1.0, 0.75, 0.5]

    References:
        Smith, `Cyclical Learning Rates <https://arxiv.org/abs/1506.01186>`_, 2017: the triangular policy.
    """
    _check_length("period", period)
    return lambda place: low + (1 - low) * (1 - jnp.abs(2 * jnp.mod(place / period, 1.0) - 1))


def step_decay(decay: float, every: float) -> RateByEpoch:
    """A factor of ``decay`` every so many epochs, whatever the batch does.

    Example:
        >>> [round(float(step_decay(0.1, 30)(place)), 3) for place in (0.0, 29.9, 30.0, 60.0)]
        [1.0, 1.0, 0.1, 0.01]
    """
    _check_length("every", every)
    return lambda place: decay ** jnp.floor(place / every)


def scale_learning_rate(rule: str, base_lr: float, base_batch_size: int, batch_size: int) -> float:
    """A learning rate carried from one batch size to another.

    Args:
        rule: ``"linear"`` (rate ∝ B), ``"sqrt"`` (rate ∝ √B) or ``"none"``.
        base_lr: rate found good at ``base_batch_size``.
        base_batch_size: examples.
        batch_size: examples.

    Raises:
        ValueError: another rule; a rate or size not above 0.

    Example:
        >>> [scale_learning_rate(rule, 0.1, 256, 1024) for rule in ("linear", "sqrt", "none")]
        [0.4, 0.2, 0.1]

    References:
        Linear: Goyal et al., `Accurate, Large Minibatch SGD <https://arxiv.org/abs/1706.02677>`_, 2017. Square root:
        Krizhevsky, `One weird trick <https://arxiv.org/abs/1404.5997>`_, 2014. Measured: ``experiments.learning_rate_grid``.
    """
    powers = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}
    if rule not in powers:
        raise ValueError(f"rule={rule!r} must be one of {', '.join(map(repr, powers))}.")
    for name, value in (("base_lr", base_lr), ("base_batch_size", base_batch_size), ("batch_size", batch_size)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value} must be above 0 and finite.")
    return base_lr * (batch_size / base_batch_size) ** powers[rule]


def _check_length(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}={value} epochs must be above 0 and finite.")
