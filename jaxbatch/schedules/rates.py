r"""Learning rates: coupled to a schedule of batch sizes, shaped along a run, or scaled from one batch size to another.

SGD depends mainly on the *effective* rate, which is learning rate ÷ batch size. A fixed batch whose rate is multiplied by
:math:`\beta`, and a batch that grows by :math:`\gamma` while its rate is multiplied by :math:`\gamma\beta`, have the same
effective rate. So a batch-size schedule also knows its *stage* (the number of changes so far) and its *nominal* size (the
size without rounding and cap). The coupled rate is

.. math:: \eta(e) = \eta_0\, \delta^{\text{stage}(e)}\, \frac{\text{size}(e)}{\text{nominal}(e)},

where :math:`\delta` is the rate's own decay at each change. If rounding or a cap keeps the batch smaller than its nominal
size, the rate falls by the same factor, so that the effective rate is exact.

Epochs are counted from 0. The number of updates in an epoch falls as the batch grows. So every rate is defined by the
position in the run, in epochs, and looked up by update step. Changes of the schedule are counted in integers. The position is a float32,
which tells one update from the next up to a few million updates.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxbatch.batches import Duration, in_examples
from jaxbatch.kinds import checked
from jaxbatch.schedules.batch_sizes import BatchSizeSchedule, as_schedule, is_finite
from jaxbatch.schedules.stretches import Stretch, counted_in_examples, positions_of_stretches, stretches_of_epochs
from jaxbatch.states import is_known

Rule = Literal["linear", "sqrt", "none"]
Number: TypeAlias = float | Float[Array, ""]  # an array that is traced has no value yet
RateByEpoch = Callable[[Float[Array, ""]], Float[Array, ""]]  # position in epochs, a fraction -> rate


@checked
def coupled_learning_rate(
    schedule: int | Callable[[int], int],
    *,
    init: Number,
    decay: Number = 1.0,
    num_examples: int,
    num_epochs: int,
    shape: RateByEpoch | None = None,
    warmup: Duration | None = None,
    warmup_init: Number = 0.0,
    num_groups: int | None = None,
    tokens_per_example: int | None = None,
) -> Callable[[Int[Array, ""] | int], Float[Array, ""]]:
    r"""The learning rate that goes with a batch-size schedule, as an optax schedule over update steps.

    Args:
        schedule: the batch sizes; a number stands for a size that never changes. Its changes may come within an epoch.
        init: the rate at the start. As every number of this module it may be traced, as by :func:`jaxbatch.sweep`; then it is not checked.
        decay: the factor of the rate at each change, besides the factor that a cap or rounding of the batch causes. AdaBatch's
            adaptive arm uses 0.75, with growth 2; its fixed arm uses 0.375, with growth 1.
        num_examples: the size of the training set. It gives the number of updates in an epoch; partial batches are dropped.
        num_epochs: the length of the run. Later steps have the last epoch's rate.
        shape: a further factor, a function of the position in the run in epochs, such as :func:`cosine` or :func:`cyclic`.
        warmup: the length of a linear rise, in ``steps``, ``examples``, ``tokens`` or ``epochs``, up to the rate without a warmup.
        warmup_init: the rate at which the rise starts.
        num_groups: K, as in :class:`jaxbatch.FitConfig`. Then a batch makes K updates, all at the rate of the batch.
        tokens_per_example: as in :class:`jaxbatch.Task`, for a schedule or a warmup in tokens.

    Returns:
        ``count -> rate``, usable inside jit; ``count`` is the optimizer's number of updates so far.

    Raises:
        ValueError: a rate or decay is not above 0, a warmup has no unit, a batch is larger than the data set, or a rate does
            not fit into float32 (the message names the epoch).

    Example:
        >>> from jaxbatch import adabatch_schedule
        >>> schedule = adabatch_schedule(batch_size=2, growth=2, every=1)
        >>> rate = coupled_learning_rate(schedule, init=1.0, decay=0.75, num_examples=8, num_epochs=3)
        >>> [float(rate(step)) for step in range(7)]  # 4 updates of 2, 2 of 4, 1 of 8
        [1.0, 1.0, 1.0, 1.0, 0.75, 0.75, 0.5625]

    References:
        Devarakonda et al., `AdaBatch <https://arxiv.org/abs/1712.02029>`_, 2017: eq. 6 and section 4.1. Warmup: Goyal et
        al., `Accurate, Large Minibatch SGD <https://arxiv.org/abs/1706.02677>`_, 2017.
    """
    if is_known(init) and not (init > 0 and is_finite(init)):
        raise ValueError(f"init={init} must be above 0 and finite.")
    if is_known(decay) and not (decay > 0 and is_finite(decay)):
        raise ValueError(f"decay={decay} must be above 0 and finite; 1 leaves the rate alone.")
    if num_epochs < 1:
        raise ValueError(f"num_epochs={num_epochs} must be at least 1.")
    sizes_of_run: BatchSizeSchedule = counted_in_examples(as_schedule(schedule), tokens_per_example)
    cut = stretches_of_epochs(sizes_of_run, num_examples, num_epochs)
    rates = init * _scales(sizes_of_run, decay, init, cut)
    most = np.iinfo(np.int32).max  # what an optimizer counts to
    counts = lambda numbers: np.minimum(list(numbers), most).astype(np.int32)
    starts, lengths = counts(one.start.batches for one in cut), counts(one.num_batches for one in cut)
    positions, position_ends, of_epoch = positions_of_stretches(sizes_of_run, num_examples, cut)
    sizes, seen = (np.array(numbers, np.float32) for numbers in ([one.batch_size for one in cut], [one.start.examples for one in cut]))
    if warmup is not None:
        warmup = in_examples(warmup, tokens_per_example)

    def rate(count):
        count = jnp.asarray(count) // (num_groups or 1)  # batches from here on
        part = jnp.clip(jnp.searchsorted(jnp.asarray(starts), count, side="right") - 1, 0, len(cut) - 1)
        of_part = lambda numbers: jnp.asarray(numbers, jnp.float32)[part]
        within = jnp.asarray(jnp.minimum(count - jnp.asarray(starts)[part], jnp.asarray(lengths)[part]), jnp.float32)
        position = jnp.minimum(of_part(positions) + within / of_part(of_epoch), of_part(position_ends))
        value = of_part(rates)
        if shape is not None:
            value = value * shape(position)
        if warmup is not None and warmup.amount > 0:
            examples = of_part(seen) + within * of_part(sizes)
            done = {"steps": jnp.asarray(count, jnp.float32), "examples": examples, "epochs": position}[warmup.unit]
            part_done = jnp.clip(done / float(warmup.amount), 0.0, 1.0)
            value = jnp.where(part_done < 1, warmup_init + part_done * (value - warmup_init), value)
        return value

    return rate


def _scales(schedule: BatchSizeSchedule, decay: Any, init: Any, cut: list[Stretch]) -> Float[np.ndarray, "stretches"] | Float[Array, "stretches"]:
    """The factor of ``init`` in each stretch, computed with logarithms, because decay and growth alone may overflow."""
    log_nominal = schedule.log_nominal or (lambda position: math.log(schedule.nominal(position)))
    log_decay: Any = math.log(decay) if is_known(decay) else jnp.log(decay)
    logs: Any = [schedule.stage(one.position) * log_decay + math.log(one.batch_size) - log_nominal(one.position) for one in cut]
    if not is_known(decay):
        return jnp.exp(jnp.stack(logs))
    if not is_known(init):
        return np.exp(logs)
    for one, log in zip(cut, logs, strict=True):
        if log + math.log(init) > math.log(np.finfo(np.float32).max):
            epoch = one.start.epoch
            raise ValueError(f"decay={decay} with this schedule takes the rate from init={init} outside the range of float32 by epoch {epoch}.")
    return np.exp(logs)


@checked
def cosine(num_epochs: Number, end: Number = 0.0) -> RateByEpoch:
    """A factor that falls from 1 to ``end`` along half a cosine; ``end`` after that.

    Example:
        >>> [round(float(cosine(10)(position)), 3) for position in (0.0, 5.0, 10.0)]
        [1.0, 0.5, 0.0]

    References:
        Loshchilov and Hutter, `SGDR <https://arxiv.org/abs/1608.03983>`_, 2017: eq. 5.
    """
    _check_length("num_epochs", num_epochs)
    _check_factor("end", end)
    return lambda position: end + (1 - end) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(position / num_epochs, 0.0, 1.0)))


@checked
def cyclic(period: Number, low: Number = 0.1) -> RateByEpoch:
    """A factor that rises from ``low`` to 1 and falls back within each ``period`` epochs, in straight lines.

    Example:
        >>> [round(float(cyclic(4, low=0.5)(position)), 3) for position in (0.0, 1.0, 2.0, 3.0, 4.0)]
        [0.5, 0.75, 1.0, 0.75, 0.5]

    References:
        Smith, `Cyclical Learning Rates <https://arxiv.org/abs/1506.01186>`_, 2017: the triangular policy.
    """
    _check_length("period", period)
    _check_factor("low", low)
    return lambda position: low + (1 - low) * (1 - jnp.abs(2 * jnp.mod(position / period, 1.0) - 1))


@checked
def step_decay(decay: Number, every: Number) -> RateByEpoch:
    """A factor that is multiplied by ``decay`` every ``every`` epochs, whatever the batch size.

    A change is at the update where the duration is reached. In runs of more than a million updates, where a float32 hardly tells a
    position from the next one, it may be some updates early; a ``constant_schedule(batch_size, every=epochs(0.3))`` counts in integers.

    Example:
        >>> [round(float(step_decay(0.1, 30)(position)), 3) for position in (0.0, 29.9, 30.0, 60.0)]
        [1.0, 1.0, 0.1, 0.01]
        >>> [round(float(step_decay(0.5, 0.3)(jnp.float32(update) / 10)), 3) for update in (8, 9, 10)]  # of ten updates an epoch
        [0.25, 0.125, 0.125]
    """
    _check_length("every", every)
    _check_factor("decay", decay)
    return lambda position: decay ** _whole_periods(position, every)


_ROUNDING = 2.0**-21  # relative; a float32 position, the period and their quotient have errors of 2**-22 together


def _whole_periods(position: Any, period: Number) -> Float[Array, "*shape"]:
    """How many whole periods there are up to a position; one whose end is reached up to rounding is whole."""
    return jnp.floor(jnp.asarray(position / period) * (1 + _ROUNDING))


@checked
def scale_learning_rate(rule: Rule, base_lr: Number, base_batch_size: int, batch_size: int) -> Number:
    """Scales a learning rate from one batch size to another.

    Args:
        rule: ``"linear"`` (rate ∝ B), ``"sqrt"`` (rate ∝ √B) or ``"none"``.
        base_lr: a rate that works well at ``base_batch_size``.
        base_batch_size: examples.
        batch_size: examples.

    Raises:
        ValueError: the rule is unknown, a rate or size is not above 0, or the scaled rate is too large for a float.

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
        if is_known(value) and not (value > 0 and is_finite(value)):
            raise ValueError(f"{name}={_shown(value)} must be above 0 and finite.")
    if not is_known(base_lr):
        return base_lr * (float(batch_size) / float(base_batch_size)) ** powers[rule]
    rate = float(base_lr) * (float(batch_size) / float(base_batch_size)) ** powers[rule]
    if not math.isfinite(rate):
        raise ValueError(f"base_lr={base_lr} at base_batch_size={base_batch_size} is too large a rate at batch_size={batch_size}.")
    return rate


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) < 30 else f"{text[:10]}... ({len(text)} characters)"


def _check_length(name: str, value: Number) -> None:
    if is_known(value) and not (value > 0 and is_finite(value) and np.finfo(np.float32).tiny <= value <= np.finfo(np.float32).max):
        raise ValueError(f"{name}={_shown(value)} epochs must be above 0 and finite, in float32 too.")


def _check_factor(name: str, value: Number) -> None:
    if is_known(value) and not (value >= 0 and is_finite(value)):
        raise ValueError(f"{name}={_shown(value)} must be at least 0 and finite.")
