"""The benchmark script in small: it runs, and its records have the promised fields."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

FIELDS = {"bench", "model", "batch_size", "num_groups", "ours_ms", "peer", "peer_ms", "ratio", "over_plain"}


@pytest.mark.parametrize(
    ("arguments", "benches"),
    [
        pytest.param(["train", "--batch-sizes", "1", "30"], {"train"}, marks=pytest.mark.slow),
        pytest.param(["split", "--batch-size", "16", "--num-groups", "4"], {"split", "gradients"}, marks=pytest.mark.slow),
        pytest.param(["gradients", "--batch-size", "16"], {"gradients"}, marks=pytest.mark.slow),
        pytest.param(["coupled", "--batch-size", "16", "--parts", "3"], {"coupled"}, marks=pytest.mark.slow),
        pytest.param(["layers", "--batch-size", "3", "--shapes", "2"], {"layers"}, marks=pytest.mark.slow),
        pytest.param(["adabatch", "--models", "alexnet", "--batch-size", "4", "--num-steps", "2"], {"adabatch"}, marks=pytest.mark.slow),
        pytest.param(["language", "--batch-sizes", "2", "--sequence-length", "8"], {"language", "sequences", "dense"}, marks=pytest.mark.slow),
        (["target", "--dataset", "digits", "--accuracy", "0.3", "--batch-size", "32"], {"target"}),
        pytest.param(["noise", "--batch-sizes", "8", "130"], {"noise"}, marks=pytest.mark.slow),
        pytest.param(["huge", "--batch-sizes", "40", "130", "--microbatch-size", "10", "--models", "mlp"], {"huge"}, marks=pytest.mark.slow),
        pytest.param(["huge", "--batch-sizes", "300", "--budget", "1GiB", "--models", "mlp"], {"huge"}, marks=pytest.mark.slow),
        pytest.param(["sweep", "--rates", "2", "--seeds", "2", "--num-examples", "128", "--batch-size", "32"], {"sweep"}, marks=pytest.mark.slow),
        pytest.param(
            ["ladder", "--num-examples", "128", "--sizes", "32", "64", "--first-epochs", "2", "--epochs-each", "2"],
            {"ladder"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bench(tmp_path, arguments, benches):
    file = tmp_path / "rows.jsonl"
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), *arguments, "--rounds", "2", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["bench"] for row in rows} == benches
    for row in rows:
        assert set(row) >= FIELDS
        assert row["ours_ms"] > 0 or row["bench"] == "ladder"  # a difference of two times
        assert (row["over_plain"] is not None) == (row["bench"] in ("split", "gradients", "coupled", "huge"))
        assert row.get("gflops", 1) > 0


@pytest.mark.slow
def test_this_checkout_beside_itself(tmp_path):
    file = tmp_path / "rows.jsonl"
    script = [sys.executable, str(ROOT / "scripts" / "bench.py"), "before", "--rounds", "2"]
    command = [*script, "--checkout", str(ROOT), "--batch-sizes", "60", "--models", "AlexNet", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["bench"] for row in rows] == ["train", "train", "split", "gradients"]
    assert all(row["peer"] == "before" and 0.1 < row["ratio"] < 10 for row in rows)
    done = subprocess.run([*script, "--checkout", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no folder with jaxbatch/" in done.stderr


def test_bench_refuses_in_one_line():
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "split", "--num-groups", "7"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "num_groups=7" in done.stderr


def test_a_quick_comparison_asks_for_less_unless_flags_say_otherwise(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bench_before
    import bench_commands

    monkeypatch.setattr(bench_before, "before", lambda *asked: asked)
    assert bench_commands.Before(".", quick=True).run() == (6, ".", (1, 60, 600), ())
    assert bench_commands.Before(".", quick=True, batch_sizes=(60,), rounds=2).run() == (2, ".", (60,), ("AlexNet", "ResNet20", "VGG19BN"))
    assert bench_commands.Before(".").run() == (20, ".", (1, 6, 60, 600, 6000), ("AlexNet", "ResNet20", "VGG19BN"))
