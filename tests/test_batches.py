"""Index batches: permutations, masks, durations."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbatch as jb
from jaxbatch.batches import Duration

sizes = st.integers(1, 40)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 1000), n=sizes)
def test_order_is_a_permutation_and_pure(seed, epoch, n):
    order = jb.epoch_order(seed, epoch, n)
    assert sorted(order.tolist()) == list(range(n))
    assert order.tolist() == jb.epoch_order(seed, epoch, n).tolist()


def test_order_differs_by_seed_and_epoch():
    orders = {tuple(jb.epoch_order(seed, epoch, 50).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_order_is_the_same_inside_jit():
    inside = jax.jit(lambda epoch: jb.epoch_order(7, epoch, 20))(jnp.int32(4))
    assert inside.tolist() == jb.epoch_order(7, 4, 20).tolist()


@settings(deadline=None, max_examples=40)
@given(n=sizes, batch_size=sizes)
def test_padded_batches_hold_every_example_once(n, batch_size):
    indices, mask = jb.epoch_batches(0, 0, n, batch_size, partial="pad")
    assert sorted(np.asarray(indices)[np.asarray(mask)].tolist()) == list(range(n))
    assert indices.shape == mask.shape == (-(-n // batch_size), batch_size)
    assert ((np.asarray(indices) >= 0) & (np.asarray(indices) < n)).all()


@settings(deadline=None, max_examples=40)
@given(n=sizes, batch_size=sizes)
def test_batches_of_any_size_visit_the_same_order(n, batch_size):
    if batch_size > n:
        with pytest.raises(ValueError, match=f"batch_size={batch_size} .*num_examples={n}"):
            jb.epoch_batches(3, 1, n, batch_size)
        return
    indices, mask = jb.epoch_batches(3, 1, n, batch_size)
    assert mask.all()
    kept = n // batch_size * batch_size
    assert indices.reshape(-1).tolist() == jb.epoch_order(3, 1, n)[:kept].tolist()


@pytest.mark.parametrize(
    ("duration", "partial", "expected"),
    [
        (jb.steps(7), "drop", 7),
        (jb.examples(128), "drop", 2),
        (jb.examples(129), "drop", 3),
        (jb.epochs(2), "drop", 30),
        (jb.epochs(2), "pad", 32),
        (jb.epochs(0.1), "drop", 2),
        (jb.epochs(0), "drop", 0),
    ],
)
def test_durations(duration, partial, expected):
    assert jb.num_steps(duration, num_examples=1000, batch_size=64, partial=partial) == expected


def test_durations_need_a_unit_and_a_sensible_amount():
    with pytest.raises(ValueError, match="has no unit"):
        inspect.unwrap(jb.num_steps)(5, num_examples=10, batch_size=2)  # without the tests' run-time type check
    for make, amount in ((jb.steps, -1), (jb.steps, 1.5), (jb.examples, float("nan")), (jb.epochs, float("inf"))):
        with pytest.raises(ValueError, match=make.__name__):
            make(amount)
    assert jb.epochs(1.5) == Duration(1.5, "epochs")


@pytest.mark.parametrize(
    ("args", "message"),
    [((0, 4), "num_examples=0"), ((10, 0), "batch_size=0"), ((10, -2), "batch_size=-2")],
)
def test_bad_sizes(args, message):
    with pytest.raises(ValueError, match=message):
        jb.steps_per_epoch(*args)


def test_unknown_partial():
    with pytest.raises(ValueError, match="partial='keep'"):
        jb.steps_per_epoch(10, 2, partial="keep")
