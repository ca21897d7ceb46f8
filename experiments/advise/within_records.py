"""Advice for runs of a fixed length as flat records, and back."""

import math
from collections.abc import Sequence
from typing import Any

from experiments.advise.records import read_throughput, write_throughput
from jaxbatch.advice.end_advising import EndBegun, EndRan, EndSetting
from jaxbatch.advice.end_estimate import EndSpace
from jaxbatch.advice.end_law import Scale
from jaxbatch.advice.end_request import as_metric
from jaxbatch.advice.ending import Ending
from jaxbatch.advice.throughput import Throughput
from jaxbatch.results.records import Record

_LENGTHS = ("num_steps", "payable_steps")  # by batch size, whose keys JSON would make texts of


def write(event: Throughput | EndSetting | EndRan) -> Record:
    """What a search measured."""
    if isinstance(event, EndSetting):
        return write_setting(event)
    if isinstance(event, EndRan):
        return {"kind": "ending", "number": event.number, **event.ending._asdict()}
    return write_throughput(event)


def write_setting(setting: EndSetting) -> Record:
    """What was settled before the first run."""
    space: dict[str, Any] = setting.space._asdict()
    space |= {name: list(space[name]) for name in ("batch_sizes", "learning_rates")}
    space |= {name: [space[name][size] for size in setting.space.batch_sizes] for name in _LENGTHS}
    space |= {f"scale_{name}": value for name, value in space.pop("scale")._asdict().items()}
    fields = {"num_examples": setting.num_examples, "largest_batch_size": setting.largest_batch_size, "rules": list(setting.rules)}
    return {"kind": "setting", "metric": str(setting.metric), **space, **fields}


def read_setting(records: Sequence[Record]) -> EndSetting:
    """What :func:`write_setting` wrote."""
    fields = dict(next(record for record in records if record["kind"] == "setting"))
    sizes = tuple(fields["batch_sizes"])
    scale = Scale(**{name: fields[f"scale_{name}"] for name in Scale._fields})
    lengths = {name: dict(zip(sizes, fields[name], strict=True)) for name in _LENGTHS}
    start = math.nan if fields["start"] is None else fields["start"]
    space = EndSpace(sizes, tuple(fields["learning_rates"]), scale=scale, start=start, length=fields["length"], **lengths)
    return EndSetting(as_metric(fields["metric"]), space, fields["num_examples"], fields["largest_batch_size"], tuple(fields["rules"]))


def read_endings(records: Sequence[Record]) -> tuple[Ending, ...]:
    """The runs in their order."""
    rows = {record["number"]: record for record in records if record["kind"] == "ending"}
    known = lambda value: math.nan if value is None else value

    def read(row: Record) -> Ending:
        looks = tuple((updates, known(value)) for updates, value in row["looks"])
        return Ending(**{name: known(row[name]) for name in Ending._fields} | {"looks": looks})

    return tuple(read(rows[number]) for number in sorted(rows))


def read_begun(records: Sequence[Record]) -> EndBegun:
    """What is there of a search."""
    kinds = {record["kind"] for record in records}
    throughput = read_throughput(records) if "throughput" in kinds else None
    return EndBegun(throughput, read_setting(records) if "setting" in kinds else None, read_endings(records))
