"""The benchmark script in small: it runs, and its records have the promised fields."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

FIELDS = {"bench", "model", "batch_size", "num_groups", "ours_ms", "peer", "peer_ms", "ratio"}


@pytest.mark.parametrize(
    ("arguments", "benches"),
    [
        (["train", "--batch-sizes", "1", "30"], {"train"}),
        (["split", "--batch-size", "16", "--num-groups", "4"], {"split", "gradients"}),
        (["gradients", "--batch-size", "16"], {"gradients"}),
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
        assert set(row) >= FIELDS and row["ours_ms"] > 0
        assert (row["bench"] == "train") or row["over_plain"] > 0


def test_bench_refuses_in_one_line():
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "split", "--num-groups", "7"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "num_groups=7" in done.stderr
