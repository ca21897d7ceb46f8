"""A run that has diverged says so and saves nothing bad, be it the loss or only the state that is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.training.divergence import make_is_finite

ROOT = lambda w, x: jnp.sqrt(jnp.abs(w)) * x  # 0 at w = 0, and its gradient there is infinite
TASK = jb.Task(lambda key: jnp.array(0.0), ROOT, lambda w, x: {"loss": ROOT(w, x)}, jnp.ones(8), jnp.ones(8))


@pytest.mark.parametrize("changes", [{}, {"num_groups": 2}, {"microbatch_size": 2}, {"optimizer": optax.adam(0.1)}])
def test_a_finite_loss_with_a_gradient_that_is_not(changes):
    config = jb.FitConfig(optax.sgd(0.1), 8, jb.epochs(3))._replace(**changes)
    (record,) = jb.fit(TASK, config)
    assert record["loss"] == 0.0 and not np.isfinite(record["state"].params)
    assert record["diverged"] and record["diverged_at_batch"] == 0


def test_the_batch_is_told_by_the_loss_that_follows():
    (record,) = jb.fit(TASK, jb.FitConfig(optax.sgd(0.1), 2, jb.epochs(1)))
    assert record["diverged"] and record["diverged_at_batch"] == 1  # the first loss at parameters that are lost


@pytest.mark.parametrize("runs", ["vmap", "threads", "map"])
def test_each_run_of_a_sweep_is_judged_by_itself(runs):
    task = TASK._replace(init=lambda key: jnp.array(1.0))
    rates = jnp.array([0.1, jnp.inf, 0.1])
    records = list(jb.sweep(task, optax.sgd, rates, [0, 1, 2], batch_size=8, duration=jb.epochs(2), runs=runs))
    assert [record["diverged_at_batch"].tolist() for record in records] == [[-1, 0, -1]] * 2
    assert np.isfinite(records[0]["loss"]).all()


def counting(optimizer, traced):
    """An optimizer that writes down whenever it is traced for a program."""

    def update(gradient, state, params=None):
        traced.append(1)
        return optimizer.update(gradient, state, params)

    return optax.GradientTransformation(optimizer.init, update)


SQUARE = lambda w, x: 0.5 * w**2 + x  # its gradient is finite although it is not
BAD = TASK._replace(init=lambda key: jnp.array(1.0), loss_fn=SQUARE, train_data=jnp.full(8, jnp.nan))


def test_a_run_is_asked_once_whether_its_optimizer_skips():
    traced = []
    skipping = counting(optax.apply_if_finite(optax.sgd(0.1), 100), traced)
    counts = [len(traced) for _ in jb.fit(BAD, jb.FitConfig(skipping, 8, jb.epochs(4)))]
    assert len(counts) == 4 and counts[1:] == counts[:1] * 3  # none of the later records compiles anything


@pytest.mark.parametrize("skips", [False, True])
def test_a_sweep_asks_once_for_each_setting_and_no_run_that_has_failed(skips):
    traced = []
    make = lambda rate: counting(optax.apply_if_finite(optax.sgd(rate), 100) if skips else optax.sgd(rate), traced)
    swept = {"batch_size": 8, "duration": jb.epochs(3), "runs": "threads"}
    counts = [(len(traced), record["diverged_at_batch"].tolist()) for record in jb.sweep(BAD, make, jnp.full(3, 0.1), [0, 1, 2], **swept)]
    assert [failed for _, failed in counts] == [[-1 if skips else 0] * 3] * 3
    assert len({traced for traced, _ in counts}) == 1


@pytest.mark.parametrize("keep", [1, 2])
def test_the_last_good_checkpoint_stays(tmp_path, keep):
    # Two good epochs on 1, then the parameters are driven to 0 exactly, where the gradient is infinite.
    rate = lambda count: jnp.where(count < 2, 0.0, 2.0)
    task = TASK._replace(init=lambda key: jnp.array(1.0))
    config = jb.FitConfig(optax.sgd(rate), 8, jb.epochs(9))
    records = list(jb.fit_with_checkpoints(task, config, tmp_path, keep=keep))
    assert [record["diverged"] for record in records] == [False, False, False, True]
    assert [record["loss"] for record in records] == [1.0, 1.0, 1.0, 0.0]
    kept = sorted(int(path.name.removeprefix("step_")) for path in tmp_path.iterdir() if path.is_dir())
    assert kept == [1, 2, 3][-keep:]
    (again,) = jb.fit_with_checkpoints(task, config, tmp_path, keep=keep)  # from the good one, and to the same end
    assert again["batches"] == 4 and again["diverged"]


def test_model_state_counts():
    task = TASK._replace(
        init=lambda key: (jnp.array(1.0), jnp.array(0.0)),
        loss_fn=lambda w, x: (0.5 * (x - w) ** 2, jnp.array(jnp.inf)),
        metrics_fn=lambda pair, x: {"loss": (x - pair[0]) ** 2},
        update_model_state=lambda old, new: new,
    )
    (record,) = jb.fit(task, jb.FitConfig(optax.sgd(0.1), 8, jb.epochs(3)))
    assert record["diverged"] and np.isfinite(record["loss"]) and np.isfinite(record["state"].params)


def test_optimizer_state_counts_unless_it_began_so():
    # A second moment that overflows before the parameters do.
    square = lambda w, x: 1e25 * w * x
    task = TASK._replace(init=lambda key: jnp.array(0.0), loss_fn=square, metrics_fn=lambda w, x: {"loss": 0 * w * x})
    (record,) = jb.fit(task, jb.FitConfig(optax.scale_by_adam(), 8))
    assert not np.isfinite(record["state"].opt_state.nu) and np.isfinite(record["state"].params)
    assert record["diverged"]
    # The best loss so far begins as infinite and stays so until it is first asked for.
    plateau = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(accumulation_size=100))
    smooth = TASK._replace(loss_fn=lambda w, x: 0.5 * (x - w) ** 2)
    records = list(jb.fit(smooth, jb.FitConfig(plateau, 8, jb.epochs(2))))
    assert [record["diverged"] for record in records] == [False, False]
    assert np.isinf(records[-1]["state"].opt_state[1].best_value)
    # Going on from there is no divergence either.
    (rest,) = jb.fit(smooth, jb.FitConfig(plateau, 8, jb.epochs(3)), state=records[-1]["state"])
    assert not rest["diverged"]


def test_what_is_not_floating_is_not_looked_at():
    start = {"key": jax.random.key(0), "count": jnp.array(3), "none": None, "empty": jnp.zeros(0), "w": jnp.zeros(2)}
    assert bool(make_is_finite(start)(start))
    assert not bool(make_is_finite(start)(start | {"w": jnp.array([1.0, -jnp.inf])}))
    assert bool(make_is_finite({"count": jnp.array(3)})({"count": jnp.array(4)}))
    several = make_is_finite({"w": jnp.zeros((3, 2))}, runs=True)
    assert several({"w": jnp.array([[0.0, 1], [jnp.nan, 1], [2, jnp.inf]])}).tolist() == [True, False, False]
