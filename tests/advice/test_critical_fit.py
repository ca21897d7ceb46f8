"""The fit of updates by batch size: no number leaves its range, against closed forms and a plain minimiser."""

import math

import numpy as np
import pytest
from scipy.optimize import nnls

import jaxbatch as jb


def test_updates_in_proportion_have_no_least_number():
    fit = jb.critical_batch_size({8: [1000.0] * 3, 16: [500.0] * 3, 32: [250.0] * 3})
    assert (fit.min_updates.value, fit.critical_batch_size.value, fit.min_examples) == (0, math.inf, pytest.approx(8000))
    assert f"{fit.min_updates:.0f}, {fit.critical_batch_size:.0f}, {fit.examples:,.0f}" == "0 [0, 0], inf [inf, inf], 8,000 [8,000, 8,000]"


def test_updates_that_do_not_depend_on_the_size_have_a_critical_size_of_zero():
    fit = jb.critical_batch_size({8: [300.0] * 2, 16: [300.0] * 2, 32: [300.0] * 2})
    assert (fit.min_updates.value, fit.critical_batch_size.value, fit.min_examples) == (pytest.approx(300), 0, 0)
    rising = jb.critical_batch_size({8: [100.0], 16: [150.0], 32: [200.0]})  # more updates with larger batches: nothing that the law knows
    assert rising.critical_batch_size.value == 0 == rising.examples.value and rising.min_updates.value == pytest.approx(150)


def test_no_number_is_ever_below_zero():
    random, unbounded = np.random.default_rng(0), 0
    for _ in range(200):  # near proportion, where a free fit has a negative number in every second case
        updates = {size: 8000 / size * (1 + 0.1 * random.normal(size=3)) for size in (8, 16, 32)}
        fit = jb.critical_batch_size(updates)
        assert all(0 <= part.low <= part.value <= part.high and part.n == 9 for part in fit)
        assert fit.min_examples > 0
        unbounded += fit.critical_batch_size.high == math.inf
    assert unbounded >= 0.93 * 200  # S_min cannot be told from zero


def test_the_fit_solves_its_own_weighted_problem():
    random, sizes = np.random.default_rng(1), np.repeat([8, 32, 128, 512], 3)
    values = 200 * (1 + 64 / sizes) * random.lognormal(0, 0.2, len(sizes))
    fit = jb.critical_batch_size({int(size): values[sizes == size] for size in np.unique(sizes)})
    line = fit.min_updates.value + fit.min_examples / sizes  # weights follow the line
    expected, _ = nnls(np.stack([1 / line, 1 / sizes / line], 1), values / line)
    assert (fit.min_updates.value, fit.min_examples) == pytest.approx(tuple(expected), rel=1e-6)


def test_sizes_with_one_seed_have_an_interval_from_their_scatter_about_the_line():
    fit = jb.critical_batch_size({8: [1800.0], 32: [610.0], 128: [295.0], 512: [226.0]})
    assert fit.critical_batch_size.n == 4 and 0 < fit.critical_batch_size.low < 64 < fit.critical_batch_size.high < math.inf
