"""The contrastive study: its pieces by numbers, its sentences from records made by hand, its command line in small."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbatch as jb
from experiments.contrastive import __main__ as contrastive
from experiments.contrastive.report import chosen_rate, difference, verdict
from experiments.contrastive.representations import nearest_accuracy, probe_accuracy
from experiments.contrastive.training import gradient_on, init_params, losses_within, make_arm_run, make_order
from experiments.harness.deformed import grid, read_at
from jaxbatch.augment import example_keys
from jaxbatch.results.records import read_records
from tests.experiments.test_command_line import ended

IMAGES = np.random.default_rng(0).uniform(size=(24, 6, 6)).astype(np.float32)
CONFIG = SimpleNamespace(microbatch_size=4, optimizer="adam", temperature=0.5, group=4, learning_rates=(0.1, 0.2, 0.3, 0.4), seeds=3)


def clouds(count, seed):
    random = np.random.default_rng(seed)
    labels = random.integers(5, size=count)
    return (np.random.default_rng(9).normal(size=(5, 7))[labels] + random.normal(size=(count, 7))).astype(np.float32), labels


def test_neighbours_are_those_of_scikit_learn():
    from sklearn.neighbors import KNeighborsClassifier

    (x, labels), (test, test_labels) = clouds(200, 1), clouds(60, 2)
    for k in (1, 20):
        expected = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(x, labels).score(test, test_labels)
        found = nearest_accuracy(jnp.array(x), jnp.array(labels), jnp.array(test), jnp.array(test_labels), num_classes=5, k=k)
        assert 0.3 < expected < 1 and float(found) == pytest.approx(expected)


def test_the_probe_is_ridge_regression_of_scikit_learn():
    from sklearn.linear_model import RidgeClassifier
    from sklearn.preprocessing import StandardScaler

    (x, labels), (test, test_labels) = clouds(200, 1), clouds(60, 2)
    scaler = StandardScaler().fit(x)
    for decay in (1e-3, 1.0):
        model = RidgeClassifier(alpha=decay * 200).fit(scaler.transform(x), labels)
        expected = model.score(scaler.transform(test), test_labels)
        found = probe_accuracy(jnp.array(x), jnp.array(labels), jnp.array(test), jnp.array(test_labels), num_classes=5, decay=decay)
        assert 0.3 < expected < 1 and float(found) == pytest.approx(expected)
    constant = jnp.concatenate([jnp.array(x), jnp.ones((200, 1))], 1)
    assert np.isfinite(probe_accuracy(constant, jnp.array(labels), constant, jnp.array(labels), num_classes=5))


def test_an_image_is_read_between_its_pixels():
    from scipy.ndimage import map_coordinates

    image, places = IMAGES[0], np.random.default_rng(3).uniform(-2, 8, size=(2, 50)).astype(np.float32)
    expected = map_coordinates(np.pad(image, 4), places + 4, order=1)
    np.testing.assert_allclose(read_at(jnp.array(image), *map(jnp.array, places)), expected, atol=1e-5)
    rows, columns = grid(6)
    np.testing.assert_array_equal(read_at(jnp.array(image), rows + 2.5, columns + 2.5), image)


def test_every_size_sees_as_many_examples_and_no_batch_one_twice():
    seen = {}
    for size in (4, 8, 16):
        order = make_order(3, 24, size, 64)
        assert order.indices.shape == (64 // size, size) and order.epochs.shape == (64 // size,)
        assert all(len(set(row)) == size for row in order.indices.tolist())
        seen[size] = order
    first = jb.batches.epoch_order(3, 0, 24)
    np.testing.assert_array_equal(seen[4].indices[:6].reshape(-1), first)
    assert seen[16].epochs.tolist() == [0, 1, 2, 3] and seen[4].epochs.tolist() == [0] * 6 + [1] * 6 + [2] * 4


def test_negatives_from_groups_are_the_losses_of_the_groups():
    first, second = (jnp.array(np.random.default_rng(n).normal(size=(12, 5)), jnp.float32) for n in (1, 2))
    found = losses_within(first, second, 4, 0.5)
    expected = jnp.concatenate([jb.nt_xent(first[n : n + 4], second[n : n + 4], 0.5) for n in (0, 4, 8)])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert (losses_within(first, second, 12, 0.5) > found).all()  # more negatives in the same sum


def test_the_cached_gradient_is_that_of_the_batch_in_one_piece():
    params, group = init_params(jax.random.key(1), 36), 12
    batch = (jnp.arange(12), example_keys(0, 2, jnp.arange(12)))
    ways = [jax.jit(gradient_on(jnp.array(IMAGES), 4, group, 0.5, 12, cached=cached))(params, batch) for cached in (True, False)]
    (losses, gradient), (expected, wanted) = ways
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_run_is_a_loop_over_its_batches():
    import optax

    images, params, order = jnp.array(IMAGES), init_params(jax.random.key(0), 36), make_order(1, 24, 8, 16)
    found, losses = make_arm_run(CONFIG, 8, 8, 2)(images, jax.tree.map(jnp.copy, params), np.float32(0.01), np.uint32(1), order)
    schedule = lambda step: 0.01 * (1 + np.cos(np.pi * step / 2)) / 2
    optimizer, expected = optax.adam(schedule), params
    state = optimizer.init(params)
    gradient_of = jax.jit(gradient_on(images, 99, 8, 0.5, 8))
    for n in range(2):
        told, gradient = gradient_of(expected, (order.indices[n], example_keys(1, int(order.epochs[n]), order.indices[n])))
        assert float(losses[n]) == pytest.approx(float(told.mean()), rel=1e-4)
        updates, state = optimizer.update(gradient, state)
        expected = optax.apply_updates(expected, updates)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def rows(part, size, group, rate, knns, **more):
    common = {"kind": "run", "part": part, "batch_size": size, "group": group, "learning_rate": rate, "updates": 9, "loss": 1.0, "diverged": False}
    return [common | {"seed": n, "knn": knn, "probe": knn, "loss_in_groups": 1.0} | more for n, knn in enumerate(knns)]


def test_the_rate_is_chosen_on_the_held_out_part_alone():
    records = [*rows("held_out", 8, 4, 0.1, [0.5, 0.7]), *rows("held_out", 8, 4, 0.2, [0.6, 0.6]), *rows("held_out", 8, 4, 0.3, [0.9], diverged=True)]
    records += [*rows("test", 8, 4, 0.2, [1.0]), *rows("held_out", 8, 8, 0.3, [1.0])]
    assert chosen_rate(records, 8, 4) == 0.1  # of equal ones the lower
    assert chosen_rate(records, 8, 8) == 0.3 and chosen_rate(records, 16, 4) is None


def test_the_sentences_tell_negatives_from_updates():
    records = [row for size, group in ((4, 4), (8, 4), (8, 8)) for row in rows("held_out", size, group, 0.2, [0.5])]
    for size, group, found in ((4, 4, [0.50, 0.51, 0.52]), (8, 4, [0.60, 0.61, 0.62]), (8, 8, [0.60, 0.611, 0.619])):
        records += rows("test", size, group, 0.2, found)
    records = json.loads(json.dumps(records))
    assert difference(records, (8, 4), (4, 4), "knn").value == pytest.approx(10)
    told = verdict(CONFIG, records)
    assert "B = 8 against 4 at equal examples: +10.00 [" in told[0] and told[0].endswith("points, a difference shows.")
    assert "More negatives alone, at B = 8: +0.00 [" in told[1] and "no difference shows. Fewer, less noisy updates alone: +10.00" in told[1]
    assert told[-1].startswith("More negatives do not")
    edge = [*rows("held_out", 8, 8, 0.1, [0.9]), *rows("test", 8, 8, 0.1, [0.70, 0.711, 0.719])]
    better = verdict(CONFIG, [*records, *edge])  # runs at 0.2 are no longer those of the chosen rate
    assert better[0].startswith("Warning: the best rate lies on the edge of the grid at B = 8;")
    assert better[-1] == "More negatives help the probe at B = 8."
    assert verdict(CONFIG, records[:6]) == ["One batch size alone does not answer the question. Give at least two --batch-sizes."]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-sizes", "64", "96"], "--batch-sizes 64 must divide the largest size, 96"),
        (["--batch-sizes", "32", "64"], "--batch-sizes 32 must be a multiple of --group 64"),
        (["--batch-sizes", "2048"], "larger than the training set without its held-out part (1202 examples)"),
        (["--passes", "0"], "--passes 0.0 must be above 0"),
    ],
)
def test_flags_that_cannot_be(flags, message, tmp_path, capsys):
    assert message in ended(contrastive.main, [*flags, "--output-dir", str(tmp_path)], capsys)


@pytest.mark.slow
def test_the_study_answers_and_goes_on(tmp_path, capsys):
    flags = ["--quick", "--batch-sizes", "64", "128", "--microbatch-size", "64", "--cost-sizes", "128", "--output-dir", str(tmp_path)]
    contrastive.main(flags)
    (file,) = tmp_path.glob("*/*/records.jsonl")
    records, told = read_records(file.parent), capsys.readouterr().out
    for part in ("Accuracy on the test set", "The gradient of a batch", "More negatives alone, at B = 128", "Figure:"):
        assert part in told
    runs = [record for record in records if record["kind"] == "run"]
    assert len({row["updates"] * row["batch_size"] for row in runs}) == 1 and {row["part"] for row in runs} == {"held_out", "test"}
    file.write_text("".join(json.dumps(record) + "\n" for record in records[:-3]))
    contrastive.main(flags)
    again = read_records(file.parent)
    assert len(again) == len(records) and [row["knn"] for row in again if row["kind"] == "run"] == [row["knn"] for row in runs]
