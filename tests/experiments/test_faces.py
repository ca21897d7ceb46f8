"""The study of very many classes: identities, losses and verification by numbers, sentences from records made by hand, the command line."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.faces import __main__ as faces
from experiments.faces.cost import lowered, measure_updates
from experiments.faces.identities import SIZE, keys_of, make_images, sources_of
from experiments.faces.report import chosen_rate, difference, verdict
from experiments.faces.training import init_params, make_losses, make_order, verification
from jaxbatch.data import load_dataset
from jaxbatch.machine.memory import program_memory
from jaxbatch.results.records import read_records
from tests.experiments.test_command_line import ended

CONFIG = SimpleNamespace(optimizer="adam", scale=16.0, margin=0.2, chunk_size=3, microbatch_size=4, learning_rates=(0.1, 0.2, 0.3), seeds=3)
SOURCES = np.random.default_rng(0).uniform(size=(9, 8, 8)).astype(np.float32)


def test_identities_are_functions_of_their_numbers_and_differ():
    identities = jnp.array([5, 6, 5, 5, 1 << 24])
    make = jax.jit(lambda identities, epochs: make_images(jnp.array(SOURCES), identities, keys_of(3, epochs, identities)))
    images = make(identities, jnp.array([0, 0, 0, 1, 0]))
    assert images.shape == (5, SIZE, SIZE)
    np.testing.assert_array_equal(images[0], images[2])
    far = jnp.abs(images[:, None] - images[None]).mean((2, 3))
    assert 0 < far[0, 3] < 0.7 * min(far[0, 1], far[0, 4], far[1, 4])  # another example is near, another identity is not
    np.testing.assert_array_equal(make(identities[::-1], jnp.array([0, 1, 0, 0, 0]))[::-1][0], images[0])  # whatever the batch


def test_digits_come_back_in_the_resolution_in_which_they_were_written():
    from sklearn import datasets

    digits, images = load_dataset("digits"), datasets.load_digits().images
    found = np.asarray(sources_of(digits.train_images))
    written = {image.astype(int).tobytes() for image in images}
    assert found.shape == (1442, 8, 8) and all(np.rint(image * 16).astype(int).tobytes() in written for image in found)


def test_a_pass_has_every_identity_once_at_every_batch_size():
    small, large = make_order(2, 10, 4, 40), make_order(2, 10, 20, 40)
    np.testing.assert_array_equal(small.identities.reshape(-1), large.identities.reshape(-1))
    np.testing.assert_array_equal(small.epochs.reshape(-1), np.repeat(np.arange(4), 10))
    assert all(sorted(part) == list(range(10)) for part in small.identities.reshape(4, 10).tolist())


@pytest.mark.parametrize("loss", ["softmax", "cosface", "arcface"])
def test_losses_in_chunks_are_those_of_all_logits(loss):
    params = init_params(jax.random.key(0), 7)
    embeddings = jax.random.normal(jax.random.key(1), (5, 64))
    unit = embeddings / jnp.linalg.norm(embeddings, axis=1, keepdims=True)
    labels = jnp.array([0, 6, 3, 3, 1])
    found, whole = (make_losses(CONFIG, loss, chunk_size)(params, (unit, labels)) for chunk_size in (3, None))
    kernel = np.asarray(params["kernel"], np.float64)
    cosines = np.asarray(unit, np.float64) @ (kernel / np.linalg.norm(kernel, axis=0))
    own = cosines[range(5), labels]
    cosines[range(5), labels] = {"softmax": own, "cosface": own - 0.2, "arcface": np.cos(np.arccos(own) + 0.2)}[loss]
    expected = np.log(np.exp(16 * cosines).sum(1)) - 16 * cosines[range(5), labels]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(whole, expected, rtol=1e-4)


def test_verification_is_that_of_scikit_learn():
    from sklearn.metrics import roc_curve

    random = np.random.default_rng(0)
    found = random.normal(size=(12, 1, 5)) + 0.7 * random.normal(size=(12, 3, 5))
    found /= np.linalg.norm(found, axis=-1, keepdims=True)
    flat, names = found.reshape(36, 5).astype(np.float32), np.repeat(range(12), 3)
    one, other = np.triu_indices(36, 1)
    false, true, _ = roc_curve(names[one] == names[other], (flat @ flat.T)[one, other], drop_intermediate=False)
    for rate in (0.01, 0.1):
        assert verification(found, rate)["true_accepts"] == pytest.approx(true[false <= rate + 1e-9].max(), abs=0.03)
    assert verification(found, 0.1)["accuracy"] == pytest.approx(((true + 1 - false) / 2).max(), abs=1e-6)


def test_chunks_take_a_small_part_of_the_memory_of_all_logits():
    config = SimpleNamespace(**vars(CONFIG) | {"chunk_size": 256, "microbatch_size": 256})
    chunks, whole = (program_memory(lowered(config, SOURCES, 1024, 8192, chunked=chunked).compile()) for chunked in (True, False))
    assert whole > 2 * 4 * 1024 * 8192 and chunks < whole / 3


def rows(part, size, loss, rate, accepts):
    common = {"kind": "run", "part": part, "batch_size": size, "loss_name": loss, "learning_rate": rate, "diverged": False, "updates": 3, "loss": 1.0}
    return json.loads(json.dumps([common | {"seed": n, "true_accepts": value, "accuracy": value} for n, value in enumerate(accepts)]))


def test_rates_are_chosen_apart_from_the_report_and_sentences_follow_from_intervals():
    records = [*rows("held_out", 8, "cosface", 0.2, [0.5]), *rows("held_out", 8, "cosface", 0.3, [0.4]), *rows("test", 8, "cosface", 0.3, [0.9])]
    assert chosen_rate(records, 8, "cosface") == 0.2 and chosen_rate(records, 8, "softmax") is None
    records = [*rows("held_out", 8, "softmax", 0.2, [0.5]), *rows("held_out", 8, "cosface", 0.3, [0.5]), *rows("test", 8, "cosface", 0.2, [0.0] * 3)]
    records += [*rows("test", 8, "softmax", 0.2, [0.5, 0.51, 0.52]), *rows("test", 8, "cosface", 0.3, [0.6, 0.611, 0.619])]
    records += [{"kind": "memory", "batch_size": 8, "identities": 9, "way": way, "bytes": n * 2**30} for way, n in (("chunks", 1), ("all logits", 5))]
    config = SimpleNamespace(losses=("softmax", "cosface"), batch_sizes=(8,), learning_rates=(0.1, 0.2, 0.3))
    assert difference(records, (8, "cosface"), (8, "softmax")).value == pytest.approx(10)
    edge, gain, memory = verdict(config, records)
    assert edge.startswith("Warning: the best rate lies on the edge of the grid for cosface at B = 8;")
    assert gain.startswith("True accepts, cosface against the plain softmax: +10.0 [") and "a difference shows at B = 8" in gain
    assert memory == "With 8 examples and 9 classes a gradient takes 1.00 GiB in chunks, and 5.00 GiB with all logits."


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-sizes", "64", "96"], "--batch-sizes 64 must divide the largest size, 96"),
        (["--margin", "1.5"], "--margin 1.5 must be at least 0 and below 1"),
        (["--verified", "1"], "--verified 1 must be at least 2"),
        (["--false-accept-rate", "0"], "--false-accept-rate 0.0 must be above 0 and below 1"),
        (["--huge-updates", "-1"], "--huge-updates -1 must be at least 0"),
    ],
)
def test_flags_that_cannot_be(flags, message, tmp_path, capsys):
    assert message in ended(faces.main, [*flags, "--output-dir", str(tmp_path)], capsys)


@pytest.mark.slow
def test_the_largest_case_in_small_learns_in_bounded_memory():
    config = SimpleNamespace(optimizer="adam", batch_size=512, identities=600, chunk_size=128, microbatch_size=128, scale=16.0, margin=0.2)
    found = measure_updates(config, 8)
    assert found["losses"][-1] < found["losses"][0] and found["peak"] >= found["peak_before"] > 0


@pytest.mark.slow
def test_the_study_answers_and_goes_on(tmp_path, capsys):
    flags = ["--quick", "--batch-sizes", "128", "256", "--identities", "100", "--verified", "40", "--microbatch-size", "128", "--huge-updates", "1"]
    faces.main([*flags, "--output-dir", str(tmp_path)])
    (file,) = tmp_path.glob("*/*/records.jsonl")
    records, told = read_records(file.parent), capsys.readouterr().out
    for part in ("Verification of 40 identities", "memory as compiled", "cosface against the plain softmax", "the process took at most", "Figure:"):
        assert part in told
    runs = [record for record in records if record["kind"] == "run"]
    assert len({row["updates"] * row["batch_size"] for row in runs}) == 1
    file.write_text("".join(json.dumps(record) + "\n" for record in records[:-6]))
    faces.main([*flags, "--output-dir", str(tmp_path)])
    assert len(read_records(file.parent)) == len(records)
