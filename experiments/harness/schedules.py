"""The learning rate along a run, by name: the flags of the studies that train to a target, and the optimizers that follow it."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import jaxbatch as jb
from experiments.harness.optimizers import code, follow, is_named, kind_of, make_optimizer, optimizer_words
from jaxbatch.gradients.run_lengths import for_length, takes_num_steps
from jaxbatch.schedules.named_rates import RateName

Config = TypeVar("Config", bound="ScheduleFlags")


@dataclasses.dataclass(frozen=True)
class ScheduleFlags:
    """The flags of studies whose learning rate may change along a run."""

    schedule: RateName = "constant"
    """The learning rate along a run: constant; cosine or linear down to 0; wsd, which falls to 0 in the last fifth; step, a tenth from a
    half and a hundredth from three quarters on. It is stretched to the longest run that the study makes at a batch size, so a run that
    reaches the target ends within it."""
    warmup: str = "0"
    """Share of the longest run in which the rate rises in a straight line, as 5% or 0.05."""

    own_lengths: ClassVar[bool] = False  # whether an optimizer of the user's own may take num_steps


def fill_schedule(config: Config) -> Config:
    """Writes the warmup as a number, and checks the flags.

    Raises:
        ValueError: a warmup that is no share; a schedule for an optimizer of the user's own that has one.

    Example:
        >>> fill_schedule(ScheduleFlags("cosine", "5%")).warmup, fill_schedule(ScheduleFlags("cosine", "0.050")).warmup
        ('0.05', '0.05')
        >>> fill_schedule(ScheduleFlags("cosine", "5"))
        Traceback (most recent call last):
        ValueError: --warmup 5 must be a share of the run, at least 0 and below 1, as 5% or 0.05.
    """
    text = config.warmup.strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    most, words = (0.8, "at most 80%, before wsd falls") if config.schedule == "wsd" else (0.9999, "below 1")
    if not 0 <= share <= most:
        raise ValueError(f"--warmup {config.warmup} must be a share of the run, at least 0 and {words}, as 5% or 0.05.")
    config = dataclasses.replace(config, warmup=f"{share:g}")
    if is_scheduled(config) and not is_named(config) and takes_num_steps(kind_of(config).make):
        raise ValueError(f"--schedule and --warmup are for optimizers without a schedule; {config.optimizer} takes num_steps.")
    return config


def is_scheduled(config: Any) -> bool:
    """Whether the flags ask for a rate that changes.

    Example:
        >>> is_scheduled(ScheduleFlags()), is_scheduled(ScheduleFlags(warmup="5%")), is_scheduled(None)
        (False, True, False)
    """
    return getattr(config, "schedule", "constant") != "constant" or getattr(config, "warmup", "0") != "0"


def rate_at(config: Any, learning_rate: Any, num_steps: Any) -> Callable[[Any], Any]:
    """``updates so far -> rate`` of a run of so many updates.

    Example:
        >>> float(rate_at(ScheduleFlags("linear"), 1.0, 4)(1))
        0.75
    """
    return jb.stretched_schedule(config.schedule, learning_rate, num_steps, warmup=float(config.warmup))


def make_scheduled(config: Any, name: str | None = None) -> Callable[..., Any]:
    """``rate -> optimizer`` where the rate is constant; else ``(rate, num_steps) -> optimizer``. Both may be traced.

    Args:
        config: with the flags of an optimizer and of :class:`ScheduleFlags`, filled in.
        name: an optimizer in place of the configuration's, with its other flags.

    Example:
        >>> takes_num_steps(make_scheduled(ScheduleFlags())), takes_num_steps(make_scheduled(ScheduleFlags("cosine")))
        (False, True)
    """
    if is_scheduled(config):
        return lambda learning_rate, num_steps: follow(config, rate_at(config, learning_rate, num_steps), learning_rate, name)
    if name is None and not is_named(config) and takes_num_steps(kind_of(config).make):
        return lambda learning_rate, num_steps: make_optimizer(config, num_steps=num_steps)(learning_rate)
    return make_optimizer(config, name)


def make_for_length(config: Any, num_steps: int, name: str | None = None) -> Callable[[Any], Any]:
    """``rate -> optimizer`` of runs of one length.

    Args:
        config: see :func:`make_scheduled`.
        num_steps: updates of the longest run.
        name: see :func:`make_scheduled`.

    Example:
        >>> import jax.numpy as jnp
        >>> optimizer = make_for_length(ScheduleFlags("linear"), 4)(1.0)
        >>> optimizer.update(jnp.array(1.0), optimizer.init(jnp.array(2.0)))[0].item()
        -1.0
    """
    return for_length(make_scheduled(config, name), num_steps)


def rate_words(config: Any) -> str:
    """The optimizer and its schedule as tables and figures name them.

    Example:
        >>> rate_words(ScheduleFlags("cosine", "0.05")), rate_words(ScheduleFlags())
        ('SGD with momentum 0, cosine schedule, warmup 5%', 'SGD with momentum 0')
    """
    return ", ".join([optimizer_words(config), *schedule_words(config)])


def schedule_words(config: Any) -> list[str]:
    """The schedule and the warmup, as far as the rate is not constant.

    Example:
        >>> schedule_words(ScheduleFlags("wsd", "0.05")), schedule_words(ScheduleFlags())
        (['wsd schedule', 'warmup 5%'], [])
    """
    schedule, warmup = getattr(config, "schedule", "constant"), float(getattr(config, "warmup", "0"))
    return [f"{schedule} schedule"] * (schedule != "constant") + [f"warmup {100 * warmup:g}%"] * (warmup > 0)


def scheduled_code(config: Any) -> str:
    """What makes the optimizer, in Python.

    Example:
        >>> scheduled_code(ScheduleFlags("wsd", "0.05")), scheduled_code(ScheduleFlags())
        ("jb.scheduled(optax.sgd, 'wsd', warmup=0.05)", 'optax.sgd')
    """
    if not is_scheduled(config):
        return code(config)
    warmup = f", warmup={config.warmup}" if config.warmup != "0" else ""
    return f"jb.scheduled({code(config)}, {config.schedule!r}{warmup})"
