"""What a run folder still lacks. Records are counted by what identifies them, because a run that was killed may have written any part of them.

A study that counts rows takes rows that were written twice for rows that are missing: two kills in the same place, and half a
sweep looks whole.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jaxbatch.results.records import Record, RunFolder


def identity(record: Record, names: Iterable[str]) -> tuple:
    """The values of the fields by which a record is known; None for a field that it does not have.

    Example:
        >>> identity({"kind": "run", "seed": 3, "loss": 0.1}, ("kind", "seed", "arm"))
        ('run', 3, None)
    """
    return tuple(record.get(name) for name in names)


def is_whole(records: Iterable[Record], **wanted: Iterable[Any]) -> bool:
    """Whether every combination of the wanted values has a record.

    Args:
        records: of one kind.
        wanted: by field, the values that it should take.

    Example:
        >>> rows = [{"learning_rate": 0.1, "seed": 0}, {"learning_rate": 0.1, "seed": 0}, {"learning_rate": 0.1, "seed": 1}]
        >>> is_whole(rows, learning_rate=[0.1], seed=range(2)), is_whole(rows, learning_rate=[0.1], seed=range(3))
        (True, False)
    """
    known = {identity(record, wanted) for record in records}
    return all(combination in known for combination in itertools.product(*wanted.values()))


def first_missing_round(records: Sequence[Record], rounds: int, **wanted: Iterable[Any]) -> int:
    """The first round of a measurement that is not whole, from which it is taken up; ``rounds`` if all are.

    Args:
        records: of one kind, with the field ``round``.
        rounds: how many there should be.
        wanted: see :func:`is_whole`.

    Example:
        >>> rows = [{"round": 0, "batch_size": 8}, {"round": 0, "batch_size": 16}, {"round": 1, "batch_size": 8}]
        >>> first_missing_round(rows, 5, batch_size=[8, 16]), first_missing_round(rows, 1, batch_size=[8, 16])
        (1, 1)
    """
    wanted = {name: tuple(values) for name, values in wanted.items()}
    return next((number for number in range(rounds) if not is_whole(records, **wanted, round=[number])), rounds)


def missing(records: Iterable[Record], rows: Iterable[Record], names: Sequence[str]) -> Iterator[Record]:
    """The rows that have no record of the same identity.

    Args:
        records: those that are there.
        rows: those that should be.
        names: the fields that identify them, see :func:`identity`.

    Example:
        >>> list(missing([{"seed": 0, "loss": 0.1}], [{"seed": 0, "loss": 0.1}, {"seed": 1, "loss": 0.2}], ["seed"]))
        [{'seed': 1, 'loss': 0.2}]
    """
    known = {identity(record, names) for record in records}
    for row in rows:
        if identity(row, names) not in known:
            known.add(identity(row, names))
            yield row


def append_missing(run: RunFolder, rows: Iterable[Record], names: Sequence[str]) -> None:
    """Writes the rows that are not in the run folder yet, see :func:`missing`.

    Args:
        run: the run folder.
        rows: what a measurement gave; a call that was stopped may have written some of them.
        names: the fields that identify them.

    Example:
        >>> import types
        >>> records = [{"seed": 0}]
        >>> append_missing(types.SimpleNamespace(records=records, append=records.append), [{"seed": 0}, {"seed": 1}], ["seed"])
        >>> records
        [{'seed': 0}, {'seed': 1}]
    """
    for row in missing(list(run.records), rows, names):
        run.append(row)
