"""Schedules in a function of the rate: traced where they can be, compiled for each rate where they cannot, and the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.advice.probes import ProbePrograms, Prober, make_adjustable
from jaxbatch.advice.timed_updates import time_updates
from jaxbatch.training.train_state import start_shapes
from tests.conftest import shapes_unchecked

RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.normal(size=(32, 3)), jnp.float32)
Y = X @ jnp.array([1.0, -2.0, 0.5])
LOSS = lambda w, batch: 0.5 * (batch[0] @ w - batch[1]) ** 2
TASK = jb.Task(lambda key: jnp.zeros(3), LOSS, lambda w, batch: {"loss": LOSS(w, batch)}, (X, Y), (X[:8], Y[:8]))
SCHEDULE = jb.adabatch_schedule(batch_size=8, growth=2, every=1, max_batch_size=16)
COUPLED = functools.partial(jb.coupled_learning_rate, num_examples=32, num_epochs=2)

SCHEDULES = {
    "constant": optax.constant_schedule,
    "cosine": lambda rate: optax.cosine_decay_schedule(rate, 8),
    "onecycle": lambda rate: optax.cosine_onecycle_schedule(8, rate),
    "linear onecycle": lambda rate: optax.linear_onecycle_schedule(8, rate),
    "exponential": lambda rate: optax.exponential_decay(rate, 2, 0.9),
    "warmup constant": lambda rate: optax.warmup_constant_schedule(0.0, rate, 3),
    "warmup cosine": lambda rate: optax.warmup_cosine_decay_schedule(0.0, rate, 2, 8),
    "warmup exponential": lambda rate: optax.warmup_exponential_decay_schedule(0.0, rate, 2, 2, 0.9),
    "linear": lambda rate: optax.linear_schedule(rate, 0.0, 8),
    "polynomial": lambda rate: optax.polynomial_schedule(rate, 0.0, 2, 8),
    "piecewise": lambda rate: optax.piecewise_constant_schedule(rate, {3: 0.5}),
    "piecewise interpolated": lambda rate: optax.piecewise_interpolate_schedule("linear", rate, {3: 0.5, 6: 0.1}),
    "sgdr": lambda rate: optax.sgdr_schedule([{"init_value": 0.0, "peak_value": rate, "warmup_steps": 2, "decay_steps": 8}]),
    "joined": lambda rate: optax.join_schedules([optax.linear_schedule(0.0, rate, 2), optax.constant_schedule(rate)], [2]),
    "coupled": lambda rate: COUPLED(SCHEDULE, init=rate, decay=0.75),
    "coupled decay": lambda rate: COUPLED(SCHEDULE, init=0.1, decay=rate),
    "coupled cosine": lambda rate: COUPLED(8, init=rate, shape=jb.cosine(2), warmup=jb.steps(2)),
    "cosine to": lambda rate: COUPLED(8, init=0.1, shape=jb.cosine(2, end=rate)),
    "cyclic": lambda rate: COUPLED(8, init=0.1, shape=jb.cyclic(1, low=rate)),
    "step decay": lambda rate: COUPLED(8, init=0.1, shape=jb.step_decay(rate, 1)),
    "scaled": lambda rate: jb.scale_learning_rate("sqrt", rate, 32, 8),
    "an if": lambda rate: rate if rate > 0.05 else 2 * rate,
    "a number": lambda rate: float(rate),
}
OPTIMIZERS = {name: (lambda rate, schedule=schedule: optax.sgd(schedule(rate))) for name, schedule in SCHEDULES.items()}
OPTIMIZERS |= {
    "rate in the state": lambda rate: optax.inject_hyperparams(optax.sgd)(learning_rate=rate),
    "clipped adam": lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
    "stable": lambda rate: optax.sgd(rate / jb.largest_stable_curvature(rate, 0.5)),
}
RATES = (0.03, 0.1)


@functools.cache
def run_of_fit(name, rate):
    *_, last = jb.fit(TASK, jb.FitConfig(OPTIMIZERS[name](rate), 8, jb.epochs(2)))
    return last["updates"], last["test_loss"]


def every_schedule_of_optax():
    return {name for name in dir(optax.schedules) if name.endswith(("schedule", "decay")) and not name.startswith("_")}


def test_no_schedule_of_optax_is_left_out():
    used = {name for schedule in SCHEDULES.values() for name in (schedule.__name__, *schedule.__code__.co_names)}
    assert len(every_schedule_of_optax()) >= 12 and every_schedule_of_optax() <= used


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_sweep_makes_the_runs_of_fit(name):
    *_, last = jb.sweep(TASK, OPTIMIZERS[name], jnp.array(RATES), [0, 0], batch_size=8, duration=jb.epochs(2))
    np.testing.assert_allclose(last["test_loss"], [run_of_fit(name, rate)[1] for rate in RATES], rtol=2e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_probe_is_a_run_of_fit(name):
    make, params = OPTIMIZERS[name], start_shapes(TASK)
    programs = ProbePrograms(TASK, make_adjustable(make, 0.1, params), 0.1)
    prober = Prober(programs, jb.as_goal("loss<-1"), jb.epochs(2), 1)
    for rate in RATES:
        *_, last = prober.run(8, rate, 0)
        assert last.updates == run_of_fit(name, rate)[0]
        np.testing.assert_allclose(last.value, run_of_fit(name, rate)[1], rtol=2e-5)


@pytest.mark.parametrize("name", ["warmup cosine", "coupled"])
def test_rates_are_tuned_and_branches_made(name):
    goal = {"batch_size": 8, "seeds": [0], "duration": jb.epochs(2), "goal": "loss<-1", "evaluations_per_epoch": 1}
    *_, last = jb.tune_learning_rate(TASK, OPTIMIZERS[name], RATES, **goal)
    np.testing.assert_allclose(last["result"].metric[:, 0], [run_of_fit(name, rate)[1] for rate in RATES], rtol=2e-5)
    state = jb.init_state(TASK, OPTIMIZERS[name](0.1), 0)
    branches = jb.branch(TASK, OPTIMIZERS[name], state, learning_rate=0.1, batch_size=4, examples=32, factors=(1, 2), seeds=(0,))
    assert np.isfinite(branches.metrics[8])


def test_seeds_share_the_program_of_a_rate_that_is_not_traced():
    made = []

    def make(rate):
        made.append(rate)
        return OPTIMIZERS["an if"](rate)

    settings, seeds = jnp.repeat(jnp.array(RATES), 3), [0, 1, 2] * 2
    (record,) = jb.sweep(TASK, make, settings, seeds, batch_size=8, duration=jb.epochs(1))
    assert record["test_loss"].shape == (6,) and sum(isinstance(rate, float) for rate in made) == 2 + len(seeds)  # programs, and states


def test_advice_with_a_schedule_that_is_not_traced():
    settings = {"batch_sizes": (4, 8, 16), "learning_rates": (0.03, 0.1, 0.3), "longest": jb.epochs(8), "max_probes": 3, "on_progress": None}
    throughput = jb.fit_throughput({size: [1e-3 + 1e-5 * size] * 3 for size in (4, 16)})
    advice = jb.advise(TASK, "loss<1", optimizer=OPTIMIZERS["warmup cosine"], throughput=throughput, measure_noise=False, **settings)
    assert len(advice.probes) <= 3 and any(probe.reached for probe in advice.probes)


NO_FUNCTIONS = {
    "is an optimizer whose learning rate is settled": optax.adam(1e-3),
    "is no function that makes an optimizer": 0.1,
    "makes ArrayImpl|makes float|makes function": lambda rate: rate,
    "cannot be called with a learning rate alone": lambda: optax.adam(1e-3),
}
USES = {
    "optimizer": lambda make: jb.advise(TASK, "loss<0.1", optimizer=make, on_progress=None),
    "make_optimizer": lambda make: next(jb.sweep(TASK, make, jnp.array(RATES), [0, 0], batch_size=8, duration=jb.epochs(1))),
    "make_optimizer ": lambda make: next(jb.tune_learning_rate(TASK, make, RATES, batch_size=8, seeds=[0], duration=jb.epochs(1), goal="loss<0.1")),
    "make_optimizer  ": lambda make: jb.branch(
        TASK, make, jb.init_state(TASK, optax.sgd(0.1), 0), learning_rate=0.1, batch_size=4, examples=32, factors=(1, 2), seeds=(0,)
    ),
}


@pytest.mark.parametrize("message", NO_FUNCTIONS)
@pytest.mark.parametrize("name", USES)
def test_what_makes_no_optimizer_is_one_line(name, message):
    with shapes_unchecked(), pytest.raises(ValueError, match=f"^{name.strip()}.*({message})") as raised:
        USES[name](NO_FUNCTIONS[message])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jb.scale_learning_rate("linear", x, 8, 16),
        lambda x: jb.cosine(x)(0.5),
        lambda x: jb.cyclic(x)(0.5),
        lambda x: jb.step_decay(0.5, x)(0.5),
        lambda x: jb.largest_stable_curvature(x, 0.9, 4),
        lambda x: jb.coupled_learning_rate(8, init=0.1, warmup=jb.steps(2), warmup_init=x, num_examples=32, num_epochs=2)(1),
        lambda x: jb.clipped_gradient_sum(LOSS, jnp.ones(3), (X, Y), x),
        lambda x: jb.info_nce(X, X, temperature=x),
        lambda x: jb.additive_margin(x)(jnp.ones(2)),
        lambda x: jb.angular_margin(x)(jnp.ones(2)),
    ],
)
def test_numbers_that_are_checked_may_be_traced(function):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), jax.jit(function)(0.3), function(0.3))


def test_advice_times_an_optimizer_that_keeps_the_parameters_with_a_schedule_that_is_not_traced():
    keeps = lambda rate: optax.contrib.prodigy(optax.warmup_cosine_decay_schedule(0.0, rate, 2, 400))
    programs = ProbePrograms(TASK, make_adjustable(keeps, 0.1, start_shapes(TASK)), 0.1)
    start = lambda: programs.start(0.1, seed=0)
    times = time_updates(programs.at(0.1), start, [4, 8], rounds=2, seconds_per_timing=1e-4)
    assert times.seconds[8].low > 0
