"""``--task FILE.py:FUNCTION``: whatever is wrong with a user's task is one line, before anything is trained."""

import os
import subprocess
import sys

import jax.numpy as jnp
import pytest

from experiments.adabatch import __main__ as adabatch
from experiments.convergence import __main__ as convergence
from experiments.gradient_smoothness import __main__ as gradient_smoothness
from experiments.harness.user_task import describe_user_task, load_user_task
from experiments.iteration_speed import __main__ as iteration_speed
from experiments.learning_rate_grid import __main__ as learning_rate_grid
from experiments.memory import __main__ as memory
from experiments.split_backward import __main__ as split_backward
from tests.conftest import ROOT
from tests.experiments.test_command_line import ended

STUDIES = (adabatch, convergence, gradient_smoothness, iteration_speed, learning_rate_grid, memory, split_backward)
LINEAR = """
import jax, jax.numpy as jnp
import jaxbatch as jb

def loss_fn(w, batch):
    return 0.5 * (batch[0] @ w - batch[1]) ** 2

def metrics_fn(w, batch):
    return {"loss": loss_fn(w, batch)}

def init(key):
    return 0.1 * jax.random.normal(key, (4,))

def make_task():
    x = jax.random.normal(jax.random.key(0), (240, 4))
    y = x @ jnp.arange(4.0) + 0.1 * jax.random.normal(jax.random.key(1), (240,))
    return jb.Task(init, loss_fn, metrics_fn, (x[:180], y[:180]), (x[180:], y[180:]))
"""
GRID = ["--quick", "--batch-sizes", "60", "--learning-rates", "0.1", "--target", "loss<0.4"]


def write(folder, text=LINEAR, name="linear.py"):
    (folder / name).write_text(text)
    return f"{folder / name}:make_task"


def refused(text, folder, capsys, *flags, study=learning_rate_grid):
    """The one line that a task ends with; no run folder is made."""
    error = ended(study.main, ["--task", text, *(flags or GRID), "--output-dir", str(folder / "results")], capsys)
    assert not (folder / "results").exists()
    return error.removeprefix(f"--task {text}: ").removeprefix(f"--task {text}")


def test_the_task_is_the_functions(tmp_path):
    task = load_user_task(write(tmp_path))
    assert task.num_examples == 180 and task.metrics_fn(jnp.zeros(4), task.test_data)["loss"].shape == (60,)


def test_a_file_imports_its_neighbours_and_keeps_its_dataclasses(tmp_path):
    (tmp_path / "neighbour_of_a_task.py").write_text("SCALE = 2.0\n")
    text = "from __future__ import annotations\nimport dataclasses\nfrom neighbour_of_a_task import SCALE\n" + LINEAR
    text += "\n@dataclasses.dataclass\nclass Setting:\n    scale: float = SCALE\n\nassert __name__ != '__main__'\n"
    assert load_user_task(write(tmp_path, text)).num_examples == 180


def test_a_relative_path(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load_user_task("linear.py:make_task").num_examples == 180


def test_an_edited_file_and_other_data_are_another_task(tmp_path):
    first = write(tmp_path)
    known = describe_user_task(first, load_user_task(first))
    assert known == describe_user_task(first, load_user_task(first)) and known["task"] == "linear.py:make_task"
    write(tmp_path, LINEAR + "\n# edited\n")
    edited = describe_user_task(first, load_user_task(first))
    assert edited["task_file"] != known["task_file"] and edited["task_data"] == known["task_data"]
    write(tmp_path, LINEAR.replace("key(1)", "key(2)"))
    assert describe_user_task(first, load_user_task(first))["task_data"] != known["task_data"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("linear.py", "--task linear.py must name a file and a function in it, as my_task.py:make_task."),
        ("C:\\folder\\linear.py", "must name a file and a function in it"),
        ("nothing.py:make_task", "there is no file"),
        ("s3://bucket/linear.py:make_task", "is an address"),
    ],
)
def test_a_task_that_is_not_there(text, message, capsys):
    assert message in ended(learning_rate_grid.main, ["--task", text, *GRID], capsys)


CHANGES = [
    ("def make_task", "def make_tusk", "linear.py has no function make_task; its functions are make_tusk, "),
    ("def make_task():", "make_task = 3\ndef make_tasks():", "linear.py has make_task, which is an int and not a function; its "),
    ("def init", "1 / 0\n\ndef init", "linear.py raises ZeroDivisionError in line 11: division by zero."),
    ("def init", "def init((", "linear.py raises SyntaxError in line 11"),
    ("import jax,", "import no_such_module, jax,", "linear.py raises ModuleNotFoundError in line 2: No module named 'no_such_module'."),
    ("def init", "raise SystemExit\n\ndef init", "linear.py raises SystemExit in line 11: it says no more."),
    ("def make_task():", "def make_task(size, *rest, name='x'):", "make_task needs size, but is called without arguments. Give them defaults."),
    ("    x = jax.random.normal", "    {}['data']\n    x = jax.random.normal", "make_task raises KeyError in line 15: 'data'."),
    ("return jb.Task", "return dict(), jb.Task", "make_task returns a tuple, but must return a jaxbatch.Task."),
    ("    return jb.Task", "    jb.Task", "make_task returns None, but must return a jaxbatch.Task."),
    ("(x[:180], y[:180])", "(x[:180], y[:170])", "train_data: the leaves disagree on the number of examples: [0] has 180, [1] has 170."),
    ("(x[:180], y[:180])", "(x[:180], 'labels')", "train_data[1] is a str"),
    ("return 0.1 * jax.random.normal(key, (4,))", "return key + 'a'", "init raises TypeError in line 12: "),
    ("return 0.1 * jax.random.normal(key, (4,))", "return jnp.arange(4)", "init (line 11): params is int32 and has no gradient"),
    ("return 0.5 * (batch[0] @ w - batch[1]) ** 2", "return ((batch[0] @ w - batch[1]) ** 2).mean()",
     "loss_fn (line 5): must return one loss per example, shape (2,), but returned shape (). Leave out the mean."),
    ("return 0.5 * (batch[0] @ w - batch[1]) ** 2", "return (batch[0] * w[None])",
     "loss_fn (line 5): must return one loss per example, shape (2,), but returned shape (2, 4)."),
    ("return 0.5 * (batch[0] @ w - batch[1]) ** 2", "return batch[0] @ w[:3]", "loss_fn raises TypeError in line 6: "),
    ("return 0.5 * (batch[0] @ w - batch[1]) ** 2", "return (batch[0] @ w, {})",
     "loss_fn (line 5): returned a tuple. If it is (losses, aux), the task needs update_model_state; without a task, pass has_aux=True."),
    ("return 0.5 * (batch[0] @ w - batch[1]) ** 2", "x, y, state = batch\n    return x @ w",
     "loss_fn (line 6): not enough values to unpack (expected 3, got 2). It gets params alone and a batch: an array of shape (4,), and a tuple"),
    ("y[180:]))", "y[180:]), prepare_test=lambda batch: batch)", "prepare_test (line 17): takes (batch). It gets a key for each example and a batch"),
    ("y[180:]))", "y[180:]), prepare_test=lambda keys, batch: (*batch, keys[:1]))", "prepare_test (line 17): its result: the leaves disagree"),
    ('{"loss": loss_fn(w, batch)}', '{"loss": loss_fn(w, batch).mean()}',
     "metrics_fn (line 8): it must return one value per example, shape (2,), but 'loss' has shape (). Leave out the mean."),
    ('{"loss": loss_fn(w, batch)}', "loss_fn(w, batch)",
     "metrics_fn (line 8): must return a dict with one value per example for each name, but returned an array of shape (2,)."),
    ('{"loss": loss_fn(w, batch)}', '{"loss": batch["y"]}', "metrics_fn raises TypeError in line 9: "),
    ("y[180:]))", "y[180:]), prepare=lambda keys, batch: (batch[0][:1], batch[1][:1]))",
     "prepare (line 17): it must return a batch of as many examples as it gets, 2, but returned 1."),
    ("y[180:]))", "y[180:]), prepare=lambda keys, batch: keys.nothing)", "prepare raises AttributeError in line 17: "),
    (", (x[180:], y[180:])", ", None", "test_data of the task must not be None, because the study needs a metric to judge runs by."),
    (", metrics_fn,", ", None,", "metrics_fn of the task must not be None"),
    ("(x[180:], y[180:])", "{'x': x[180:], 'y': y[180:]}", "metrics_fn raises KeyError in line 6: "),
    ("x[:180], y[:180]", "x[:5], y[:5]", "train_data hold 5 examples, and at least 6 are needed to hold a sixth out."),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), CHANGES)
def test_a_slip_is_told_with_its_function_and_line(old, new, message, tmp_path, capsys):
    assert old in LINEAR
    error = refused(write(tmp_path, LINEAR.replace(old, new, 1)), tmp_path, capsys)
    assert message in error, error


def test_metrics_that_want_other_data_than_those_held_out(tmp_path, capsys):
    text = LINEAR.replace("loss_fn(w, batch)}", "0.5 * (batch['x'] @ w - batch['y']) ** 2}").replace(
        "(x[180:], y[180:])", "{'x': x[180:], 'y': y[180:]}"
    )
    error = refused(write(tmp_path, text), tmp_path, capsys)
    assert error.startswith("metrics_fn on a part of train_data, which is held out to choose on raises TypeError in line 9: ")


STREAM = """

class Stream:
    num_examples, example = 100, (jax.ShapeDtypeStruct((4,), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32))
    def parts(self, indices, seed_epoch):
        raise NotImplementedError

plain = make_task

def make_task():
    return plain()._replace(train_data=Stream())
"""


@pytest.mark.parametrize("study", [study for study in STUDIES if study is not memory], ids=lambda study: study.__name__.split(".")[-2])
def test_a_stream_is_refused_with_the_reason(study, tmp_path, capsys):
    error = refused(write(tmp_path, LINEAR + STREAM), tmp_path, capsys, "--quick", study=study)
    assert error.startswith("train_data are a stream, and ") and error.endswith("which a stream does not allow. Give arrays.") | error.endswith(
        "which a stream does not give. Give arrays."
    )


@pytest.mark.parametrize(
    ("study", "flags", "message"),
    [
        (learning_rate_grid, (), "--target is needed with --task: give a metric (loss), a direction and a value, as --target 'loss<0.4'."),
        (split_backward, (), "--target is needed with --task"),
        (convergence, ("--target", "accuracy>0.9"), "--target accuracy>0.9: the metrics are loss."),
        (convergence, ("--target", "loss"), "--target loss must name a metric, a direction and a number, as 'accuracy>0.98' or 'loss<0.4'."),
        (adabatch, ("--num-examples", "50"), "--task and --num-examples exclude each other: "),
        (memory, ("--dtype", "bfloat16"), "--task and --dtype exclude each other: "),
        (iteration_speed, ("--dataset", "digits"), "--task and --dataset exclude each other: a task has data and a model of its own."),
        (adabatch, ("--model=mlp",), "--task and --model exclude each other: "),
        (memory, ("--data-dir", "."), "--task and --data-dir exclude each other: "),
    ],
)
def test_flags_that_a_task_needs_or_excludes(study, flags, message, tmp_path, capsys):
    text = write(tmp_path)
    error = ended(study.main, ["--task", text, "--quick", *flags, "--output-dir", str(tmp_path / "results")], capsys)
    assert message in error and not (tmp_path / "results").exists()


STATEFUL = """

stateless = make_task

def make_task():
    task = stateless()
    return task._replace(
        init=lambda key: (init(key), jnp.zeros(4)),
        loss_fn=lambda w, batch: (loss_fn(w, batch), batch[0].mean(0)),
        metrics_fn=lambda both, batch: metrics_fn(both[0], batch),
        update_model_state=lambda state, moments: 0.9 * state + 0.1 * moments,
    )
"""


@pytest.mark.parametrize("study", [gradient_smoothness, split_backward], ids=lambda study: study.__name__.split(".")[-2])
def test_what_a_state_of_the_batch_rules_out(study, tmp_path, capsys):
    assert "has update_model_state: " in refused(write(tmp_path, LINEAR + STATEFUL), tmp_path, capsys, "--quick", study=study)
    slip = (LINEAR + STATEFUL).replace("0.9 * state + 0.1 * moments", "state[:2]")
    error = refused(write(tmp_path, slip), tmp_path, capsys, "--quick", study=study)
    assert "update_model_state (line " in error and "must return a state of the form that it got" in error
    slip = (LINEAR + STATEFUL).replace("(init(key), jnp.zeros(4))", "init(key)")
    assert "init (line 25): must return (params, model_state) for a task with update_model_state" in refused(
        write(tmp_path, slip), tmp_path, capsys, "--quick", study=study
    )


def test_as_a_process(tmp_path):
    text = write(tmp_path, LINEAR.replace("** 2", "** 2 + nothing"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "experiments.learning_rate_grid", "--task", text, *GRID]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    wanted = f"error: --task {text}: loss_fn raises NameError in line 6: name 'nothing' is not defined.\n"
    assert (done.returncode, done.stderr, done.stdout) == (2, wanted, "")
