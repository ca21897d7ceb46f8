"""docs/any_script.md: every adapter on it, as it stands there, is advised with the real library."""

import importlib.util
import sys

import pytest

import jaxbatch as jb
from experiments.advise.command_runs import CommandRuns, CommandSettings
from tests.conftest import ROOT
from tests.docs.code_blocks import code_blocks, run_block

BLOCKS = code_blocks("any_script.md")
PEERS = {"Hugging Face Trainer 0": ("transformers", "accelerate"), "Keras 0": ("keras",), "Lightning 0": ("lightning",)}
ARGUMENTS = "--batch-size {batch_size} --lr {learning_rate} --seed {seed}"


def check(advice):
    """The advised setting was run and reached the goal, and what is expected of it is near what runs needed."""
    reached = [probe for probe in advice.probes if probe.reached]
    best = [probe for probe in reached if (probe.batch_size, probe.learning_rate) == (advice.batch_size, advice.learning_rate)]
    assert best and 0 < advice.choice.updates.value <= 1.5 * max(probe.updates for probe in reached)
    assert not any("failed" in doubt or "memory" in doubt for doubt in advice.doubts), advice.doubts


def test_every_block_is_run():
    assert len(BLOCKS) == 9 and set(PEERS) <= set(BLOCKS)


def test_numpy():
    run = run_block(BLOCKS["A generator 0"], "NumPy")["run"]
    settings = {"batch_sizes": [32, 128], "learning_rates": [0.1, 0.3, 1.0], "max_probes": 5, "on_progress": None}
    advice = jb.advise_runs(run, "val_loss<0.3", **settings)
    check(advice)
    assert len(advice.probes) == 5
    values = [look.value for look in run(advice.batch_size, advice.learning_rate, seed=99)]
    assert min(values) < 0.3 < values[0]


def test_the_call_for_numpy(capsys):
    names = run_block(BLOCKS["A generator 0"], "NumPy")
    advice = run_block(BLOCKS["A generator 1"], "NumPy", **names)["advice"]
    check(advice)
    assert 6 < len(advice.probes) <= 16 and advice.learning_rate >= 0.1
    said = capsys.readouterr()
    assert said.out.startswith("Train with batch size") and "jaxbatch.advise: run 1: B = 32" in said.err


def test_numpy_at_a_fixed_length():
    names = run_block(BLOCKS["A generator 0"], "NumPy")
    advice = run_block(BLOCKS["A generator 2"], "NumPy", **names)["advice"]
    assert advice.batch_size in (8, 32, 128) and 0.1 <= advice.learning_rate <= 3.16
    assert not any("failed" in doubt for doubt in advice.doubts)


def test_scikit_learn():
    run = run_block(BLOCKS["scikit-learn 0"], "scikit-learn")["run"]
    settings = {"batch_sizes": [32, 128], "learning_rates": [0.03, 0.1, 0.3], "max_probes": 4, "longest": jb.steps(100)}
    advice = jb.advise_runs(run, "val_loss<0.7", **settings, on_progress=None)
    check(advice)
    assert len(advice.probes) == 4


@pytest.mark.slow
def test_pytorch():
    pytest.importorskip("torch")
    run = run_block(BLOCKS["PyTorch 0"], "PyTorch")["run"]
    advice = jb.advise_runs(run, "accuracy>0.9", batch_sizes=[16, 64, 256], max_probes=16, longest=jb.steps(1000), on_progress=None)
    check(advice)
    assert 1e-3 <= advice.learning_rate <= 0.1


def advise_command(script, goal, folder, **settings):
    """Advice for a script by its command, as ``python -m experiments.advise --command`` makes its runs."""
    metric = jb.as_goal(goal).metric
    runs = CommandRuns(CommandSettings(f"{sys.executable} {script} {ARGUMENTS}", metric, folder / "logs"))
    advice = jb.advise_runs(runs.run, goal, batch_sizes=[16, 64], **settings, on_progress=None)
    assert len(list((folder / "logs").iterdir())) == len(advice.probes)
    return advice


@pytest.mark.slow
def test_the_pytorch_script(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    script = ROOT / "docs" / "examples" / "train_digits.py"
    lines = script.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 65 and sum("json" in line for line in lines) == 2  # its import and the print
    (line,) = BLOCKS["A command 0"].splitlines()
    assert line in lines
    advice = advise_command(script, "accuracy>0.95", tmp_path, learning_rates=[0.01, 0.03, 0.1], max_probes=6)
    check(advice)


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_a_library_that_owns_the_loop(name, tmp_path, monkeypatch):
    for library in PEERS[name]:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"needs {library}: pip install -e '.[peers]'")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    if name.startswith("Keras"):
        monkeypatch.setenv("KERAS_BACKEND", "jax")
    (tmp_path / "train.py").write_text(BLOCKS[name], encoding="utf-8")
    goal = "eval_loss<0.3" if name.startswith("Hugging") else "val_loss<0.3"
    advice = advise_command(tmp_path / "train.py", goal, tmp_path, learning_rates=[0.001, 0.003, 0.01], max_probes=5)
    check(advice)
    assert all(1e-4 < seconds.value < 1 for seconds in advice.throughput.seconds.values())
    assert all(probe.updates % (10 if "Keras" not in name else 1) == 0 for probe in advice.probes)
