"""A stream of the user's own that gives too few, too many or wrong parts ends in one line, wherever it is read."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.advice.timed_updates import _Ready
from jaxbatch.data.stream_parts import checked_parts
from jaxbatch.training.epochs import compile_task_epoch
from jaxbatch.training.evaluation import make_evaluate

X, Y = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32), np.arange(20, dtype=np.int32)


class Arrays:
    """Arrays as a user would stream them: ``seed_epoch`` has no default."""

    num_examples = 20
    example = (jax.ShapeDtypeStruct((3,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32))

    def parts(self, indices, seed_epoch):
        for part in indices:
            yield X[part], Y[part]


class Changed(Arrays):
    """The same with a fault: ``change`` makes other parts of the indices and the parts."""

    def __init__(self, change):
        self.change = change

    def parts(self, indices, seed_epoch):
        return self.change(indices, super().parts(indices, seed_epoch))


def twice(indices, parts):
    for part in parts:
        yield part
        yield part


def twice_ahead(indices, parts):
    """The same by a stream that takes its indices ahead."""
    return twice(None, Arrays().parts(list(indices), None))


def each(change):
    return lambda indices, parts: (change(x, y) for x, y in parts)


FAULTS = {
    "none": (lambda indices, parts: iter(()), r"gave 0 of 4 parts: yield one for each array of indices"),
    "few": (lambda indices, parts: itertools.islice(parts, 3), r"gave 3 of 4 parts"),
    "more": (lambda indices, parts: itertools.chain(parts, [(X[:5], Y[:5])]), r"gave more than 4 parts"),
    "twice": (twice, r"gave part 2 before it took its indices"),
    "twice, ahead": (twice_ahead, r"gave more than 4 parts"),
    "short": (each(lambda x, y: (x[1:], y[1:])), r"gave part 1 with \[0\] of shape \(4, 3\): \(5, 3\) is wanted, 5 examples"),
    "one short": (each(lambda x, y: (x, y[1:])), r"gave part 1 with \[1\] of shape \(4,\): \(5,\) is wanted"),
    "wide": (each(lambda x, y: (np.tile(x, (1, 2)), y)), r"gave part 1 with \[0\] of shape \(5, 6\): \(5, 3\) is wanted"),
    "alone": (each(lambda x, y: x), r"gave part 1 as PyTreeDef\(\*\), and \w+.example is PyTreeDef\(\(\*, \*\)\)"),
    "type": (each(lambda x, y: (x.astype(np.float16), y)), r"gave part 1 with \[0\] of float16, and \w+.example says float32"),
    "large": (each(lambda x, y: (x, y + np.int64(2**40))), r"parts: \[1\] goes from .* and JAX keeps int64 as int32"),
    "strange": (each(lambda x, y: (x, "labels")), r"gave part 1 with \[1\] of the class str: use numpy.asarray"),
    "nothing": (lambda indices, parts: None, r"must yield the examples of each part in order, but returned a NoneType"),
}


def loss_fn(w, batch):
    return 0.5 * (batch[0] @ w - batch[1]) ** 2


def a_task(train_data=None, test_data=None):
    return jb.Task(lambda key: jnp.ones(3), loss_fn, lambda w, batch: {"loss": loss_fn(w, batch)}, train_data or Arrays(), test_data)


@functools.cache
def reader(name):
    """Reads 4 parts of 5 examples of a stream, by one program for all streams."""
    if name == "evaluation":
        evaluate = make_evaluate(a_task().metrics_fn, 20, 5)
        return lambda stream: evaluate(jnp.ones(3), stream)
    if name == "alone":
        return lambda stream: list(checked_parts(stream, lambda: np.arange(20).reshape(4, 5)))
    state, settings = jb.init_state(a_task(), optax.sgd(0.1), 0), {}
    if name in ("jit", "pmap"):
        settings = {"devices": jax.devices()[:2], "parallel": name}
    if name == "parts":
        run = compile_task_epoch(a_task(), optax.sgd(0.1), state, 2, 10, microbatch_size=5)
        return lambda stream: run(jax.tree.map(jnp.copy, state), stream, np.arange(20).reshape(2, 10))
    run = compile_task_epoch(a_task(), optax.sgd(0.1), state, 4, 5, **settings)
    return lambda stream: run(jax.tree.map(jnp.copy, state), stream, np.arange(20).reshape(4, 5))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["batches", "parts", "evaluation", "alone"])
def test_a_wrong_part_is_one_line(name, fault):
    change, message = FAULTS[fault]
    with pytest.raises(ValueError, match=("test" if name == "evaluation" else "train") + "_data.parts.*" + message.removeprefix("parts:")) as caught:
        reader(name)(Changed(change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["batches", "parts", "evaluation", "alone"])
def test_a_right_stream_is_read(name):
    reader(name)(Arrays())
    reader(name)(Changed(each(lambda x, y: (x.astype(np.float64), y.astype(np.int64)))))  # JAX makes them what the example says
    reader(name)(Changed(lambda indices, parts: list(parts)))


def fault_on_two_devices(fault, message, parallel):
    """0 if the error is the one line that is expected, else 1; two devices, because parts of five examples are filled up to six."""
    message = message.replace(r"\(4", r"\(5").replace(r"\(5, 3\) is", r"\(6, 3\) is").replace(r"\(5,\) is", r"\(6,\) is").replace("5 ex", "6 ex")
    message = message.replace(r"\(5, 6\)", r"\(6, 6\)")
    try:
        reader(parallel)(Changed(FAULTS[fault][0]))
    except ValueError as error:
        return float(re.search("train_data.parts.*" + message.removeprefix("parts:"), str(error)) is None or "\n" in str(error))
    return 1.0


def test_a_user_s_stream_trains_and_tests_as_arrays_do():
    streamed, arrays = a_task(Arrays(), Arrays()), a_task((X, Y), (X, Y))
    config = jb.FitConfig(optax.sgd(0.01), 5, jb.epochs(1))
    ((one,), (other,)) = (list(jb.fit(task, config)) for task in (streamed, arrays))
    np.testing.assert_allclose([one["loss"], one["test_loss"]], [other["loss"], other["test_loss"]], rtol=1e-5)
    with pytest.raises(ValueError, match="test_data.parts gave 0 of 1 parts"):
        list(jb.fit(streamed._replace(test_data=Changed(FAULTS["none"][0])), config))


def test_other_readers_look_too():
    config = jb.FitConfig(optax.sgd(0.01), 5, jb.epochs(1), monitor=jb.NoiseMonitor())
    for change in ("none", "twice, ahead"):
        wrong = Changed(FAULTS[change][0])
        with pytest.raises(ValueError, match="train_data.parts gave"):
            list(jb.fit(a_task(wrong), config))
        with pytest.raises(ValueError, match="train_data.parts gave"):
            list(_Ready(wrong).parts([np.arange(5)], (0, 0)))


def test_what_is_no_stream_says_what_it_lacks():
    class Lacking:
        num_examples = 20
        parts = Arrays.parts

    class Uncounted(Arrays):
        num_examples = "20"

    class Old(Arrays):
        def parts(self, indices):
            return super().parts(indices, None)

    config = jb.FitConfig(optax.sgd(0.1), 5)
    for stream, message in (
        (Lacking(), "train_data is a stream without example"),
        (Uncounted(), "train_data is a stream of num_examples='20', and must hold a whole number of at least 1"),
        (Old(), r"train_data.parts takes \(indices\). It gets an iterable of the indices of each part and \(seed, epoch\)"),
    ):
        with pytest.raises(ValueError, match=message):
            list(jb.fit(a_task(stream), config))
