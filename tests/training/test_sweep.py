"""Many runs in one program: each is the run that fit makes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.machine import compiling
from jaxbatch.training.sweeps import start_states
from tests.data.test_streams import Arrays
from tests.gradients.test_gradients import assert_close
from tests.gradients.test_moments import batch_norm_task
from tests.training.test_loops import convolution_task
from tests.training.test_train import task  # noqa: F401 (a fixture)

RATES, SEEDS = [0.001, 0.01, 0.02], [3, 3, 8]


def make_optimizer(rate):
    return optax.sgd(rate, 0.9)


def run_sweep(task, runs, duration, rates=RATES):
    return list(jb.sweep(task, make_optimizer, jnp.array(rates), SEEDS, batch_size=8, duration=duration, runs=runs))


@pytest.mark.parametrize("runs", ["vmap", "map", "threads", None])
@pytest.mark.parametrize("make", ["plain", "convolution"])
def test_each_run_is_what_fit_makes(task, runs, make):
    task = task if make == "plain" else convolution_task()
    records = run_sweep(task, runs, jb.steps(7))
    assert [record["batches"] for record in records] == [3, 6, 7]
    for index, (rate, seed) in enumerate(zip(RATES, SEEDS, strict=True)):
        alone = list(jb.fit(task, jb.FitConfig(make_optimizer(rate), 8, jb.steps(7), seed=seed)))
        for mine, theirs in zip(records, alone, strict=True):
            for name in ("loss", "test_loss", "test_accuracy"):
                np.testing.assert_allclose(mine[name][index], theirs[name], rtol=2e-5, err_msg=name)
            assert (mine["examples"], mine["epoch"]) == (theirs["examples"], theirs["epoch"])
        last = jax.tree.map(lambda leaf: leaf[index], records[-1]["state"])
        assert_close(last.params, alone[-1]["state"].params, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("runs", ["vmap", "map", "threads"])
def test_a_run_that_diverges_leaves_the_others_alone(task, runs):
    *_, last = run_sweep(task, runs, jb.epochs(9), rates=[0.01, 1e20, 0.01])
    assert last["diverged_at_batch"][0] == last["diverged_at_batch"][2] == -1
    alone = list(jb.fit(task, jb.FitConfig(make_optimizer(1e20), 8, jb.epochs(9), seed=3)))
    assert last["diverged_at_batch"][1] == alone[-1]["diverged_at_batch"]
    assert np.isfinite(last["test_loss"][[0, 2]]).all()


@pytest.mark.parametrize("runs", ["vmap", "threads"])
def test_several_updates_from_a_batch_in_a_sweep(task, runs):
    settings = {"batch_size": 8, "duration": jb.steps(4), "num_groups": 4}
    *_, last = jb.sweep(task, make_optimizer, jnp.array([0.001, 0.01]), [0, 1], runs=runs, **settings)
    *_, alone = jb.fit(task, jb.FitConfig(make_optimizer(0.01), seed=1, **settings))
    mine = jax.tree.map(lambda leaf: leaf[1], last["state"])
    assert_close(mine.params, alone["state"].params, rtol=1e-4, atol=1e-6)
    assert int(mine.step) == alone["updates"] == 16 and last["batches"] == 4
    with pytest.raises(ValueError, match="num_groups=3 does not divide batch_size=8. Nearest that do: 2 and 4"):
        next(jb.sweep(task, make_optimizer, jnp.array([0.01]), [0], **(settings | {"num_groups": 3})))


def test_running_moments_in_a_sweep():
    task = batch_norm_task()
    (record,) = jb.sweep(task, make_optimizer, jnp.array([0.01, 0.1]), [0, 1], batch_size=8, duration=jb.steps(2))
    alone = list(jb.fit(task, jb.FitConfig(make_optimizer(0.1), 8, jb.steps(2), seed=1)))
    mine = jax.tree.map(lambda leaf: leaf[1], record["state"].model_state)
    assert_close(mine, alone[-1]["state"].model_state, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("runs", ["vmap", "threads"])
def test_going_on_ends_in_the_same_numbers(task, runs):
    rates, kept = [0.01, 1e20, 0.01], ("batches", "diverged_at_batch", "state")

    def run(after=None):
        return list(
            jb.sweep(
                task,
                make_optimizer,
                jnp.array(rates),
                SEEDS,
                batch_size=8,
                duration=jb.steps(50),
                evaluations_per_epoch=2,
                after=after,
                runs=runs,
            )
        )

    whole = run()
    assert [record["batches"] for record in whole[:4]] == [1, 3, 4, 6]  # 3 batches an epoch, in two parts
    assert whole[-1]["diverged_at_batch"][1] >= 0
    for stop in (0, 1, len(whole) - 2):
        rest = run({key: whole[stop][key] for key in kept})
        assert [r["batches"] for r in rest] == [r["batches"] for r in whole[stop + 1 :]]
        for mine, theirs in zip(rest, whole[stop + 1 :], strict=True):
            np.testing.assert_array_equal(mine["test_loss"], theirs["test_loss"])
            np.testing.assert_array_equal(mine["diverged_at_batch"], theirs["diverged_at_batch"])
    assert run({key: whole[-1][key] for key in kept}) == []


def test_float64_in_threads(x64):
    data = jnp.arange(4.0)
    task = jb.Task(lambda key: jnp.array(0.0), lambda w, x: 0.5 * (x - w) ** 2, lambda w, x: {"loss": x - w, "accuracy": x}, data, data)
    (record,) = jb.sweep(task, optax.sgd, jnp.array([0.1, 0.2]), [0, 1], batch_size=2, duration=jb.steps(1), runs="threads")
    assert record["state"].params.dtype == record["test_loss"].dtype == np.float64


def test_refusals(task):
    with pytest.raises(ValueError, match="leading axis of seeds, 2"):
        list(jb.sweep(task, make_optimizer, jnp.ones(3), [0, 1], batch_size=8, duration=jb.epochs(1)))
    with pytest.raises(ValueError, match="runs='all'"):
        run_sweep(task, "all", jb.epochs(1))
    with pytest.raises(ValueError, match="batch_size=25"):
        list(jb.sweep(task, make_optimizer, jnp.ones(1), [0], batch_size=25, duration=jb.epochs(1)))


@pytest.mark.parametrize("name", ["train_data", "test_data"])
def test_streams_are_refused_by_name(task, name):
    there = task._replace(**{name: Arrays(jax.tree.leaves(getattr(task, name)))})
    with pytest.raises(ValueError, match=f"{name} is a stream, .* with fit"):
        run_sweep(there, None, jb.epochs(1))


@pytest.mark.parametrize("runs", ["vmap", "threads"])
def test_a_loss_that_needs_several_examples(runs):
    loss_fn = lambda w, x: ((x - w) ** 2 + 0 * x.reshape(-1, 2).mean()).astype(jnp.float32)
    task = jb.Task(lambda key: jnp.array(0.0), loss_fn, None, jnp.arange(8.0), None)
    rates = jnp.array([0.1, 1e30])  # the second diverges
    *_, last = jb.sweep(task, optax.sgd, rates, [0, 0], batch_size=4, duration=jb.steps(6), runs=runs)
    assert np.isfinite(last["loss"][0]) and last["diverged_at_batch"].tolist()[0] == -1 < last["diverged_at_batch"][1]


def test_sweeps_and_runs_begin_by_one_program(monkeypatch):
    texts, compile_once = [], compiling._compile_once
    monkeypatch.setattr(compiling, "_compile_once", lambda lowered, where: texts.append(lowered.as_text()) or compile_once(lowered, where))
    small = lambda: jb.Task(lambda key: jax.random.normal(key, (3,)), lambda w, x: x @ w, None, jnp.ones((4, 3)), None)
    states = start_states(small(), optax.adam, jnp.array([0.1, 0.2, 0.1]), SEEDS)
    for index, seed in enumerate(SEEDS):
        alone = jb.init_state(small(), optax.adam(0.1), seed)
        jax.tree.map(lambda mine, theirs, index=index: np.testing.assert_array_equal(mine[index], theirs), states, alone)
    assert len(texts) == 4 and len(set(texts)) == 1
