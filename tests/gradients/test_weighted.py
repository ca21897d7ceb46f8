"""Losses with weights: however a batch is cut, its mean and gradient are those of the tokens that count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbatch as jb
from jaxbatch.gradients.cut import Cut
from jaxbatch.training.divergence import batch_means
from jaxbatch.training.pieces import make_pieces
from tests import reference
from tests.conftest import make_problem, make_weighted

SIZE = 10  # sequences 3, 4, 8 and 9 have no token that counts
CONV = lambda x: jax.lax.conv(x[:, None], jnp.ones((1, 1, 1), x.dtype), (1,), "VALID")[:, 0]  # which makes the loops ones in Python


def close(found, expected, bound=1e-12):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=bound, atol=bound)


def convolved(loss_fn):
    return lambda p, batch: jb.Weighted(CONV(loss_fn(p, batch).total[:, None])[:, 0], loss_fn(p, batch).weight)


@pytest.mark.parametrize("size", range(1, SIZE + 1))
def test_accumulated_over_ragged_sequences_is_the_whole_batch(size, x64):
    loss_fn, token_loss, params, batch = make_weighted(SIZE)
    expected = reference.token_mean_gradient(token_loss, params, batch)[1]
    close(jb.accumulated_gradient(loss_fn, params, batch, size), expected)
    close(jb.accumulated_gradient(convolved(loss_fn), params, batch, size), expected)  # a Python loop
    close(jb.accumulated_gradient(jb.recompute(loss_fn, "segments"), params, batch, size), expected)
    losses, found = jb.losses_and_mean_gradient(loss_fn, params, batch, microbatch_size=size)
    close(found, expected)
    assert losses.weight.tolist() == batch["counts"].sum(1).tolist()


def test_the_mean_of_the_means_of_microbatches_is_another_number(x64):
    # What this file is for: with it in place of the library, the test above fails.
    loss_fn, token_loss, params, batch = make_weighted(SIZE)
    means = [reference.token_mean_gradient(token_loss, params, group)[1] for group in reference.groups_of(batch, 5)]
    naive = jax.tree.map(lambda *leaves: sum(leaves) / 5, *means)
    with pytest.raises(AssertionError):
        close(naive, reference.token_mean_gradient(token_loss, params, batch)[1], 1e-2)


def test_gradients_of_examples_and_groups(x64):
    loss_fn, token_loss, params, batch = make_weighted(SIZE)
    for groups, found in [(k, jb.group_gradients(loss_fn, params, batch, k)) for k in (1, 2, 5, SIZE)] + [
        (SIZE, jb.per_example_gradients(loss_fn, params, batch)),
        (2, jb.group_gradients(loss_fn, params, batch, 2, microbatch_size=2)),
    ]:
        own = [reference.token_mean_gradient(token_loss, params, group)[1] for group in reference.groups_of(batch, groups)]
        close(found, jax.tree.map(lambda *leaves: jnp.stack(leaves), *own))
    examples = jb.per_example_gradients(loss_fn, params, batch)
    weight = batch["counts"].sum(1)
    assert all((leaf[weight == 0] == 0).all() for leaf in jax.tree.leaves(examples))
    mean = jax.tree.map(lambda leaf: jnp.tensordot(weight / weight.sum(), leaf, 1), examples)
    close(mean, reference.token_mean_gradient(token_loss, params, batch)[1])
    close(jb.sum_of_gradients(loss_fn, params, batch, lambda g: g, microbatch_size=3), jax.tree.map(lambda leaf: leaf.sum(0), examples))
    clipped = jb.clipped_gradient_sum(loss_fn, params, batch, 1e9, microbatch_size=3)
    close(clipped.total, jax.tree.map(lambda leaf: leaf.sum(0), examples))
    assert (clipped.norms[weight == 0] == 0).all()


@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize("microbatch_size", [None, 1, 3])
def test_steps_and_splits_against_loops_over_groups(groups, microbatch_size, x64):
    loss_fn, token_loss, params, batch = make_weighted(SIZE)
    optimizer = optax.sgd(0.05, 0.9)
    expected, losses = reference.token_steps(token_loss, optimizer, params, [batch] * 2, groups)
    step = jb.make_train_step(loss_fn, optimizer, SIZE, num_groups=groups, microbatch_size=microbatch_size)
    state = jb.TrainState(params, optimizer.init(params), jnp.array(0))
    state, found = jb.make_epoch(step)(jax.tree.map(jnp.copy, state), batch, jnp.stack([jnp.arange(SIZE)] * 2))
    close((state.params, batch_means(found)), (expected, losses))
    split = jb.split_backward(loss_fn, optimizer, groups, microbatch_size=microbatch_size)
    after, _, own = split(params, optimizer.init(params), batch)
    close(after, reference.token_steps(token_loss, optimizer, params, [batch], groups)[0])
    assert isinstance(own, jb.Weighted) and own.total.shape == (SIZE,)


def test_an_optimizer_that_wants_the_loss_gets_the_weighted_one():
    loss_fn, token_loss, params, batch = make_weighted(SIZE, np.float32)
    seen = []

    def update(gradient, state, params=None, *, value, **_):
        jax.debug.callback(lambda value: seen.append(float(value)), value)
        return gradient, state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: (), update)
    jb.split_backward(loss_fn, optimizer, 2)(params, (), batch)
    jax.effects_barrier()
    assert sorted(seen) == pytest.approx(
        sorted(float(reference.token_mean_gradient(token_loss, params, g)[0]) for g in reference.groups_of(batch, 2))
    )


def test_aux_comes_with_weighted_losses(x64):
    loss_fn, token_loss, params, batch = make_weighted(SIZE)
    with_aux = lambda p, b: (loss_fn(p, b), b["counts"].sum())
    gradients, aux = jb.group_gradients(with_aux, params, batch, 2, has_aux=True)
    assert aux.tolist() == [group["counts"].sum() for group in reference.groups_of(batch, 2)]
    for microbatch_size in (None, 4):
        step = jb.make_train_step(with_aux, optax.sgd(0.1), SIZE, microbatch_size=microbatch_size, update_model_state=jnp.add)
        state, _ = step(jb.TrainState(params, optax.sgd(0.1).init(params), jnp.array(0), jnp.array(0)), batch)
        close(state.params, reference.token_steps(token_loss, optax.sgd(0.1), params, [batch])[0])
        assert state.model_state == batch["counts"].sum()


def test_nothing_that_counts_has_the_gradient_zero_and_no_mean():
    loss_fn, _, params, batch = make_weighted(SIZE, np.float32)
    batch = batch | {"counts": jnp.zeros_like(batch["counts"])}
    gradients = [jb.accumulated_gradient(loss_fn, params, batch, size) for size in (3, SIZE)]
    gradients += [jb.accumulated_gradient(convolved(loss_fn), params, batch, 3)]
    gradients += [jb.group_gradients(loss_fn, params, batch, 2), jb.per_example_gradients(loss_fn, params, batch)]
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients))
    task = jb.Task(lambda key: params, loss_fn, lambda p, b: {"loss": loss_fn(p, b)}, batch, batch)
    for changes in ({}, {"microbatch_size": 2}, {"num_groups": 5}, {"monitor": jb.NoiseMonitor()}):
        (record,) = jb.fit(task, jb.FitConfig(optax.sgd(0.1), 5)._replace(**changes))
        assert np.isnan([record["loss"], record["test_loss"]]).all() and not record["diverged"]
        close(record["state"].params, params)
        assert record.get("noise_measurements", 0) == 0
    assert np.isnan(jb.gradient_statistics(loss_fn, params, batch)).all()  # of nothing there is no noise to tell


@pytest.mark.parametrize("changes", [{}, {"microbatch_size": 2}, {"num_groups": 5}])
def test_a_total_without_weight_does_not_count_and_a_negative_weight_is_loud(changes):
    x, weight = jnp.arange(20.0).reshape(10, 2), jnp.array([1.0, 0.0] * 5)
    loss_fn = lambda w, b: jb.Weighted((b[0] * w).sum(1), b[1])
    task = jb.Task(lambda key: jnp.array(1.0), loss_fn, None, (x, weight), None)
    (record,) = jb.fit(task, jb.FitConfig(optax.sgd(0.0), 10)._replace(**changes))
    assert record["loss"] == x[::2].sum() / 5
    (record,) = jb.fit(task._replace(train_data=(x, weight.at[3].set(-1.0))), jb.FitConfig(optax.sgd(0.0), 10)._replace(**changes))
    assert record["diverged"] and np.isnan(record["loss"])


@pytest.mark.parametrize("batch_size", [1, 3, 4, 500])
def test_evaluation_is_over_the_tokens_of_the_whole_data_set(batch_size, x64):
    loss_fn, token_loss, params, batch = make_weighted(SIZE)

    def metrics_fn(p, b):
        hits = jnp.where(b["counts"], b["y"][..., 0] > 0, False).sum(1)
        return {"loss": loss_fn(p, b), "plain": b["x"][:, 0, 0], "hits": jb.Weighted(hits, b["counts"].sum(1))}

    kept = np.asarray(batch["y"])[np.asarray(batch["counts"])][:, 0]
    expected = {"loss": reference.token_mean_gradient(token_loss, params, batch)[0], "plain": batch["x"][:, 0, 0].mean(), "hits": (kept > 0).mean()}
    close(jb.make_evaluate(metrics_fn, SIZE, batch_size)(params, batch), expected)
    slow = lambda p, b: {**metrics_fn(p, b), "loss": convolved(loss_fn)(p, b)}
    close(jb.make_evaluate(slow, SIZE, batch_size)(params, batch), expected)


@functools.cache
def of_six(microbatch_size):
    """The loss and gradient at 0 of six examples with totals t (x - w)^2."""
    loss_fn = lambda w, b: jb.Weighted(b[0] * (b[1] - w) ** 2, b[2])
    return jax.jit(lambda *batch: jb.accumulated_gradient(loss_fn, jnp.array(0.0), batch, microbatch_size))


NUMBERS = st.lists(st.floats(0.125, 8, width=32), min_size=6, max_size=6).map(np.float32)


@settings(max_examples=25, deadline=None)
@given(NUMBERS, NUMBERS, st.permutations(range(6)), st.floats(0.125, 0.875, width=32), st.sampled_from([1, 2, 4, 6]))
def test_invariants_of_weights(x, weight, order, part, size):
    gradient, order = of_six(size), np.array(order)
    first = gradient(weight, x, weight)
    np.testing.assert_allclose(gradient(*(leaf[order] for leaf in (weight, x, weight))), first, rtol=1e-5)
    # All weights equal: the loss without weights, whatever the weight is.
    equal = np.full(6, weight[0])
    plain = jb.accumulated_gradient(lambda w, x: (x - w) ** 2, jnp.array(0.0), x, size)
    np.testing.assert_allclose(gradient(equal, x, equal), plain, rtol=1e-5)
    # The last example in two places, with a part of its weight in each, is the same example.
    once = weight * np.array([1, 1, 1, 1, 0, 1], np.float32)
    twice, x = np.concatenate([weight[:4], weight[5] * np.array([part, 1 - part], np.float32)]), np.concatenate([x[:4], x[5:], x[5:]])
    np.testing.assert_allclose(gradient(twice, x, twice), gradient(once, x, once), rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_two_thousand_microbatches_in_bfloat16(size):
    random, count = np.random.default_rng(0), 2048 * size
    weight, x = random.integers(0, 64, count), jnp.asarray(random.uniform(0.5, 1.5, count), jnp.bfloat16)
    loss_fn = lambda w, b: jb.Weighted(w * b[0] * b[1].astype(jnp.bfloat16), b[1])
    w, batch = jnp.array(1.0, jnp.bfloat16), (x, jnp.asarray(weight))
    exact = (np.asarray(x, np.float64) * weight).sum() / weight.sum()
    found = jb.accumulated_gradient(loss_fn, w, batch, size)
    assert found.dtype == jnp.bfloat16 and abs(float(found) / exact - 1) < 2**-8  # the rounding of the result, and of parts
    step = jb.make_train_step(loss_fn, optax.sgd(1.0), count, microbatch_size=size)
    state, losses = step(jb.TrainState(w, optax.sgd(1.0).init(w), jnp.array(0)), batch)
    assert losses.weight.dtype == jnp.float32 and float(losses.weight.sum()) == weight.sum()
    assert abs(float(1 - state.params) - exact) < 2**-8
    in_half = jax.lax.scan(lambda total, part: (total + part, None), jnp.zeros((), jnp.bfloat16), x * weight.astype(jnp.bfloat16))[0]
    assert abs(float(in_half) / weight.sum() / exact - 1) > 0.4  # what a sum in bfloat16 would be


def test_what_is_refused():
    x, w = jnp.arange(4.0), jnp.array(1.0)
    refusals = {
        "one total and one weight per example, shape .4,., but returned Weighted with a total of shape .4,. and a weight of shape .4, 2.": (
            lambda w, x: jb.Weighted(w * x, jnp.ones((4, 2)))
        ),
        "a total of shape .. and a weight of shape ..": lambda w, x: jb.Weighted((w * x).sum(), x.sum()),
        "floating-point totals, but returned int32": lambda w, x: jb.Weighted(jnp.ones(len(x), int), x),
        "weights that are numbers of at least 0, but returned complex64": lambda w, x: jb.Weighted(w * x, x + 1j),
        "loss_fn returned a tuple. If it is": lambda w, x: (jb.Weighted(w * x, x), 1),
    }
    for text, loss_fn in refusals.items():
        with pytest.raises(ValueError, match=text):
            jb.accumulated_gradient(loss_fn, w, x, 2)
    with pytest.raises(ValueError, match="loss_fn must return a pair"):
        jb.group_gradients(lambda w, x: jb.Weighted(w * x, x), w, x, 2, has_aux=True)
    with pytest.raises(ValueError, match="the loss of an example changes with the others"):
        jb.per_example_gradients(lambda w, x: jb.Weighted(w * x, x / x.sum()), w, x + 1)
    with pytest.raises(ValueError, match=r"'loss' \(weight\) has shape \(\)"):
        jb.make_evaluate(lambda w, x: {"loss": jb.Weighted(w * x, x.sum())}, 4)(w, x)


def lowered():
    """The text of programs without weights: a plain step, microbatches, groups, pieces."""
    loss_fn, params, batch = make_problem(12)
    optimizer = optax.sgd(0.1, 0.9)
    state = jb.TrainState(params, optimizer.init(params), jnp.array(0))
    for changes in ({}, {"microbatch_size": 4}, {"microbatch_size": 5}, {"num_groups": 3}, {"num_groups": 2, "microbatch_size": 3}):
        yield jb.make_epoch(jb.make_train_step(loss_fn, optimizer, 12, **changes)).lower(state, batch, jnp.arange(12)[None]).as_text()
    pieces = make_pieces(jb.Task(lambda key: params, loss_fn, None, batch, None), optimizer, Cut(12))
    total = jax.eval_shape(pieces.begin, state)
    yield jax.jit(pieces.add).lower(total, params, batch, jnp.arange(5), None, None).as_text()
    yield jax.jit(pieces.finish).lower(state, total).as_text()


def test_without_weights_programs_are_what_they_were(monkeypatch):
    with_weights = list(lowered())
    count, mean = lambda losses, count, axis=None: count, lambda losses: losses.mean()
    for module, names in {
        "gradients.accumulation": "divisor mean_loss",
        "gradients.accumulators": "totals",
        "gradients.split": "mean_loss",
        "training.layouts": "loss_of_batch",
        "training.pieces": "divisor",
    }.items():
        for name in names.split():
            plain = {"divisor": count, "mean_loss": mean, "loss_of_batch": mean, "totals": lambda losses: losses}
            monkeypatch.setattr(f"jaxbatch.{module}.{name}", plain[name])
    assert list(lowered()) == with_weights and len(set(with_weights)) == 6
