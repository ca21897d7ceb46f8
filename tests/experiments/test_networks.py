"""Every network that a study offers, on data of every form that it offers."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbatch as jb
from experiments.adabatch import __main__ as adabatch
from experiments.adabatch.arms import make_model
from experiments.batch_shape import __main__ as batch_shape
from experiments.convergence import __main__ as convergence
from experiments.gradient_smoothness import __main__ as gradient_smoothness
from experiments.harness.task import NETWORKS
from experiments.iteration_speed import __main__ as iteration_speed
from experiments.large_batch import __main__ as large_batch
from experiments.learning_rate_grid import __main__ as learning_rate_grid
from experiments.split_backward import __main__ as split_backward
from jaxbatch.data import pad_images

CHEAP = {
    adabatch: "--epochs 2 --num-examples 24 --batch-size 4 --max-batch-size 8 --seeds 1 --tuned-rates 0.001 --learning-rate 0.001",
    batch_shape: "--centres 32 --dtypes float32 --rounds 1",
    convergence: "--batch-sizes 600 --seeds 1 --speed-rounds 1 --tuned-rates 0.01 --epochs 1 --evaluations-per-epoch 1",
    gradient_smoothness: "--batch-sizes 600 --iterations 4 --batches-compared 2",
    iteration_speed: "--batch-sizes 600 --rounds 1 --examples-per-round 600",
    large_batch: "--batch-size 600 --arms plain --no-pairs --learning-rates 0.01 --seeds 1 --epochs 1",
    learning_rate_grid: "--batch-sizes 600 --learning-rates 0.01 --seeds 1 --epochs 1",
    split_backward: "--batch-size 600 --num-groups 2 --seeds 1 --epochs 1 --cost-rounds 1",
}


def networks_of(study):
    """What the flag of the network takes."""
    if study is batch_shape:
        return list(batch_shape.MODELS)
    return list(typing.get_args(typing.get_type_hints(study.Config)["model"]))


PAIRS = [pytest.param(study, network, id=f"{study.__name__.split('.')[-2]}-{network}") for study in CHEAP for network in networks_of(study)]


@pytest.mark.slow
@pytest.mark.parametrize(("study", "network"), PAIRS)
def test_every_network_runs_on_the_default_data(study, network, tmp_path, capsys):
    flag = "--models" if study is batch_shape else "--model"
    flags = CHEAP[study].split()
    if network == "transformer":  # whose quick text has 1,024 sequences
        flags = [*" ".join(flags).replace("600", "60").replace("--num-examples 24", "").split(), "--dataset", "generated"]
    study.main(["--quick", *flags, flag, network, "--output-dir", str(tmp_path)])
    told = capsys.readouterr()
    assert "Figure" in told.out and told.err == ""
    (file,) = (path for path in tmp_path.glob("*/*/records.jsonl") if path.parts[-3] == study.__name__.split(".")[-2])
    assert file.read_text().count("\n") >= 2


@pytest.mark.parametrize("network", [name for name in networks_of(adabatch) if name != "transformer"])  # which takes texts
@pytest.mark.parametrize(("side", "channels"), [(28, 1), (32, 3)])
def test_every_network_of_adabatch_takes_grey_and_coloured_images(network, side, channels, monkeypatch):
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (30, side, side, channels), dtype=np.uint8), np.arange(30, dtype=np.int32) % 10
    found = jb.Dataset("digits", images, labels, images[:9], labels[:9], 10, (0.0,) * channels, (1.0,) * channels)
    monkeypatch.setattr(jb, "load_dataset", lambda *_, **__: found)
    config = adabatch.Config(model=network, num_examples=20)
    dataset = adabatch.load(config)
    model = make_model(config, dataset.num_classes)
    logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.asarray(dataset.train_images[:5], jnp.float32))
    assert logits.shape == (5, 10) and len(dataset.train_images) == 20


def test_every_network_of_the_other_studies_takes_grey_and_coloured_images():
    for side, channels in ((28, 1), (32, 3)):
        for make in NETWORKS.values():
            image = jnp.zeros((5, side, side, channels))
            assert jax.eval_shape(make(num_classes=7).init_with_output, jax.random.key(0), image)[0].shape == (5, 7)


def test_padding_is_zeros_around_the_same_pixels():
    dataset = jb.load_dataset("digits")
    padded = pad_images(dataset, 32)
    for before, after in ((dataset.train_images, padded.train_images), (dataset.test_images, padded.test_images)):
        assert after.dtype == np.uint8 and after.shape[1:] == (32, 32, 1)
        np.testing.assert_array_equal(after[:, 2:30, 2:30], before)
        assert after.sum(dtype=np.int64) == before.sum(dtype=np.int64)
    assert pad_images(dataset, 31).train_images.shape[1:3] == (31, 31)  # an odd pixel too
    np.testing.assert_array_equal(pad_images(dataset, 20).train_images, dataset.train_images)
    assert padded.train_labels is dataset.train_labels
