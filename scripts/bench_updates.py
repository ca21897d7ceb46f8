"""The time of an update by batch size, from one example to more than a data set of the studies has."""

import optax
from side_by_side import MOMENTUM, RATE, make_rows, random_task

import jaxbatch as jb


def updates(rounds: int, batch_sizes: tuple[int, ...]) -> list[dict]:
    """Times an update of SimpleCNN as :func:`jaxbatch.advise` does; every row has the line through all of them.

    ``start_ms`` and ``example_us`` are the line's: the time of an update without examples, and that of one more.
    """
    task = random_task(jb.SimpleCNN(), max(batch_sizes))
    throughput = jb.measure_throughput(task, optax.sgd(RATE, MOMENTUM), batch_sizes, rounds=rounds)
    line = {"start_ms": throughput.seconds_per_update.value * 1e3, "example_us": throughput.seconds_per_example.value * 1e6}
    rows = []
    for size, seconds in throughput.seconds.items():
        (row,) = make_rows("updates", "simple_cnn", size, 1, [{"ours": seconds.value * 1e3}])
        rows.append(row | {"rounds": rounds, "ours_low": seconds.low * 1e3, "ours_high": seconds.high * 1e3} | line)
    return rows
