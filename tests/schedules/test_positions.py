"""Where a run stands in epochs: it never falls, never passes an epoch's end, and is the same in records, rates and durations."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbatch as jb
from jaxbatch.batches import Duration
from jaxbatch.training.plans import FitConfig, progress_after, settled
from tests.reference import plan_segments
from tests.schedules.test_milestones import TOKENS, each, schedules


@settings(deadline=None, max_examples=100)
@given(schedule=schedules(), evaluations=st.integers(1, 4), cut=st.integers(0, 60))
def test_the_position_in_epochs_never_falls_and_never_passes_the_end(schedule, evaluations, cut):
    unit, num_examples, milestones = schedule
    sizes = jb.milestone_schedule({Duration(amount, unit): size for amount, size in milestones})
    config = settled(FitConfig(None, sizes, jb.epochs(4), evaluations_per_epoch=evaluations), TOKENS)
    plan = plan_segments(config, num_examples)
    ends = [one.end for one in plan]
    assert all(one < other for one, other in zip([0.0, *ends], ends))
    assert all(one.epoch < one.end <= one.epoch + 1 and one.last == (one.end == one.epoch + 1) for one in plan)
    for one in plan:
        whole = num_examples // one.batch_size * one.batch_size
        of_epoch = [other for other in plan if other.epoch == one.epoch]
        seen = of_epoch[-1].first + of_epoch[-1].num_examples
        if {other.batch_size for other in of_epoch} == {one.batch_size} and seen == whole:  # by the formula for batches of one size, to the bit
            assert one.end == one.epoch + (one.first + one.num_examples) / whole
    start = progress_after(config, num_examples, min(cut, sum(one.num_batches for one in plan)))
    rest = plan_segments(config, num_examples, start=start)
    assert [one.end for one in rest] == ends[len(ends) - len(rest) :]


@settings(deadline=None, max_examples=5)  # each compiles
@given(schedule=schedules())
def test_the_position_of_a_rate_is_that_of_the_records(schedule):
    unit, num_examples, milestones = schedule
    sizes = jb.milestone_schedule({Duration(amount, unit): size for amount, size in milestones})
    rate = jb.coupled_learning_rate(
        sizes, init=1.0, num_examples=num_examples, num_epochs=4, shape=lambda position: position, tokens_per_example=TOKENS
    )
    plan = plan_segments(settled(FitConfig(None, sizes, jb.epochs(4), evaluations_per_epoch=4), TOKENS), num_examples)
    ends = np.cumsum([one.num_batches for one in plan])
    positions = np.asarray(rate(jnp.arange(ends[-1] + 3)))
    assert (np.diff(positions) >= 0).all() and positions.max() == 4
    np.testing.assert_allclose(positions[ends], [one.end for one in plan], rtol=1e-6)


@settings(deadline=None, max_examples=100)
@given(schedule=schedules(), amount=st.floats(0.01, 4))
def test_a_part_of_an_epoch_ends_with_the_batch_that_reaches_it(schedule, amount):
    unit, num_examples, milestones = schedule
    sizes = jb.milestone_schedule({Duration(amount, unit): size for amount, size in milestones})
    config = settled(FitConfig(None, sizes, jb.epochs(round(amount, 2))), TOKENS)
    plan, longer = (plan_segments(one, num_examples) for one in (config, config._replace(duration=jb.epochs(5))))
    batches = each(plan)
    assert batches == each(longer)[: len(batches)] and plan[-1].end >= config.duration.amount - 1e-9
    before = plan_segments(config._replace(duration=jb.steps(len(batches) - 1)), num_examples)
    assert not before or before[-1].end < config.duration.amount


@pytest.mark.parametrize("unit", ["steps", "examples", "tokens"])
def test_a_schedule_in_another_unit_says_where_its_stages_begin(unit):
    sizes = jb.milestone_schedule({0: 8, Duration(16, unit): 4})
    with pytest.raises(ValueError, match=f"unit='{unit}' needs start, a function of the stage"):
        jb.BatchSizeSchedule(sizes.size, sizes.stage, sizes.nominal, unit=unit)
    again = jb.BatchSizeSchedule(sizes.size, sizes.stage, sizes.nominal, unit=unit, start=sizes.start)
    plans = [plan_segments(settled(FitConfig(None, one, jb.epochs(8)), TOKENS), 24) for one in (sizes, again)]
    assert plans[0] == plans[1] and {one.batch_size for one in plans[0]} == {8, 4}


def test_a_batch_that_shrinks_near_the_end_of_an_epoch():
    sizes = jb.milestone_schedule({0: 1, jb.examples(9): 30, jb.examples(99): 1})
    assert [one.end for one in plan_segments(FitConfig(None, sizes), 100)] == [0.09, 0.99, 1.0]
