"""The noise in Adam's metric where rows of an embedding come rarely: their moments tell nothing, so they are left out, and records say so."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.gradients.part_norms import inverse_moments

ROWS, COMMON, SIZE = 40, 4, 16
MONITOR = jb.NoiseMonitor(preconditioned=True)


def rare_tokens(last):
    """Examples of the common tokens alone, but for the last batch of the run, in which ``last`` comes too."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, COMMON, 20 * SIZE)
    order = np.asarray(jb.epoch_order(0, 0, len(tokens)))
    if last is not None:
        tokens[order[-SIZE]] = last
    loss_fn = lambda params, batch: ((params["table"][batch[0]] * params["out"][None]).sum(1) - batch[1]) ** 2
    start = {"table": jnp.asarray(random.normal(size=(ROWS, 3)), jnp.float32), "out": jnp.ones(3)}
    data = jnp.asarray(tokens, jnp.int32), jnp.asarray(random.normal(size=len(tokens)), jnp.float32)
    return jb.Task(lambda key: start, loss_fn, None, data, None)


def traces(last, optimizer, **settings):
    config = jb.FitConfig(optimizer, SIZE, evaluations_per_epoch=20, monitor=MONITOR, **settings)
    return list(jb.fit(rare_tokens(last), config))


@pytest.mark.parametrize("optimizer", [optax.adamw(1e-3), optax.rmsprop(1e-3)], ids=["adamw", "rmsprop"])
def test_a_token_that_comes_for_the_first_time_does_not_drown_the_others(optimizer):
    *before, last = traces(ROWS - 1, optimizer)
    known = [record["noise_trace"] for record in before[4:]]
    assert 0 < last["noise_trace"] < 10 * max(known)  # it was 1e16
    rare = 3 * (ROWS - COMMON) / (3 * ROWS + 3)
    np.testing.assert_allclose(last["noise_left_out"], rare, rtol=0.05)
    *_, without = jb.fit(rare_tokens(None), jb.FitConfig(optimizer, SIZE, monitor=jb.NoiseMonitor()))
    assert "noise_left_out" not in without


def test_on_the_other_paths_too():
    expected = traces(ROWS - 1, optax.adamw(1e-3), microbatch_size=4)[-1]
    in_groups = traces(ROWS - 1, optax.adamw(1e-3), num_groups=2, microbatch_size=4)[-1]
    assert in_groups["noise_left_out"] == pytest.approx(expected["noise_left_out"], rel=0.05)
    task = rare_tokens(ROWS - 1)
    config = jb.FitConfig(optax.adamw(1e-3), SIZE, evaluations_per_epoch=20, monitor=MONITOR, microbatch_size=4)
    *_, streamed = jb.fit(task._replace(train_data=jb.ArrayStream(task.train_data)), config)
    assert streamed["noise_left_out"] == pytest.approx(expected["noise_left_out"])
    np.testing.assert_allclose(streamed["noise_trace"], expected["noise_trace"], rtol=1e-3)


def test_a_moment_that_has_faded_tells_nothing_and_others_keep_their_metric():
    adam, params = optax.adam(1e-3), jnp.zeros(4)
    state = adam.init(params)
    gradient = jax.jit(lambda n: jnp.array([1.0, 0.0, jnp.where(n == 0, 1.0, 0.0), jnp.where(n >= 40, 0.01, 0.0)]))
    for number in range(50):
        _, state = adam.update(gradient(number), state, params)
    fresh, known = inverse_moments(MONITOR, state, params)
    assert known and fresh[1] == 0 and (fresh[jnp.array([0, 2, 3])] > 0).all()
    moments = np.asarray(state[0].nu, np.float64) / (1 - 0.999**50)
    np.testing.assert_allclose(fresh[jnp.array([0, 2, 3])], ((np.sqrt(moments) + 1e-8) ** -2)[[0, 2, 3]], rtol=1e-4)
    for number in range(50, 160):
        _, state = adam.update(gradient(number), state, params)
    faded, _ = inverse_moments(MONITOR, state, params)
    assert faded[1] == faded[2] == 0 and faded[0] > 0 and faded[3] > 0
