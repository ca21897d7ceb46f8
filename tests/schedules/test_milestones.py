"""Batch sizes that change after epochs, steps, examples or tokens: against a slow twin, batch by batch; runs that go on are the same."""

import contextlib
import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbatch as jb
from experiments.adabatch.periods import read_period
from experiments.harness import training as harness_training
from experiments.harness.training import train_into
from jaxbatch.batches import Duration
from jaxbatch.results.records import open_run
from jaxbatch.schedules.batch_sizes import whole_periods
from jaxbatch.schedules.stretches import count_steps
from jaxbatch.training.checkpoints import checkpointed
from jaxbatch.training.plans import FitConfig, progress_after, settled
from jaxbatch.training.run_programs import RunPrograms
from tests.reference import plan_segments

UNITS = ("steps", "examples", "epochs", "tokens")
TOKENS = 7  # of an example


def walked(milestones, unit, num_examples, num_batches):
    """The batches of a run one by one: (epoch, first example, size). Before each, the last milestone that is reached gives the size."""
    batches, examples, epoch, offset, number, sizes = [], 0, 0, 0, 0, [size for _, size in milestones]

    def is_reached(milestone, size):
        if unit == "epochs":  # a part of an epoch is a part of its whole batches, rounded up
            whole, rest = divmod(Fraction(milestone).limit_denominator(1000), 1)
            return (epoch, offset) >= (whole, math.ceil(rest * (num_examples // size)) * size)
        return {"steps": len(batches), "examples": examples, "tokens": examples * TOKENS}[unit] >= milestone

    while len(batches) < num_batches:
        while number + 1 < len(milestones) and is_reached(milestones[number + 1][0], sizes[number]):
            number += 1
        if num_examples - offset < sizes[number]:
            epoch, offset = epoch + 1, 0
            continue
        batches.append((epoch, offset, sizes[number]))
        examples, offset = examples + sizes[number], offset + sizes[number]
    return batches


def each(plan):
    return [(one.epoch, one.first + n * one.batch_size, one.batch_size) for one in plan for n in range(one.num_batches)]


@st.composite
def schedules(draw):
    unit, num_examples = draw(st.sampled_from(UNITS)), draw(st.integers(6, 40))
    amounts = st.floats(0.01, 4).map(lambda amount: round(amount, 2)) if unit == "epochs" else st.integers(1, 400 if unit == "tokens" else 60)
    later = draw(st.lists(st.tuples(amounts, st.integers(1, 6)), max_size=4, unique_by=lambda pair: pair[0]))
    return unit, num_examples, [(0, draw(st.integers(1, 6))), *sorted(later)]


@settings(deadline=None, max_examples=100)
@given(schedule=schedules(), evaluations=st.integers(1, 3), cut=st.integers(0, 60))
def test_sizes_change_at_the_batch_where_the_milestone_is_reached(schedule, evaluations, cut):
    unit, num_examples, milestones = schedule
    sizes = jb.milestone_schedule({Duration(amount, unit): size for amount, size in milestones})
    config = FitConfig(None, sizes, jb.steps(60), evaluations_per_epoch=evaluations)
    if unit == "tokens" and len(milestones) > 1:
        with pytest.raises(ValueError, match="tokens_per_example=None: give the number of tokens of an example"):
            plan_segments(config, num_examples)
    config = settled(config, TOKENS)
    plan, expected = plan_segments(config, num_examples), walked(milestones, unit, num_examples, 60)
    assert each(plan) == expected
    assert [one.last for one in plan] == [one.epoch != other.epoch for one, other in zip(plan, plan[1:])] + [plan[-1].last]
    rest = plan_segments(config, num_examples, start=progress_after(config, num_examples, cut))
    assert each(rest) == expected[cut:]
    epochs = range(expected[-1][0])  # the last may be cut
    assert count_steps(config.batch_size, num_examples, len(epochs)) == [sum(one[0] == epoch for one in expected) for epoch in epochs]


@pytest.mark.parametrize("unit", UNITS)
def test_a_growing_batch_is_that_of_its_milestones(unit):
    every = Duration({"steps": 5, "examples": 11, "epochs": 0.7, "tokens": 80}[unit], unit)
    growing = jb.adabatch_schedule(batch_size=2, every=every, max_batch_size=8)
    listed = jb.milestone_schedule({0: 2} | {Duration(every.amount * n, unit): min(2 * 2**n, 8) for n in (1, 2, 3, 4)})
    plans = [plan_segments(settled(FitConfig(None, sizes, jb.epochs(4)), TOKENS), 24) for sizes in (growing, listed)]
    assert plans[0] == plans[1] and {one.batch_size for one in plans[0]} == {2, 4, 8}


def test_a_change_makes_a_record_and_what_leaves_the_size_alone_makes_none():
    sizes = lambda schedule: [(one.batch_size, one.num_batches) for one in plan_segments(FitConfig(None, schedule, jb.epochs(2)), 16)]
    assert sizes(jb.milestone_schedule({0: 2, jb.steps(3): 4, jb.steps(6): 4})) == [(2, 3), (4, 2), (4, 4)]
    assert sizes(jb.constant_schedule(2, every=jb.steps(3))) == [(2, 8), (2, 8)]
    assert sizes(jb.milestone_schedule({0: 2, jb.examples(13): 8})) == [(2, 7), (8, 2)]  # what is left of epoch 0 fills no batch of 8


def a_task():
    loss_fn = lambda w, batch: 0.5 * (batch @ w - 1) ** 2
    data = jnp.asarray(np.random.default_rng(0).normal(size=(24, 3)), jnp.float32)
    return jb.Task(lambda key: jnp.ones(3), loss_fn, None, data, None, tokens_per_example=TOKENS)


def numbers(records):
    return [[record[key] for key in ("batches", "examples", "tokens", "batch_size", "loss", "epoch")] for record in records]


def test_a_run_goes_on_in_the_same_bits_wherever_it_was_stopped(tmp_path):
    sizes = jb.adabatch_schedule(batch_size=4, every=jb.tokens(10 * TOKENS), max_batch_size=12)
    rate = jb.coupled_learning_rate(sizes, init=0.1, decay=0.5, num_examples=24, num_epochs=2, tokens_per_example=TOKENS)
    config = jb.FitConfig(optax.sgd(rate, 0.9), sizes, jb.tokens(44 * TOKENS))
    whole = list(jb.fit(a_task(), config))
    assert [record["batch_size"] for record in whole] == [4, 8, 12] and [record["epoch"] for record in whole] == [0.6, 1.0, 2.0]  # 12 of 20
    kept = jb.fit_with_checkpoints(a_task(), config, tmp_path)
    next(kept), next(kept)  # the checkpoint of a record is written when the next one is asked for
    kept.close()
    again = [list(jb.fit(a_task(), config, state=whole[number]["state"])) for number in range(2)]
    for number, last in ((0, again[0]), (1, again[1]), (0, list(jb.fit_with_checkpoints(a_task(), config, tmp_path)))):
        assert numbers(last) == numbers(whole)[number + 1 :]
        jax.tree.map(np.testing.assert_array_equal, last[-1]["state"].params, whole[-1]["state"].params)


@pytest.mark.parametrize("unit", UNITS)
def test_the_coupled_rate_changes_with_the_batch(unit):
    every = Duration({"steps": 5, "examples": 10, "epochs": 0.5, "tokens": 75}[unit], unit)
    schedule = jb.adabatch_schedule(batch_size=2, every=every, max_batch_size=8)
    rate = jb.coupled_learning_rate(schedule, init=1.0, decay=0.5, num_examples=24, num_epochs=2, tokens_per_example=TOKENS)
    plan = plan_segments(settled(FitConfig(None, schedule, jb.epochs(2)), TOKENS), 24)
    sizes = [size for _, _, size in each(plan)]
    changes = {"steps": [5, 10], "examples": [5, 8], "epochs": [6, 9], "tokens": [6, 9]}[unit]  # 75 tokens are 11 examples, 150 are 22
    assert sizes[: changes[1] + 1] == [2] * changes[0] + [4] * (changes[1] - changes[0]) + [8]
    expected = [1.0] * changes[0] + [0.5] * (changes[1] - changes[0]) + [0.25]
    np.testing.assert_allclose(rate(jnp.arange(12))[: changes[1] + 1], expected, rtol=1e-6)


def test_a_warmup_in_tokens():
    rate = jb.coupled_learning_rate(2, init=1.0, num_examples=8, num_epochs=3, warmup=jb.tokens(8 * TOKENS), tokens_per_example=TOKENS)
    np.testing.assert_allclose(rate(jnp.arange(12)), [0.0, 0.25, 0.5, 0.75] + 8 * [1.0], rtol=1e-6)


PERIODS = [Fraction(1, 10), Fraction(3, 10), Fraction(7, 10), Fraction(11, 10), Fraction(1, 3), Fraction(5, 6), Fraction(5, 2), Fraction(7)]


@pytest.mark.parametrize("every", PERIODS, ids=str)
def test_a_step_decay_changes_at_the_update_where_its_duration_is_reached(every):
    updates = np.arange(90 * 390)  # always as many, so that all share one compiled program
    for per_epoch in (7, 10, 30, 390):
        rate = jb.coupled_learning_rate(1, init=1.0, num_examples=per_epoch, num_epochs=90, shape=jb.step_decay(0.99, float(every)))
        changes = np.round(np.log(np.asarray(rate(jnp.asarray(updates)), float)) / np.log(0.99)).astype(int)
        expected = updates * every.denominator // (per_epoch * every.numerator)
        np.testing.assert_array_equal(changes[: 90 * per_epoch], expected[: 90 * per_epoch])


def test_a_step_decay_keeps_to_its_update_in_a_run_of_a_million():
    rate = jb.coupled_learning_rate(1, init=1.0, num_examples=10_000, num_epochs=101, shape=jb.step_decay(0.5, 100.0))
    assert [float(rate(update)) for update in (999_999, 1_000_000)] == [1.0, 0.5]
    rate = jb.coupled_learning_rate(1, init=1.0, num_examples=10_000, num_epochs=101, shape=jb.step_decay(0.999, 0.3))
    for number in (100, 250, 333):  # at 3,000 updates each
        assert round(math.log(float(rate(3000 * number - 1))) / math.log(0.999)) == number - 1
        assert round(math.log(float(rate(3000 * number))) / math.log(0.999)) == number


@pytest.mark.parametrize("every", PERIODS, ids=str)
def test_whole_periods_are_those_of_exact_arithmetic(every):
    for epoch in range(3000):
        assert whole_periods(epoch, float(every)) == epoch // every
        assert whole_periods(epoch / 10, float(every)) == Fraction(epoch, 10) // every
    schedule = jb.constant_schedule(8, every=jb.epochs(float(every)))
    assert [schedule.stage(epoch) for epoch in range(100)] == [epoch // every for epoch in range(100)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jb.milestone_schedule({0: 8, jb.steps(3): 9, jb.tokens(4): 10}), "has milestones in steps and in tokens. Give all in one unit"),
        (lambda: jb.milestone_schedule({jb.steps(3): 9}), "must begin at epoch 0"),
        (lambda: jb.milestone_schedule({0: 8, -1: 9}), "must begin at epoch 0, with milestones of at least 0"),
        (lambda: jb.milestone_schedule({0: 8, 2: 9, jb.epochs(2.0): 10}), "each given once"),
        (lambda: jb.adabatch_schedule(batch_size=8, every=jb.steps(0)), r"every=steps\(0\) must be above 0"),
        (lambda: jb.adabatch_schedule(batch_size=8, every=0.5), r"every=0.5 epochs must be at least 1. For a part of an epoch give epochs\(0.5\)"),
        (lambda: jb.adabatch_schedule(batch_size=8, every=jb.steps(1))(100), r"by steps\(100\). Give a max_batch_size"),
        (
            lambda: jb.coupled_learning_rate(jb.constant_schedule(2, every=jb.tokens(9)), init=1.0, num_examples=8, num_epochs=1),
            r"tokens\(9\) with tokens_per_example=None",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def trained_by_a_study(folder, monkeypatch, stops=()):
    """The records of an epoch each, of a study that is killed after so many records of ``fit`` and called again."""
    sizes = jb.milestone_schedule({0: 4, jb.examples(10): 8, jb.examples(44): 4})
    config, run = jb.FitConfig(optax.sgd(0.05), sizes, jb.epochs(3)), None
    for stop in (*stops, None):

        def counted(*arguments, stop=stop):
            yield from itertools.islice(checkpointed(*arguments), stop)
            if stop is not None:
                raise KeyboardInterrupt

        monkeypatch.setattr(harness_training, "checkpointed", counted)
        run = open_run(folder, "study", {"name": "one"})
        with contextlib.suppress(KeyboardInterrupt):
            train_into(run, RunPrograms(a_task(), config.optimizer), config, {"arm": "a", "seed": 0}, lambda epochs, examples_per_second=0.0: None)
    return [{name: value for name, value in record.items() if not name.endswith("seconds")} for record in run.find(kind="epoch")]


def test_a_study_keeps_one_record_of_an_epoch_whose_batch_changes_and_goes_on_within_it(tmp_path, monkeypatch):
    whole = trained_by_a_study(tmp_path / "whole", monkeypatch)
    assert [(row["epoch"], row["batch_size"], row["updates"], row.get("updates_by_size")) for row in whole] == [
        (1, 8, 4, {"4": 3, "8": 1}),  # 12 and 8 examples; the last 4 fill no batch of 8
        (2, 8, 7, None),
        (3, 4, 13, None),
    ]
    config = jb.FitConfig(optax.sgd(0.05), jb.milestone_schedule({0: 4, jb.examples(10): 8, jb.examples(44): 4}), jb.epochs(3))
    first, second, *_ = (record["loss"] for record in jb.fit(a_task(), config))
    np.testing.assert_allclose(whole[0]["loss"], (3 * first + second) / 4, rtol=1e-6)
    assert trained_by_a_study(tmp_path / "killed", monkeypatch, stops=(1, 1)) == whole


@pytest.mark.parametrize("text", ["soon", "0", "3 steps", "-1 tokens", "1.5 examples", "nan"])
def test_a_wrong_period_of_a_study_is_named(text):
    with pytest.raises(ValueError, match=f"--every {text} must be"):
        read_period(text)
