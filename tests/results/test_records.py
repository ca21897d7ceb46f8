"""Run folders, intervals, timings."""

import importlib.util
import json
import math
import shutil
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest

from jaxbatch.intervals import Interval, interval
from jaxbatch.machine.timing import timed_rounds
from jaxbatch.results import records
from jaxbatch.results.records import as_number, describe_provenance, open_run, read_records
from tests.conftest import ROOT


def test_records_are_found_again(tmp_path):
    run = open_run(tmp_path, "study", {"a": 1})
    run.append({"kind": "x", "value": 1.5})
    run.append({"kind": "x", "value": float("nan"), "other": math.inf})
    again = open_run(tmp_path, "study", {"a": 1})
    assert again.path == run.path
    assert again.records == run.records == [{"kind": "x", "value": 1.5}, {"kind": "x", "value": None, "other": None}]
    assert open_run(tmp_path, "study", {"a": 2}).path != run.path
    config = json.loads((run.path / "config.json").read_text())
    assert config["config"] == {"a": 1} and {"commit", "dirty", "jax", "device"} <= set(config["provenance"])


def test_whatever_a_measurement_is_made_of_is_kept(tmp_path):
    run = open_run(tmp_path, "study", {})
    numbers = {"single": np.float32(0.5), "half": jnp.bfloat16(0.25), "count": np.int64(3), "good": np.bool_(True), "lost": np.float64("nan")}
    deep = {"losses": [1.0, math.nan, np.float32("inf")], "table": np.array([[1.0, np.nan]]), "by_layer": {"w": jnp.ones(2), 3: (1, None)}}
    run.append(numbers | deep)
    read = open_run(tmp_path, "study", {}).records
    assert (
        read
        == run.records
        == [
            {"single": 0.5, "half": 0.25, "count": 3, "good": True, "lost": None}
            | {"losses": [1.0, None, None], "table": [[1.0, None]], "by_layer": {"w": [1.0, 1.0], "3": [1, None]}}
        ]
    )
    assert type(read[0]["count"]) is int and math.isnan(as_number(read[0]["lost"]))
    with pytest.raises(TypeError, match="object"):
        run.append({"wrong": object()})
    assert read_records(run.path) == read


def test_a_line_cut_short_is_dropped_and_the_rest_goes_on(tmp_path):
    run = open_run(tmp_path, "study", {})
    run.append({"n": 1})
    with open(run.path / "records.jsonl", "a") as file:
        file.write('{"n": 2, "val')
    again = open_run(tmp_path, "study", {})
    assert again.records == [{"n": 1}]
    again.append({"n": 3})
    assert read_records(run.path) == [{"n": 1}, {"n": 3}]


def test_a_damaged_line_and_a_folder_that_cannot_be_are_named(tmp_path):
    run = open_run(tmp_path, "study", {"a": 1})
    run.append({"n": 1})
    run.append({"n": 2})
    file = run.path / "records.jsonl"
    file.write_text("not a record\n" + file.read_text())
    with pytest.raises(ValueError, match=r"records.jsonl: line 1 is damaged.*--overwrite"):
        open_run(tmp_path, "study", {"a": 1})
    with pytest.raises(ValueError, match="output_dir='/proc/nothing': no folder can be made there"):
        open_run("/proc/nothing", "study", {"a": 1})


def test_overwrite_and_refusal(tmp_path):
    open_run(tmp_path, "study", {}).append({"n": 1})
    with pytest.raises(ValueError, match="holds 1 records .* --overwrite"):
        open_run(tmp_path, "study", {}, resume=False)
    assert open_run(tmp_path, "study", {}, overwrite=True).records == []


def test_write_is_whole_or_nothing(tmp_path, monkeypatch):
    run = open_run(tmp_path, "study", {})
    run.write("state", b"old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        run.write("state", b"new")
    assert (run.path / "state").read_bytes() == b"old"


def test_provenance_names_versions_and_device():
    provenance = describe_provenance()
    assert provenance["platform"] == "cpu" and provenance["num_cores"] >= 1 and provenance["device"]


def commit_told_by(file):
    """What a copy of records.py says of where it lies."""
    spec = importlib.util.spec_from_file_location("records_elsewhere", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.describe_commit()


def git(folder, *arguments):
    settings = ["-c", "user.name=someone", "-c", "user.email=someone@example.org", "-c", "init.defaultBranch=main"]
    return subprocess.run(["git", *settings, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def make_repository(folder, file):
    """Somebody's repository of one tracked file; and a copy of records.py at ``file`` within it."""
    folder.mkdir(exist_ok=True)
    git(folder, "init")
    (folder / "their_own.py").write_text("1")
    git(folder, "add", "their_own.py")
    git(folder, "commit", "-m", "theirs")
    file.parent.mkdir(parents=True)
    shutil.copy(records.__file__, file)


def test_somebody_elses_commit_is_not_ours(tmp_path):
    nothing = {"commit": None, "dirty": None}
    installed = tmp_path / "theirs" / ".venv" / "lib" / "python3.11" / "site-packages" / "jaxbatch" / "results" / "records.py"
    make_repository(tmp_path / "theirs", installed)
    assert commit_told_by(installed) == nothing
    git(tmp_path / "theirs", "add", "-f", str(installed))  # an environment that they have committed
    assert commit_told_by(installed) == nothing
    beside = tmp_path / "flat" / "jaxbatch" / "results" / "records.py"
    make_repository(tmp_path / "flat", beside)  # `pip install --target .`
    assert commit_told_by(beside) == nothing
    alone = tmp_path / "alone" / "jaxbatch" / "results" / "records.py"
    alone.parent.mkdir(parents=True)
    shutil.copy(records.__file__, alone)
    assert commit_told_by(alone) == nothing


def test_our_own_commit_is(tmp_path, monkeypatch):
    ours = git(ROOT, "rev-parse", "--short=12", "HEAD")
    assert records.describe_commit()["commit"] == ours and isinstance(records.describe_commit()["dirty"], bool)
    checkout = tmp_path / "checkout" / "jaxbatch" / "results" / "records.py"
    make_repository(tmp_path / "checkout", checkout)
    git(tmp_path / "checkout", "add", "jaxbatch")
    git(tmp_path / "checkout", "commit", "-m", "jaxbatch")
    assert commit_told_by(checkout) == {"commit": git(tmp_path / "checkout", "rev-parse", "--short=12", "HEAD"), "dirty": False}
    checkout.write_text(checkout.read_text() + "\n")
    assert commit_told_by(checkout)["dirty"]
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "checkout" / ".git"))  # as in a hook of another repository
    assert records.describe_commit()["commit"] == ours


def test_versions_are_those_of_what_is_loaded(monkeypatch):
    monkeypatch.setattr(np, "__version__", "0.0.loaded")
    assert describe_provenance()["numpy"] == "0.0.loaded"


def test_interval_of_few_or_odd_values():
    assert interval([]).n == 0 and f"{interval([]):.1f}" == "none"
    assert f"{interval([2.0]):.1f}" == "2.0" and not interval([2.0]).excludes(0)
    lost = interval([1, 1.1, float("nan"), math.inf, None])
    assert (lost.n, lost.left_out) == (2, 3) and f"{lost:.2f}".endswith("(2 of 5)")
    assert f"{interval([math.nan, 2.0]):.1f}" == "2.0 (1 of 2)" and f"{interval([math.nan]):.1f}" == "none (0 of 1)"
    same = interval([5.0, 5.0, 5.0])
    assert same[:3] == (5.0, 5.0, 5.0) and same.excludes(4.9)
    assert f"{Interval(0.5, 0.25, 0.75, 9):.2f}" == "0.50 [0.25, 0.75]"


def test_timed_rounds_compile_first_and_shuffle():
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    rounds = list(timed_rounds(functions, 20))
    assert len(rounds) == 20 and all(set(times) == set("abc") for times in rounds)
    assert calls[:3] == ["a", "b", "c"] and len(calls) == 63
    assert len({tuple(calls[i : i + 3]) for i in range(3, 63, 3)}) > 1
    with pytest.raises(ValueError, match="rounds=0"):
        list(timed_rounds(functions, 0))
