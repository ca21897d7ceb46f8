"""What is settled before JAX is loaded."""

import os
import pathlib
import subprocess
import sys

import pytest

from experiments.harness import environment
from tests.conftest import ROOT


@pytest.fixture
def started(monkeypatch, tmp_path):
    """A system whose huge pages come on request; what would be started instead of this process."""
    found = []
    pages = tmp_path / "enabled"
    pages.write_text("always [madvise] never\n")
    monkeypatch.setattr(environment, "_HUGE_PAGES", pages)
    monkeypatch.setattr(os, "execve", lambda *arguments: found.append(arguments))
    return found


def test_a_study_starts_anew_with_huge_pages_and_the_same_arguments(started):
    environ = {"HOME": "/nowhere"}
    environment.settle(environ)
    ((program, arguments, given),) = started
    assert (program, arguments[1:]) == (sys.executable, sys.orig_argv[1:])
    assert given == {"HOME": "/nowhere", "TF_CPP_MIN_LOG_LEVEL": "3", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    environment.settle(given)  # the new process does not start another
    assert len(started) == 1


def test_other_tunables_are_kept(started):
    environment.settle(environ := {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"})
    assert environ["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"


@pytest.mark.parametrize("environ", [{"JAXBATCH_HUGE_PAGES": "0"}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}])
def test_told_not_to(started, environ):
    environment.settle(environ)
    assert not started


def test_a_system_without_huge_pages(started, monkeypatch):
    monkeypatch.setattr(environment, "_HUGE_PAGES", pathlib.Path("/nowhere/enabled"))
    environment.settle({})
    assert not started


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_our_letters_gets_its_tables(tmp_path, encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    command = [
        sys.executable,
        "-m",
        "experiments.learning_rate_grid",
        "--quick",
        "--model",
        "mlp",
        "--batch-sizes",
        "60",
        "--output-dir",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr.decode(encoding)
    text = done.stdout.decode(encoding)
    assert "best rate" in text and "Figure: " in text and "?" not in text
