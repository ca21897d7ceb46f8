"""The script for the day a GPU is at hand runs on a CPU too, with tiny sizes; a finished stage is not run again."""

import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[1] / "scripts" / "device_day.sh"


def run(*flags):
    here = {"PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix}  # the script takes python3
    return subprocess.run(["bash", str(SCRIPT), *flags], env=os.environ | here, capture_output=True, text=True)


@pytest.mark.slow
def test_stages_run_once(tmp_path):
    stages = ("check", "memory", "adabatch")
    first = run("--quick", "--output", str(tmp_path), *stages)
    assert first.returncode == 0, first.stdout + first.stderr
    for stage in stages:
        assert (tmp_path / stage / "done").exists()
        assert f"{stage}: " in first.stdout and "FAILED" not in first.stdout
    again = run("--quick", "--output", str(tmp_path), *stages)
    assert again.returncode == 0
    assert "check: " not in again.stdout.split("==")[0]  # nothing ran


def test_an_unknown_stage_is_named(tmp_path):
    done = run("--output", str(tmp_path), "nothing")
    assert done.returncode == 2
    assert "no stage nothing" in done.stderr
