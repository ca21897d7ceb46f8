"""Every study with a task of the user's own: bare functions, Flax, Equinox; what it writes, what it says."""

import json

import numpy as np
import pytest

from experiments.adabatch import __main__ as adabatch
from experiments.advise import __main__ as advise
from experiments.convergence import __main__ as convergence
from experiments.critical_batch_size import __main__ as critical_batch_size
from experiments.gradient_smoothness import __main__ as gradient_smoothness
from experiments.iteration_speed import __main__ as iteration_speed
from experiments.large_batch import __main__ as large_batch
from experiments.learning_rate_grid import __main__ as learning_rate_grid
from experiments.memory import __main__ as memory
from experiments.sharpness import __main__ as sharpness
from experiments.split_backward import __main__ as split_backward
from tests.experiments.test_user_task import LINEAR, STATEFUL, write

FLAX = """
import numpy as np, flax.linen as nn
import jaxbatch as jb

class Model(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(3)(images.reshape(len(images), -1))

def make_task():
    random = np.random.default_rng(0)
    labels = np.arange(150, dtype=np.int32) % 3
    images = random.integers(0, 60, (150, 4, 4, 1)).astype(np.uint8)
    images[np.arange(150), labels] += 150
    arrays = (images[:120], labels[:120], images[120:], labels[120:])
    return jb.classification_task(Model(), jb.Dataset("rows", *arrays, 3, (0.0,), (1.0,)))
"""
EQUINOX = """
import equinox as eqx, jax, jax.numpy as jnp
import jaxbatch as jb

def make(key):
    return eqx.partition(eqx.nn.MLP(4, 1, 8, 1, key=key), eqx.is_inexact_array)

def make_task():
    static = make(jax.random.key(0))[1]
    x = jax.random.normal(jax.random.key(1), (150, 4))
    data = {"x": x, "y": jnp.tanh(x[:, 0])}

    def predict(params, x):
        return jax.vmap(eqx.combine(params, static))(x)[:, 0]

    def loss_fn(params, batch):
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.9, (4,)))(batch["key"])
        return (predict(params, batch["x"] * keep) - batch["y"]) ** 2

    def metrics_fn(params, batch):
        found = predict(params, batch["x"])
        return {"mse": (found - batch["y"]) ** 2, "close_accuracy": (abs(found - batch["y"]) < 0.5).astype(jnp.float32)}

    part = lambda start, stop: jax.tree.map(lambda leaf: leaf[start:stop], data)
    prepare = lambda keys, batch: batch | {"key": keys}
    return jb.Task(lambda key: make(key)[0], loss_fn, metrics_fn, part(0, 120), part(120, 150), prepare=prepare)
"""
TASKS = {"bare": (LINEAR, "loss<0.4"), "flax": (FLAX, "accuracy>0.9"), "equinox": (EQUINOX, "mse<0.3"), "stateful": (LINEAR + STATEFUL, "loss<0.4")}
SIZES = ["--batch-sizes", "12", "60"]
STUDIES = {
    iteration_speed: [*SIZES, "--rounds", "2"],
    gradient_smoothness: [*SIZES, "--iterations", "20"],
    learning_rate_grid: [*SIZES, "--learning-rates", "0.03", "0.1", "--epochs", "2"],
    convergence: [*SIZES, "--tuned-rates", "0.1", "0.1", "--epochs", "2"],
    large_batch: ["--epochs", "1", "--learning-rates", "0.03", "0.1"],
    split_backward: ["--batch-size", "20", "--epochs", "2", "--seeds", "1", "--learning-rates", "0.03", "0.1"],
    adabatch: ["--batch-size", "10", "--max-batch-size", "20", "--epochs", "2", "--seeds", "1"],
    memory: ["--targets", "cpu", "--budget", "1GiB"],
    advise: ["--batch-sizes", "4", "12", "60", "--learning-rates", "0.01", "0.1", "1", "--epochs", "20"],
    critical_batch_size: ["--batch-sizes", "8", "16", "--base-batch-size", "8", "--factors", "2", "--learning-rates", "0.03", "0.1"],
    sharpness: ["--small-batch-size", "12", "--large-batch-size", "60", "--learning-rates", "0.03", "0.1", "--train-loss", "0.5"],
}
TARGETED = (learning_rate_grid, convergence, split_backward)  # their tables name the metric of the validation part
EVERY = [(study, name) for study in STUDIES for name in TASKS if name != "stateful" or study not in (gradient_smoothness, sharpness, split_backward)]
SLOW = (memory, large_batch, sharpness, gradient_smoothness, critical_batch_size)
ALWAYS = [*((study, "bare") for study in STUDIES if study not in SLOW), (learning_rate_grid, "equinox"), (iteration_speed, "flax")]


def name_of(study):
    return study.__name__.split(".")[-2]


def run(study, name, folder):
    text, target = TASKS[name]
    goal = ["--target", target] if study in (*TARGETED, advise, critical_batch_size, sharpness) else []
    if study is adabatch and name == "equinox":
        text = text.replace("close_accuracy", "accuracy")
    place = write(folder, text, f"{name}.py")
    study.main(["--task", place, "--quick", *STUDIES[study], *goal, "--output-dir", str(folder / "results")])
    (path,) = (folder / "results").glob(f"{name_of(study)}/*")
    return path, [json.loads(line) for line in (path / "records.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("study", "name"),
    [pytest.param(*pair, marks=() if pair in ALWAYS else pytest.mark.slow, id=f"{name_of(pair[0])}-{pair[1]}") for pair in EVERY],
)
def test_a_study_of_ones_own_task(study, name, tmp_path, capsys):
    if name == "equinox":
        pytest.importorskip("equinox")
    path, records = run(study, name, tmp_path)
    out = capsys.readouterr().out
    assert f"{name}.py:make_task" in out and "Figure" in out and "digits" not in out and "simple_cnn" not in out and "nan" not in out.lower()
    config = json.loads((path / "config.json").read_text())["config"]
    assert config["task"] == f"{name}.py:make_task" and len(config["task_file"]) == 32 and not {"dataset", "model"} & set(config)
    assert (path / "figure.png").stat().st_size > 5000
    if study in (iteration_speed, convergence):
        assert "loading" not in out and not any("streamed_ms" in record for record in records)
    if study in TARGETED:
        metric = TASKS[name][1].rstrip(".0123456789")[:-1]
        assert f"validation {metric}" in out and any(f"validation_{metric}" in record for record in records)
        assert ("accuracy" in out) == (metric == "accuracy")
    again, same = run(study, name, tmp_path)
    assert (again, same) == (path, records) and "Continuing from" in capsys.readouterr().out


def test_an_edited_file_does_not_continue_the_records(tmp_path, monkeypatch, capsys):
    first, _ = run(learning_rate_grid, "bare", tmp_path)
    monkeypatch.setitem(TASKS, "bare", (LINEAR.replace("0.1 * jax.random.normal(key, (4,))", "jnp.zeros(4)"), "loss<0.4"))
    with pytest.raises(ValueError, match="too many values"):  # a second run folder
        run(learning_rate_grid, "bare", tmp_path)
    assert "Continuing from" not in capsys.readouterr().out


def test_the_best_rate_of_a_loss_is_the_one_that_ends_lowest(tmp_path, capsys):
    _, records = run(learning_rate_grid, "bare", tmp_path)
    out = capsys.readouterr().out
    ends = {
        rate: [r["validation_loss"] for r in records if r["kind"] == "run" and r["learning_rate"] == rate and r["batch_size"] == 60][-1]
        for rate in (0.03, 0.1)
    }
    assert np.isfinite(list(ends.values())).all() and ends[0.1] < ends[0.03]
    assert "No rate reaches a validation loss of at most 0.4 within the budget" in out or "updates to a validation loss of at most 0.4" in out


def test_a_loss_that_couples_examples_leaves_out_the_noise(tmp_path, monkeypatch, capsys):
    coupled = LINEAR.replace("return 0.5 * (batch[0] @ w", "return 0.5 * ((batch[0] - batch[0].mean(0, keepdims=True)) @ w")
    monkeypatch.setitem(TASKS, "bare", (coupled, "loss<0.4"))
    _, records = run(convergence, "bare", tmp_path)
    out = capsys.readouterr().out
    assert "No gradient noise scale: an example's loss depends on the others in its batch" in out and "on the way" not in out
    assert {record["kind"] for record in records} == {"speed", "rate", "run"}
