"""Schedules against updates counted by hand, and the effective rate of coupled pairs."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbatch as jb
from jaxbatch.schedules.batch_sizes import as_schedule
from jaxbatch.schedules.stretches import count_steps
from tests.training.test_train import task  # noqa: F401 (a fixture)

ADAPTIVE = jb.adabatch_schedule(batch_size=128, growth=2, every=20, max_batch_size=2048)
FIXED = jb.constant_schedule(128, every=20)


def by_hand(ladder, init, factor):
    """Rate at every update: ``ladder`` is a list of (epochs, updates an epoch)."""
    return np.concatenate([np.full(epochs * updates, init * factor**n) for n, (epochs, updates) in enumerate(ladder)])


def test_adabatch_counted_by_hand():
    # 50,000 examples: 390 updates of 128, 195 of 256, 97 of 512, 48 of 1,024, 24 of 2,048 in an epoch.
    ladder = [(20, 390), (20, 195), (20, 97), (20, 48), (20, 24)]
    assert count_steps(ADAPTIVE, 50_000, 100) == [updates for epochs, updates in ladder for _ in range(epochs)]
    rate = jb.coupled_learning_rate(ADAPTIVE, init=0.01, decay=0.75, num_examples=50_000, num_epochs=100)
    np.testing.assert_allclose(jax.vmap(rate)(jnp.arange(20 * 754)), by_hand(ladder, 0.01, 0.75), rtol=1e-6)
    rate = jb.coupled_learning_rate(FIXED, init=0.01, decay=0.375, num_examples=50_000, num_epochs=100)
    np.testing.assert_allclose(jax.vmap(rate)(jnp.arange(39_000)), by_hand([(20, 390)] * 5, 0.01, 0.375), rtol=1e-6)
    assert rate(39_000) == rate(10**6) == rate(38_999)  # beyond the run


@settings(deadline=None, max_examples=30)
@given(
    batch_size=st.integers(1, 60),
    growth=st.floats(1.0, 4.0),
    every=st.integers(1, 7),
    cap=st.integers(60, 200),
    num_epochs=st.integers(1, 25),
)
def test_the_effective_rate_is_that_of_the_fixed_arm(batch_size, growth, every, cap, num_epochs):
    # growth that is no whole number, a cap, an interval that does not divide the epochs
    adaptive = jb.adabatch_schedule(batch_size=batch_size, growth=growth, every=every, max_batch_size=cap)
    fixed = jb.constant_schedule(batch_size, every=every)
    effective, shared = 0.375, {"init": 0.1, "num_examples": 200, "num_epochs": num_epochs}
    rate = jb.coupled_learning_rate(adaptive, decay=effective * growth, **shared)
    reference = jb.coupled_learning_rate(fixed, decay=effective, **shared)
    first = np.cumsum([0, *count_steps(adaptive, 200, num_epochs)])
    for epoch in range(num_epochs):
        assert batch_size <= adaptive(epoch) <= cap
        for step in (first[epoch], first[epoch + 1] - 1):
            mine = float(rate(step)) / adaptive(epoch)
            theirs = float(reference(epoch * (200 // batch_size))) / batch_size
            np.testing.assert_allclose(mine, theirs, rtol=1e-5)


def test_growth_is_rounded_from_the_exact_product():
    schedule = jb.adabatch_schedule(batch_size=100, growth=1.3, every=3)
    assert [schedule(e) for e in range(0, 15, 3)] == [100, 130, 169, 220, 286]  # 219.7, 285.61
    assert [schedule(e) for e in (2, 3, 5, 6)] == [100, 130, 130, 169]


def test_a_product_that_no_float_holds_is_the_cap():
    capped = jb.adabatch_schedule(batch_size=16, growth=2, every=1, max_batch_size=256)
    assert [capped(epoch) for epoch in (0, 4, 1019, 1020, 1024, 10**9)] == [16, 256, 256, 256, 256, 256]
    free = jb.adabatch_schedule(batch_size=16, growth=2, every=1)
    assert free(49) == 2**53
    for epoch in (50, 1024, 10**9):
        with pytest.raises(ValueError, match=f"growth=2 makes batch_size=16 grow to more than .* by epoch {epoch}. Give a max_batch_size"):
            free(epoch)
    assert jb.increase_instead_of_decay(batch_size=8, decay=1e-300, every=1, max_batch_size=64)(2) == 64


@pytest.mark.parametrize(("growth", "decay"), [(2, 0.75), (2, 1.0), (4, 1.5), (1e300, 1.0), (1, 0.375), (1e6, 1e5), (2, 2.0)])
def test_coupled_rates_stay_numbers_over_2000_epochs(growth, decay):
    # decay and growth alone overflow or vanish on the way; the rate is cap / start × (decay / growth)^epoch
    schedule = jb.adabatch_schedule(batch_size=16, growth=growth, every=1, max_batch_size=256)
    rate = jb.coupled_learning_rate(schedule, init=0.1, decay=decay, num_examples=256, num_epochs=2000)
    starts = np.cumsum([0, *count_steps(schedule, 256, 2000)])[:-1]
    found = np.asarray(jax.vmap(rate)(jnp.asarray(starts)))
    epochs = np.arange(2000)
    logs = math.log(0.1) + epochs * (math.log(decay) - math.log(growth)) + np.log([schedule(e) / 16 for e in range(2000)])
    assert np.isfinite(found).all() and (found >= 0).all()
    np.testing.assert_allclose(found, np.exp(logs), rtol=1e-5, atol=1e-37)


def test_a_rate_that_grows_beyond_float32_is_named():
    with pytest.raises(ValueError, match="decay=10.0 with this schedule takes the rate from init=0.1 outside the range of float32 by epoch 40"):
        jb.coupled_learning_rate(jb.constant_schedule(2, every=1), init=0.1, decay=10.0, num_examples=8, num_epochs=50)


def test_warmup_and_runs_longer_than_int32_holds():
    # 3 × 10^9 examples: the warmup is over, whatever a sum of them would wrap around to
    rate = jb.coupled_learning_rate(10**6, init=0.5, num_examples=10**9, num_epochs=3, warmup=jb.examples(10**8))
    np.testing.assert_allclose([float(rate(step)) for step in (0, 50, 100, 2_500, 2_999)], [0, 0.25, 0.5, 0.5, 0.5], rtol=1e-6)
    rate = jb.coupled_learning_rate(10**6, init=0.5, num_examples=10**9, num_epochs=3, warmup=jb.examples(10**10))
    np.testing.assert_allclose(float(rate(2_500)), 0.125, rtol=1e-6)
    rate = jb.coupled_learning_rate(4_000_000, init=1.0, num_examples=10**9, num_epochs=4, warmup=jb.examples(40_000_000))
    np.testing.assert_allclose([float(rate(step)) for step in (5, 10, 537, 999)], [0.5, 1, 1, 1], rtol=1e-6)
    rate = jb.coupled_learning_rate(10**6, init=1.0, num_examples=10**12, num_epochs=4, warmup=jb.examples(2 * 10**12))
    np.testing.assert_allclose([float(rate(step)) for step in (10**6, 2 * 10**6, 39 * 10**5)], [0.5, 1, 1], rtol=1e-6)
    rate = jb.coupled_learning_rate(1, init=0.5, decay=0.5, num_examples=3 * 10**9, num_epochs=3)
    assert float(rate(2**31 - 2)) == 0.5


def test_increase_instead_of_decay_keeps_the_rate_until_the_cap():
    schedule = jb.increase_instead_of_decay(batch_size=100, decay=0.5, every=1, max_batch_size=400)
    rate = jb.coupled_learning_rate(schedule, init=0.1, num_examples=800, num_epochs=5)
    assert [schedule(e) for e in range(5)] == [100, 200, 400, 400, 400]
    starts = np.cumsum([0, 8, 4, 2, 2])
    np.testing.assert_allclose([float(rate(s)) for s in starts], [0.1, 0.1, 0.1, 0.05, 0.025], rtol=1e-6)


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        (jb.steps(4), [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]),
        (jb.examples(8), [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]),
        (jb.epochs(1.5), [0.0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0]),  # 4 updates an epoch
        (jb.steps(0), [1.0, 1.0]),
    ],
)
def test_warmup_in_each_unit(warmup, expected):
    rate = jb.coupled_learning_rate(2, init=1.0, num_examples=8, num_epochs=3, warmup=warmup)
    np.testing.assert_allclose([float(rate(step)) for step in range(len(expected))], expected, rtol=1e-6)


def test_warmup_across_a_change_of_size():
    schedule = jb.milestone_schedule({0: 2, 1: 4})
    rate = jb.coupled_learning_rate(schedule, init=1.0, num_examples=8, num_epochs=3, warmup=jb.examples(16), warmup_init=0.5)
    np.testing.assert_allclose([float(rate(s)) for s in range(7)], [0.5, 0.5625, 0.625, 0.6875, 0.75, 0.875, 1.0], rtol=1e-6)


def test_shapes_follow_epochs_not_updates():
    shared = {"init": 1.0, "num_examples": 800, "num_epochs": 8}
    small = jb.coupled_learning_rate(10, shape=jb.cosine(8), **shared)
    growing = jb.coupled_learning_rate(jb.milestone_schedule({0: 10, 4: 40}), shape=jb.cosine(8), **shared)
    np.testing.assert_allclose(small(80 * 6), growing(80 * 4 + 20 * 2), rtol=1e-6)
    assert float(small(80 * 8)) == pytest.approx(0, abs=1e-6)


def test_it_is_an_optax_schedule_and_fit_takes_both(task):
    schedule = jb.adabatch_schedule(batch_size=6, growth=2, every=1, max_batch_size=24)
    rate = jb.coupled_learning_rate(schedule, init=0.02, decay=0.75, num_examples=24, num_epochs=3)
    config = jb.FitConfig(optax.sgd(rate), schedule, jb.epochs(3))
    records = list(jb.fit(task, config))
    assert [record["batch_size"] for record in records] == [6, 12, 24] and records[-1]["updates"] == 4 + 2 + 1
    # Each epoch alone, at its own constant rate, from where the one before ended.
    state = None
    for epoch, (size, value) in enumerate([(6, 0.02), (12, 0.015), (24, 0.01125)]):
        state = jb.init_state(task, optax.sgd(value), 0) if state is None else state
        step = jb.make_train_step(task.loss_fn, optax.sgd(value), size)
        for index in jb.epoch_batches(0, epoch, 24, size).indices:
            state, _ = step(state._replace(opt_state=optax.sgd(value).init(state.params)), jax.tree.map(lambda leaf: leaf[index], task.train_data))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), records[-1]["state"].params, state.params)


def test_any_function_and_number_is_a_schedule():
    assert as_schedule(ADAPTIVE) is ADAPTIVE
    assert as_schedule(7)(100) == 7
    rate = jb.coupled_learning_rate(lambda e: 2 if e < 2 else 4, init=1.0, decay=0.5, num_examples=8, num_epochs=4)
    np.testing.assert_allclose([float(rate(s)) for s in (0, 7, 8, 11)], [1, 1, 0.5, 0.5])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jb.adabatch_schedule(batch_size=0), "batch_size=0 must be a whole number of at least 1"),
        (lambda: jb.adabatch_schedule(batch_size=8, growth=0.5), "growth=0.5 must be at least 1"),
        (lambda: jb.adabatch_schedule(batch_size=8, every=0), "every=0 epochs"),
        (lambda: jb.adabatch_schedule(batch_size=8, max_batch_size=4), "max_batch_size=4 is below batch_size=8"),
        (lambda: jb.milestone_schedule({1: 8}), "must begin at epoch 0"),
        (lambda: jb.increase_instead_of_decay(batch_size=8, decay=2.0, every=1), "decay=2.0 must be above 0"),
        (lambda: count_steps(ADAPTIVE, 1000, 100), "batch_size=1024 at epoch 60 is larger than the data set .*max_batch_size"),
        (lambda: jb.coupled_learning_rate(8, init=0.0, num_examples=8, num_epochs=1), "init=0.0 must be above 0"),
        (lambda: jb.coupled_learning_rate(8, init=1.0, decay=0.0, num_examples=8, num_epochs=1), "decay=0.0 must be above 0"),
        (lambda: jb.scale_learning_rate("cubic", 0.1, 1, 2), "rule='cubic' must be one of 'linear', 'sqrt', 'none'"),
        (lambda: jb.scale_learning_rate("linear", 0.1, 0, 2), "base_batch_size=0 must be above 0"),
        (lambda: jb.cosine(0), "num_epochs=0 epochs must be above 0"),
        (lambda: jb.cosine(1e-320), "num_epochs=1e-320 epochs must be above 0 and finite, in float32 too"),
        (lambda: jb.cosine(10, end=math.nan), "end=nan must be at least 0"),
        (lambda: jb.cyclic(10**400), "period=1000000000... .401 characters. epochs must be above 0 and finite"),
        (lambda: jb.cyclic(4, low=-1.0), "low=-1.0 must be at least 0"),
        (lambda: jb.step_decay(math.inf, 3), "decay=inf must be at least 0 and finite"),
        (lambda: jb.step_decay(0.1, math.nan), "every=nan epochs"),
        (lambda: inspect.unwrap(jb.adabatch_schedule)(batch_size=math.nan), "batch_size=nan must be a whole number"),
        (lambda: inspect.unwrap(jb.adabatch_schedule)(batch_size=math.inf), "batch_size=inf must be a whole number"),
        (lambda: jb.adabatch_schedule(batch_size=10**400), "batch_size=an integer of 401 digits must be a whole number"),
        (lambda: jb.adabatch_schedule(batch_size=8, growth=10**400), "must be at least 1 and finite"),
        (lambda: inspect.unwrap(jb.adabatch_schedule)(batch_size=8, every=math.nan), "every=nan epochs must be at least 1"),
        (lambda: inspect.unwrap(jb.adabatch_schedule)(batch_size=8, max_batch_size=math.nan), "max_batch_size=nan must be a whole number"),
        (lambda: jb.increase_instead_of_decay(batch_size=8, decay=1e-320, every=1), "decay=1e-320 is too small"),
        (lambda: jb.milestone_schedule({0: 8, 3: 2.5}), r"sizes\[3\]=2.5 must be a whole number"),
        (lambda: jb.milestone_schedule({0: 10**400}), r"sizes\[0\]=an integer of 401 digits"),
        (lambda: inspect.unwrap(as_schedule)(math.nan), "batch_size=nan must be a whole number"),
        (lambda: jb.coupled_learning_rate(8, init=10**400, num_examples=8, num_epochs=1), "must be above 0 and finite"),
        (lambda: jb.scale_learning_rate("linear", 1e308, 1, 1000), "base_lr=1e.308 at base_batch_size=1 is too large a rate at batch_size=1000"),
        (lambda: jb.scale_learning_rate("linear", 0.1, 1, 10**400), "batch_size=1000000000... .401 characters. must be above 0 and finite"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_schedule_that_outgrows_the_data_ends_before_it_trains(task):
    config = jb.FitConfig(optax.sgd(0.1), jb.adabatch_schedule(batch_size=8, growth=4, every=1), jb.epochs(3))
    with pytest.raises(ValueError, match="batch_size=32 at epoch 1 is larger than the data set"):
        next(jb.fit(task, config))


def test_groups_of_a_batch_share_its_rate():
    schedule = jb.adabatch_schedule(batch_size=2, growth=2, every=1)
    settings = {"init": 1.0, "decay": 0.5, "num_examples": 8, "num_epochs": 3, "warmup": jb.steps(2)}
    alone = jb.coupled_learning_rate(schedule, **settings)
    split = jb.coupled_learning_rate(schedule, **settings, num_groups=2)
    assert [float(split(count)) for count in range(14)] == [float(alone(count // 2)) for count in range(14)]
    with pytest.raises(ValueError, match="num_groups=0"):
        jb.coupled_learning_rate(schedule, **settings, num_groups=0)
