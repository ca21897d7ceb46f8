"""Intervals: Fieller's three cases against the t-test that defines them, coverage, values within their ends."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

import jaxbatch as jb
from jaxbatch.intervals import Interval, around, interval, ratio_of_means

BOUNDED = ([12.0, 20.0, 16.0, 15.0], [1.0, 1.5, 0.9, 1.1])
# The numerators can be told from zero, the denominators cannot: all but an interval around zero.
COMPLEMENT = ([5.0, 6.0, 7.0], [-1.0, 2.0, -0.5])
ALL = ([1.0, -2.0, 1.5], [-1.0, 2.0, 0.5])
GRID = np.concatenate([-np.geomspace(1e4, 1e-3, 4000), [0.0], np.geomspace(1e-3, 1e4, 4000)])


def not_rejected(numerators, denominators):
    """The ratios on the grid that a t-test at 5% lets stand, each by itself."""
    rest = np.asarray(numerators)[None] - GRID[:, None] * np.asarray(denominators)[None]
    return stats.ttest_1samp(rest, 0.0, axis=1).pvalue >= 0.05


def stretches(stands):
    """``(first, last)`` of every run of ratios that stand; infinite where it meets the end of the grid."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], stands.astype(int), [0]])))
    ends = [(GRID[start], GRID[stop - 1]) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
    outside = lambda end: math.copysign(math.inf, end) if abs(end) == GRID[-1] else end
    return [(outside(low), outside(high)) for low, high in ends]


def test_fieller_bounded():
    (expected,) = stretches(not_rejected(*BOUNDED))
    found = ratio_of_means(*BOUNDED, scale="linear")
    np.testing.assert_allclose(found[1:3], expected, rtol=0.01)
    assert found.low > 0 and ratio_of_means(*BOUNDED, nonnegative=True, scale="linear") == found
    swapped = ratio_of_means(np.negative(BOUNDED[0]), BOUNDED[1])
    assert swapped[:3] == (-found.value, -found.high, -found.low)


def test_fieller_all_but_an_interval():
    (low, left), (right, high) = stretches(not_rejected(*COMPLEMENT))
    assert (low, high) == (-math.inf, math.inf) and left < 0 < right < 36
    assert ratio_of_means(*COMPLEMENT) == Interval(pytest.approx(36.0), -math.inf, math.inf, 3)
    found = ratio_of_means(*COMPLEMENT, nonnegative=True)
    assert found.low == pytest.approx(right, rel=0.01) and found.high == math.inf
    negative = np.negative(COMPLEMENT[0])
    assert ratio_of_means(negative, COMPLEMENT[1]) == Interval(pytest.approx(-36.0), -math.inf, math.inf, 3)
    assert ratio_of_means(negative, COMPLEMENT[1], nonnegative=True) == Interval(0.0, 0.0, math.inf, 3)  # nothing over who knows what
    below = ratio_of_means(COMPLEMENT[0], np.negative(COMPLEMENT[1]), nonnegative=True)
    assert below.value == math.inf == below.high and 0 < below.low < 36  # a denominator below its range is taken for zero


def test_fieller_all_but_an_interval_above_zero():
    # Ratios around 2 are excluded, those near 0 and large ones are not: from 0 on, both sides remain.
    numerators, denominators = [-0.7, -0.2, 1.0, 2.3], [0.0, 0.2, 0.9, 1.5]
    (low, left), (right, high) = stretches(not_rejected(numerators, denominators))
    assert 1 < left < 2 < right < 4 and (low, high) == (-math.inf, math.inf)
    assert ratio_of_means(numerators, denominators, nonnegative=True) == Interval(pytest.approx(0.9231, rel=1e-3), 0, math.inf, 4)
    assert ratio_of_means(numerators, denominators)[1:3] == (-math.inf, math.inf)


def test_fieller_everything():
    assert not_rejected(*ALL).all()
    found = ratio_of_means(*ALL)
    assert found[1:3] == (-math.inf, math.inf) and not found.excludes(1e9)
    assert ratio_of_means(*ALL, nonnegative=True)[1:3] == (0, math.inf)


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize(
    ("mean", "spread", "least", "most"),
    [
        (4.0, 1.0, 0.93, 0.97),  # denominators clear of zero: bounded, nearly always
        (1.0, 1.5, 0.93, 1.0),  # of all three kinds
        (0.2, 1.5, 0.93, 1.0),  # hardly told from zero: nearly always unbounded
    ],
)
def test_coverage(mean, spread, least, most, nonnegative):
    random, ratio, trials = np.random.default_rng(5), 3.0, 2000
    denominators = random.normal(mean, spread, (trials, 8))
    numerators = ratio * mean + 0.5 * (denominators - mean) + random.normal(0, 1.0, (trials, 8))
    found = [ratio_of_means(*pair, nonnegative=nonnegative) for pair in zip(numerators, denominators, strict=True)]
    hits = sum(not one.excludes(ratio) for one in found)
    assert least <= hits / trials <= most
    bounded = sum(math.isfinite(one.high) for one in found) / trials
    assert bounded > 0.99 if mean == 4 else 0 < bounded < 0.9


numbers = st.one_of(st.integers(-9, 9).map(float), st.floats(-1e100, 1e100, allow_nan=False).filter(lambda x: x == 0 or abs(x) > 1e-100))


@settings(deadline=None, max_examples=300)
@given(pairs=st.lists(st.tuples(numbers, numbers), min_size=2, max_size=6), nonnegative=st.booleans())
def test_a_ratio_lies_within_its_interval(pairs, nonnegative):
    found = ratio_of_means(*np.transpose(pairs), nonnegative=nonnegative)
    assert found.low <= found.value <= found.high and found.n == len(pairs) and (found.low >= 0 or not nonnegative)
    assert not found.excludes(found.value)


@settings(deadline=None, max_examples=40)
@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=7),
    statistic=st.sampled_from([np.mean, np.median]),
    scale=st.sampled_from(["linear", "log", "any"]),
)
@example(values=[5e-324, 1e6], statistic=np.mean, scale="log")
def test_a_statistic_lies_within_its_interval(values, statistic, scale):
    found = interval(values, statistic, scale=scale)
    assert found.low <= found.value <= found.high


def test_an_interval_without_ends_excludes_nothing():
    assert not Interval(1.0, math.nan, math.nan, 5).excludes(0.0)
    assert around(1.0, -math.inf, 0.5, 3) == Interval(1.0, -math.inf, 1.0, 3)


def test_the_noise_scale_is_never_beside_its_interval():
    steps = jb.GradientStatistics(signal=np.array([-1.0, 2.0, -0.5]), trace=np.array([5.0, 6.0, 7.0]))
    found = jb.gradient_noise_scale(steps)
    assert found.value == pytest.approx(36) and 1.3 < found.low < 1.5 and found.high == math.inf
    found = jb.gradient_noise_scale(steps._replace(signal=-steps.signal))
    assert found.value == math.inf == found.high and 0 < found.low < 36
