"""A folder of checkpoints belongs to one run: others are refused, and nothing else in it is touched."""

import json

import jax
import optax
import pytest

import jaxbatch as jb
from jaxbatch.training.checkpoints import Checkpoints
from tests.training.test_checkpoints import run
from tests.training.test_train import task  # noqa: F401 (a fixture)


def test_another_run_is_refused(task, tmp_path):
    run(task, tmp_path)
    with pytest.raises(ValueError, match="holds another run .seed: 1 there, 2 here.*Take another folder"):
        run(task, tmp_path, seed=2)
    with pytest.raises(ValueError, match="batch_sizes"):
        run(task, tmp_path, batch_size=6)
    with pytest.raises(ValueError, match="every=0"):
        next(jb.fit_with_checkpoints(task, jb.FitConfig(optax.sgd(0.1), 8), tmp_path, every=0))
    with pytest.raises(ValueError, match="another model or optimizer"):
        run(task, tmp_path, optimizer=optax.adam(0.1))
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, {}, keep=0)


@pytest.mark.parametrize("names", [["3"], ["100", "200"], ["step_x"], ["12", "step_a1"]])
def test_a_user_s_own_folders_stay(task, tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("irreplaceable")
    run(task, tmp_path)
    assert run(task, tmp_path) == []
    assert all((tmp_path / name / "thesis.txt").read_text() == "irreplaceable" for name in names)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "about.json", "step_12", "step_6"])


def test_checkpoints_of_nobody_knows_whom_are_refused(task, tmp_path):
    (tmp_path / "step_3").mkdir()
    (tmp_path / "step_3" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(ValueError, match="holds step_3 but no about.json.*Take another folder"):
        run(task, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_3"] and (tmp_path / "step_3" / "thesis.txt").exists()


def test_a_folder_of_an_earlier_format_is_refused(task, tmp_path):
    run(task, tmp_path)
    about = json.loads((tmp_path / "about.json").read_text())
    (tmp_path / "about.json").write_text(json.dumps({name: value for name, value in about.items() if name != "format"}))
    with pytest.raises(ValueError, match="holds another run .format: None there, 2 here"):
        run(task, tmp_path)


def test_other_data_of_the_same_size_are_refused(task, tmp_path):
    run(task, tmp_path)
    other = jax.tree.map(lambda leaf: leaf.at[0].add(1e-3), task.train_data)
    with pytest.raises(ValueError, match="holds another run .data: "):
        run(task._replace(train_data=other), tmp_path)


def test_a_diverged_state_is_not_kept(task, tmp_path):
    config = jb.FitConfig(optax.sgd(1e20), 8, jb.epochs(4), seed=1)
    *_, last = jb.fit_with_checkpoints(task, config, tmp_path)
    assert last["diverged"]
    *_, again = jb.fit_with_checkpoints(task, config, tmp_path)
    assert again["diverged_at_batch"] == last["diverged_at_batch"]
