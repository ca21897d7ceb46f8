"""What the seconds of advice are, what of them is loading, and whether they matter at all."""

import math
from collections.abc import Sequence
from typing import Any

from jaxbatch.advice.throughput import Throughput
from jaxbatch.intervals import Interval

_SHORT = 0.1  # seconds of training; starting a program takes longer


def time_sentences(choices: Sequence[Any], batch_size: int, objective: str, throughput: Throughput) -> list[str]:
    """Sentences on the seconds of every choice.

    Args:
        choices: for each batch size in ascending order what is expected of it, with an interval of ``seconds``.
        batch_size: the advised one.
        objective: see :func:`jaxbatch.advise`.
        throughput: times of an update.
    """
    return [
        *loading_sentences(throughput, batch_size),
        f"Seconds are of training alone{' and a lower bound' if throughput.bound else ''}: start, compiling and evaluation come on top.",
        *([] if throughput.bound else negligible_sentences({choice.batch_size: choice.seconds.high for choice in choices}, batch_size, objective)),
    ]


def loading_sentences(throughput: Throughput, batch_size: int) -> list[str]:
    """What loading examples costs; nothing where it was not timed by itself.

    Example:
        >>> from jaxbatch.advice.throughput import fit_throughput
        >>> measured = fit_throughput({8: [0.01] * 3, 64: [0.08] * 3})._replace(ready_seconds={8: 0.001, 64: 0.004})
        >>> loading_sentences(measured, 64)
        ['Loading takes 95% of the time of an update at B = 64: 80 ms, and 4 ms if its examples were ready.']
    """
    if not throughput.ready_seconds:
        return []
    loaded = {size: Interval(value, math.nan, math.nan, 1) for size, value in throughput.ready_seconds.items()}
    whole, ready = (times.seconds_at(batch_size) for times in (throughput, throughput._replace(seconds=loaded)))
    share = max(0.0, 1 - ready / whole)
    if share < 0.05:
        return [f"Loading costs next to nothing: at B = {batch_size} it is done while the device works."]
    times = f"{1e3 * whole:.3g} ms, and {1e3 * ready:.3g} ms if its examples were ready"
    return [f"Loading takes {100 * share:.0f}% of the time of an update at B = {batch_size}: {times}."]


def negligible_sentences(seconds: dict[int, float], batch_size: int, objective: str) -> list[str]:
    """Whether the advised size and its neighbours all train for so short a time that it does not matter.

    Args:
        seconds: by batch size in ascending order, the most seconds of training that are expected.
        batch_size: the advised one.
        objective: only for ``"time"`` there is something to say.

    Example:
        >>> negligible_sentences({8: 0.3, 16: 0.02, 32: 0.01, 64: 0.02, 128: 0.4}, 32, "time")
        ['Take any size between 16 and 64: time does not matter here, because training takes less than 0.1 s, and starting a program longer.']
    """
    sizes = list(seconds)
    low = high = sizes.index(batch_size)
    if objective != "time" or not seconds[batch_size] < _SHORT:
        return []
    while low > 0 and seconds[sizes[low - 1]] < _SHORT:
        low -= 1
    while high + 1 < len(sizes) and seconds[sizes[high + 1]] < _SHORT:
        high += 1
    which = f"Take any size between {sizes[low]} and {sizes[high]}: time" if low < high else "Time"
    return [f"{which} does not matter here, because training takes less than {_SHORT:g} s, and starting a program longer."]
