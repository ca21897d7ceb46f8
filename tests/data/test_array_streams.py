"""Arrays that stay on the host, or in a file: training from them is training from the device."""

import json

import jax
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.training.evaluation import make_evaluate
from tests.gradients.test_huge_batches import augmented, image_task


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


def other_data(arrays, way):
    if way == "one number":
        arrays[0][-1, 0] += 1
    return arrays if way != "order" else [leaf[::-1].copy() for leaf in arrays]


@pytest.mark.parametrize("way", ["one number", "order"])
def test_other_data_in_the_same_folder_are_refused(way, tmp_path):
    arrays = [np.arange(24.0).reshape(12, 2), np.arange(12)]
    run = lambda arrays: jb.fit_with_checkpoints(
        jb.Task(lambda key: np.zeros(2, np.float32), lambda w, b: b[0] @ w, None, jb.ArrayStream(tuple(arrays)), None),
        jb.FitConfig(optax.sgd(0.1), 4, jb.epochs(3)),
        tmp_path,
    )
    next(iter(run(arrays)))
    next(iter(run([leaf.copy() for leaf in arrays])))  # the same data
    with pytest.raises(ValueError, match="holds another run .data"):
        next(iter(run(other_data(arrays, way))))


def test_a_folder_from_before_streams_had_fingerprints_goes_on(tmp_path):
    task = jb.Task(lambda key: np.zeros((), np.float32), lambda w, x: w * x, None, jb.ArrayStream(np.ones(8, np.float32)), None)
    run = lambda: jb.fit_with_checkpoints(task, jb.FitConfig(optax.sgd(0.1), 4, jb.epochs(3)), tmp_path)
    next(iter(run()))
    about = tmp_path / "about.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"data": None}, sort_keys=True))
    assert [record["epoch"] for record in run()][-1] == 3.0


def test_the_fingerprint_of_a_large_file_reads_some_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxbatch.data.streams._DIGESTED_BYTES", 1000)
    monkeypatch.setattr("jaxbatch.data.streams._DIGESTED_EXAMPLES", 10)
    x = np.arange(2000.0)
    first = jb.ArrayStream(x).fingerprint
    assert first == jb.ArrayStream(x.copy()).fingerprint != jb.ArrayStream(x + 1).fingerprint
    assert first != jb.ArrayStream(x[:1999]).fingerprint and first != jb.ArrayStream(x.astype(np.float32)).fingerprint
    unread = x.copy()
    unread[1] = 7
    assert jb.ArrayStream(unread).fingerprint == first  # as the docstring says
