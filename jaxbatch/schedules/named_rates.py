r"""Learning rates by name, stretched to the length of a run, and optimizers that follow them.

All lengths are counted in updates, in integers, so that a change comes at its very update in runs of millions of them. An update has the number
``count`` of those before it: a run of T updates uses the counts 0 to T - 1. What decays reaches its end at T, so no update of the run has a rate
of 0. The number of updates may be traced: one program then serves runs of all lengths. ``optax.cosine_decay_schedule``, ``linear_schedule``
and what is made of them want a length that Python can look at, so the shapes stand here; they are tested against optax's.
"""

import fractions
import typing
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxbatch.gradients.updates import Optimizer, check_make_optimizer
from jaxbatch.kinds import checked
from jaxbatch.schedules.batch_sizes import is_finite
from jaxbatch.schedules.rates import Number
from jaxbatch.states import is_known

RateName = Literal["constant", "cosine", "linear", "wsd", "step"]
Steps: TypeAlias = int | Int[Array, ""] | Float[Array, ""]
Schedule = Callable[[Any], Array]  # updates so far -> rate
_DROPS = (1.0, 0.1, 0.01)  # of "step": at first, from a half of the run, from three quarters of it
_LONGEST = np.iinfo(np.int32).max - 1  # what an optimizer counts to
_FINEST = 10_000  # shares of a run are kept as fractions with denominators up to this


@checked
def stretched_schedule(name: RateName, learning_rate: Number, num_steps: Steps, *, warmup: float = 0.0, decay: float = 0.2) -> Schedule:
    r"""A learning rate that rises, stays and falls as its name says, stretched to a run of ``num_steps`` updates, as an optax schedule.

    With T = ``num_steps`` and W = ⌊warmup · T⌋, update number ``count`` has, from W on, ``learning_rate`` times

    - ``"constant"``: 1,
    - ``"cosine"``: :math:`(1 + \cos(\pi (\text{count} - W) / (T - W))) / 2`,
    - ``"linear"``: :math:`(T - \text{count}) / (T - W)`,
    - ``"wsd"`` (warmup, stable, decay): 1, and in the last D = ⌊decay · T⌋ updates :math:`(T - \text{count}) / D`,
    - ``"step"``: 1, then 0.1 from T / 2 on and 0.01 from 3T / 4 on, as for ResNets on CIFAR-10.

    From T on the rate stays at its end, which is 0 for cosine, linear and wsd. The first W updates rise in a straight line to it: they have
    :math:`1/(W + 1)` to :math:`W/(W + 1)` of the rate. So the first update never has a rate of 0, which would be an update for nothing, and a
    warmup that is shorter than an update is none.

    Args:
        name: the shape.
        learning_rate: the highest rate. It may be traced; then it is not checked.
        num_steps: T, updates of the run. It may be traced, too: one program serves all lengths.
        warmup: the share of the run in which the rate rises, as 0.05; at least 0 and below 1.
        decay: the share of the run in which ``"wsd"`` falls; with ``warmup`` at most 1. The other shapes do not use it.

    Returns:
        ``count -> rate``, usable inside jit.

    Raises:
        ValueError: a name that is not known; a rate that is not above 0; a length that is not a whole number of at least 1; shares out of range.

    Example:
        >>> for name in ("constant", "cosine", "linear", "wsd", "step"):
        ...     rate = stretched_schedule(name, 1.0, 10, warmup=0.2)
        ...     print(f"{name:8}", *(f"{float(rate(count)):.2f}" for count in range(11)))
        constant 0.33 0.67 1.00 1.00 1.00 1.00 1.00 1.00 1.00 1.00 1.00
        cosine   0.33 0.67 1.00 0.96 0.85 0.69 0.50 0.31 0.15 0.04 0.00
        linear   0.33 0.67 1.00 0.88 0.75 0.62 0.50 0.38 0.25 0.12 0.00
        wsd      0.33 0.67 1.00 1.00 1.00 1.00 1.00 1.00 1.00 0.50 0.00
        step     0.33 0.67 1.00 1.00 1.00 0.10 0.10 0.10 0.01 0.01 0.01

    References:
        Cosine: Loshchilov and Hutter, `SGDR <https://arxiv.org/abs/1608.03983>`_, 2017, eq. 5, without restarts. WSD: Hu et al., `MiniCPM
        <https://arxiv.org/abs/2404.06395>`_, 2024, section 4; a linear end over 20% of the run: Hägele et al., `Scaling Laws and
        Compute-Optimal Training Beyond Fixed Training Durations <https://arxiv.org/abs/2405.18392>`_, 2024. Step: He et al., `Deep Residual
        Learning <https://arxiv.org/abs/1512.03385>`_, 2015, section 4.2: of 64,000 updates, the rate is divided by 10 at 32,000 and 48,000.
    """
    _check(name, learning_rate, num_steps, warmup, decay)
    length = jnp.asarray(num_steps, jnp.int32)
    rising, falling = _share(length, warmup), _share(length, decay)

    def rate(count):
        count = jnp.minimum(jnp.asarray(count), length)
        left = length - count
        share_left = left / jnp.maximum(length - rising, 1)
        if name == "constant":
            factor = jnp.ones_like(share_left)
        elif name == "cosine":
            factor = jnp.sin(0.5 * jnp.pi * share_left) ** 2  # the same as (1 + cos) / 2, and exact down to its end
        elif name == "linear":
            factor = share_left
        elif name == "wsd":
            factor = jnp.minimum(left / jnp.maximum(falling, 1), 1.0)
        else:
            drops = jnp.int32(left <= _share(length, 0.5)) + jnp.int32(left <= _share(length, 0.25))
            factor = jnp.asarray(_DROPS, jnp.float32)[drops]
        return learning_rate * jnp.where(count < rising, (count + 1) / (rising + 1), factor)

    return rate


@checked
def scheduled(make_optimizer: Callable[..., Any], name: RateName, *, warmup: float = 0.0, decay: float = 0.2) -> Callable[[Number, Steps], Optimizer]:
    """Turns a function of the rate into one of the rate and the length of the run, whose rate follows :func:`stretched_schedule`.

    Args:
        make_optimizer: ``learning_rate -> optimizer``, such as ``optax.adamw``. It gets a schedule for a rate, as all optimizers of optax take one;
            a constant rate without warmup it gets as a number.
        name: see :func:`stretched_schedule`.
        warmup: likewise.
        decay: likewise.

    Returns:
        ``(learning_rate, num_steps) -> optimizer``, for :func:`jaxbatch.advise` and whatever else takes such a function. Both may be traced.

    Raises:
        ValueError: as :func:`stretched_schedule`; ``make_optimizer`` makes no optimizer from a rate; or, when the function is called,
            ``make_optimizer`` computes with the rate and so takes no schedule.

    Example:
        >>> import optax
        >>> make = scheduled(optax.sgd, "linear")
        >>> optimizer, params = make(1.0, 4), jnp.array(0.0)
        >>> state = optimizer.init(params)
        >>> for _ in range(4):
        ...     update, state = optimizer.update(jnp.array(-1.0), state)
        ...     print(float(update))
        1.0
        0.75
        0.5
        0.25
    """
    _check(name, 1.0, 1, warmup, decay)
    check_make_optimizer(make_optimizer, 1.0)

    def make(learning_rate, num_steps):
        if name == "constant" and not warmup:
            return make_optimizer(learning_rate)
        schedule = stretched_schedule(name, learning_rate, num_steps, warmup=warmup, decay=decay)
        try:
            return make_optimizer(schedule)
        except TypeError as error:
            raise ValueError(
                f"make_optimizer takes no schedule in place of a rate ({error}): give one that hands the rate on to an optimizer of optax, as "
                "optax.adamw, or lambda rate: optax.sgd(rate, momentum=0.9)."
            ) from error

    return make


def _share(length: Int[Array, ""], share: float) -> Int[Array, ""]:
    """A share of a number of updates, rounded down, in integers that stay below 2^31."""
    part = fractions.Fraction(share).limit_denominator(_FINEST)
    whole, rest = length // part.denominator, length % part.denominator
    return whole * part.numerator + rest * part.numerator // part.denominator


def _check(name: str, learning_rate: Any, num_steps: Any, warmup: float, decay: float) -> None:
    if name not in typing.get_args(RateName):
        raise ValueError(f"name={name!r} must be one of {', '.join(typing.get_args(RateName))}.")
    if is_known(learning_rate) and not (learning_rate > 0 and is_finite(learning_rate)):
        raise ValueError(f"learning_rate={learning_rate} must be above 0 and finite.")
    if is_known(num_steps) and not (1 <= num_steps <= _LONGEST and num_steps == int(num_steps)):
        raise ValueError(f"num_steps={num_steps} must be a whole number of updates from 1 to {_LONGEST}.")
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup={warmup} must be a share of the run, at least 0 and below 1, as 0.05 for a twentieth.")
    if not 0 <= decay <= 1 or (name == "wsd" and warmup + decay > 1 + 1e-9):
        raise ValueError(f"decay={decay} must be a share of the run, at least 0 and at most what the warmup leaves, as 0.2 for a fifth.")
