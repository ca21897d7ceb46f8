"""The script for the day a GPU is at hand: turns, limits and going on with a stand-in for Python; tiny sizes on a CPU; data in small parts."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "scripts" / "device_day.sh"
STAGES = ["adabatch", "target", "sweep", "networks", "advise", "check", "split"]
# Notes its arguments. AlexNet takes longer than a turn the first time; ResNet-20 fails as long as there is a file named broken.
STAND_IN = """#!/usr/bin/env bash
cd "$(dirname "$0")"
echo "$*" >> calls
case "$*" in
  *default_backend*) echo cpu ;;
  *experiments.adabatch*alexnet*) [ -e begun ] || { touch begun; sleep 60; } ;;
  *experiments.adabatch*resnet20*) [ ! -e broken ] ;;
esac
"""


def run(*flags, **env):
    here = {"PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix}  # the script takes python3
    around = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}  # the script has its own by default
    return subprocess.run(["bash", str(SCRIPT), *map(str, flags)], env=around | here | env, capture_output=True, text=True)


@pytest.fixture
def pretend(tmp_path):
    (tmp_path / "python3").write_text(STAND_IN)
    (tmp_path / "python3").chmod(0o755)
    for name in ("mnist", "cifar-10-batches-bin"):
        (tmp_path / "data" / name).mkdir(parents=True)

    def call(*flags):
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JAXBATCH_DATA_DIR": str(tmp_path / "data")}
        return run("--output", tmp_path / "out", "--stage-seconds", 5, *flags, **env)

    call.calls = lambda: (tmp_path / "calls").read_text().splitlines()
    call.folder = tmp_path
    return call


def test_a_stage_whose_turn_is_over_goes_on_after_the_others(pretend):
    done = pretend()
    assert done.returncode == 0, done.stdout
    told = [line for line in done.stdout.split("\n==")[0].splitlines() if line]
    assert [line.split(":")[0] for line in told] == [*STAGES, "adabatch"]
    assert told[0].endswith("goes on where it stopped") and all(line.endswith(", done") for line in told[1:])
    trained = [call.split("--model ")[1].split()[0] for call in pretend.calls() if "experiments.adabatch" in call]
    assert trained == ["resnet20", "alexnet", "alexnet"]  # what is done is not run again
    assert pretend().returncode == 0 and len([call for call in pretend.calls() if "experiments.adabatch" in call]) == 3


def test_what_is_left_when_the_time_is_over_is_said_and_a_failure_too(pretend):
    (pretend.folder / "broken").touch()
    done = pretend("--minutes", 0, "split")
    assert done.returncode == 3 and done.stdout.endswith("To go on: split\n")
    (pretend.folder / "begun").touch()
    done = pretend("adabatch", "sweep")
    assert done.returncode == 1 and re.search(r"adabatch: \d+ s, FAILED\nsweep: \d+ s, done\n", done.stdout)
    (pretend.folder / "broken").unlink()
    assert pretend("adabatch").returncode == 0


def test_a_stage_without_its_data_says_so(pretend):
    (pretend.folder / "data" / "mnist").rmdir()
    done = pretend("target", "split")
    assert "mnist is not in" in done.stdout and "left out" in done.stdout and re.search(r"split: \d+ s, done", done.stdout)
    assert not (pretend.folder / "out" / "target" / "done").exists()


def test_an_unknown_stage_is_named(tmp_path):
    done = run("--output", tmp_path, "nothing")
    assert done.returncode == 2
    assert "no stage nothing" in done.stderr


@pytest.mark.slow
def test_all_stages_run_in_small_and_keep_their_programs(tmp_path):
    done = run("--quick", "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all((tmp_path / stage / "done").exists() for stage in STAGES)
    rows = [json.loads(line) for file in tmp_path.glob("*/*.jsonl") for line in file.read_text().splitlines()]
    assert {row["bench"] for row in rows} == {"target", "sweep", "adabatch", "updates", "split", "gradients"}
    assert {row["batch_size"] for row in rows if row["bench"] == "updates"} == {1, 8}
    assert {row["model"] for row in rows if row["bench"] == "split"} == {"simple_cnn", "simple_cnn, one vector"}
    assert any((tmp_path / "compiled").iterdir())


def test_packed_data_are_the_official_ones_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import carry_data

    from jaxbatch.data import published

    random, version = np.random.default_rng(0), published.CIFAR["cifar10"][0]
    (tmp_path / version.folder).mkdir()
    facts = {}
    for name in version.files:  # 130 images each fill no row of the large image
        rows = np.zeros(130 * 3073, np.uint8)
        rows[random.integers(0, len(rows), 999)] = random.integers(0, 256, 999)  # few, because noise takes long to compress
        blob = rows.tobytes()
        (tmp_path / version.folder / name).write_bytes(blob)
        facts[name] = published.FileFacts(len(blob), None)
    monkeypatch.setitem(carry_data.CIFAR, "cifar10", (version._replace(files=facts),))
    parts = carry_data.pack(carry_data.Config("pack", tmp_path, tmp_path / "parts"))
    assert [path.name for path in parts] == ["cifar10_1of2.npz", "cifar10_2of2.npz"]
    aside = parts[1].rename(tmp_path / "aside")
    unpack = carry_data.Config("unpack", tmp_path / "new", tmp_path / "parts")
    assert [path.name for path in carry_data.unpack(unpack)] == list(version.files)[:3]  # the part that is there
    aside.rename(parts[1])
    assert len(carry_data.unpack(unpack)) == 6
    for name in version.files:
        assert (tmp_path / "new" / version.folder / name).read_bytes() == (tmp_path / version.folder / name).read_bytes()
    monkeypatch.setitem(facts, "test_batch.bin", published.FileFacts(facts["test_batch.bin"].length, "0" * 64))
    (tmp_path / "new" / version.folder / "test_batch.bin").unlink()
    with pytest.raises(ValueError, match="its checksum is"):
        carry_data.unpack(unpack)
