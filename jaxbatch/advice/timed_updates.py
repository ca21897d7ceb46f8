"""Times updates with several batch sizes side by side, in the program that training runs.

Axes: B examples in a batch, R rounds.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jaxbatch.advice.throughput import Throughput, check_sizes, fit_throughput, predicted_throughput
from jaxbatch.batches import epoch_order
from jaxbatch.data.stream_parts import checked_parts
from jaxbatch.data.streams import Stream, is_stream
from jaxbatch.gradients.updates import Optimizer, check_optimizer
from jaxbatch.kinds import checked
from jaxbatch.machine.timing import timed_rounds
from jaxbatch.states import as_arrays
from jaxbatch.training.devices import find_devices
from jaxbatch.training.run_programs import RunPrograms
from jaxbatch.training.tasks import Task
from jaxbatch.training.train_state import TrainState, init_state, start_shapes

_OVERLAP = 4  # batches in a row, if there are as many: loading the first overlaps with nothing
_SHORT = 0.002  # seconds; calling a program takes a good part of less


@checked
def measure_throughput(
    task: Task,
    optimizer: Optimizer,
    batch_sizes: Iterable[int],
    *,
    rounds: int = 10,
    seconds_per_timing: float = 0.05,
    microbatch_size: int | None = None,
    num_devices: int = 1,
    loading: bool = False,
    budget: float | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Throughput:
    """Times the program that :func:`jaxbatch.fit` runs, with several batch sizes side by side.

    Every size runs once a round, in shuffled order, so that a machine that slows down does so for all. What is timed is a row of
    updates without evaluation. The model that they train is thrown away, whatever became of it; its times do not depend on it.

    Args:
        task: see :class:`jaxbatch.Task`.
        optimizer: any optax optimizer.
        batch_sizes: at least 2 sizes B, over all devices, none above the data set.
        rounds: R.
        seconds_per_timing: each timing runs as many updates as take about so long, and at least one. The measurement takes about
            ``rounds * len(batch_sizes) * seconds_per_timing``, and the time to compile.
        microbatch_size, num_devices: see :class:`jaxbatch.FitConfig`.
        loading: whether the time to decode examples counts, for a task with a stream. It is the time that training waits: the next
            batches are decoded while the device works. ``False``: the same few examples are given again and again; they are
            still moved to the device. Arrays on the device cost nothing but the gathering of a
            batch, which always counts.
        budget: seconds, compiling included, after which only what is needed is measured: the largest and the smallest size, in
            two rounds. ``None``: no limit.
        on_progress: called with a few words before each size is compiled and before the rounds.

    Raises:
        ValueError: fewer than 2 sizes, one above the data set, too few devices, ``rounds`` below 1, a time that is not above 0, or
            an optimizer that is not one of optax's, or a budget below 0.

    Example:
        >>> import optax
        >>> from jaxbatch import MLP, classification_task, load_dataset
        >>> task = classification_task(MLP(), load_dataset("digits"))
        >>> found = measure_throughput(task, optax.sgd(0.1), [8, 512], rounds=3, seconds_per_timing=0.005)
        >>> found.seconds[512].value > found.seconds[8].value, found.seconds[8].n
        (True, 3)
    """
    sizes = check_sizes(batch_sizes, task.num_examples)
    if budget is not None and not budget >= 0:
        raise ValueError(f"budget={budget} must be a number of seconds of at least 0, or None.")
    check_optimizer(optimizer, start_shapes(task))
    settings: dict[str, Any] = {"microbatch_size": microbatch_size, "devices": find_devices(num_devices)}
    clock: dict[str, Any] = {"rounds": rounds, "seconds_per_timing": seconds_per_timing, "budget": budget, "on_progress": on_progress}
    return time_updates(RunPrograms(task, optimizer), lambda: init_state(task, optimizer, 0), sizes, loading=loading, **clock, **settings)


def time_updates(
    programs: RunPrograms,
    start: Callable[[], TrainState],
    sizes: Sequence[int],
    *,
    rounds: int,
    seconds_per_timing: float = 0.05,
    loading: bool = False,
    budget: float | None = None,
    on_progress: Callable[[str], None] | None = None,
    **settings: Any,
) -> Throughput:
    """:func:`measure_throughput` of the programs that runs of one task and optimizer share.

    Args:
        programs: what is timed; what is not there yet is compiled, and stays for the runs.
        start: makes the state that is trained and thrown away.
        sizes: from :func:`jaxbatch.advice.throughput.check_sizes`.
        rounds, seconds_per_timing, loading, budget, on_progress: see :func:`measure_throughput`.
        **settings: how a batch goes through a step, for :meth:`jaxbatch.training.run_programs.RunPrograms.epoch`.
    """
    end = math.inf if budget is None else time.perf_counter() + budget
    say = on_progress or (lambda message: None)
    data, num_examples = programs.task.train_data, programs.task.num_examples
    streamed = is_stream(data)
    if not streamed:
        data = programs.data(settings.get("devices") or jax.devices()[:1])[0]  # as in training, which moves them there once
    if streamed and not loading:
        data = _Ready(data)
    order, kept = np.asarray(epoch_order(0, 0, num_examples)), [as_arrays(start())]

    def updates(size: int, count: int) -> Callable[[], Any]:
        say(f"timing an update at B = {size}")
        run = programs.epoch(kept[0], count, size, **settings)
        indices = np.resize(order, (count, size))

        def one_row():  # all sizes train one state, because copying a large one would take a good part of the time
            kept[0], losses = run(kept[0], data, indices, (0, 0))
            return losses

        return one_row

    least = _OVERLAP if streamed and loading else 1
    functions, counts = _rows(updates, sizes, num_examples, seconds_per_timing, least, lambda: time.perf_counter() > end)
    say(f"timing B = {', '.join(map(str, sorted(functions)))} side by side")
    times = []
    for of_round in timed_rounds(functions, rounds):
        times.append(of_round)
        if len(times) >= 2 and time.perf_counter() > end:
            break
    return fit_throughput({size: [of_round[size] / 1e3 / counts[size] for of_round in times] for size in sorted(functions)})


def find_throughput(
    task: Task,
    optimizer: Optimizer,
    sizes: Sequence[int],
    target: str,
    left: float = math.inf,
    say: Callable[[str], None] | None = None,
    *,
    programs: RunPrograms | None = None,
    start: Callable[[], TrainState] | None = None,
) -> Throughput:
    """Times of an update at every fourth-fold size: measured here, or bounded for a target that is not here.

    Examples of a stream are loaded, as in training; then the times with ready examples are measured, too.

    Args:
        task, optimizer: see :func:`measure_throughput`.
        sizes: all of interest, in ascending order.
        target: ``"here"``, or see :func:`jaxbatch.predicted_throughput`.
        left: seconds that are left; a third of them may be spent.
        say: see ``on_progress`` of :func:`measure_throughput`.
        programs, start: see :func:`time_updates`; ``None``: those of ``task`` and ``optimizer``.
    """
    some = sorted({*sizes[::2], sizes[-1]}) if len(sizes) > 2 else list(sizes)
    if len(some) == 1:  # a line needs another
        some = sorted(
            {some[0], some[0] // 4 or min(4, task.num_examples), max(1, some[0] - 1)}
            if some[0] > 3
            else {some[0], some[0] + 1 if some[0] < task.num_examples else some[0] - 1} - {0}
        )
    if target != "here":
        return predicted_throughput(task, optimizer, some, target)
    programs, start = programs or RunPrograms(task, optimizer), start or (lambda: init_state(task, optimizer, 0))
    parts = 6 if is_stream(task.train_data) else 3  # a stream is timed twice
    settings: dict[str, Any] = {"budget": None if left == math.inf else max(0.0, left / parts), "on_progress": say}
    if not is_stream(task.train_data):
        return time_updates(programs, start, some, rounds=5, **settings)
    throughput = time_updates(programs, start, some, rounds=3, loading=True, **settings)
    ready = time_updates(programs, start, list(throughput.seconds), rounds=3, **settings)
    return throughput._replace(ready_seconds={size: seconds.value for size, seconds in ready.seconds.items()})


class _Ready:
    """A stream whose parts are decoded once and given again and again, for timing what comes after decoding."""

    def __init__(self, stream: Stream):
        self.num_examples, self.example = stream.num_examples, stream.example
        self._stream = stream
        self._parts: dict[int, Any] = {}

    def parts(self, indices, seed_epoch=(0, 0)):
        for part in indices:
            if len(part) not in self._parts:
                (self._parts[len(part)],) = checked_parts(self._stream, lambda part=part: [part], seed_epoch)
            yield self._parts[len(part)]


def _rows(
    updates: Callable[[int, int], Callable[[], Any]], sizes: Sequence[int], num_examples: int, seconds: float, least: int, is_late: Callable[[], bool]
) -> tuple[dict, dict]:
    """For each size a row of updates that takes about so many seconds, of at least ``least`` if an epoch has them, and their number.

    Compiling takes longer than all timings, so each size is compiled once, if it can be. The number of steps in its program has
    to be known before, from the next larger size: a step with a smaller batch takes between as long and in proportion less.
    """
    functions, counts, expected = {}, {}, math.inf  # the first program has one step
    for number, size in enumerate(sorted(sizes, reverse=True)):
        if is_late() and number and size != min(sizes):
            continue
        most = num_examples // size  # as many as fit runs in one program
        count = min(most, max(least, round(seconds / expected)))
        row = updates(size, count)
        took = _seconds(row)
        if number == 0 and took < min(seconds, _SHORT) and most > 1:
            count = min(most, math.ceil(count * seconds / took))
            row = updates(size, count)
            took = _seconds(row)
        times = max(1, round(seconds / took))
        functions[size], counts[size] = (lambda row=row, times=times: [row() for _ in range(times)][-1]), times * count
        smaller = max((other for other in sizes if other < size), default=size)
        expected = took / count * math.sqrt(smaller / size)
    return functions, counts


def _seconds(function: Callable[[], Any]) -> float:
    """Of the second call, because the first touches new memory."""
    jax.block_until_ready(function())
    started = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - started
