"""The file that a cross-check saves for another machine (records, digests and numbers), and the comparison with it."""

import errno
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.cross_check.cases.run import Output

_FORMAT = 1


class Pair(NamedTuple):
    """The same computation here and on the other machine."""

    computation: str
    size: str
    form: str
    precision: str
    here: str  # backend
    there: str
    relation: str  # "bit-equal", "within" or "apart"
    difference: float
    allowed: float


def save(path: pathlib.Path, outputs: Sequence[Output], machines: dict) -> None:
    """Writes the whole file, or nothing if this fails."""
    about = {"format": _FORMAT, "machines": machines, "records": [output.record for output in outputs]}
    file = io.BytesIO()
    np.savez_compressed(file, about=np.array(json.dumps(about)), **{f"output_{n}": one.kept for n, one in enumerate(outputs)})
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(file.getvalue())
    part.replace(path)


def check_save(path: pathlib.Path) -> None:
    """Raises a ValueError if :func:`save` could not write here; called before minutes of computing."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        part.touch()
        part.unlink()
    except OSError as error:
        raise ValueError(f"--save {path}: no file can be written there ({error.strerror}).") from None


def load(path: pathlib.Path) -> tuple[list[Output], dict]:
    """Reads a file that :func:`save` has written.

    Raises:
        ValueError: the file was not written by :func:`save`.
        FileNotFoundError: there is no file.
    """
    try:
        with open(path, "rb") as handle, np.load(handle) as file:
            about = json.loads(str(file["about"]))
            outputs = [Output(record, file[f"output_{n}"]) for n, record in enumerate(about["records"])]
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a file that --save wrote ({type(error).__name__}: {error}). Save it again.") from error
    if about["format"] != _FORMAT:
        raise ValueError(f"{path} was saved in format {about['format']}, but this version reads format {_FORMAT}. Save it again.")
    return outputs, about["machines"]


def load_others(path: pathlib.Path, seed: int) -> list[Output]:
    """Reads what another machine has saved for the same inputs.

    Raises:
        ValueError: there is no such file, or it has other inputs.
    """
    others, _ = load(path)
    seeds = {output.record["seed"] for output in others}
    if seeds and seed not in seeds:
        raise ValueError(f"--against {path}: its inputs were made with --seed {min(seeds)}, not {seed}. Use --seed {min(seeds)}.")
    return others


def compare(outputs: Sequence[Output], others: Sequence[Output]) -> list[Pair]:
    """Compares every computation that is in both, for every pair of backends."""
    there: dict[tuple, list[Output]] = {}
    for output in others:
        there.setdefault(_key(output), []).append(output)
    pairs = []
    for one in outputs:
        for other in there.get(_key(one), []):
            difference, allowed = _difference(one, other), one.record["bound"] + other.record["bound"]
            equal = one.record["digest"] == other.record["digest"] != ""
            relation = "bit-equal" if equal else "within" if difference <= allowed else "apart"
            pairs.append(Pair(*_key(one), one.record["backend"], other.record["backend"], relation, difference, allowed))
    return pairs


def _key(output: Output) -> tuple:
    return tuple(output.record[name] for name in ("computation", "size", "form", "precision"))


def _difference(one: Output, other: Output) -> float:
    if one.kept.shape != other.kept.shape or one.kept.size == 0:
        return float("nan")
    return float(np.linalg.norm(one.kept - other.kept) / max(np.linalg.norm(other.kept), 1e-300))
