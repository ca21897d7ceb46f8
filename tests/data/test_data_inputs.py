"""Data that would train wrongly are refused by name: leaves that disagree, images and labels of odd ranges and types."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbatch as jb
from tests.training.test_inputs import PAIR, PAIRS, SHORT, TASK, X, first, swept


class Unequal:
    """A stream that says it is empty."""

    num_examples, example = 0, jax.ShapeDtypeStruct((), jnp.float32)

    def parts(self, indices, place=(0, 0)):
        yield from ()


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: first(PAIRS._replace(train_data=SHORT)), r"train_data: .*\[0\] has 10, \[1\] has 6"),
        (lambda: first(PAIRS._replace(test_data=SHORT)), r"test_data: .*\[0\] has 10, \[1\] has 6"),
        (lambda: swept(PAIRS._replace(train_data=SHORT)), r"train_data: .*\[0\] has 10, \[1\] has 6"),
        (lambda: swept(PAIRS._replace(test_data=SHORT)), r"test_data: .*\[0\] has 10, \[1\] has 6"),
        (lambda: PAIRS._replace(train_data=SHORT).num_examples, "train_data"),
        (lambda: first(TASK._replace(train_data=Unequal())), "train_data is a stream of num_examples=0"),
        (lambda: first(TASK._replace(test_data=Unequal())), "test_data is a stream of num_examples=0"),
        (lambda: jb.make_evaluate(PAIRS.metrics_fn, 10)(0.0, SHORT), r"data: .*\[0\] has 10, \[1\] has 6"),
        (lambda: jb.make_evaluate(PAIRS.metrics_fn, 10)(0.0, (X, X)), "num_examples=10 and got data of 8"),
        (lambda: jb.make_epoch(lambda s, b: (s, b[1]))(0.0, SHORT, jnp.array([[7]])), r"data: .*\[0\] has 10, \[1\] has 6"),
        (lambda: jb.compile_epoch(lambda s, b: (s, b[1]), 0.0, SHORT, 1, 1), r"data: .*\[0\] has 10, \[1\] has 6"),
        (lambda: jb.per_example_gradients(PAIR, jnp.array(0.0), SHORT), r"batch: .*\[0\] has 10, \[1\] has 6"),
        (lambda: jb.group_gradients(PAIR, jnp.array(0.0), SHORT, 2), r"batch: .*\[0\] has 10, \[1\] has 6"),
        (lambda: jb.gradient_statistics(PAIR, jnp.array(0.0), SHORT), r"batch: .*\[0\] has 10, \[1\] has 6"),
        (lambda: jb.accumulated_gradient(PAIR, jnp.array(0.0), SHORT, 2), r"batch: .*\[0\] has 10, \[1\] has 6"),
    ],
)
def test_leaves_of_different_length(use, message):
    with pytest.raises(ValueError, match=message):
        use()


DIGITS = jb.load_dataset("digits")


def labels(part, change):
    return lambda: {f"{part}_labels": change(getattr(DIGITS, f"{part}_labels"))}


def images(part, change):
    return lambda: {f"{part}_images": change(getattr(DIGITS, f"{part}_images"))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (labels("train", lambda y: y[:-100]), "dataset.train: 1442 images and 1342 labels"),
        (labels("test", lambda y: y[:-100]), "dataset.test: 355 images and 255 labels"),
        (labels("train", lambda y: y[:, None]), r"dataset.train_labels have shape \(1442, 1\) .*reshape"),
        (labels("test", lambda y: np.eye(10)[y]), r"dataset.test_labels have shape \(355, 10\) .*argmax"),
        (labels("train", lambda y: y + 1), "dataset.train_labels go from 1 to 10, and num_classes=10 allows 0 to 9"),
        (labels("test", lambda y: y - 1), "dataset.test_labels go from -1 to 8"),
        (labels("train", lambda y: y.astype(np.float32)), "dataset.train_labels are float32 and must be whole numbers"),
        (labels("train", lambda y: y == 1), "dataset.train_labels are bool"),
        (images("train", lambda x: x.astype(np.float32)), "dataset.train_images go up to 255 and are float32: divide them by 255"),
        (images("test", lambda x: x.astype(np.float64)), "dataset.test_images go up to 255 and are float64"),
        (images("train", lambda x: x.astype(np.int32)), "dataset.train_images are int32 and must be uint8"),
        (images("train", lambda x: np.where(x == 255, np.nan, x / 255)), "dataset.train_images hold values that are not finite"),
        (images("train", lambda x: x[..., 0]), r"dataset.train_images have shape \(1442, 28, 28\) .*add an axis"),
        (lambda: {"test_images": DIGITS.test_images[:0], "test_labels": DIGITS.test_labels[:0]}, "dataset.test is empty"),
        (lambda: {"mean": (0.5, 0.5, 0.5)}, "dataset.mean has 3 numbers for 1 channels"),
    ],
)
def test_a_data_set_that_would_train_wrongly(changes, message):
    with pytest.raises(ValueError, match=message):
        jb.classification_task(jb.MLP((4,)), DIGITS._replace(**changes()))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_images_that_are_scaled_are_taken(dtype):
    scaled = DIGITS._replace(**{name: (getattr(DIGITS, name) / 255).astype(dtype) for name in ("train_images", "test_images")})
    assert jb.classification_task(jb.MLP((4,)), scaled).num_examples == 1442


# 2. Kinds of input
