"""A run folder keeps a study's configuration, its provenance (code version, device) and its measurements.

``<output_dir>/<study>/<hash of the configuration>/`` holds ``config.json``, figures and ``records.jsonl`` (append-only, one
flat record a line). Each measurement is written immediately. The same command finds the same folder and continues from there.
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
import jax.numpy as jnp
import numpy as np

from jaxbatch.machine.cores import num_cores
from jaxbatch.paths import local_path

Record = dict[str, Any]


class RunFolder:
    """An open run folder. ``records`` holds the records of earlier calls of the same command and of this call."""

    def __init__(self, path: pathlib.Path, records: list[Record], provenance: Record):
        self.path = path
        self.records = records
        self.provenance = provenance  # of the call that made the folder

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one record and makes sure it is on disk before returning."""
        flat = {str(key): as_json(value) for key, value in record.items()}
        with open(self.path / "records.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(flat, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(flat)

    def find(self, **key: Any) -> list[Record]:
        """The records that have the values of ``key`` in all of its fields."""
        return [record for record in self.records if all(record.get(name) == value for name, value in key.items())]

    def write(self, name: str, blob: bytes) -> None:
        """Writes a file completely or not at all."""
        part = self.path / f"{name}.part"
        part.write_bytes(blob)
        part.replace(self.path / name)


def as_json(value: Any) -> Any:
    """A value of a record as JSON has it, at any depth: NumPy's and JAX's numbers and arrays as plain numbers and lists.

    JSON has no NaN or infinity: a measurement that is not finite becomes None, which :func:`as_number` reads.

    Raises:
        TypeError: it is something else than numbers, words, None, and lists, arrays, tuples and mappings of them.

    Example:
        >>> as_json({"loss": np.float32(0.5), "losses": [1.0, float("nan")], "sizes": np.arange(2), "good": np.bool_(True)})
        {'loss': 0.5, 'losses': [1.0, None], 'sizes': [0, 1], 'good': True}
    """
    if isinstance(value, Mapping):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        number = np.asarray(value)
        return as_json(number.astype(np.float64).tolist() if jnp.issubdtype(number.dtype, jnp.floating) else number.tolist())
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"{value!r} of type {type(value).__name__} is nothing that a record can hold.")


def as_number(value: float | None) -> float:
    """A measurement of a record; NaN for None, which stands for one that was not finite.

    Example:
        >>> as_number(0.5), as_number(None)
        (0.5, nan)
    """
    return math.nan if value is None else float(value)


def open_run(
    output_dir: str | os.PathLike,
    study: str,
    config: Mapping[str, Any],
    *,
    resume: bool = True,
    overwrite: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> RunFolder:
    """Opens, or makes, the run folder of a configuration.

    Args:
        output_dir: parent of all run folders.
        study: the study's name.
        config: everything that determines the results, JSON values only; its hash names the folder.
        resume: whether to continue from existing records.
        overwrite: whether to remove existing records first.
        facts: further ones to store with :func:`describe_provenance` when the folder is made.

    Raises:
        ValueError: there are records and neither ``resume`` nor ``overwrite`` is given; the folder cannot be made; a record is
            damaged.
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
        provenance = describe_provenance() | dict(facts or {})
        folder = RunFolder(path, records, provenance)
        folder.write(
            "config.json",
            json.dumps({"study": study, "config": dict(config), "provenance": provenance}, indent=2).encode(),
        )
    return RunFolder(path, records, provenance)


def make_run_folder(output_dir: str | os.PathLike, study: str, config: Mapping[str, Any]) -> pathlib.Path:
    """The folder of a configuration. It is made if it does not exist; existing files stay.

    Raises:
        ValueError: the folder cannot be made.
    """
    text = json.dumps(dict(config), sort_keys=True)
    path = local_path(output_dir, "output_dir") / study / hashlib.sha256(text.encode()).hexdigest()[:10]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir={os.fspath(output_dir)!r}: no folder can be made there ({error.strerror}).") from None
    return path


def read_records(path: pathlib.Path) -> list[Record]:
    """The records of a run folder. An incomplete last line, from a run that was killed, is removed from the file."""
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
    """The commit, versions and device, which are needed to judge a measurement later."""
    # The versions of the loaded modules, because other versions may be installed under the same names.
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
    """``commit`` and ``dirty`` (uncommitted changes) of the Git checkout that tracks this package; None if none does.

    A copy of the package may be installed inside another repository, whose commit says nothing about the package.
    """
    folder = pathlib.Path(__file__).resolve().parent
    # In a hook, Git sets these variables, and they may name another repository.
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
    """The processor's name, if the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
