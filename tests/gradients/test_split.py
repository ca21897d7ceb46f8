"""One forward, several backward: against a Python loop, against closed forms, inside scan, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jaxbatch as jb
from experiments.split_backward.steps import make_masked_step
from tests import reference
from tests.conftest import make_problem
from tests.gradients.test_gradients import assert_close

OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, 0.9),
    "nesterov": lambda: optax.sgd(0.1, 0.9, nesterov=True),
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "lars": lambda: optax.lars(0.1),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1)),
    "schedule": lambda: optax.sgd(optax.exponential_decay(0.1, 3, 0.5)),
    "injected": lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.5),
}


@pytest.mark.parametrize("method", [None, "map", "vmap", "unroll"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_a_python_loop(x64, name, method):
    loss_fn, params, batch = make_problem(24, np.float64)
    optimizer = OPTIMIZERS[name]()
    opt_state = optimizer.init(params)
    ours = jb.split_backward(loss_fn, optimizer, 4, method=method)(params, opt_state, batch)
    expected = reference.split_backward(loss_fn, optimizer, 4, params, opt_state, batch)
    assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(group_size=st.integers(1, 4), num_groups=st.integers(1, 8), microbatch_size=st.sampled_from([None, 1, 3]))
def test_plain_sgd_is_one_step_at_k_times_the_rate(group_size, num_groups, microbatch_size):
    loss_fn, params, batch = make_problem(group_size * num_groups)
    step = jb.split_backward(loss_fn, optax.sgd(0.01), num_groups, microbatch_size=microbatch_size)
    ours, _, _ = step(params, optax.sgd(0.01).init(params), batch)
    gradient = reference.mean_gradient(loss_fn, params, batch)
    assert_close(ours, jax.tree.map(lambda p, g: p - num_groups * 0.01 * g, params, gradient), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 6, 8, 12, 24])
def test_every_divisor_in_float64(x64, num_groups):
    loss_fn, params, batch = make_problem(24, np.float64)
    ours, _, losses = jb.split_backward(loss_fn, optax.sgd(0.1), num_groups)(params, optax.sgd(0.1).init(params), batch)
    gradient = reference.mean_gradient(loss_fn, params, batch)
    assert_close(ours, jax.tree.map(lambda p, g: p - num_groups * 0.1 * g, params, gradient), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(losses, loss_fn(params, batch), rtol=1e-12)


@pytest.mark.parametrize("num_groups", [1, 3, 8, 24])
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_momentum_closed_form(x64, num_groups, momentum):
    loss_fn, params, batch = make_problem(24, np.float64)
    optimizer = optax.sgd(0.1, momentum)
    step = jb.split_backward(loss_fn, optimizer, num_groups)
    first_params, opt_state, _ = step(params, optimizer.init(params), batch)  # leaves a velocity behind
    velocity = opt_state[0].trace
    gradients = reference.group_gradients(loss_fn, first_params, batch, num_groups)
    expected = reference.momentum_closed_form(first_params, velocity, gradients, 0.1, momentum)
    assert_close(step(first_params, opt_state, batch)[0], expected, rtol=1e-10, atol=1e-12)


def test_the_gradients_are_not_those_of_small_batches(problem):
    # A test that fails if a later group saw the weights that an earlier one had moved.
    loss_fn, params, batch = problem
    optimizer = optax.sgd(0.1)
    ours, _, _ = jb.split_backward(loss_fn, optimizer, 4)(params, optimizer.init(params), batch)
    small = params
    for group in reference.groups_of(batch, 4):
        small = jax.tree.map(lambda p, g: p - 0.1 * g, small, reference.mean_gradient(loss_fn, small, group))
    assert float(optax.tree.norm(optax.tree.sub(ours, small))) > 1e-2


def test_step_count_advances_by_k(problem):
    loss_fn, params, batch = problem
    optimizer = optax.adam(1e-3)
    _, opt_state, _ = jb.split_backward(loss_fn, optimizer, 6)(params, optimizer.init(params), batch)
    assert int(opt_state[0].count) == 6


def test_inside_scan(problem):
    loss_fn, params, batch = problem
    optimizer = optax.adam(1e-2)
    step = jb.split_backward(loss_fn, optimizer, 4)

    def body(carry, _):
        params, opt_state, losses = step(*carry, batch)
        return (params, opt_state), losses

    (scanned, _), losses = lax.scan(body, (params, optimizer.init(params)), None, length=3)
    looped, opt_state = params, optimizer.init(params)
    for _ in range(3):
        looped, opt_state, _ = step(looped, opt_state, batch)
    assert_close(scanned, looped, rtol=1e-5, atol=1e-6)
    assert losses.shape == (3, 24)


def test_aux_and_dropout(problem):
    loss_fn, params, batch = problem

    def noisy(params, batch):
        noise = jax.vmap(lambda key: jax.random.normal(key, (5,)))(batch["key"])
        losses = loss_fn(params, {"x": batch["x"] + noise, "y": batch["y"]})
        return losses, {"state": (batch["x"] + noise).mean(0)}

    batch = batch | {"key": jax.random.split(jax.random.key(1), 24)}
    optimizer = optax.sgd(0.1, 0.9)
    ours = jb.split_backward(noisy, optimizer, 3, has_aux=True)(params, optimizer.init(params), batch)
    expected = reference.split_backward(lambda p, b: noisy(p, b)[0], optimizer, 3, params, optimizer.init(params), batch)
    assert_close(ours[:3], expected, rtol=1e-5, atol=1e-6)
    states = [noisy(params, group)[1]["state"] for group in reference.groups_of(batch, 3)]
    np.testing.assert_allclose(ours[3]["state"], jnp.stack(states), rtol=1e-5, atol=1e-6)


def test_batch_of_one_and_group_of_one():
    loss_fn, params, batch = make_problem(1)
    optimizer = optax.sgd(0.1)
    ours = jb.split_backward(loss_fn, optimizer, 1)(params, optimizer.init(params), batch)
    assert_close(ours, reference.split_backward(loss_fn, optimizer, 1, params, optimizer.init(params), batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_groups", [1, 2, 5, 10])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_largest_stable_curvature(x64, num_groups, momentum):
    # Just below the limit the real step shrinks a parameter, just above it blows it up.
    limit = jb.largest_stable_curvature(0.02, momentum, num_groups)
    assert jb.largest_stable_curvature(0.02 * num_groups, momentum) >= limit * (1 - 1e-12)
    optimizer = optax.sgd(0.02, momentum)
    for factor, grows in ((0.98, False), (1.02, True)):
        step = jb.split_backward(lambda w, x: 0.5 * factor * limit * w**2 + 0 * x, optimizer, num_groups)

        def body(carry, _):
            return step(*carry, jnp.zeros(num_groups))[:2], None

        start = jnp.array(1.0)
        (end, _), _ = lax.scan(body, (start, optimizer.init(start)), None, length=2000)
        assert (not abs(float(end)) <= 1) == grows  # blown up may be infinite or NaN by now


def test_largest_stable_curvature_refuses():
    for args, message in (((0.0, 0.5), "learning_rate=0"), ((0.1, 1.0), "momentum=1"), ((0.1, 0.5, 0), "num_groups=0")):
        with pytest.raises(ValueError, match=message):
            jb.largest_stable_curvature(*args)


def test_naive_way_is_the_same_step(problem):
    loss_fn, params, batch = problem
    optimizer = optax.sgd(0.1, 0.9)
    naive = make_masked_step(loss_fn, optimizer, 4)(params, optimizer.init(params), batch)
    ours = jb.split_backward(loss_fn, optimizer, 4)(params, optimizer.init(params), batch)
    assert_close(naive, ours, rtol=1e-5, atol=1e-6)


def test_costs_no_k_copies_of_the_parameters():
    # In a loop over groups every gradient is used up before the next is computed.
    params = {"w": jnp.zeros((400, 400))}
    loss_fn = lambda p, x: ((x @ p["w"]) ** 2).sum(-1)
    batch = jnp.ones((64, 400))
    optimizer = optax.sgd(0.1)

    def total(num_groups):
        step = jb.split_backward(loss_fn, optimizer, num_groups, method="map")
        memory = step.lower(params, optimizer.init(params), batch).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes

    assert total(16) < total(1) + 4 * params["w"].nbytes


@pytest.mark.parametrize(
    ("num_groups", "change", "message"),
    [
        (5, lambda b: b, "num_groups=5 .*batch_size=24.* 4 and 6"),
        (2, lambda b: jax.tree.map(lambda x: x[:0], b), "empty"),
    ],
)
def test_refusals(problem, num_groups, change, message):
    loss_fn, params, batch = problem
    step = jb.split_backward(loss_fn, optax.sgd(0.1), num_groups)
    with pytest.raises(ValueError, match=message):
        step(params, optax.sgd(0.1).init(params), change(batch))


def test_refuses_no_groups_and_a_mean_loss(problem):
    loss_fn, params, batch = problem
    with pytest.raises(ValueError, match="num_groups=0"):
        jb.split_backward(loss_fn, optax.sgd(0.1), 0)
    step = jb.split_backward(lambda p, b: loss_fn(p, b).mean(), optax.sgd(0.1), 2)
    with pytest.raises(ValueError, match="one loss per example"):
        step(params, optax.sgd(0.1).init(params), batch)
