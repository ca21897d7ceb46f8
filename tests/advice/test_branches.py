"""Branches from a state: against a closed form, against plain loops, and which examples they read."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.advice.branches import critical_of_branches
from tests.conftest import make_problem
from tests.data.test_streams import Arrays

CURVATURE, NOISE, WIDTH, START = 0.5, 2.0, 16, 1.0  # of the quadratic; the noise is that of its examples


@pytest.fixture(scope="module")
def quadratic():
    """``0.5 h |w - x|^2`` on examples around 0; the metric is the loss above the minimum. With a state at ``START``."""
    examples = NOISE * jax.random.normal(jax.random.key(0), (2**16, WIDTH))
    loss_fn = lambda w, x: 0.5 * CURVATURE * ((x - w[None]) ** 2).sum(-1)
    centre = examples.mean(0)
    task = jb.Task(lambda key: centre + START, loss_fn, lambda w, x: {"loss": loss_fn(w, x)}, examples, centre[None])
    return task, jb.init_state(task, optax.sgd(0.1), 0)


def expected(size, rate, examples):
    """The formula of the module's first lines."""
    a, power = 1 - rate * CURVATURE, 2 * examples // size
    noise = CURVATURE**2 * NOISE**2 * WIDTH  # trace of the gradient's covariance
    return CURVATURE / 2 * (a**power * START**2 * WIDTH + rate**2 * noise / size * (1 - a**power) / (1 - a**2))


@pytest.mark.parametrize("rule", ["linear", "sqrt"])
def test_branches_end_where_the_closed_form_says(quadratic, rule):
    task, state = quadratic
    settings = {"learning_rate": 0.05, "batch_size": 4, "factors": (8, 64), "examples": 1024, "seeds": range(24)}
    found = jb.branch(task, optax.sgd, state, rule=rule, tolerance=0.05, **settings)
    assert list(found.metrics) == [4, 32, 256] and found.examples == 3 * 24 * 1024
    power = {"linear": 1, "sqrt": 0.5}[rule]
    truth = {size: expected(size, rate, 1024) for size, rate in found.learning_rates.items()}
    for size, ends in found.metrics.items():
        assert found.learning_rates[size] == pytest.approx(0.05 * (size / 4) ** power)
        assert abs(np.mean(ends) - truth[size]) < 4 * np.std(ends, ddof=1) / math.sqrt(24), size
    critical = critical_of_branches({size: (value,) for size, value in truth.items()}, 0.05)
    assert found.critical_batch_size.low <= critical.value <= found.critical_batch_size.high


@pytest.mark.parametrize("slower", [1, 4])
def test_a_rate_that_is_c_times_smaller_finds_a_size_that_is_c_times_larger(quadratic, slower):
    """Long branches end at a noise floor, in proportion to ``1 / (1 - k rate h / 2)``: 1.3 times that of small rates at 1/2, twice at 1."""
    task, state = quadratic
    rate = 1 / 8 / CURVATURE / slower  # k rate h is 1/8 for the smallest batch, 1/2 for 4 times it, if slower is 1
    settings = {"batch_size": 4, "examples": 1024, "rule": "linear", "seeds": range(24), "factors": (4 * slower, 8 * slower)}
    found = jb.branch(task, optax.sgd, state, learning_rate=rate, tolerance=0.55 * expected(4, rate, 1024), **settings)
    assert found.critical_batch_size.value == 16 * slower


def test_branches_are_plain_loops_that_carry_the_optimizer_on():
    loss_fn, params, data = make_problem(96)
    task = jb.Task(lambda key: params, loss_fn, lambda p, batch: {"loss": loss_fn(p, batch)}, data, data)
    config = jb.FitConfig(optax.adam(0.01), 4, jb.steps(30), seed=5)
    *_, record = jb.fit(task, config)
    state = record["state"]
    before = jax.tree.map(np.asarray, state)
    found = jb.branch(task, optax.adam, state, learning_rate=0.01, batch_size=4, examples=70, factors=(4,), seeds=[7])
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, state))  # it can be used again
    order = np.asarray(jb.epoch_order(7 + 0x6272616E, 0, 96))[:64]
    for size, rate in ((4, 0.01), (16, 0.02)):
        optimizer, now, opt_state = optax.adam(rate), state.params, state.opt_state
        for index in order.reshape(-1, size):
            batch = jax.tree.map(lambda leaf, index=index: leaf[index], data)
            gradient = jax.grad(lambda p, batch=batch: loss_fn(p, batch).mean())(now)
            updates, opt_state = optimizer.update(gradient, opt_state, now)
            now = optax.apply_updates(now, updates)
        np.testing.assert_allclose(found.metrics[size], [float(loss_fn(now, data).mean())], rtol=1e-5)


def test_branches_read_the_same_examples_and_not_the_run_s_next_ones():
    read = []

    class Watched(Arrays):
        def parts(self, indices, place=(0, 0)):
            for part in indices:
                read.append(list(map(int, part)))
                yield from super().parts([part], place)

    data = (jnp.arange(64.0),)
    loss_fn = lambda w, batch: 0.5 * (batch[0] - w) ** 2
    task = jb.Task(lambda key: jnp.array(0.0), loss_fn, lambda w, batch: {"loss": loss_fn(w, batch)}, Watched(data), data)
    *_, record = jb.fit(task, jb.FitConfig(optax.sgd(0.01), 4, jb.steps(6), seed=0))
    read.clear()
    jb.branch(task, optax.sgd, record["state"], learning_rate=0.01, batch_size=4, examples=32, factors=(2, 4), seeds=[0, 1])
    seen = [example for part in read for example in part]
    branches = [seen[start : start + 32] for start in range(0, len(seen), 32)]  # by size, then by seed
    assert len(branches) == 6 and [len(part) for part in read[:16:15]] == [4, 4] and len(read[-1]) == 16
    assert branches[0] == branches[2] == branches[4] and branches[1] == branches[3] == branches[5] != branches[0]
    own = list(map(int, jb.epoch_order(0, 0, 64)))  # the run with seed 0: what it has read, and what it would read next
    for examples in branches[:2]:
        assert len(set(examples)) == 32 and examples not in (own[:32], own[24:56])
        assert sum(a == b for a, b in zip(examples, own[24:56], strict=True)) < 8


def test_the_interval_says_between_which_sizes_and_how_sure():
    held = {8: (1.0, 1.1, 1.2), 16: (1.0, 1.1, 1.2), 32: (1.3, 1.45, 1.6)}
    assert critical_of_branches(held, 0.05)[:4] == (16, 16, 32, 3)
    assert critical_of_branches({size: ends[:2] for size, ends in held.items()}, 0.05)[:3] == (16, 16, math.inf)  # 2 seeds say little
    assert critical_of_branches(held, 1.0)[:3] == (32, 32, math.inf)  # all hold: only a lower bound
    assert critical_of_branches({8: (1.0, 1.0), 16: (2.0, 2.0)}, 0.1)[:3] == (8, 0, 16)  # none: only an upper one
    assert critical_of_branches({8: (0.9, 0.9), 16: (0.895, 0.895), 32: (0.7, 0.7)}, 0.01, above=True)[:3] == (16, 16, 32)
    alone = critical_of_branches({8: (1.0,), 16: (2.0,)}, 0.1)
    assert alone.value == 8 and math.isnan(alone.low) and not alone.excludes(16)  # one seed says nothing of its error
    assert critical_of_branches({8: (1.0,), 16: (2.0,), 32: (1.0,)}, 0.1).value == 8  # what comes after a failure does not count
    unsure = critical_of_branches({8: (1.0, 1.0, 1.0), 16: (1.0, 1.0, 1.0), 32: (0.9, 1.0, 1.2)}, 0.05)
    assert unsure[:3] == (32, 16, math.inf)
    lost = critical_of_branches({8: (1.0, math.inf), 16: (1.0, 1.0)}, 0.1)
    assert math.isnan(lost.value) and not lost.excludes(8)


def test_a_branch_that_diverges_does_not_hold(quadratic):
    task, state = quadratic
    settings = {"learning_rate": 0.5, "batch_size": 4, "factors": (2, 128), "examples": 2**16, "rule": "linear", "seeds": [0, 1]}
    found = jb.branch(task, optax.sgd, state, tolerance=1e9, **settings)
    assert found.metrics[512] == (math.inf, math.inf) and found.critical_batch_size[:4] == (8, 8, 512, 2)


def test_what_a_user_gets_wrong_is_said(quadratic):
    task, state = quadratic
    right = {"learning_rate": 0.05, "batch_size": 4, "examples": 64, "factors": (2,)}
    for wrong, words in (
        ({"examples": 7}, "take at least 8"),
        ({"examples": 2**17}, "num_examples=65536"),
        ({"factors": (1,)}, "above 1"),
        ({"seeds": ()}, "seeds is empty"),
        ({"seeds": (-1,)}, "seed=-1"),
        ({"metric": "accuracy"}, "metrics are loss"),
        ({"rule": "cubic"}, "rule='cubic'"),
        ({"tolerance": -1.0}, "tolerance=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
    ):
        with pytest.raises(ValueError, match=words):
            jb.branch(task, optax.sgd, state, **(right | wrong))
    with pytest.raises(ValueError, match="another form"):
        jb.branch(task, optax.adam, state, **right)
    injected = optax.inject_hyperparams(optax.sgd)
    with pytest.raises(ValueError, match="inject_hyperparams"):
        jb.branch(task, injected, state._replace(opt_state=injected(0.05).init(state.params)), **right)
    with pytest.raises(ValueError, match="test_data"):
        jb.branch(task._replace(test_data=None), optax.sgd, state, **right)
