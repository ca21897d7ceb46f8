"""Timings that can be compared: every function runs once a round, in shuffled order, in one process.

A computer's speed changes with time. So two times measured a minute apart can hardly be compared, but two times from the
same round can.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax


def timed_rounds(functions: Mapping[Any, Callable[[], Any]], rounds: int, *, rest: float = 0.0, seed: int = 0) -> Iterator[dict[Any, float]]:
    """Runs every function once a round and yields the times in milliseconds.

    A first round, which compiles and touches memory, is not yielded. The order within a round is shuffled, so that no function
    always follows the same other one.

    Args:
        functions: maps a name (or any key) to a function without arguments; the time includes waiting for its result.
        rounds: number of rounds to yield, at least 1.
        rest: seconds to wait before each run. The threads of OpenMP and of XLA keep cores busy for milliseconds after their
            last work, which would slow down the next run on the same cores.
        seed: the seed of the order.

    Raises:
        ValueError: ``rounds`` below 1.

    Example:
        >>> rounds = list(timed_rounds({"nothing": lambda: None, "sleep": lambda: time.sleep(0.002)}, 3))
        >>> len(rounds), all(times["sleep"] >= 2 > times["nothing"] for times in rounds)
        (3, True)
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1.")
    for function in functions.values():
        jax.block_until_ready(function())
    shuffle = random.Random(seed).sample
    for _ in range(rounds):
        times = {}
        for name in shuffle(list(functions), len(functions)):
            time.sleep(rest)
            started = time.perf_counter()
            jax.block_until_ready(functions[name]())
            times[name] = (time.perf_counter() - started) * 1e3
        yield {name: times[name] for name in functions}
