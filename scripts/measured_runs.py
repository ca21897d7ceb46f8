"""The runs whose records are kept in docs/measured: how one gets there, how it is read, what its study makes of it.

A run is `<study>/<name>`: a run folder as the study wrote it, with its records compressed. `awaited.txt` lists the runs that pages name and that
are not kept yet: their tables, figures and sentences hold older numbers.
"""

import dataclasses
import functools
import gzip
import importlib
import importlib.util
import json
import pathlib
import shutil
import tempfile
from types import ModuleType
from typing import Any, NamedTuple

from jaxbatch.results.records import Record, read_records
from jaxbatch.results.report import Printed, printed

ROOT = pathlib.Path(__file__).resolve().parents[1]
MEASURED = ROOT / "docs" / "measured"


class Run(NamedTuple):
    """A run that is kept."""

    name: str  # <study>/<name>
    config: Any  # the study's own
    records: list[Record]
    provenance: Record
    report: ModuleType  # the study's print_tables and verdict
    figure: ModuleType  # its draw_figure


def keep(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Copies a run folder of a study to docs/measured, with its records compressed.

    Raises:
        ValueError: the folder is no run folder.
    """
    if not (folder / "config.json").exists() or not (folder / "records.jsonl").exists():
        raise ValueError(f"{folder}: no run folder. It must hold config.json and records.jsonl, as results/<study>/<hash> of a study does.")
    study = json.loads((folder / "config.json").read_text(encoding="utf-8"))["study"]
    kept = MEASURED / study / name
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "config.json", kept)
    compress(folder / "records.jsonl", kept)
    await_no_longer(f"{study}/{name}")
    return kept


def await_no_longer(name: str) -> None:
    """Takes a run out of the list of those that pages name and that are not kept yet."""
    file = MEASURED / "awaited.txt"
    if file.exists():
        names = file.read_text(encoding="utf-8").split()
        file.write_text("".join(f"{other}\n" for other in names if other != name), encoding="utf-8")


def compress(file: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes ``<file>.gz`` into a folder: the same bytes from the same file, whenever it is done."""
    blob = gzip.compress(file.read_bytes(), 9, mtime=0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{file.name}.gz").write_bytes(blob)


def unpack(kept: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes a kept folder's files into another folder, none of them compressed."""
    for file in kept.iterdir():
        if file.suffix == ".gz":
            (folder / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
        else:
            shutil.copy(file, folder)


def kept_runs() -> list[str]:
    """The names of all runs that are kept."""
    return sorted(str(path.parent.relative_to(MEASURED)) for path in MEASURED.glob("*/*/config.json"))


def modules_of(study: str) -> tuple[str, str, str]:
    """Where a study keeps its flags, its report and its figure."""
    if study == "advise_within":  # the second question of a study
        return "advise.within", "advise.within_report", "advise.within_figure"
    return f"{study}.__main__", f"{study}.report", f"{study}.figure"


@functools.cache
def read(name: str) -> Run:
    """A run that is kept.

    Raises:
        ValueError: there is none of this name; its configuration has a field that the study does not have any more.
    """
    kept = MEASURED / name
    if not (kept / "config.json").exists():
        raise ValueError(f"no run {name!r} is kept: there are {', '.join(kept_runs())}.")
    about = json.loads((kept / "config.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        unpack(kept, pathlib.Path(folder))
        records = read_records(pathlib.Path(folder))
    main, report_name, figure = (f"experiments.{module}" for module in modules_of(about["study"]))
    study = importlib.import_module(main)
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in about["config"].items() if key != "jaxbatch"}
    unknown = set(fields) - {field.name for field in dataclasses.fields(study.Config)}
    if unknown:
        raise ValueError(
            f"{kept / 'config.json'}: the study has no {', '.join(sorted(unknown))}. Rename the field there as it was renamed in the study."
        )
    report = importlib.import_module(report_name)
    drawing = importlib.import_module(figure) if importlib.util.find_spec(figure) else report
    return Run(name, study.Config(**fields), records, about["provenance"], report, drawing)


@functools.cache
def report_of(name: str) -> Printed:
    """The tables and lines of a run's report."""
    run = read(name)
    return printed(lambda console: run.report.print_tables(console, run.config, run.records, run.provenance))


def setting_of(name: str) -> str:
    """What was run, and on which machine, with which commit."""
    run = read(name)
    commit = run.provenance.get("commit")
    return report_of(name).lines[0].strip() + (f", commit {commit}" if commit else "")


def draw(name: str, folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws a run's figures, as `<study>_<name>.png`, into a folder."""
    run = read(name)
    with tempfile.TemporaryDirectory() as drawn_in:
        drawn = run.figure.draw_figure(run.config, run.records, pathlib.Path(drawn_in))
        figures = []
        for path in drawn if isinstance(drawn, list) else [drawn]:
            more = "" if path.stem == "figure" else f"_{path.stem}"
            figures.append(pathlib.Path(shutil.copy(path, folder / f"{name.replace('/', '_')}{more}.png")))
    return figures
