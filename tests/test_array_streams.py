"""Arrays that stay on the host, or in a file: training from them is training from the device."""

import jax
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.training.evaluation import make_evaluate
from tests.test_huge_batches import augmented, image_task


def in_files(task, folder):
    """The task, its training data in memory maps."""
    maps = []
    for number, leaf in enumerate(task.train_data):
        np.save(folder / f"{number}.npy", leaf)
        maps.append(np.load(folder / f"{number}.npy", mmap_mode="r"))
    assert all(isinstance(leaf, np.memmap) for leaf in jb.ArrayStream(tuple(maps)).arrays)
    return task._replace(train_data=jb.ArrayStream(tuple(maps)))


@pytest.mark.parametrize("prepare", [image_task, lambda: augmented(image_task())], ids=["plain", "augmented"])
def test_training_from_files_is_training_from_the_device(prepare, tmp_path):
    task = prepare()
    config = jb.FitConfig(optax.sgd(0.1, 0.9), 24, jb.epochs(2), microbatch_size=7)
    for one, other in zip(jb.fit(task, config), jb.fit(in_files(task, tmp_path), config), strict=True):
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-6)
        np.testing.assert_allclose(one["test_accuracy"], other["test_accuracy"])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), one["state"].params, other["state"].params)


def test_the_bound_of_a_task_holds_for_its_stream(tmp_path):
    task, sizes = image_task(), set()

    def loss_fn(params, batch):
        sizes.add(len(batch[1]))
        return task.loss_fn(params, batch)

    bounded = in_files(task._replace(loss_fn=loss_fn, microbatch_size=7), tmp_path)
    list(jb.fit(bounded, jb.FitConfig(optax.sgd(0.1), 24, jb.steps(2))))
    assert max(sizes) == 6  # 24 examples, at most 7 at a time, in equal parts


def test_evaluation_from_files(tmp_path):
    task = image_task()
    streamed = in_files(task, tmp_path).train_data
    params = task.init(jax.random.key(0))
    one, other = (make_evaluate(task.metrics_fn, 48, 7)(params, data) for data in (task.train_data, streamed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, other)


def test_types_are_those_of_the_device():
    stream = jb.ArrayStream({"x": np.arange(3.0), "y": np.arange(3)})
    (part,) = stream.parts([np.array([1, 1])])
    assert {key: leaf.dtype for key, leaf in part.items()} == {"x": np.float32, "y": np.int32}
    assert all(part[key].dtype == stream.example[key].dtype for key in part)


@pytest.mark.parametrize("arrays", [(), (np.ones(3), np.ones(4)), (np.ones(3), np.float32(1))])
def test_arrays_that_are_no_examples_are_refused(arrays):
    with pytest.raises(ValueError, match="arrays have the shapes"):
        jb.ArrayStream(arrays)
