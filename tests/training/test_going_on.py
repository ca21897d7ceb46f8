"""A run that goes on with another batch size: every example of an epoch comes once, and the records count what was seen."""

import weakref

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbatch as jb
from jaxbatch.training.plans import FitConfig, Progress, advance, progress_after, read_progress, write_progress
from tests.reference import plan_segments


def count_task(num_examples):
    """Its parameters count how often each example came: a batch of B adds 1 / B to those of its examples."""
    loss_fn = lambda w, i: -w[i]
    data = jnp.arange(num_examples)
    return jb.Task(lambda key: jnp.zeros(num_examples), loss_fn, lambda w, i: {}, data, None)


def go_on(task, batch_size, duration, state=None, **more):
    *_, last = jb.fit(task, jb.FitConfig(optax.sgd(1.0), batch_size, duration, seed=3, **more), state=state)
    return last


def test_a_smaller_batch_takes_the_rest_of_the_epoch():
    task = count_task(16)
    first = go_on(task, 4, jb.steps(2))
    last = go_on(task, 2, jb.epochs(1), first["state"])
    assert last["examples"] == 16 and last["batches"] == last["total_batches"] == 2 + 4 and last["epoch"] == 1.0
    counts = np.asarray(last["state"].params)
    assert sorted(counts.tolist()) == [0.25] * 8 + [0.5] * 8  # none twice, none left out
    np.testing.assert_array_equal(counts == 0.25, np.asarray(first["state"].params) > 0)


def test_a_larger_batch_takes_the_rest_of_the_epoch_and_then_whole_epochs():
    task = count_task(16)
    first = go_on(task, 2, jb.steps(4))
    second = go_on(task, 8, jb.epochs(2), first["state"])
    assert second["examples"] == 8 + 8 + 16 and second["batches"] == 4 + 1 + 2
    assert sorted(np.asarray(second["state"].params).tolist()) == [0.25] * 8 + [0.625] * 8


def test_what_is_left_of_an_epoch_and_fills_no_batch_is_told():
    task = count_task(16)
    first = go_on(task, 8, jb.steps(1))
    with pytest.raises(ValueError, match="state.step=1 leaves 8 examples of epoch 0, fewer than a batch.*smaller batch"):
        go_on(task, 16, jb.epochs(1), first["state"])
    assert go_on(task, 16, jb.epochs(2), first["state"])["examples"] == 8 + 16  # in epoch 1


def test_other_groups_go_on_from_the_same_place():
    task = count_task(16)
    first = go_on(task, 4, jb.steps(2))
    split = go_on(task, 4, jb.epochs(1), first["state"], num_groups=2)
    assert split["examples"] == 16 and split["batches"] == 4 and split["updates"] == 2 + 2 * 2
    plain = go_on(task, 4, jb.epochs(2), split["state"])
    assert plain["examples"] == 32 and plain["batches"] == 8


def test_a_state_stepped_elsewhere_or_set_back_follows_its_step():
    task = count_task(16)
    first = go_on(task, 4, jb.steps(2))["state"]
    step = jb.make_train_step(task.loss_fn, optax.sgd(1.0), 4)
    stepped, _ = step(first, jnp.arange(4))
    assert go_on(task, 4, jb.steps(4), stepped)["examples"] == 16
    assert go_on(task, 4, jb.steps(1), first._replace(step=jnp.zeros((), jnp.int32)))["examples"] == 4


@settings(deadline=None, max_examples=200)
@given(
    num_examples=st.integers(1, 40),
    stages=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=5),
    evaluations=st.integers(1, 3),
)
def test_no_example_comes_twice_in_an_epoch_whatever_the_sizes(num_examples, stages, evaluations):
    progress, seen = Progress(), []
    for size, batches in stages:
        size = min(size, num_examples)
        config = FitConfig(None, size, jb.steps(progress.batches + batches), evaluations_per_epoch=evaluations)
        plan = plan_segments(config, num_examples, start=progress)
        assert sum(segment.num_batches for segment in plan) == batches
        for segment in plan:
            progress = advance(progress, segment)
            seen += [(segment.epoch, segment.first + n) for n in range(segment.num_examples)]
            left = num_examples - segment.first - segment.num_examples
            assert segment.last == (left < size) and segment.epoch < segment.end <= segment.epoch + 1
    assert len(set(seen)) == len(seen) and seen == sorted(seen)
    assert progress.examples == len(seen) and all(example < num_examples for _, example in seen)


@settings(deadline=None, max_examples=100)
@given(num_examples=st.integers(1, 30), first=st.integers(1, 5), cut=st.integers(0, 60), evaluations=st.integers(1, 4))
def test_a_plan_from_any_batch_is_the_rest_of_the_whole(num_examples, first, cut, evaluations):
    config = FitConfig(None, lambda epoch: min(first + epoch, num_examples), jb.epochs(4), evaluations_per_epoch=evaluations)
    each = lambda plan: [(s.epoch, s.first + n * s.batch_size, s.batch_size) for s in plan for n in range(s.num_batches)]
    whole = plan_segments(config, num_examples)
    cut = min(cut, len(each(whole)) - 1)
    rest = plan_segments(config, num_examples, start=progress_after(config, num_examples, cut))
    assert each(rest) == each(whole)[cut:] and [s.end for s in rest] == [s.end for s in whole][-len(rest) :]


@given(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1), st.integers(0, 2**60))
def test_progress_survives_a_state_of_32_bits(epoch, offset, batches, examples):
    progress = Progress(epoch, offset, batches, examples)
    assert read_progress(jnp.asarray(write_progress(progress, 5)), 5) == progress
    assert read_progress(jnp.asarray(write_progress(progress, 5)), 6) is None and read_progress((), 5) is None


def test_a_given_state_is_freed_after_its_first_step():
    task = count_task(16)
    state = go_on(task, 4, jb.steps(2))["state"]
    alive = weakref.ref(state.params)
    records = jb.fit(task, jb.FitConfig(optax.sgd(1.0), 4, jb.epochs(3), seed=3), state=state)
    del state
    next(records)
    assert alive() is None and next(records)["batches"] > 0
