"""The scores of advice from the files in docs/measured/score and docs/measured/within: their tables, as their scripts print them."""

import functools
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile

from jaxbatch.results.records import describe_provenance
from scripts import measured_runs

SCRIPTS = {"score": "score_advice.py", "within": "score_within.py"}


def score_folder(name: str = "score") -> pathlib.Path:
    """Where a score is kept: that of advice for a goal, or for runs of a fixed length (``"within"``)."""
    return measured_runs.MEASURED / name


def is_kept(name: str) -> bool:
    """Whether there is such a score, and its files are kept."""
    return name in SCRIPTS and score_folder(name).exists()


def keep_score(folder: pathlib.Path, name: str = "score") -> pathlib.Path:
    """Copies the files of a score (`scripts/score_advice.py --output FOLDER`, or another of ``SCRIPTS``) to docs/measured, compressed.

    Raises:
        ValueError: the folder holds none.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise ValueError(f"{folder}: no files of a score. Make them by python scripts/{SCRIPTS[name]} sweep --output {folder}.")
    for file in files:
        measured_runs.compress(file, score_folder(name))
    measured_runs.await_no_longer(name)
    # The cases may be of several commits, none of which is the one that keeps them.
    machine = {name: value for name, value in describe_provenance().items() if name not in ("commit", "dirty")}
    about = {"study": name, "provenance": machine}
    (score_folder(name) / "config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return score_folder(name)


def setting(name: str = "score") -> str:
    """The machine."""
    made_by = json.loads((score_folder(name) / "config.json").read_text(encoding="utf-8"))["provenance"]
    return f"{made_by['device']}, {made_by['num_cores']} cores, jax {made_by['jax']}"


@functools.cache
def lines(name: str = "score") -> tuple[str, ...]:
    """What the `table` of its script prints."""
    with tempfile.TemporaryDirectory() as folder:
        measured_runs.unpack(score_folder(name), pathlib.Path(folder))
        command = [sys.executable, str(measured_runs.ROOT / "scripts" / SCRIPTS[name]), "table", "--output", folder]
        return tuple(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())


def table(name: str = "score") -> str:
    """Its tables, which are printed as Markdown."""
    groups = itertools.groupby(lines(name), key=lambda line: line.startswith("|"))
    return "\n\n".join("\n".join(group) for is_table, group in groups if is_table)


def summary(name: str = "score") -> str:
    """The other lines, which say what the tables come to."""
    return "\n".join(f"- {line}" for line in lines(name) if line and not line.startswith("|"))
