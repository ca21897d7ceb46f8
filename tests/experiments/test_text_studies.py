"""The studies of batch size on texts: which sequences they use, their target, flags that do not go together, runs in small."""

import functools
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import jaxbatch as jb
from experiments.adabatch import __main__ as adabatch
from experiments.advise import __main__ as advise
from experiments.gradient_smoothness import __main__ as gradient_smoothness
from experiments.harness import task as study_task
from experiments.harness.target import fill_target
from experiments.iteration_speed import __main__ as iteration_speed
from experiments.learning_rate_grid import __main__ as learning_rate_grid
from tests.experiments.test_command_line import ended

FLAGS = ["--dataset", "generated", "--model", "transformer", "--quick"]


def config_of(**changes):
    return SimpleNamespace(**{"task": None, "dataset": "generated", "model": "transformer", "data_dir": None, "quick": False} | changes)


def test_choices_see_the_training_and_validation_text_alone():
    task, test_data = study_task.load_choosing_task(config_of())
    dataset = jb.load_text("generated")
    assert task.train_data.shape == (2048, 65) and task.test_data.shape == test_data.shape == (256, 65)
    for part, tokens in ((task.train_data, dataset.train_tokens), (task.test_data, dataset.validation_tokens), (test_data, dataset.test_tokens)):
        rows = {row.tobytes() for row in jb.sequences(tokens, 64)}
        assert all(row.tobytes() in rows for row in np.asarray(part))
    np.testing.assert_array_equal(study_task.load_task(config_of()).train_data, task.train_data)


def test_sequences_come_from_all_over_the_text():
    rows = study_task._spread(jnp.arange(103), 10)
    assert rows.tolist() == list(range(0, 100, 10))


def test_quick_takes_fewer():
    task, test_data = study_task.load_choosing_task(config_of(quick=True))
    assert len(task.train_data) == 1024 and len(task.test_data) == len(test_data) == 128


def test_the_target_is_one_of_bits():
    task = study_task.load_task(config_of())
    config = fill_target(advise.Config(dataset="generated", model="transformer"), task)
    assert (config.epochs, config.target) == (15, "bits_per_token<1.5")
    assert jb.load_text("generated").entropy < 1.5


@pytest.mark.parametrize(
    ("study", "flags", "message"),
    [
        (advise, ["--dataset", "generated"], "--model simple_cnn takes images, but --dataset generated is a text. Use --model transformer."),
        (advise, ["--model", "transformer"], "--model transformer takes a text, but --dataset digits holds images. Use --dataset generated or "),
        (adabatch, ["--dataset", "generated"], "--model simple_cnn takes images, but --dataset generated is a text. Use --model transformer."),
        (adabatch, [*FLAGS, "--augment", "True"], "--augment is for images, and --dataset generated is a text."),
        (advise, ["--dataset", "generatd"], "unknown dataset name='generatd'. Did you mean 'generated'?"),
        (advise, [*FLAGS, "--target", "accuracy>1.5"], "--target accuracy>1.5: for an accuracy, write > and a number between 0 and 1"),
    ],
)
def test_flags_that_do_not_go_together(study, flags, message, tmp_path, capsys):
    assert message in ended(study.main, [*flags, "--output-dir", str(tmp_path)], capsys)


@pytest.fixture
def small_texts(monkeypatch):
    """A network and numbers of sequences that take seconds."""
    monkeypatch.setattr(study_task, "TRANSFORMER", functools.partial(jb.TransformerLM, width=16, num_layers=1, num_heads=2))
    monkeypatch.setattr(study_task, "NUM_SEQUENCES", 128)  # of which --quick takes half
    monkeypatch.setattr(study_task, "NUM_HELD_OUT", 32)


def records_of(study, flags, folder):
    study.main([*FLAGS, *flags, "--output-dir", str(folder)])
    (file,) = folder.glob("*/*/records.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_learning_rates_on_a_text(small_texts, tmp_path, capsys):
    flags = ["--batch-sizes", "16", "--learning-rates", "0.1", "0.3", "--epochs", "2", "--seeds", "1", "--target", "bits_per_token<4.7"]
    runs = [record for record in records_of(learning_rate_grid, flags, tmp_path) if record["kind"] == "run"]
    assert {run["learning_rate"] for run in runs} == {0.1, 0.3}
    assert all(4 < run["validation_bits_per_token"] < 4.9 for run in runs)
    told = capsys.readouterr().out
    assert "generated, transformer" in told and "bits_per_token" in told


def test_a_growing_batch_on_a_text(small_texts, tmp_path, capsys):
    flags = ["--batch-size", "8", "--max-batch-size", "16", "--epochs", "2", "--every", "2048 tokens", "--seeds", "1", "--rounds", "1"]
    records = records_of(adabatch, [*flags, "--learning-rate", "0.01", "--tuned-rates", "0.01"], tmp_path)
    ends = {record["arm"]: record for record in records if record["kind"] == "epoch" and record["epoch"] == 2}
    assert {arm: end["batch_size"] for arm, end in ends.items()} == {"tune": 8, "small": 8, "adaptive": 16, "large": 16, "tuned": 8}
    (first,) = (record for record in records if record.get("arm") == "adaptive" and record.get("epoch") == 1)
    assert first["updates_by_size"] == {"8": 4, "16": 2}  # a half of 64 sequences of 64 tokens each
    assert all(3 < end["test_bits_per_token"] < 4.9 for arm, end in ends.items() if arm != "tune")
    assert ends["tune"]["validation_bits_per_token"] != ends["small"]["test_bits_per_token"]  # other parts of the text
    told = capsys.readouterr().out
    assert "AdamW, weight decay 0.0005, 2 epochs" in told and "Test bits per token after the last epoch" in told and "8 (512 tokens)" in told


@pytest.mark.parametrize(("optimizer", "alone", "rate"), [("momentum", 0.375, 0.01), ("adamw", 0.75 / 2**0.5, 0.00316)])
def test_the_small_batch_s_rate_falls_by_what_the_growing_batch_does_in_its_place(optimizer, alone, rate):
    config = adabatch.resolve(adabatch.Config(optimizer=optimizer), 1442)
    assert config.learning_rate == rate
    for arm, factor in (("small", alone), ("adaptive", 0.75), ("large", alone)):
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jb, "coupled_learning_rate", lambda schedule, seen=seen, **settings: seen.append(settings["decay"]) or 0.1)
            adabatch.make_fit_config(config, arm, rate, 0, 1442)
        assert seen == pytest.approx([factor])


@pytest.mark.slow
def test_smoothness_on_a_text(small_texts, tmp_path, capsys):
    curves = [record for record in records_of(gradient_smoothness, ["--batch-sizes", "16", "--iterations", "8"], tmp_path) if "guess_loss" in record]
    assert len(curves) == 1 and curves[0]["guess_loss"] == pytest.approx(np.log(28))


@pytest.mark.slow
def test_speed_on_a_text_without_loading(small_texts, tmp_path, capsys):
    flags = ["--batch-sizes", "16", "--rounds", "1", "--examples-per-round", "64"]
    speeds = [record for record in records_of(iteration_speed, flags, tmp_path) if record["kind"] == "speed"]
    assert speeds and all("resident_ms" in speed and "streamed_ms" not in speed for speed in speeds)
