"""The parts of pages that are made from the kept runs: settings, tables and verdicts, between two comments.

    <!-- measured: split_backward/mnist | setting | table To | table Cost of one batch | verdict -->
    <!-- measured: large_batch/digits | table Each arm | without s per run -->
    <!-- measured: score | table -->
    <!-- measured: within | table | verdict -->
    <!-- end -->

What stands between such a comment and the end is written anew. A table is named by the beginning of its title. After `verdict`, a number says with
which sentence it begins, and a second one with which it ends. While a run is not kept, its blocks stay as they are.
"""

import pathlib
import re

from jaxbatch.results.report import as_markdown
from scripts import measured_runs, measured_score

BLOCK = re.compile(r"<!-- measured: (?P<order>[^>]+?) -->\n(?P<body>.*?)<!-- end -->", re.DOTALL)


def write_blocks(text: str) -> str:
    """A page with the blocks of all kept runs written anew."""
    return BLOCK.sub(lambda match: write_block(match) if is_kept(run_of(match["order"])) else match[0], text)


def write_block(match: re.Match) -> str:
    """A block, with its comments."""
    return f"<!-- measured: {match['order']} -->\n\n{content_of(match['order'])}\n\n<!-- end -->"


def without_blocks(text: str) -> str:
    """What people wrote of a page."""
    return BLOCK.sub("", text)


def run_of(order: str) -> str:
    """The run of a block.

    Example:
        >>> run_of("split_backward/mnist | setting")
        'split_backward/mnist'
    """
    return order.partition("|")[0].strip()


def is_kept(name: str) -> bool:
    """Whether the records of a run, or of a score, are in docs/measured."""
    return name in measured_runs.kept_runs() or measured_score.is_kept(name)


def content_of(order: str) -> str:
    """The text that an order stands for.

    Raises:
        ValueError: there is no such table or column, or the order cannot be read.
    """
    name, *parts = (part.strip() for part in order.split("|"))
    is_score = name in measured_score.SCRIPTS
    texts: list[str] = []
    for position, part in enumerate(parts):
        kind, _, detail = part.partition(" ")
        if kind == "setting":
            texts.append(f"*{measured_score.setting(name) if is_score else measured_runs.setting_of(name)}.*")
        elif kind == "table":
            left_out = [more.removeprefix("without ") for more in _following(parts, position) if more.startswith("without ")]
            texts.append(measured_score.table(name) if is_score else table_of(name, detail, left_out))
        elif kind == "verdict":
            texts.append(measured_score.summary(name) if is_score else verdict_of(name, *map(int, detail.split())))
        elif kind != "without":
            raise ValueError(f"measured: {order}: {part!r} must begin with setting, table, without or verdict.")
    return "\n\n".join(texts)


def _following(parts: list[str], position: int) -> list[str]:
    """What belongs to a part: the parts after it, up to the next one that is written."""
    rest = parts[position + 1 :]
    return rest[: next((number for number, part in enumerate(rest) if not part.startswith("without ")), len(rest))]


def table_of(name: str, title: str, without: list[str]) -> str:
    """A table of a run's report, with its title above it.

    Raises:
        ValueError: none or several begin with this title.
    """
    tables = measured_runs.report_of(name).tables
    chosen = [full for full in tables if full.startswith(title)]
    if len(chosen) != 1:
        raise ValueError(f"{len(chosen)} tables of {name} begin with {title!r}; their titles are {'; '.join(tables)}.")
    return f"{chosen[0]}:\n\n{as_markdown(tables[chosen[0]], without)}"


def verdict_of(name: str, first: int = 1, last: int | None = None) -> str:
    """The sentences of a run's verdict, one a line."""
    run = measured_runs.read(name)
    return "\n".join(f"- {sentence}" for sentence in run.report.verdict(run.config, run.records)[first - 1 : last])


def pages() -> list[pathlib.Path]:
    """README and the pages of the documentation."""
    return [measured_runs.ROOT / "README.md", *sorted((measured_runs.ROOT / "docs").glob("*.md"))]
