"""The fit of updates by batch size: no number leaves its range, against closed forms and a plain minimiser."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import nnls

import jaxbatch as jb
from jaxbatch.advice.full_sweep import best_rates, reached_at, sweep_size


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


def test_a_fit_does_not_take_the_wait_for_the_next_look_for_examples():
    """Evaluated every 1,000 examples, runs that need 6,400 show the goal 500 examples late on average."""
    random, rows = np.random.default_rng(0), []
    for size in (5, 20, 100, 500):
        look = 1000 // size
        for updates in np.ceil(100 * (1 + 64 / size) * random.lognormal(-0.02, 0.2, 400)):
            noticed = look * math.ceil(updates / look)
            rows.append({"batch_size": size, "learning_rate": 0.1, "updates": noticed, "more_than": noticed - look})
    fit = jb.critical_batch_size({size: updates for size, (_, updates) in best_rates(rows).items()})
    assert fit.critical_batch_size.value == pytest.approx(64, rel=0.03) and fit.min_examples == pytest.approx(6400, rel=0.03)


def test_a_row_of_a_sweep_says_between_which_looks_it_met_the_goal():
    data = jnp.linspace(0.5, 1.5, 40)
    loss_fn = lambda w, x: 0.5 * (x - w) ** 2
    task = jb.Task(lambda key: jnp.array(0.0), loss_fn, lambda w, x: {"loss": loss_fn(w, x)}, data, data)
    settings = {"longest": jb.epochs(4), "evaluations_per_epoch": 2}
    rows = sweep_size(task, optax.sgd, jb.as_goal("loss<0.1"), 4, [0.02, 0.1], [0], **settings)
    (slow, fast), looks = sorted(rows, key=lambda row: row["learning_rate"]), range(0, 41, 5)
    assert fast["updates"] in looks and fast["more_than"] == fast["updates"] - 5 and reached_at(fast) == fast["updates"] - 2
    *_, at_look = jb.fit(task, jb.FitConfig(optax.sgd(0.1), 4, jb.steps(fast["more_than"]), evaluations_per_epoch=2))
    assert at_look["test_loss"] > 0.1
    assert slow["updates"] is None and slow["more_than"] == slow["ran"]  # nothing is known beyond
