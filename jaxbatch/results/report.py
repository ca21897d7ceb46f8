"""Shows progress bars and tables."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


def print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table, with the first column aligned left and the others right; in a file it is as wide as necessary."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = console.width
    if not console.is_terminal:
        console.width = max(width, table.__rich_measure__(console, console.options.update(max_width=1000)).maximum)
    console.print(table)
    console.width = width


def progress_bar(console: Console | None = None) -> Progress:
    """A bar with examples/s and the time left, which disappears at the end; add a task with ``rate=""``."""
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
    """Yields the records of :func:`jaxbatch.fit` and shows a progress bar.

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
