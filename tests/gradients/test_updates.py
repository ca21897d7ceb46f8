"""Any optax optimizer: those that want the loss get it on every path, line searches are refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.gradients.cut import Cut
from jaxbatch.training.devices import AXIS
from jaxbatch.training.epochs import compile_task_epoch
from jaxbatch.training.loops import compile_epoch_in_pieces
from jaxbatch.training.steps import make_task_step

LOSS = lambda w, x: 0.5 * (x - w) ** 2
X = jnp.arange(16.0)
TASK = jb.Task(lambda key: jnp.array(1.0), LOSS, lambda w, x: {"loss": LOSS(w, x)}, X, X)


def record_value():
    """An optimizer whose state is the sum of the losses it was given."""

    def update(updates, state, params=None, *, value, **_):
        return updates, state + value

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update)


OPTIMIZER = optax.chain(optax.sgd(0.0), record_value())
SEEN = [float(LOSS(1.0, np.asarray(X)[np.asarray(jb.epoch_order(0, 0, 16))]).reshape(4, 4)[k].mean()) for k in range(4)]


@pytest.mark.parametrize("changes", [{}, {"microbatch_size": 3}, {"num_groups": 2}, {"num_groups": 4, "microbatch_size": 1}])
def test_the_value_is_the_mean_loss(changes):
    (record,) = jb.fit(TASK, jb.FitConfig(OPTIMIZER, 4)._replace(**changes))
    assert float(record["state"].opt_state[1]) == pytest.approx(sum(SEEN) * changes.get("num_groups", 1), rel=1e-6)


@pytest.mark.parametrize("method", ["map", "vmap", "unroll"])
def test_each_update_of_a_split_gets_its_group_s_mean(method):
    weigh = optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros(()), lambda g, s, p=None, *, value, **_: (jax.tree.map(jnp.zeros_like, g), 10 * s + value)
    )
    step = jb.split_backward(lambda w, x: x + 0 * w, weigh, 4, method=method)
    _, opt_state, _ = step(jnp.array(1.0), weigh.init(None), jnp.array([1.0, 1, 2, 2, 3, 3, 4, 4]))
    assert float(opt_state) == 1234.0


@pytest.mark.parametrize("runs", ["vmap", "threads", "map"])
def test_sweeps_pass_it_on(runs):
    make = lambda rate: optax.chain(optax.sgd(rate), record_value())
    (record,) = jb.sweep(TASK, make, jnp.zeros(2), [0, 0], batch_size=4, duration=jb.epochs(1), runs=runs)
    np.testing.assert_allclose(record["state"].opt_state[1], [sum(SEEN)] * 2, rtol=1e-6)


def test_accumulation_and_devices_pass_it_on():
    start = jb.init_state(TASK, OPTIMIZER, 0)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), start)
    indices = np.asarray(jb.epoch_order(0, 0, 16)).reshape(4, 4)
    run = compile_epoch_in_pieces(TASK, OPTIMIZER, shapes, Cut(4, microbatch_size=3))
    assert float(run(start, X, indices)[0].opt_state[1]) == pytest.approx(sum(SEEN), rel=1e-6)
    # Along an axis of one device; tests/training/test_parallel.py has several.
    step = make_task_step(TASK, OPTIMIZER, 4, axis=AXIS)
    state = jb.init_state(TASK, OPTIMIZER, 0)
    for index in indices:
        along = jax.vmap(lambda batch, state=state: step(state, batch), axis_name=AXIS, out_axes=None)
        state, _ = along(X[index][None])
    assert float(state.opt_state[1]) == pytest.approx(sum(SEEN), rel=1e-6)


def test_reduce_on_plateau_reduces():
    plateau = optax.chain(optax.sgd(1e-3), optax.contrib.reduce_on_plateau(factor=0.5, patience=2, rtol=0.5))
    *_, last = jb.fit(TASK, jb.FitConfig(plateau, 16, jb.epochs(12)))
    assert float(last["state"].opt_state[1].scale) < 0.2


def test_polyak_steps_need_the_loss():
    *_, last = jb.fit(TASK, jb.FitConfig(optax.polyak_sgd(f_min=float(X.var() / 2)), 16, jb.epochs(30)))
    assert last["test_loss"] == pytest.approx(float(X.var() / 2), rel=1e-3)


@pytest.mark.parametrize("optimizer", [optax.lbfgs(), optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5))])
@pytest.mark.parametrize("changes", [{}, {"num_groups": 2}, {"microbatch_size": 2}])
def test_line_searches_are_refused_before_anything_runs(optimizer, changes):
    def never(key):
        assert isinstance(key, jax.core.Tracer), "it ran"
        return jnp.array(1.0)

    with pytest.raises(ValueError, match="optimizer: its update needs more .*value_fn.* line search"):
        next(jb.fit(TASK._replace(init=never), jb.FitConfig(optimizer, 4)._replace(**changes)))


def test_line_searches_are_refused_by_sweeps_and_steps_too():
    make = lambda rate: optax.chain(optax.sgd(rate), optax.scale_by_backtracking_linesearch(5))
    with pytest.raises(ValueError, match="line search"):
        next(jb.sweep(TASK, make, jnp.ones(1), [0], batch_size=4, duration=jb.epochs(1)))
    start = jnp.array(1.0)
    with pytest.raises(ValueError, match="line search"):
        jb.split_backward(LOSS, optax.lbfgs(), 2)(start, optax.lbfgs().init(start), X)
    with pytest.raises(ValueError, match="line search"):
        jb.make_train_step(LOSS, optax.lbfgs(), 16)(jb.TrainState(start, optax.lbfgs().init(start), jnp.array(0)), X)


def test_an_error_of_the_optimizer_s_own_is_not_renamed():
    def update(updates, state, params=None):
        raise TypeError("something else")

    broken = optax.GradientTransformation(lambda params: (), update)
    with pytest.raises(TypeError, match="something else"):
        next(jb.fit(TASK, jb.FitConfig(broken, 4)))


# Optimizers that train at other parameters than they end with


def test_metrics_are_taken_at_the_evaluation_parameters():
    optimizer = optax.contrib.schedule_free_sgd(0.3)
    config = jb.FitConfig(optimizer, 4, jb.epochs(2))
    *_, plain = jb.fit(TASK, config)
    *_, last = jb.fit(TASK, config._replace(eval_params=optax.contrib.schedule_free_eval_params))
    state = last["state"]
    expected = optax.contrib.schedule_free_eval_params(state.opt_state, state.params)
    assert float(expected) != float(state.params)
    assert last["test_loss"] == pytest.approx(float(LOSS(expected, X).mean()), rel=1e-6)
    assert plain["test_loss"] == pytest.approx(float(LOSS(state.params, X).mean()), rel=1e-6)


@pytest.mark.parametrize("runs", ["vmap", "threads", "map"])
def test_sweeps_take_them_there_too(runs):
    settings = {"batch_size": 4, "duration": jb.epochs(2), "eval_params": optax.contrib.schedule_free_eval_params, "runs": runs}
    *_, last = jb.sweep(TASK, optax.contrib.schedule_free_sgd, jnp.array([0.3, 0.1]), [0, 1], **settings)
    config = jb.FitConfig(optax.contrib.schedule_free_sgd(0.3), 4, jb.epochs(2), eval_params=settings["eval_params"])
    *_, alone = jb.fit(TASK, config)
    assert last["test_loss"][0] == pytest.approx(alone["test_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jb.make_train_step(LOSS, OPTIMIZER, 4, num_groups=0), "num_groups=0 must be a whole number of at least 1"),
        (lambda: jb.split_backward(LOSS, optax.sgd(0.1), 1, method="all")(jnp.array(0.0), optax.sgd(0.1).init(0.0), X), "method='all' must be"),
        (lambda: compile_task_epoch(TASK, OPTIMIZER, jb.init_state(TASK, OPTIMIZER, 0), 1, 4, devices=[]), "devices is empty"),
        (
            lambda: compile_task_epoch(TASK, OPTIMIZER, jb.init_state(TASK, OPTIMIZER, 0), 1, 4, devices=[], monitor=jb.NoiseMonitor()),
            "devices is empty",
        ),
        (lambda: compile_task_epoch(TASK, OPTIMIZER, jb.init_state(TASK, OPTIMIZER, 0), 1, 4, parallel="mpi"), "parallel='mpi' must be"),
        (lambda: compile_task_epoch(TASK, OPTIMIZER, jb.init_state(TASK, OPTIMIZER, 0), 1, 4, num_groups=3), "num_groups=3 does not divide"),
    ],
)
def test_what_makes_no_step_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
