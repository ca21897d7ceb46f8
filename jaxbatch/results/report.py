"""Shows progress bars and tables; the tables of a report as Markdown, so that pages have the same ones."""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

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


class Printed(NamedTuple):
    """What a report prints."""

    tables: dict[str, Table]  # by title, in their order
    lines: list[str]  # everything else


class _Keeper(Console):
    """A console that keeps what it is given, and shows nothing."""

    def __init__(self):
        super().__init__(file=io.StringIO(), width=1000)
        self.kept: list[Any] = []

    def print(self, *objects: Any, **_: Any) -> None:
        self.kept.extend(objects)


def printed(report: Callable[[Console], None]) -> Printed:
    """The tables and lines that a report prints on a console, which shows none of them.

    Args:
        report: prints on the console that it is given, its tables by :func:`print_table`.

    Example:
        >>> list(printed(lambda console: print_table(console, "Costs", ["step", "ms"], [["split", "1.3"]])).tables)
        ['Costs']
    """
    keeper = _Keeper()
    report(keeper)
    return Printed({str(one.title): one for one in keeper.kept if isinstance(one, Table)}, [one for one in keeper.kept if isinstance(one, str)])


def as_markdown(table: Table, without: Sequence[str] = ()) -> str:
    """A table as Markdown.

    Args:
        table: made by :func:`print_table`, see :func:`printed`.
        without: heads of columns that are left out.

    Raises:
        ValueError: the table has no such column.

    Example:
        >>> [table] = printed(lambda console: print_table(console, "Costs", ["step", "ms"], [["split", "1.3"]])).tables.values()
        >>> print(as_markdown(table))
        | step | ms |
        |---|---:|
        | split | 1.3 |
    """
    columns = [column for column in table.columns if column.header not in without]
    missing = set(without) - {column.header for column in table.columns}
    if missing:
        raise ValueError(f"without={sorted(missing)}: the table has the columns {', '.join(str(column.header) for column in table.columns)}.")
    rows = [[column.header for column in columns], *zip(*(column.cells for column in columns), strict=True)]
    head, *body = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    rule = "|" + "".join("---:|" if column.justify == "right" else "---|" for column in columns)
    return "\n".join([head, rule, *body])


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
