"""``--within``: the longest run of a study in any unit."""

import types

import numpy as np
import pytest
from rich.console import Console

import jaxbatch as jb
from experiments.convergence import __main__ as convergence
from experiments.critical_batch_size import __main__ as critical_batch_size
from experiments.harness.command_line import parse
from experiments.harness.lengths import check_within, longest_run
from experiments.harness.rate_grid import measure_grid
from experiments.harness.study import open_study
from experiments.harness.target import bound_words, num_updates
from experiments.harness.task import load_choosing_task
from experiments.large_batch import __main__ as large_batch
from experiments.learning_rate_grid import __main__ as learning_rate_grid
from jaxbatch.training.tasks import updates_of
from tests.experiments.test_command_line import ended
from tests.experiments.test_user_task import GRID, LINEAR, write

STUDIES = (convergence, learning_rate_grid, critical_batch_size, large_batch)
TASK = jb.Task(lambda key: np.zeros(2), lambda w, x: (x @ w) ** 2, lambda w, x: {"loss": (x @ w) ** 2}, np.ones((24, 2)), np.ones((4, 2)))


def flags_of(folder, study):
    return ["--task", write(folder, LINEAR), "--quick"] + ([] if study is large_batch else ["--target", "loss<-1"])


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.__name__.split(".")[-2])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--within", "5"], "--within 5 must be a number with its unit"),
        (["--within", "60seconds"], "--within 60seconds must be above 0 and in epochs, examples, tokens or steps"),
        (["--within", "0steps"], "--within 0steps must be above 0"),
        (["--within", "1,5epochs"], "--within 1,5epochs must be a number with its unit"),
        (["--within", "2000.5steps"], "--within 2000.5steps: steps=2000.5"),
        (["--within", "500tokens"], "tokens_per_example"),
        (["--within", "60examples", "--epochs", "2"], "--within 60examples and --epochs both give the longest run: give one."),
    ],
    ids=["unit", "seconds", "zero", "comma", "half", "tokens", "both"],
)
def test_wrong_lengths_are_one_line(study, flags, message, tmp_path, capsys):
    assert message in ended(study.main, [*flags_of(tmp_path, study), *flags, "--output-dir", str(tmp_path)], capsys)


def test_the_grid_makes_runs_of_that_length(tmp_path):
    def rows(*flags):
        config = parse(
            learning_rate_grid.Config, "", [*flags_of(tmp_path, learning_rate_grid), *GRID, "--seeds", "1", *flags, "--output-dir", str(tmp_path)]
        )
        task, _ = load_choosing_task(config)
        config = learning_rate_grid.resolve(config, task)
        run = open_study("learning_rate_grid", config, Console(), task)
        measure_grid(config, task, run, Console(quiet=True))
        return run.path, run.find(kind="run"), num_updates(config, task, 60), updates_of(task, jb.epochs(2), 60)

    in_epochs, in_steps = rows("--epochs", "2"), rows("--within", "4steps")
    assert in_steps[1][-1]["updates"] == in_steps[2] == 4 and in_epochs[2] == in_epochs[3]
    assert in_steps[0] != in_epochs[0]  # each has its own folder
    assert rows("--within", f"{in_epochs[3]}steps")[1][-1] == in_epochs[1][-1]


def test_the_length_counts_for_every_size(tmp_path):
    config = types.SimpleNamespace(within="48examples", epochs=15, max_updates=180_000, given=("within",))
    assert [num_updates(config, TASK, size) for size in (1, 6, 24)] == [48, 8, 2]
    config.max_updates = 7
    assert num_updates(config, TASK, 1) == 7
    critical = parse(critical_batch_size.Config, "", ["--within", "48examples"])
    check_within(critical, TASK)
    assert updates_of(TASK, longest_run(critical), 6) == 8


@pytest.mark.parametrize(("flags", "most"), [([], 500_000), (["--max-updates", "300"], 300), (["--quick"], 500_000)])
def test_a_length_that_is_given_is_not_cut_in_silence(flags, most):
    config = learning_rate_grid.resolve(parse(learning_rate_grid.Config, "", ["--within", "500000steps", "--target", "loss<1", *flags]), TASK)
    assert num_updates(config, TASK, 6) == most
    assert bound_words(config) == "up to 500,000 steps" + (" or 300 updates" if most == 300 else "")


def test_arms_of_the_huge_batch_see_whole_passes():
    within = lambda *flags: large_batch.epochs_within(parse(large_batch.Config, "", [*flags]), TASK)
    assert within("--within", "71examples") == 2 and within("--within", "3epochs") == 3 and within("--epochs", "5") == 5 and within() is None
    with pytest.raises(ValueError, match="--within 20examples is less than one pass over the 24 training examples"):
        within("--within", "20examples")
    with pytest.raises(ValueError, match="--within 9steps: the arms make different numbers of updates"):
        within("--within", "9steps")
