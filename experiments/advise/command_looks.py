"""Looks from what a training script writes: JSON objects among its output, a file of JSON lines or CSV, or lines that a pattern matches."""

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from experiments.harness.tail import Tail
from jaxbatch.advice.looks import Look

Row = Mapping[str, Any]
_DECODER = json.JSONDecoder()
_OBJECTS_OF_A_LINE = 8  # that are tried, so that a line of braces costs no time
VALUE = "value"  # the group of a pattern that stands for a metric whose name is no name of a group, such as eval/loss


class Fields(NamedTuple):
    """The names under which a script writes what a look needs; the first that is there counts."""

    metric: str
    step: tuple[str, ...] = ("global_step", "step", "steps", "updates", "update", "iteration", "iter")
    examples: tuple[str, ...] = ("examples", "samples")
    seconds: tuple[str, ...] = ("seconds", "time", "elapsed")
    loss: tuple[str, ...] = ("train_loss", "loss", "val_loss", "eval_loss")
    epoch: tuple[str, ...] = ("epoch",)


def fields_for(metric: str, names: str | None = None) -> Fields:
    """The names of a script's fields.

    Args:
        metric: the one of the target.
        names: other names than the usual ones, such as ``step=iter,seconds=t``.

    Raises:
        ValueError: ``names`` is not of this form, or names a field that a look does not have.

    Example:
        >>> fields_for("loss", "step=iter,seconds=t")[:4]
        ('loss', ('iter',), ('examples', 'samples'), ('t',))
    """
    fields = Fields(metric)
    for part in filter(None, (part.strip() for part in (names or "").split(","))):
        field, _, name = map(str.strip, part.partition("="))
        if field not in Fields._fields or not name:
            raise ValueError(f"fields={part!r} must be FIELD=NAME, where FIELD is one of {', '.join(Fields._fields)}, such as step=iter.")
        fields = fields._replace(**{field: name if field == "metric" else (name,)})
    return fields


def json_row(line: str, metric: str) -> Row | None:
    """The JSON object in a line that has the metric, wherever in the line it begins; None: there is none.

    Example:
        >>> json_row('10%|#   | {"step": 3, "loss": NaN} saved', "loss"), json_row('{"step": 3}', "loss"), json_row("{loss", "loss")
        ({'step': 3, 'loss': nan}, None, None)
    """
    if metric not in line and metric.isascii():  # others may be written as escapes
        return None
    start = line.find("{")
    for _ in range(_OBJECTS_OF_A_LINE):
        if start < 0:
            break
        try:
            row, end = _DECODER.raw_decode(line, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            if metric in row:
                return row
        start = line.find("{", end)
    return None


def csv_row(line: str, header: str) -> Row | None:
    """A line of CSV by the names in the header; None: it has another number of cells.

    Example:
        >>> csv_row('3,"0.5"', "step, loss"), csv_row("3", "step,loss")
        ({'step': '3', 'loss': '0.5'}, None)
    """
    try:
        names, cells = next(csv.reader([header]), []), next(csv.reader([line]), [])
    except csv.Error:
        return None
    return dict(zip((name.strip() for name in names), cells)) if len(names) == len(cells) else None


def compiled_pattern(pattern: str, fields: Fields) -> re.Pattern:
    """A pattern with the groups that a look needs.

    Raises:
        ValueError: it is no regular expression, or lacks a group.

    Example:
        >>> compiled_pattern(r"iter (?P<step>[0-9]+)", Fields("loss"))
        Traceback (most recent call last):
        ValueError: pattern='iter (?P<step>[0-9]+)' lacks a group for the metric: write (?P<loss>...) or (?P<value>...) where its number stands.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r} is no regular expression: {error}.") from None
    groups = compiled.groupindex
    if fields.metric not in groups and VALUE not in groups:
        name = f"(?P<{fields.metric}>...) or " if fields.metric.isidentifier() else ""
        raise ValueError(f"pattern={pattern!r} lacks a group for the metric: write {name}(?P<{VALUE}>...) where its number stands.")
    if not set(groups) & {*fields.step, *fields.examples, *fields.epoch}:
        step = "step" if "step" in fields.step else fields.step[0]
        raise ValueError(f"pattern={pattern!r} lacks a group for the number of updates: write (?P<{step}>...) where it stands.")
    return compiled


def look_from(row: Row, fields: Fields, batch_size: int, num_examples: int | None = None) -> Look | None:
    """The look of a row; None: its metric, or what its updates follow from, is no number.

    Args:
        row: what was written, by name. Numbers may be text.
        fields: the names.
        batch_size: from which the updates follow where only examples or epochs are written.
        num_examples: of the training set, without which epochs say nothing.

    Raises:
        ValueError: it names neither updates nor examples nor epochs.

    Example:
        >>> look_from({"samples": "64", "loss": "nan"}, Fields("loss"), batch_size=32)
        Look(updates=2, examples=64, seconds=None, value=nan, loss=None)
        >>> look_from({"epoch": 0.5, "acc": 1, "loss": 2}, Fields("acc"), batch_size=32, num_examples=640)
        Look(updates=10, examples=320, seconds=None, value=1.0, loss=2.0)
        >>> look_from({"t": 1, "loss": 2}, Fields("loss"), batch_size=32)
        Traceback (most recent call last):
        ValueError: A line with 'loss' says not after how many updates: it has loss, t. Let it have a step, or name the field: fields='step=NAME'.
    """
    value = _number(row.get(fields.metric))
    if value is None:
        return None
    epochs = fields.epoch if num_examples is not None else ()
    if not any(name in row for name in (*fields.step, *fields.examples, *epochs)):
        advice = "Let it have a step, or name the field: fields='step=NAME'" + (
            ", or give num_examples." if any(name in row for name in fields.epoch) else "."
        )
        raise ValueError(f"A line with {fields.metric!r} says not after how many updates: it has {', '.join(map(str, sorted(row)))}. {advice}")
    examples, epoch = _count(row, fields.examples), _count(row, epochs)
    if examples is None and epoch is not None:
        examples = epoch * num_examples
    step = _count(row, fields.step)
    if step is None and examples is None:
        return None
    updates = round(examples / batch_size if step is None else step)
    losses = (_number(row.get(name)) for name in fields.loss if name != fields.metric)
    loss = next((number for number in losses if number is not None), None)
    return Look(updates, None if examples is None else round(examples), _count(row, fields.seconds), value, loss)


def _number(value: Any) -> float | None:
    """A number, NaN among them, also if it is written as text; None: it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _count(row: Row, names: tuple[str, ...]) -> float | None:
    """The first of the named fields that is finite and not negative."""
    numbers = (_number(row.get(name)) for name in names)
    return next((number for number in numbers if number is not None and math.isfinite(number) and number >= 0), None)


class Looks:
    """The looks in a file that grows, each with more updates than the one before.

    Args:
        tail: the file.
        row_of: what a line says, by name; None: nothing.
        to_look: from a row to its look, see :func:`look_from`.
    """

    def __init__(self, tail: Tail, row_of: Callable[[str], Row | None], to_look: Callable[[Row], Look | None]):
        self.tail, self.num_looks, self.num_back = tail, 0, 0  # num_back: looks whose updates were not more than those before
        self._row_of, self._to_look, self._before, self._value = row_of, to_look, -1, math.nan

    def new(self, final: bool = False) -> Iterator[Look]:
        """The looks that have come since the last call; of several with the same updates among them, the last.

        Args:
            final: whether nothing more will come.
        """
        waiting, has_fallen = None, False
        for line in self.tail.lines(final):
            look = self._look(line, any_before=self.num_looks > 0 or waiting is not None)
            if look is None:
                continue
            last = self._before if waiting is None else waiting.updates
            if look.updates > last:
                if waiting is not None:
                    yield self._taken(waiting)
                waiting, has_fallen = look, False
            elif look.updates < last:
                self.num_back, has_fallen = self.num_back + 1, True
            elif waiting is not None and not has_fallen:
                waiting = look
            elif waiting is None and look.value != self._value:
                self.num_back += 1
        if waiting is not None:
            yield self._taken(waiting)

    def _look(self, line: str, any_before: bool) -> Look | None:
        row = self._row_of(line)
        try:
            return None if row is None else self._to_look(row)
        except ValueError:
            if any_before:  # a summary at the end, such as the best value of the run
                return None
            raise

    def _taken(self, look: Look) -> Look:
        self._before, self._value, self.num_looks = look.updates, look.value, self.num_looks + 1
        return look
