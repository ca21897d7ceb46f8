"""``--schedule`` and ``--warmup``: what studies train with, what they refuse, and run folders that go on as before."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import jaxbatch as jb
from experiments.critical_batch_size import __main__ as critical_batch_size
from experiments.harness.command_line import parse
from experiments.harness.optimizers import OptimizerFlags
from experiments.harness.rate_grid import measure_grid
from experiments.harness.schedules import ScheduleFlags, fill_schedule, make_for_length, make_scheduled, scheduled_code
from experiments.harness.study import StudyConfig, open_study
from experiments.harness.target import num_updates
from experiments.harness.task import load_choosing_task
from experiments.large_batch import arms
from experiments.learning_rate_grid import __main__ as learning_rate_grid
from experiments.nose_game import __main__ as nose_game
from tests.experiments.test_command_line import ended
from tests.experiments.test_user_task import GRID, LINEAR, write

OWN = "import optax\n\ndef make(rate, num_steps):\n    return optax.sgd(optax.cosine_decay_schedule(rate, num_steps))\n"
NUMBER = "import optax\n\ndef make(rate):\n    return optax.sgd(float(rate))\n"


@dataclasses.dataclass(frozen=True)
class Flags(ScheduleFlags, OptimizerFlags):
    own_lengths = True


def own(folder, text):
    return write(folder, text, "mine.py").replace("make_task", "make")


def moves(optimizer, count=6):
    """The updates from gradients of 1."""
    params, made = jnp.array(1.0), []
    state = optimizer.init(params)
    for _ in range(count):
        step, state = optimizer.update(jnp.array(1.0), state, params)
        made.append(-float(step))
    return made


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "step"])
def test_every_optimizer_follows_the_schedule(schedule, tmp_path):
    rates = [float(jb.stretched_schedule(schedule, 0.5, 5, warmup=0.4)(count)) for count in range(6)]
    for optimizer in ("sgd", own(tmp_path, NUMBER)):  # by name, and one of the user's own that wants a number
        config = fill_schedule(Flags(optimizer=optimizer, schedule=schedule, warmup="40%"))
        np.testing.assert_allclose(moves(make_for_length(config, 5)(0.5)), rates, rtol=1e-5, atol=1e-7)


def test_an_optimizer_of_ones_own_gets_the_length(tmp_path):
    config = fill_schedule(Flags(optimizer=own(tmp_path, OWN)))
    np.testing.assert_allclose(moves(make_scheduled(config)(0.5, 6)), moves(optax.sgd(optax.cosine_decay_schedule(0.5, 6))), rtol=1e-6)
    with pytest.raises(ValueError, match=r"^--schedule and --warmup are for optimizers without a schedule; .* takes num_steps\.$"):
        fill_schedule(Flags(optimizer=own(tmp_path, OWN), schedule="wsd"))


def test_without_the_flags_nothing_changes(tmp_path):
    assert make_scheduled(Flags())(0.1).update.__qualname__ == optax.sgd(0.1).update.__qualname__
    folders = []
    for config_type in (StudyConfig, dataclasses.make_dataclass("Scheduled", [], bases=(ScheduleFlags, StudyConfig), frozen=True)):
        folders.append(open_study("some", config_type(output_dir=str(tmp_path), resume=True), None).path)
    cosine = dataclasses.make_dataclass("Scheduled", [], bases=(ScheduleFlags, StudyConfig), frozen=True)(
        output_dir=str(tmp_path), schedule="cosine", warmup="0.05"
    )
    other = open_study("some", cosine, None).path
    assert folders[0] == folders[1] != other
    assert json.loads((other / "config.json").read_text())["config"]["schedule"] == "cosine"


def test_the_printed_code_makes_the_optimizer():
    config = fill_schedule(Flags(schedule="linear", warmup="20%", optimizer="momentum"))
    make = eval(scheduled_code(config), {"jb": jb, "optax": optax, "functools": functools})
    np.testing.assert_allclose(moves(make(0.5, 6)), moves(make_scheduled(config)(0.5, 6)), rtol=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--warmup", "5"], "--warmup 5 must be a share of the run, at least 0 and below 1, as 5% or 0.05."),
        (["--warmup", "five"], "--warmup five must be a share"),
        (["--warmup", "-1%"], "--warmup -1% must be a share"),
        (["--schedule", "wsd", "--warmup", "90%"], "--warmup 90% must be a share of the run, at least 0 and at most 80%, before wsd falls"),
        (["--schedule", "cosin"], "--schedule"),
    ],
    ids=["number", "word", "negative", "wsd", "name"],
)
def test_wrong_flags_are_one_line(flags, message, tmp_path, capsys):
    assert message in ended(learning_rate_grid.main, ["--task", write(tmp_path), *GRID, *flags], capsys)


def test_a_study_without_lengths_refuses_an_optimizer_that_takes_them(tmp_path, capsys):
    for study, flags in ((nose_game, []), (critical_batch_size, ["--task", write(tmp_path), "--target", "loss<0.4"])):
        error = ended(study.main, ["--optimizer", own(tmp_path, OWN), "--quick", *flags], capsys)
        assert "takes num_steps, which this study does not give" in error


def test_the_grid_is_trained_with_the_schedule(tmp_path):
    flags = ["--task", write(tmp_path, LINEAR), *GRID, "--target", "loss<-1", "--schedule", "linear", "--warmup", "20%", "--seeds", "1"]
    config = parse(learning_rate_grid.Config, "", [*flags, "--output-dir", str(tmp_path)])
    task, _ = load_choosing_task(config)
    config = learning_rate_grid.resolve(config, task)
    run = open_study("learning_rate_grid", config, Console(), task)
    measure_grid(config, task, run, Console(quiet=True))
    updates = num_updates(config, task, 60)
    optimizer = optax.sgd(jb.stretched_schedule("linear", 0.1, updates, warmup=0.2), momentum=0.5)
    *_, last = jb.fit(task, jb.FitConfig(optimizer, 60, jb.steps(updates)))
    row = run.find(kind="run")[-1]
    assert row["updates"] == updates == 6 and row["validation_loss"] == pytest.approx(last["test_loss"], rel=1e-5)


def test_branches_go_on_at_the_rate_that_the_run_has():
    config = SimpleNamespace(optimizer="sgd", schedule="linear", warmup="0")
    rate = critical_batch_size.rate_now(config, 0.5, 3, 4)
    assert rate == 0.25  # that of update number 2, the third
    run, branch = make_for_length(config, 4)(0.5), critical_batch_size.make_at_rest(config)(rate)
    params = jnp.array(1.0)
    assert float(branch.update(params, run.init(params), params)[0]) == -0.25


def test_arms_of_the_huge_batch_that_are_no_schedule_follow_the_flag():
    config = SimpleNamespace(optimizer="sgd", schedule="linear", warmup="0", epochs=2, batch_size=60, small_batch_size=6, num_groups=10, longest=4)
    rates = lambda name: moves(arms.make_optimizer(config, arms.find_arm(name), 120)(1.0), 4)
    assert rates("plain") == [1.0, 0.75, 0.5, 0.25]  # two epochs of two updates
    np.testing.assert_allclose(
        rates("cosine"), moves(arms.make_optimizer(SimpleNamespace(**vars(config) | {"schedule": "constant"}), arms.find_arm("cosine"), 120)(1.0), 4)
    )
