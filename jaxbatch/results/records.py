"""A run folder: what was asked, on what it ran, every measurement as one line, written the moment it is made.

``<output_dir>/<study>/<hash of the configuration>/`` holds ``config.json``, ``records.jsonl`` (append-only, one
flat record a line) and figures. The same command finds the same folder and goes on from what is there.
"""

import hashlib
import importlib
import json
import math
import os
import pathlib
import platform
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

import jax

from jaxbatch.machine.cores import num_cores
from jaxbatch.paths import local_path

Record = dict[str, Any]


class RunFolder:
    """An open run folder. ``records`` are those of earlier calls of the same command and of this one."""

    def __init__(self, path: pathlib.Path, records: list[Record], provenance: Record):
        self.path = path
        self.records = records
        self.provenance = provenance  # of the call that began the folder

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one record and makes sure it is on disk before returning."""
        # JSON has no NaN or infinity; a measurement that is not finite becomes null.
        flat = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
        with open(self.path / "records.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(flat, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(flat)

    def find(self, **key: Any) -> list[Record]:
        """The records that agree with ``key`` in every field it names."""
        return [record for record in self.records if all(record.get(name) == value for name, value in key.items())]

    def write(self, name: str, blob: bytes) -> None:
        """Writes a file whole or not at all."""
        part = self.path / f"{name}.part"
        part.write_bytes(blob)
        part.replace(self.path / name)


def open_run(
    output_dir: str | os.PathLike,
    study: str,
    config: Mapping[str, Any],
    *,
    resume: bool = True,
    overwrite: bool = False,
    found: Mapping[str, Any] | None = None,
) -> RunFolder:
    """Opens, or makes, the run folder of a configuration.

    Args:
        output_dir: parent of all run folders.
        study: the study's name.
        config: what decides the results, JSON values only; its hash names the folder.
        resume: whether to go on from records that are there.
        overwrite: remove what is there first.
        found: what is written down beside :func:`describe_provenance` when the folder is begun.

    Raises:
        ValueError: records are there and neither ``resume`` nor ``overwrite`` is given; a folder that cannot be made; a
            damaged record.
    """
    path = make_run_folder(output_dir, study, config)
    if overwrite:
        shutil.rmtree(path)
        path.mkdir()
    records = read_records(path)
    if records and not resume:
        raise ValueError(f"{path} holds {len(records)} records of this configuration. Add --resume or --overwrite.")
    config_file = path / "config.json"
    if config_file.exists():
        provenance = json.loads(config_file.read_text(encoding="utf-8"))["provenance"]
    else:
        provenance = describe_provenance() | dict(found or {})
        folder = RunFolder(path, records, provenance)
        folder.write(
            "config.json",
            json.dumps({"study": study, "config": dict(config), "provenance": provenance}, indent=2).encode(),
        )
    return RunFolder(path, records, provenance)


def make_run_folder(output_dir: str | os.PathLike, study: str, config: Mapping[str, Any]) -> pathlib.Path:
    """The folder of a configuration, made where it is not there; what it holds stays.

    Raises:
        ValueError: it cannot be made.
    """
    text = json.dumps(dict(config), sort_keys=True)
    path = local_path(output_dir, "output_dir") / study / hashlib.sha256(text.encode()).hexdigest()[:10]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir={os.fspath(output_dir)!r}: no folder can be made there ({error.strerror}).") from None
    return path


def read_records(path: pathlib.Path) -> list[Record]:
    """The records of a run folder. A last line cut short by a kill is removed from the file."""
    file = path / "records.jsonl"
    if not file.exists():
        return []
    whole, newline, rest = file.read_bytes().rpartition(b"\n")
    if rest:
        with open(file, "r+b") as handle:
            handle.truncate(len(whole) + len(newline))
    records = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            raise ValueError(f"{file}: line {number} is damaged. Remove the line, or start afresh with --overwrite.") from None
    return records


def describe_provenance() -> Record:
    """Commit, versions and device: what a number needs to be believed later."""
    # Those of the modules that are loaded here: another of the same name may be installed.
    versions = {name: importlib.import_module(name).__version__ for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    device = jax.devices()[0]
    return {
        **describe_commit(),
        "python": platform.python_version(),
        **versions,
        "platform": device.platform,
        "device": describe_cpu() if device.platform == "cpu" else device.device_kind,
        "num_devices": jax.device_count(),
        "num_cores": num_cores(),
    }


def describe_commit() -> Record:
    """``commit`` and ``dirty`` of the checkout that this package is a tracked part of; None where it is of none.

    An environment inside somebody's own repository holds a copy of the package: that repository's commit says nothing of it.
    """
    folder = pathlib.Path(__file__).resolve().parent
    # A hook that Git runs names another repository in these.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments):
        command = ["git", *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", pathlib.Path(__file__).name)
        if pathlib.Path(git("rev-parse", "--show-toplevel")).resolve() != folder.parents[1]:  # jaxbatch/results
            return {"commit": None, "dirty": None}
        return {"commit": git("rev-parse", "--short=12", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def describe_cpu() -> str:
    """The processor's name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
