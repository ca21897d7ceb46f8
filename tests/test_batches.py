"""Index batches: permutations, masks, durations."""

import inspect
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbatch as jb
from jaxbatch.batches import Duration, check_duration, even_part
from jaxbatch.training import plans
from jaxbatch.training.plans import FitConfig
from tests.reference import plan_segments

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
        (jb.epochs(1e-9), "drop", 1),
        (jb.epochs(3 * 0.1), "drop", 5),  # 0.30000000000000004
        (jb.steps(0), "drop", 0),
        (jb.examples(1), "drop", 1),
        (jb.examples(2000), "pad", 32),  # the last batch of each epoch holds 40
        (jb.examples(10**12), "drop", 15_625_000_000),
        (jb.examples(10**12 + 1), "drop", 15_625_000_001),
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
    for made, message in ((Duration(float("nan"), "epochs"), "epochs=nan"), (Duration(5, "minutes"), "unit='minutes'")):
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(check_duration)(made)


def planned_slowly(amount, unit, sizes, num_examples):
    """Batch after batch, in whole numbers: ``(epoch, size)`` of each until what is asked for is done."""
    done, batches, epoch = 0, [], 0
    while True:
        size = sizes(epoch)
        for batch in range(num_examples // size):
            if done >= (amount if unit != "epochs" else Fraction(amount)) and (batches or not amount):
                return batches
            batches.append((epoch, size))
            done = {"steps": done + 1, "examples": done + size, "epochs": epoch + Fraction(batch + 1, num_examples // size)}[unit]
        epoch += 1


@settings(deadline=None, max_examples=150)
@given(
    unit=st.sampled_from(["steps", "examples", "epochs"]),
    amount=st.integers(0, 60),
    part=st.sampled_from([0, Fraction(1, 2), Fraction(3, 8), Fraction(1, 2**14)]),
    first=st.integers(1, 9),
    growth=st.integers(0, 3),
    num_examples=st.integers(40, 60),
)
def test_plans_are_those_of_a_slow_twin(unit, amount, part, first, growth, num_examples):
    amount = amount if unit != "epochs" else float(amount // 10 + part)
    sizes = lambda epoch: min(first + growth * epoch, 40)
    plan = plan_segments(FitConfig(None, sizes, Duration(amount, unit)), num_examples)
    told = [(segment.epoch, segment.batch_size) for segment in plan for _ in range(segment.num_batches)]
    assert told == planned_slowly(amount, unit, sizes, num_examples)
    if growth == 0:
        assert len(told) == jb.num_steps(Duration(amount, unit), num_examples=num_examples, batch_size=first)


@settings(deadline=None, max_examples=200)
@given(
    unit=st.sampled_from(["steps", "examples", "epochs"]),
    num_examples=st.integers(1, 10**12),
    cut=st.floats(0, 1),
    times=st.floats(0, 3),
    evaluations=st.integers(1, 3),
)
def test_a_plan_of_any_size_ends_and_does_what_is_asked_and_less_than_a_batch_more(unit, num_examples, cut, times, evaluations):
    size = max(1, round(num_examples**cut))
    per_epoch = num_examples // size
    amount = {"steps": int(times * per_epoch), "examples": int(times * num_examples), "epochs": times}[unit]
    config = FitConfig(None, size, Duration(amount, unit), evaluations_per_epoch=evaluations)
    plan = plan_segments(config, num_examples)
    count = sum(segment.num_batches for segment in plan)
    asked = {"steps": amount, "examples": Fraction(amount) / size, "epochs": Fraction(amount) * per_epoch}[unit]
    within = max(Fraction(1, 10**6), asked / 2**50) if unit == "epochs" else 0  # what 0.1 epochs are
    assert count >= asked - within and count < asked + 1 and (count > 0) == (amount > 0)
    assert count == jb.num_steps(config.duration, num_examples=num_examples, batch_size=size)


def test_one_example_of_millions_is_one_batch():
    (segment,) = plan_segments(FitConfig(None, 3_000_000, jb.examples(1)), 3_000_000)
    assert segment[:4] == (0, 0, 3_000_000, 1)
    (segment,) = plan_segments(FitConfig(None, 3_000_000, jb.epochs(1e-9)), 3_000_000)
    assert segment.num_batches == 1
    sizes = lambda epoch: np.int32(2**30)  # three of them are more than an int32 holds
    assert sum(segment.num_batches for segment in plan_segments(FitConfig(None, sizes, jb.examples(2**33)), 2**31)) == 8


def test_more_examples_than_an_index_can_name_are_refused():
    with pytest.raises(ValueError, match="num_examples=2147483648 must be below"):
        jb.epoch_order(0, 0, 2**31)


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


def test_the_even_part_is_the_one_that_a_search_through_all_finds():
    for batch_size in (*range(1, 70), 509, 600, 2**13, 2**13 - 1):
        for at_most in (*range(1, 75), 128, 4000):
            sizes = [size for size in range(at_most // 2 + 1, min(batch_size, at_most) + 1) if batch_size % size == 0]
            assert even_part(batch_size, at_most) == max(sizes, default=min(batch_size, at_most))
    assert even_part(10**9 + 7, 5 * 10**8) == 5 * 10**8  # a prime: a search through all sizes would take minutes


def test_a_plan_of_many_epochs_works_one_of_them_out(monkeypatch):
    looks = 0
    plain = plans.batches_to

    def counted(*arguments):
        nonlocal looks
        looks += 1
        return plain(*arguments)

    monkeypatch.setattr(plans, "batches_to", counted)
    config = FitConfig(None, 4, jb.steps(20_000), evaluations_per_epoch=4)
    plan = plan_segments(config, 21)
    assert len(plan) == 4 * 4000 and sum(segment.num_batches for segment in plan) == 20_000
    assert plan[-1] == (3999, 12, 4, 2, 4000.0, True)
    assert looks < 100
