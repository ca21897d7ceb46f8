"""Parts of a batch that they do not divide are as equal as can be, in every way through training: each counts once in running moments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.gradients.parts import Part, fold
from jaxbatch.layers import BatchNorm
from jaxbatch.part_lengths import part_lengths, part_slices
from jaxbatch.training.classification import running_average
from tests.gradients.test_weighted import CONV


def test_lengths_differ_by_one_at_most_and_no_part_is_needless():
    for size in range(1, 70):
        for at_most in range(1, 75):
            lengths = part_lengths(size, at_most)
            listed = [one.stop - one.start for one in part_slices(size, at_most)]
            assert listed == sorted(listed, reverse=True) == [length for length, count in lengths.items() for _ in range(count)]
            assert sum(listed) == size and len(listed) == -(-size // at_most)
            assert max(listed) <= at_most and max(listed) - min(listed) <= 1


@pytest.mark.parametrize("method", ["map", "vmap", "unroll"])
@pytest.mark.parametrize(("size", "at_most"), [(11, 4), (65, 64), (9, 7), (12, 4), (5, 9)])
def test_a_fold_over_them(method, size, at_most):
    x = jnp.arange(float(size))
    found = fold(lambda part: Part(part.sum(), 2 * part, jnp.array([len(part), part[0]])), x, at_most, method=method)
    starts = [[part.stop - part.start, part.start] for part in part_slices(size, at_most)]
    assert found.summed == x.sum() and found.examples.tolist() == (2 * x).tolist() and found.each.tolist() == starts


def convolved(loss_fn):
    """A loss whose loops over parts are ones in Python, because it holds a convolution."""
    return lambda w, x: CONV(loss_fn(w, x)[:, None])[:, 0]


SIZE, AT_MOST = 11, 5  # in parts of 5 the last would have 1 example


def sizes_of_parts(loss_fn=lambda w, x: (x - w) ** 2, **fields):
    """A task whose state tells the least and the most examples of a part so far."""
    init = lambda key: (jnp.zeros(()), (jnp.array(1e9), jnp.array(0.0)))
    aux = lambda w, x: (loss_fn(w, x), jnp.array(float(len(x))))
    newest = lambda state, size: (jnp.minimum(state[0], size), jnp.maximum(state[1], size))
    return jb.Task(init, aux, None, jnp.ones(2 * SIZE), None, AT_MOST, newest, **fields)


def of_fit(task, **settings):
    (record,) = jb.fit(task, jb.FitConfig(optax.sgd(0.1), SIZE)._replace(**settings))
    return record["state"].model_state


def of_step(task):
    step = jb.make_train_step(task.loss_fn, optax.sgd(0.1), SIZE, microbatch_size=AT_MOST, update_model_state=task.update_model_state)
    return step(jb.init_state(task, optax.sgd(0.1), 0), task.train_data[:SIZE])[0].model_state


def of_sweep(task, runs):
    (record,) = jb.sweep(task, optax.sgd, jnp.array([0.1]), [0], batch_size=SIZE, duration=jb.epochs(1), runs=runs)
    return record["state"].model_state


PATHS = {
    "fit": (of_fit, [4, 3]),  # 4, 4, 3
    "step": (of_step, [4, 3]),
    "groups": (lambda task: of_fit(task._replace(microbatch_size=3), batch_size=22, num_groups=2), [3, 2]),  # 3, 3, 3, 2
    "stream": (lambda task: of_fit(task._replace(train_data=jb.ArrayStream(task.train_data))), [4, 3]),
    "stream in groups": (lambda task: of_fit(task._replace(train_data=jb.ArrayStream(task.train_data)), batch_size=22, num_groups=2), [4, 3]),
    "pieces": (lambda task: of_fit(sizes_of_parts(convolved(lambda w, x: (x - w) ** 2))), [4, 3]),
    "sweep in threads": (lambda task: of_sweep(task, "threads"), [4, 3]),
    "sweep by vmap": (lambda task: of_sweep(task, "vmap"), [4, 3]),
    "monitor": (lambda task: of_fit(task._replace(microbatch_size=None), monitor=jb.NoiseMonitor(parts=3), microbatch_size=AT_MOST), [4, 3]),
}


@pytest.mark.parametrize("path", PATHS)
def test_every_way_through_training_takes_equal_parts(path):
    run, (most, least) = PATHS[path]
    assert [float(np.squeeze(value)) for value in run(sizes_of_parts())] == [least, most]


def test_running_moments_are_not_those_of_a_last_example_alone():
    """In microbatches of 64 and 1 the variance would come to 0.47."""
    norm, x = BatchNorm(), jnp.asarray(np.random.default_rng(0).normal(size=(650, 1, 1, 1)), jnp.float32)
    variables = norm.init(jax.random.key(0), x, train=True)

    def loss_fn(params, x):
        out, moments = norm.apply({"params": params}, x, train=True, mutable=["batch_stats"])
        return out[:, 0, 0, 0] ** 2, moments["batch_stats"]

    task = jb.Task(lambda key: (variables["params"], variables["batch_stats"]), loss_fn, None, x, None, 64, running_average)
    *_, record = jb.fit(task, jb.FitConfig(optax.sgd(0.0), 65, jb.epochs(2)))
    np.testing.assert_allclose(record["state"].model_state["var"], x.var(), rtol=0.2)


def test_accumulation_in_a_python_loop_takes_equal_parts():
    lengths = []
    loss = convolved(lambda w, x: lengths.append(len(x)) or (x - w) ** 2)
    jb.accumulated_gradient(loss, jnp.zeros(()), jnp.ones(SIZE), AT_MOST)
    assert {4, 3} <= set(lengths) and 1 not in lengths
