"""Advice as flat records, and back."""

import math
from collections.abc import Sequence
from typing import Any

from jaxbatch.advice.advice import Advice
from jaxbatch.advice.advising import Begun, Ran
from jaxbatch.advice.probes import Probe
from jaxbatch.advice.settling import Setting, conclude
from jaxbatch.advice.throughput import Throughput
from jaxbatch.intervals import Interval
from jaxbatch.results.records import Record, as_number
from jaxbatch.training.goals import as_goal

_LINE = ("seconds_per_update", "seconds_per_example", "knee")


def write(event: Setting | Throughput | Ran) -> Record:
    """What a search measured."""
    if isinstance(event, Setting):
        return write_setting(event)
    return write_probe(*event) if isinstance(event, Ran) else write_throughput(event)


def read_begun(records: Sequence[Record]) -> Begun:
    """What is there of a search."""
    kinds = {record["kind"] for record in records}
    setting = read_setting(records) if "setting" in kinds else None
    return Begun(setting, read_throughput(records) if "throughput" in kinds else None, tuple(read_probes(records)))


def write_setting(setting: Setting) -> Record:
    """What was settled before the first run."""
    lists = {name: list(getattr(setting, name)) for name in ("batch_sizes", "learning_rates", "rules")}
    return {
        "kind": "setting",
        **setting._asdict(),
        **lists,
        "goal": f"{setting.goal.metric}{'>' if setting.goal.above else '<'}{setting.goal.value!r}",
    }


def read_setting(records: Sequence[Record]) -> Setting:
    """What :func:`write_setting` wrote."""
    fields = dict(next(record for record in records if record["kind"] == "setting"))
    del fields["kind"]
    lists = {name: tuple(fields[name]) for name in ("batch_sizes", "learning_rates", "rules")}
    lengths = None if fields.get("run_lengths") is None else tuple(fields["run_lengths"])
    return Setting(**{**fields, **lists, "goal": as_goal(fields["goal"]), "start": as_number(fields["start"]), "run_lengths": lengths})


def write_throughput(throughput: Throughput) -> Record:
    """The times of an update. An end that is infinite is not written."""
    fields: dict[str, Any] = {"kind": "throughput", "error": throughput.error, "bound": throughput.bound}
    named = {name: getattr(throughput, name) for name in _LINE} | {f"seconds_{size}": value for size, value in throughput.seconds.items()}
    for name, value in named.items():
        fields |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high, f"{name}_n": value.n}
    ready = throughput.ready_seconds
    return fields | {"sizes": list(throughput.seconds), "ready_seconds": None if ready is None else [ready.get(size) for size in throughput.seconds]}


def read_throughput(records: Sequence[Record]) -> Throughput:
    """What :func:`write_throughput` wrote."""
    record = next(record for record in records if record["kind"] == "throughput")

    def read(name):
        ends = [record[f"{name}{end}"] for end in ("", "_low", "_high")]
        n = record[f"{name}_n"]
        # JSON has neither infinity nor NaN. With one round there are no ends; else what is missing was infinite.
        missing = [math.inf, math.nan if n == 1 else math.inf, math.nan if n == 1 else math.inf]
        return Interval(*(other if end is None else end for end, other in zip(ends, missing, strict=True)), n)

    seconds = {size: read(f"seconds_{size}") for size in record["sizes"]}
    ready = record.get("ready_seconds")  # of every size, in their order
    ready = None if ready is None else {size: value for size, value in zip(record["sizes"], ready, strict=True) if value is not None}
    return Throughput(*(read(name) for name in _LINE), seconds, record["error"], record["bound"], ready)


def write_probe(probe: Probe, number: int) -> Record:
    """A run."""
    return {"kind": "probe", "number": number, **probe._asdict()}


def read_probes(records: Sequence[Record]) -> list[Probe]:
    """The runs in their order."""
    rows = {record["number"]: record for record in records if record["kind"] == "probe"}
    known = lambda value: math.nan if value is None else value
    written = lambda row: {name: known(row[name]) for name in Probe._fields if name in row}  # older records lack some
    return [Probe(**written(rows[number])) for number in sorted(rows)]


def read_advice(records: Sequence[Record]) -> Advice:
    """The advice that follows from the records."""
    return conclude(read_setting(records), read_throughput(records), read_probes(records))
