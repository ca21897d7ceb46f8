"""Advice for runs of a fixed length where a metric, a length or the runs are unusual."""

import json
import math
import re

import numpy as np
import pytest

import jaxbatch as jb
from jaxbatch.advice.end_advising import EndSetting, conclude_within
from jaxbatch.advice.end_doubts import worse_with_length
from jaxbatch.advice.end_estimate import EndSpace, make_estimate
from jaxbatch.advice.end_law import Scale, choose_scale
from jaxbatch.advice.end_request import Metric, check_known_ends
from jaxbatch.advice.end_search import cost_of, has_ended, race_next
from jaxbatch.advice.ending import Ending, as_written

RATES = (0.001, 0.01, 0.1, 1.0)


def small_space(*, above=False, start=2.0, updates=64, sizes=(8, 32), rates=RATES):
    """Settings of which each has as many updates."""
    steps = dict.fromkeys(sizes, updates)
    return EndSpace(sizes, rates, steps, steps, choose_scale(above, start, [], 50), start, float(updates * sizes[-1]))


def run(size, rate, value, *, steps=64, seed=0):
    return Ending(size, rate, seed, steps, steps, False, value, ((steps // 2, value), (steps, value)))


def runs_of(values, **settings):
    """A run of each size and rate, whose value is a function of how far the rate is from 0.1."""
    return [run(size, rate, values(abs(math.log10(rate) + 1)), seed=number, **settings) for number, (size, rate) in enumerate(_cells())]


def _cells():
    return [(size, rate) for size in (8, 32) for rate in RATES]


METRICS = {
    "falls below 0": (False, 30.0, lambda off: -50 + 20 * off),
    "rises above 1": (True, 0.9, lambda off: 25 - 5 * off),
    "NaN at first": (False, math.nan, lambda off: 0.1 + 0.3 * off),
}


@pytest.mark.parametrize("metric", METRICS)
def test_the_best_run_is_advised_whatever_the_metric_is_like(metric):
    above, start, values = METRICS[metric]
    estimate = make_estimate(runs_of(values), small_space(above=above, start=start), final=True)
    assert np.isfinite(estimate.expected).all()
    assert RATES[estimate.best[1]] == 0.1


def test_a_scale_goes_by_what_runs_showed():
    assert Scale("log", False).suited_to(2.0, [0.1, math.nan]).kind == "log"
    assert Scale("log", False).suited_to(2.0, [0.1, -3.0]) == Scale("linear", False, 5.0)
    assert Scale("log missing", True, 0.01).suited_to(0.5, [1.0]).kind == "log missing"
    assert Scale("log missing", True, 0.01).suited_to(0.5, [20.5]) == Scale("linear", True, 20.0)
    assert choose_scale(False, math.nan, [], 10).kind == "log"


def test_no_accuracy_is_above_1():
    scale = choose_scale(True, 0.1, [], 50)
    assert scale.read(np.array([-9.0, scale.write(1.0), 9.0])).tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("most", [2.0, 4.0, 8.0])
@pytest.mark.parametrize("updates", [8, 16, 40, 2000])
def test_the_first_runs_cost_at_most_half_or_are_two(most, updates):
    space = small_space(updates=updates, rates=tuple(np.geomspace(1e-4, 3, 19)))
    endings = []
    while (following := race_next(endings, space, 8, most)) is not None:
        endings.append(run(8, following.learning_rate, 0.5, steps=following.num_steps))
    assert len(endings) >= 2 and has_ended(endings, space)
    assert sum(cost_of(ending, space) for ending in endings) <= (most / 2 if len(endings) > 2 else most)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (run(16, 0.1, 0.5), "known holds a run of 64 updates with batch size 16 and learning rate 0.1"),
        (run(8, 0.2, 0.5), "learning rate 0.2, and the choice is among [8, 32]"),
        (run(8, 0.1, 0.5, steps=65), "known holds a run of 65 updates"),
    ],
)
def test_runs_of_another_question_are_refused(known, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        check_known_ends([run(8, 0.1, 0.5), known], small_space())
    assert "\n" not in str(caught.value)


def settled(**settings):
    return EndSetting(Metric("loss", False), small_space(**settings), 512, 40, ())


def test_a_horizon_as_long_as_the_runs_is_none():
    advice = conclude_within(jb.steps(64), jb.steps(64), settled(), None, runs_of(lambda off: 0.5 + 0.3 * off))
    words = " ".join(advice.sentences())
    assert advice.horizon is None and "not made" not in words
    assert f"The batch size {advice.batch_size}" in words and ("memory holds at most 40" in words) == (advice.batch_size == 32)
    assert "where the advised setting does" not in words
    assert all(advice.sentences()) and ("No larger batch" not in words or advice.batch_size == 8)


def test_memory_is_named_only_where_it_is_the_bound():
    def words(largest_that_fits):
        better_large = [
            run(size, rate, 0.5 + 0.3 * abs(math.log10(rate) + 1) - 0.1 * (size == 32), seed=n) for n, (size, rate) in enumerate(_cells())
        ]
        setting = settled()._replace(largest_batch_size=largest_that_fits)
        return " ".join(conclude_within(jb.steps(64), None, setting, None, better_large).sentences())

    assert (
        "memory holds at most 40" in words(40) and "memory" not in words(1000) and "32 is the largest that was considered: try sizes" in words(1000)
    )


def test_runs_from_a_file_are_taken():
    def conclude(change):
        return conclude_within(jb.steps(64), None, settled(), None, [change(one) for one in runs_of(lambda off: 0.5 + 0.3 * off)])

    listed = conclude(lambda one: as_written(Ending(**json.loads(json.dumps(one._asdict())))))
    assert listed.choices == conclude(lambda one: one).choices


def test_runs_that_end_without_a_number_did_not_diverge():
    endings = runs_of(lambda off: math.nan)
    advice = conclude_within(jb.steps(64), None, settled(), None, endings)
    assert advice.batch_size is None
    assert advice.doubts == ("loss was not finite at the end of 8 of 8 runs, and no run ended with a number: check metrics_fn.",)


@pytest.mark.parametrize(("short", "worse"), [(0.5, False), (0.45, False), (0.3, True)])
def test_a_shorter_run_that_ends_alike_or_is_lucky_is_no_overfitting(short, worse):
    endings = [run(8, 0.1, 0.5), run(32, 0.1, 0.5), run(8, 0.1, short, steps=16)]
    assert (worse_with_length(endings, small_space(), 0.1) is not None) == worse


def test_overfitting_is_told():
    short, long = runs_of(lambda off: 0.3 + 0.1 * off, steps=16), runs_of(lambda off: 0.5 + 0.1 * off)
    advice = conclude_within(jb.steps(64), None, settled(), None, [*short, *long])
    assert "the model overfits" in " ".join(advice.doubts)
