"""The memory study from the command line, on this machine's CPU."""

import json
import pathlib
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from experiments.memory import __main__ as memory


def run(*flags):
    return subprocess.run([sys.executable, "-m", "experiments.memory", *flags], capture_output=True, text=True)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    flags = ("--quick", "--model", "mlp", "--dataset", "digits", "--targets", "here,cpu", "--budget", "100MiB", "--batch-size", "1500000")
    done = run(*flags, "--output-dir", str(folder))
    assert (done.returncode, done.stderr) == (0, "")
    return folder, flags, done.stdout


def test_answers_tables_and_figure(quick_run):
    folder, _, text = quick_run
    for part in ("Largest batch that fits", "Memory of that batch", "the largest batch that fits is", "A batch of 1,500,000 on"):
        assert part in text
    (path,) = folder.glob("memory/*/records.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    answers = {record["target"]: record for record in records if record["kind"] == "largest"}
    assert set(answers) == {"here", "cpu"}
    for target, answer in answers.items():
        sizes = {record["batch_size"]: record for record in records if record["kind"] == "size" and record["target"] == target}
        size = answer["batch_size"]
        assert answer["verified"]
        assert sizes[size]["total"] <= answer["limit"] == int(0.95 * 100 * 2**20) < sizes[size + 1]["total"]
    assert (path.parent / "figure.png").stat().st_size > 10_000


def test_nothing_is_compiled_again(quick_run):
    folder, flags, _ = quick_run
    (path,) = folder.glob("memory/*/records.jsonl")
    before = path.read_text()
    done = run(*flags, "--output-dir", str(folder))
    assert "Continuing from" in done.stdout
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--targets", "h1000"], "h100"),
        (["--budget", "much"], "budget='much'"),
        (["--margin", "1"], "--margin 1.0"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--split", "0"], "--split 0"),
        (["--model", "resnet20", "--dataset", "mnist"], "32 pixels"),
        (["--targets", "here", "--num-devices", "2"], "num_devices=2"),
        (["--budget", "1KiB", "--model", "mlp", "--targets", "cpu"], "are missing"),
        (["--model", "resnet21"], "--model resnet21"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, tmp_path):
    done = run(*flags, "--output-dir", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_a_target_that_does_not_fit_leaves_the_others_their_rows(monkeypatch):
    def measure_target(config, task, name, work):
        if name == "t4":
            raise ValueError("no batch fits on t4")
        yield {"kind": "largest", "target": name}

    monkeypatch.setattr(memory, "measure_target", measure_target)
    monkeypatch.setattr(memory, "work_by_batch_size", lambda task, optimizer: None)
    measured = []
    with pytest.raises(ValueError, match="no batch fits on t4"):
        for record in memory.measure(memory.Config(targets=("t4", "h100", "v5e")), None, SimpleNamespace(find=lambda **key: [])):
            measured.append(record["target"])
    assert sorted(measured) == ["h100", "v5e"]


BUDGET = pathlib.Path(__file__).with_name("budget_child.py")


@pytest.mark.slow
def test_the_predicted_largest_batch_runs_in_its_budget_and_a_larger_one_does_not():
    """A process may take as many bytes as the budget; the predicted batch runs, 1.15 times it does not."""
    ends = {factor: subprocess.run([sys.executable, BUDGET, str(factor)], capture_output=True, text=True) for factor in (1.0, 1.15)}
    if ends[1.0].returncode == 77:
        pytest.skip("this process may not make control groups")
    assert "ran" in ends[1.0].stdout, ends[1.0].stderr[-500:]
    assert "ran" not in ends[1.15].stdout
    assert ends[1.15].returncode == -signal.SIGKILL  # by the system, because the group is out of memory


@pytest.mark.slow
def test_a_fit_runs_in_what_was_counted_and_a_larger_evaluation_does_not():
    """A process may take what the prediction says for 1,000 test examples at a time; twice as many do not fit."""
    ends = [subprocess.run([sys.executable, BUDGET, "fit", str(size)], capture_output=True, text=True) for size in (1000, 2000)]
    if ends[0].returncode == 77:
        pytest.skip("this process may not make control groups")
    assert ends[0].stdout == "ran 10\nran 20\n", ends[0].stderr[-500:]
    assert (ends[1].stdout, ends[1].returncode) == ("", -signal.SIGKILL)
