"""Benchmark of start-up: importing, printing --help, a study's first and second run."""

import os
import subprocess
import sys
import tempfile

from side_by_side import make_rows

from jaxbatch.machine.timing import timed_rounds


def startup(rounds: int) -> list[dict]:
    """Times whole processes, in milliseconds."""
    python = sys.executable

    def process(*arguments, **environ):
        environ = {**os.environ, **environ}
        return lambda: subprocess.run([python, *arguments], check=True, capture_output=True, env=environ)

    imports = {
        "ours": process("-c", "import jaxbatch"),
        "import jax, flax, optax": process("-c", "import jax, flax, optax"),
    }
    rows = make_rows("startup", "import jaxbatch", 0, 0, list(timed_rounds(imports, rounds)))
    answers = {
        "ours": process("-m", "experiments.split_backward", "--help"),
        "import jax, flax, optax": imports["import jax, flax, optax"],
    }
    rows += make_rows("startup", "split_backward --help", 0, 0, list(timed_rounds(answers, rounds)))
    with tempfile.TemporaryDirectory() as folder:
        quick = ("-m", "experiments.split_backward", "--quick", "--overwrite", "--output-dir", folder)
        runs = {
            "ours": process(*quick, XDG_CACHE_HOME=os.path.join(folder, "cache")),
            "--no-keep-compiled": process(*quick, "--no-keep-compiled"),
        }
        times = list(timed_rounds(runs, min(rounds, 3)))  # its first round, which it does not yield, fills the cache
    return rows + make_rows("startup", "split_backward --quick", 64, 4, times)
