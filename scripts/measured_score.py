"""The score of advice from the files in docs/measured/score: its table, as scripts/score_advice.py prints it."""

import functools
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile

from jaxbatch.results.records import describe_provenance
from scripts import measured_runs


def score_folder() -> pathlib.Path:
    """Where they are kept."""
    return measured_runs.MEASURED / "score"


def keep_score(folder: pathlib.Path) -> pathlib.Path:
    """Copies the files of a score (`scripts/score_advice.py --output FOLDER`) to docs/measured, compressed.

    Raises:
        ValueError: the folder holds none.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise ValueError(f"{folder}: no files of a score. Make them by python scripts/score_advice.py sweep --output {folder}.")
    for file in files:
        measured_runs.compress(file, score_folder())
    measured_runs.await_no_longer("score")
    # The cases may be of several commits, none of which is the one that keeps them.
    machine = {name: value for name, value in describe_provenance().items() if name not in ("commit", "dirty")}
    about = {"study": "score", "provenance": machine}
    (score_folder() / "config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return score_folder()


def setting() -> str:
    """The machine."""
    made_by = json.loads((score_folder() / "config.json").read_text(encoding="utf-8"))["provenance"]
    return f"{made_by['device']}, {made_by['num_cores']} cores, jax {made_by['jax']}"


@functools.cache
def lines() -> tuple[str, ...]:
    """What `scripts/score_advice.py table` prints."""
    with tempfile.TemporaryDirectory() as folder:
        measured_runs.unpack(score_folder(), pathlib.Path(folder))
        command = [sys.executable, str(measured_runs.ROOT / "scripts" / "score_advice.py"), "table", "--output", folder]
        return tuple(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())


def table() -> str:
    """Its tables, which are printed as Markdown."""
    groups = itertools.groupby(lines(), key=lambda line: line.startswith("|"))
    return "\n\n".join("\n".join(group) for is_table, group in groups if is_table)


def summary() -> str:
    """The other lines, which say what the tables come to."""
    return "\n".join(f"- {line}" for line in lines() if line and not line.startswith("|"))
