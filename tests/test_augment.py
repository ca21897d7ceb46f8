"""Augmentation against NumPy, image by image, and its independence of how examples are batched."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.augment import crop_and_flip, example_keys
from tests.training.test_loops import convolution_task


def by_hand(key, image, padding, flip):
    """The same draws, the change spelled out in NumPy."""
    for_crop, for_flip = jax.random.split(key)
    top, left = np.asarray(jax.random.randint(for_crop, (2,), 0, 2 * padding + 1)) if padding else (0, 0)
    padded = np.pad(np.asarray(image), ((padding, padding), (padding, padding), (0, 0)))
    image = padded[top : top + image.shape[0], left : left + image.shape[1]]
    return image[:, ::-1] if flip and bool(jax.random.bernoulli(for_flip)) else image


@pytest.mark.parametrize("padding", [0, 2, 4])
@pytest.mark.parametrize("flip", [True, False])
def test_against_numpy(padding, flip):
    images = jnp.asarray(np.random.default_rng(0).integers(1, 256, (32, 8, 6, 3), dtype=np.uint8))
    keys = example_keys(3, 5, jnp.arange(32))
    found = jax.jit(lambda k, x: crop_and_flip(k, x, padding=padding, flip=flip))(keys, images)
    for key, image, mine in zip(keys, images, found, strict=True):
        np.testing.assert_array_equal(mine, by_hand(key, image, padding, flip))
    if not padding and not flip:
        np.testing.assert_array_equal(found, images)


def test_every_place_and_both_sides_come_up_evenly():
    image = np.zeros((9, 9, 1), np.uint8)
    image[4, 3] = 1  # off the middle, so that a flip shows
    found = crop_and_flip(example_keys(0, 0, jnp.arange(4000)), jnp.broadcast_to(image, (4000, 9, 9, 1)), padding=2)
    places, counts = np.unique(np.argwhere(np.asarray(found)[..., 0])[:, 1:], axis=0, return_counts=True)
    assert len(places) == 5 * 7 and counts.sum() == 4000  # columns 1..5 straight, 3..7 mirrored
    straight = np.asarray(found)[..., 0].sum(1)[:, :3].sum()  # columns that only an unmirrored image reaches
    assert abs(straight / 4000 - 0.5 * 2 / 5) < 0.03


def test_an_example_is_changed_alike_in_any_batch():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), dtype=np.uint8))
    whole = crop_and_flip(example_keys(0, 2, jnp.arange(10)), images)
    order = jnp.array([7, 3, 9])
    np.testing.assert_array_equal(crop_and_flip(example_keys(0, 2, order), images[order]), whole[order])
    other_epoch = crop_and_flip(example_keys(0, 3, jnp.arange(10)), images)
    assert (np.asarray(other_epoch) != np.asarray(whole)).any()
    with pytest.raises(ValueError, match="padding=-1 pixels"):
        crop_and_flip(example_keys(0, 0, order), images[order], padding=-1)


def augmented(task):
    """The task with noise on its inputs, one key for each example."""

    def prepare(keys, batch):
        images, *rest = batch
        return (images + jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(keys), *rest)

    return task._replace(prepare=prepare)


def test_a_run_with_augmentation_against_a_loop():
    task, optimizer = augmented(convolution_task()), optax.sgd(0.1, 0.9)
    records = list(jb.fit(task, jb.FitConfig(optimizer, 8, jb.epochs(2), seed=5)))
    state = jb.init_state(task, optimizer, 5)
    step = jb.make_train_step(task.loss_fn, optimizer, 8)
    for epoch in range(2):
        for index in jb.epoch_batches(5, epoch, 24, 8).indices:
            batch = jax.tree.map(lambda leaf: leaf[index], task.train_data)
            state, _ = step(state, task.prepare(example_keys(5, epoch, index), batch))
    for mine, expected in zip(*map(jax.tree.leaves, (records[-1]["state"].params, state.params)), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-6)
    plain = list(jb.fit(convolution_task(), jb.FitConfig(optimizer, 8, jb.epochs(2), seed=5)))
    assert records[0]["loss"] != plain[0]["loss"]
    test = jb.make_evaluate(task.metrics_fn, 7)(records[-1]["state"].params, task.test_data)
    assert records[-1]["test_loss"] == float(test["loss"])  # the test set is left as it is


@pytest.mark.parametrize("runs", ["vmap", "map", "threads"])
def test_a_sweep_with_augmentation_is_what_fit_makes(runs):
    task, optimizer = augmented(convolution_task()), optax.sgd(0.1)
    *_, last = jb.sweep(task, optax.sgd, jnp.array([0.1, 0.1]), [2, 9], batch_size=8, duration=jb.epochs(2), runs=runs)
    for index, seed in enumerate([2, 9]):
        *_, alone = jb.fit(task, jb.FitConfig(optimizer, 8, jb.epochs(2), seed=seed))
        np.testing.assert_allclose(last["test_loss"][index], alone["test_loss"], rtol=1e-5)


def test_going_on_and_other_parts_of_an_epoch_see_the_same_images():
    task = augmented(convolution_task())
    config = jb.FitConfig(optax.sgd(0.1), 4, jb.steps(10), seed=1)
    whole = list(jb.fit(task, config._replace(evaluations_per_epoch=3)))
    for record in (whole[0], whole[3]):
        rest = list(jb.fit(task, config, state=record["state"]))
        np.testing.assert_array_equal(rest[-1]["test_loss"], whole[-1]["test_loss"])


def test_images_of_a_data_set():
    dataset = jb.load_dataset("digits")
    task = jb.classification_task(jb.MLP((8,)), dataset, augment=lambda keys, x: crop_and_flip(keys, x, flip=False))
    images, labels = task.prepare(example_keys(0, 0, jnp.arange(5)), jax.tree.map(lambda leaf: leaf[:5], task.train_data))
    assert images.dtype == jnp.uint8 and images.shape == (5, 28, 28, 1) and (labels == task.train_data[1][:5]).all()
