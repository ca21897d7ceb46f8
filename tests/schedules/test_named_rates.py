"""Rates by name: against closed forms in float64 and in fractions, against optax's own, and in one program for all lengths."""

import fractions
import functools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.schedules.named_rates import RateName
from tests.conftest import shapes_unchecked

NAMES = typing.get_args(RateName)


def expected(name, num_steps, count, warmup="0", decay="1/5"):
    """The factor of the rate, in exact fractions where it is one."""
    length, count = fractions.Fraction(num_steps), min(count, num_steps)
    rising, falling = (math.floor(length * fractions.Fraction(share)) for share in (warmup, decay))
    if count < rising:
        return (count + 1) / (rising + 1)
    if name == "constant":
        return 1.0
    if name == "step":
        return 0.01 if count >= length * 3 / 4 else 0.1 if count >= length / 2 else 1.0
    if name == "wsd":
        return float(min(1, (length - count) / max(falling, 1)))
    share = (length - count) / (length - rising)
    return float(share) if name == "linear" else math.sin(math.pi / 2 * float(share)) ** 2


def on(rate, counts):
    return np.asarray(jax.jit(rate)(jnp.asarray(counts, jnp.int32)))


@functools.partial(jax.jit, static_argnames=("name", "warmup"))
def factors(name, num_steps, counts, warmup):
    return jb.stretched_schedule(name, 1.0, num_steps, warmup=warmup)(counts)


@pytest.mark.parametrize("name", NAMES)
def test_every_update_of_short_runs(name):
    counts = jnp.arange(43)
    for warmup in ("0", "1/20", "2/3"):
        for num_steps in (1, 2, 3, 4, 7, 20, 39, 40):
            found = factors(name, num_steps, counts, float(fractions.Fraction(warmup)))
            np.testing.assert_allclose(found, [expected(name, num_steps, count, warmup) for count in range(43)], rtol=2e-6, atol=1e-30)
            assert (found[:num_steps] > 0).all()  # no update for nothing


@pytest.mark.parametrize("name", NAMES)
def test_changes_come_at_their_update_in_long_runs(name):
    for num_steps in (9_999_999, 10_000_000, 9_999_973):
        around = [0, num_steps // 20, num_steps // 2, num_steps * 3 // 4, num_steps * 4 // 5, num_steps]
        counts = [max(0, middle + shift) for middle in around for shift in range(-2, 3)]
        wanted = [expected(name, num_steps, count, "1/20") for count in counts]
        np.testing.assert_allclose(factors(name, num_steps, jnp.array(counts), 0.05), wanted, rtol=1e-6, atol=1e-30)


def test_the_length_of_a_warmup_is_counted_in_integers():
    for share in ("0.29", "0.0001", "0.9999", "1/3"):
        for num_steps in (1, 3, 100, 9_999_999, 2**31 - 2):
            rising = math.floor(num_steps * fractions.Fraction(share))
            last = factors("linear", num_steps, jnp.array([rising, rising + 1]), float(fractions.Fraction(share)))
            assert last[0] == 1.0 and (last[1] < 1 or num_steps - rising > 2**23)  # float32 tells no more


OPTAX = {
    "constant": lambda rate, steps, start, rise: optax.warmup_constant_schedule(start, rate, rise),
    "cosine": lambda rate, steps, start, rise: optax.warmup_cosine_decay_schedule(start, rate, rise, steps),
    "linear": lambda rate, steps, start, rise: optax.join_schedules(
        [optax.linear_schedule(start, rate, rise), optax.linear_schedule(rate, 0.0, steps - rise)], [rise]
    ),
    "wsd": lambda rate, steps, start, rise: optax.join_schedules(
        [optax.linear_schedule(start, rate, rise), optax.linear_schedule(rate, 0.0, steps // 5, steps - steps // 5 - rise)], [rise]
    ),
    "step": lambda rate, steps, start, rise: optax.join_schedules(
        [optax.linear_schedule(start, rate, rise), optax.piecewise_constant_schedule(rate, {steps // 2 - rise: 0.1, steps * 3 // 4 - rise: 0.1})],
        [rise],
    ),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_steps", [20, 1000])
def test_they_are_those_of_optax_with_the_same_lengths(name, num_steps):
    rising = num_steps // 20
    theirs = OPTAX[name](0.3, num_steps, 0.3 / (rising + 1), rising)
    ours = jb.stretched_schedule(name, 0.3, num_steps, warmup=0.05)
    np.testing.assert_allclose(on(ours, range(num_steps + 3)), on(theirs, range(num_steps + 3)), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_one_program_serves_all_lengths_and_rates(name):
    traces = []

    @jax.jit
    def rates(learning_rate, num_steps, counts):
        traces.append(name)
        return jb.stretched_schedule(name, learning_rate, num_steps, warmup=0.1)(counts)

    counts = jnp.arange(12)
    for learning_rate, num_steps in ((0.1, 1), (0.2, 3), (0.3, 10), (1.0, 10_000_000)):
        known = jb.stretched_schedule(name, learning_rate, num_steps, warmup=0.1)
        np.testing.assert_allclose(rates(learning_rate, num_steps, counts), on(known, counts), rtol=1e-6, atol=1e-30)
    assert len(traces) == 1


def test_a_length_may_be_traced_as_a_float():
    rate = lambda steps: jb.stretched_schedule("linear", 1.0, steps)(1)
    assert float(jax.jit(rate)(4.0)) == float(rate(4)) == 0.75


@pytest.mark.parametrize("make", [optax.sgd, optax.adamw, optax.lion, lambda rate: optax.sgd(rate, momentum=0.9)])
def test_a_scheduled_optimizer_follows_its_schedule(make):
    optimizer = jb.scheduled(make, "wsd", warmup=0.25)(0.1, 8)
    schedule = jb.stretched_schedule("wsd", 0.1, 8, warmup=0.25)
    params, gradient = jnp.ones((2, 2)), jnp.array([[0.5, -0.25], [1.0, 2.0]])
    state, plain = optimizer.init(params), make(1.0)
    plain_state = plain.init(params)
    for count in range(8):
        moved, state = optimizer.update(gradient, state, params)
        direction, plain_state = plain.update(gradient, plain_state, params)
        np.testing.assert_allclose(moved, direction * schedule(count), rtol=1e-5)


def test_a_constant_rate_is_given_as_it_is():
    given = []
    jb.scheduled(lambda rate: given.append(rate) or optax.sgd(rate), "constant")(0.1, 8)
    assert given[-1] == 0.1


def test_bad_arguments_are_one_line():
    schedule = lambda **changed: jb.stretched_schedule(**({"name": "cosine", "learning_rate": 0.1, "num_steps": 9} | changed))
    bad = {
        "name='cosin' must be one of": {"name": "cosin"},
        "learning_rate=0.0 must be above 0": {"learning_rate": 0.0},
        "learning_rate='0.1' must be a number": {"learning_rate": "0.1"},
        "num_steps=0 must be a whole number": {"num_steps": 0},
        "num_steps=2.5 must be": {"num_steps": 2.5},
        "num_steps=2147483647 must be": {"num_steps": 2**31 - 1},
        "warmup=1.0 must be a share": {"warmup": 1.0},
        "warmup=nan must be a share": {"warmup": math.nan},
        "warmup=5 must be a share": {"warmup": 5},
        "decay=0.6 must be a share": {"name": "wsd", "warmup": 0.5, "decay": 0.6},
        "decay=-0.1 must be a share": {"decay": -0.1},
    }
    for message, changed in bad.items():
        with shapes_unchecked(), pytest.raises(ValueError, match=f"^{message}") as raised:
            schedule(**changed)
        assert "\n" not in str(raised.value)
    with shapes_unchecked(), pytest.raises(ValueError, match="^make_optimizer is an optimizer whose learning rate is settled"):
        jb.scheduled(optax.sgd(0.1), "cosine")
    with pytest.raises(ValueError, match="^make_optimizer takes no schedule in place of a rate") as raised:
        jb.scheduled(lambda rate: optax.sgd(2 * rate), "cosine")(0.1, 9)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("decay", [0.1, 0.2, 0.3, 0.5])
def test_warmup_and_decay_may_fill_the_run(decay):
    rate = jb.stretched_schedule("wsd", 1.0, 10, warmup=round(1 - decay, 1), decay=decay)
    rising = round(10 * (1 - decay))
    np.testing.assert_allclose(rate(jnp.arange(11))[rising:], np.linspace(1, 0, 11 - rising), atol=1e-6)
