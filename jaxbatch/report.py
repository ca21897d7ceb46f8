"""What a run shows: progress, intervals, tables."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class Interval(NamedTuple):
    """A mean or median with its 95% bootstrap interval and the number of values n behind it."""

    value: float
    low: float
    high: float
    n: int

    def __format__(self, spec: str) -> str:
        if self.n == 0:
            return "none"
        value = format(self.value, spec)
        return value if self.n == 1 else f"{value} [{format(self.low, spec)}, {format(self.high, spec)}]"

    def excludes(self, reference: float) -> bool:
        """Whether the interval says that the value differs from ``reference``; never with fewer than 2 values."""
        return self.n > 1 and not self.low <= reference <= self.high


def interval(values: Sequence[float | None] | np.ndarray, statistic=np.mean, *, seed: int = 0) -> Interval:
    """A statistic of ``values`` with its 95% percentile bootstrap interval.

    One value has no interval (its ends are NaN); values that are not finite are left out of both.

    Args:
        values: independent measurements, one a seed or a round.
        statistic: ``np.mean`` or ``np.median``.
        seed: of the resampling.

    Example:
        >>> mean = interval([1.0, 2.0, 3.0, 4.0])
        >>> f"{mean:.2f}", mean.excludes(0.0)
        ('2.50 [1.50, 3.50]', True)

    References:
        Efron, *Bootstrap methods: another look at the jackknife*, 1979; scipy.stats.bootstrap.
    """
    values = np.asarray([value for value in values if value is not None], float)
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    if len(values) == 1:
        return Interval(float(values[0]), float("nan"), float("nan"), 1)
    from scipy import stats  # costs half a second; --help should not pay it

    ends = stats.bootstrap(
        (values,), statistic, method="percentile", n_resamples=5000, rng=np.random.default_rng(seed)
    ).confidence_interval
    return Interval(float(statistic(values)), float(ends.low), float(ends.high), len(values))


def print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table: the first column to the left, numbers to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def progress_bar(console: Console | None = None) -> Progress:
    """A bar with examples/s and the time left, gone when done; a task is added with ``rate=""``."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def track(records: Iterable[dict[str, Any]], console: Console | None = None) -> Iterator[dict[str, Any]]:
    """Passes on the records of :func:`jaxbatch.fit` and shows a progress bar meanwhile.

    Example:
        ``for record in jb.track(jb.fit(task, config)): ...``
    """
    with progress_bar(console) as bar:
        task, before = bar.add_task("training", rate=""), None
        for record in records:
            fresh = record["examples"] - (before["examples"] if before else 0)
            rate = f"{fresh / record['train_seconds']:,.0f} examples/s" if before else ""
            bar.update(task, completed=record["batches"], total=record["total_batches"], rate=rate)
            before = record
            yield record
