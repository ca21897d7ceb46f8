"""Numbers outside the range that their name has everywhere: each is one line that names it."""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Range(NamedTuple):
    """What numbers of one name must be, in every function and record."""

    holds: Callable[[Any], bool]
    words: str  # after "must be"
    outside: float  # a number that is refused


_COUNT, _POSITIVE = Range(lambda value: value >= 1, "a whole number of at least 1", 0), Range(lambda value: value > 0, "above 0", 0.0)
_COUNTS = (
    *("batch_size", "microbatch_size", "evaluation_batch_size", "cut_to_measure", "chunk_size", "num_groups", "num_devices", "num_samples"),
    *("evaluations_per_epoch", "depth", "length", "monitor.every"),
)
RANGES: dict[str, Range] = {
    **dict.fromkeys(_COUNTS, _COUNT),
    **dict.fromkeys(("learning_rate", "max_norm", "temperature", "seconds_per_timing", "monitor.halflife"), _POSITIVE),
    "momentum": Range(lambda value: 0 <= value < 1, "at least 0 and below 1", 1.0),
    "label_smoothing": Range(lambda value: 0 <= value <= 1, "from 0 to 1: the share of the target that goes to all classes alike", 1.5),
    "monitor.parts": Range(lambda value: value >= 2, "at least 2: noise shows in how parts differ", 1),
}


def check_range(name: str, value: Any) -> None:
    """Refuses a number outside the range of its name; a traced one has no value yet.

    Raises:
        ValueError: as said.

    Example:
        >>> check_range("momentum", 1.0)
        Traceback (most recent call last):
        ValueError: momentum=1.0 must be at least 0 and below 1.
    """
    is_array = isinstance(value, jax.Array | np.ndarray) and value.shape == () and not isinstance(value, jax.core.Tracer)
    if name in RANGES and (is_array or isinstance(value, numbers.Real)) and not RANGES[name].holds(float(value) if is_array else value):
        raise ValueError(f"{name}={value} must be {RANGES[name].words}.")
