"""Optimizers of a rate and the length of the run: told from those of a rate, one program where tracing allows, and the same runs everywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.advice.full_sweep import sweep_size
from jaxbatch.advice.probes import ProbePrograms, Prober, make_adjustable
from jaxbatch.gradients.run_lengths import takes_num_steps
from jaxbatch.training.train_state import start_shapes
from tests.conftest import shapes_unchecked

RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.normal(size=(32, 3)), jnp.float32)
Y = X @ jnp.array([1.0, -2.0, 0.5])
LOSS = lambda w, batch: 0.5 * (batch[0] @ w - batch[1]) ** 2
TRACES = []


def counted(w, batch):
    TRACES.append(jnp.shape(batch[1]))
    return LOSS(w, batch)


TASK = jb.Task(lambda key: jnp.zeros(3), LOSS, lambda w, batch: {"loss": LOSS(w, batch)}, (X, Y), (X[:8], Y[:8]))
MAKERS = {
    "cosine": jb.scheduled(optax.sgd, "cosine", warmup=0.2),
    "wsd of adamw": jb.scheduled(optax.adamw, "wsd"),
    "optax's cosine": lambda rate, length: optax.sgd(optax.cosine_decay_schedule(rate, length)),
    "optax's warmup": lambda rate, num_steps: optax.sgd(optax.warmup_cosine_decay_schedule(0.0, rate, num_steps // 4, num_steps)),
    "optax's steps": lambda rate, *, num_steps: optax.sgd(optax.piecewise_constant_schedule(rate, {num_steps // 2: 0.1})),
    "a length in the state": lambda rate, num_steps: optax.inject_hyperparams(optax.sgd)(learning_rate=rate / num_steps),
}
TRACED = {"cosine", "wsd of adamw"}
ends = jb.as_goal("loss<-1")


@functools.cache
def end_of_fit(name, rate, batch_size, num_epochs):
    make, steps = MAKERS[name], num_epochs * (32 // batch_size)
    optimizer = make(rate, num_steps=steps) if name == "optax's steps" else make(rate, steps)
    *_, last = jb.fit(TASK, jb.FitConfig(optimizer, batch_size, jb.epochs(num_epochs)))
    return last["test_loss"]


def test_which_functions_take_a_length():
    class Maker:
        def __call__(self, rate, num_steps):
            return optax.sgd(rate)

    both = [lambda rate, length: 0, lambda num_steps, rate: 0, lambda rate, num_steps=1000: 0, Maker(), jb.scheduled(optax.sgd, "linear")]
    both += [functools.partial(lambda rate, num_steps, decay: 0, decay=1.0), lambda rate, *, num_steps: 0]
    rate_alone = [optax.sgd, optax.adamw, optax.lion, optax.lars, optax.contrib.muon, lambda rate: 0, lambda rate, decay=0.1: 0, 0.1, None]
    rate_alone += [functools.partial(lambda rate, num_steps: 0, num_steps=9), lambda rate, a, b: 0, optax.sgd(0.1)]
    assert all(map(takes_num_steps, both)) and not any(map(takes_num_steps, rate_alone))


@pytest.mark.parametrize("name", MAKERS)
def test_a_probe_is_a_run_of_fit_over_its_length(name):
    make = MAKERS[name]
    programs = ProbePrograms(TASK, make_adjustable(make, 0.1, start_shapes(TASK), 4), 0.1, 4)
    assert (programs.at(0.1, 4) is programs.at(0.05, 8)) is (name in TRACED)
    for rate, batch_size in ((0.1, 8), (0.05, 16)):
        *_, last = Prober(programs, ends, jb.epochs(2), 1, False).run(batch_size, rate, 0)
        np.testing.assert_allclose(last.value, end_of_fit(name, rate, batch_size, 2), rtol=2e-5)


@pytest.mark.parametrize("name", ["cosine", "optax's cosine", "optax's steps"])
def test_tuned_rates_are_runs_of_fit_over_their_length(name):
    limits = {"batch_size": 8, "seeds": [0], "duration": jb.epochs(2), "evaluations_per_epoch": 1}
    *_, last = jb.tune_learning_rate(TASK, MAKERS[name], [0.1], goal="loss<-1", **limits)
    np.testing.assert_allclose(last["result"].metric[:, 0], [end_of_fit(name, 0.1, 8, 2)], rtol=2e-5)


def test_one_program_serves_all_rates_and_lengths():
    task, make = TASK._replace(loss_fn=counted), MAKERS["cosine"]
    programs = ProbePrograms(task, make_adjustable(make, 0.1, start_shapes(task), 4), 0.1, 4)
    *_, last = Prober(programs, ends, jb.epochs(2), 1, False).run(8, 0.1, 0)
    before = len(TRACES)
    for rate, num_epochs in ((0.1, 4), (0.05, 3)):
        *_, last = Prober(programs, ends, jb.epochs(num_epochs), 1, False).run(8, rate, 0)
        np.testing.assert_allclose(last.value, end_of_fit("cosine", rate, 8, num_epochs), rtol=2e-5)
    assert len(TRACES) == before > 0
    assert programs.start(0.1, 0).opt_state.num_steps == 4 and programs.start(0.1, 0, 9).opt_state.num_steps == 9


def test_a_rate_alone_is_as_it_was():
    programs = ProbePrograms(TASK, make_adjustable(optax.adam, 0.1, start_shapes(TASK)), 0.1)
    state = programs.start(0.2, 3, 50).opt_state
    assert state.num_steps is None and len(jax.tree.leaves(state)) == 1 + len(jax.tree.leaves(optax.adam(0.1).init(jnp.zeros(3))))
    schedule = lambda rate: optax.sgd(optax.warmup_cosine_decay_schedule(0.0, rate, 2, 8))
    programs = ProbePrograms(TASK, make_adjustable(schedule, 0.1, start_shapes(TASK)), 0.1)
    assert programs.at(0.1, 5) is programs.at(0.1, 9) is not programs.at(0.2, 9)


def test_a_full_sweep_stretches_the_schedule_to_its_longest_run():
    settings = {"learning_rates": [0.1], "seeds": [0], "longest": jb.epochs(3), "evaluations_per_epoch": 1}
    (row,) = sweep_size(TASK, MAKERS["cosine"], jb.as_goal(f"loss<{end_of_fit('cosine', 0.1, 8, 3) + 1e-6}"), 8, **settings)
    assert row["updates"] == 12


@pytest.mark.parametrize("name", ["cosine", "optax's warmup"])
def test_advice_with_a_length(name):
    settings = {"batch_sizes": (8, 16), "learning_rates": (0.03, 0.1, 0.3), "longest": jb.epochs(8), "max_probes": 3, "on_progress": None}
    throughput = jb.fit_throughput({size: [1e-3 + 1e-5 * size] * 3 for size in (8, 16)})
    advice = jb.advise(TASK, "loss<1", optimizer=MAKERS[name], throughput=throughput, measure_noise=False, evaluations_per_epoch=2, **settings)
    assert any(probe.reached for probe in advice.probes) and advice.run_length == 256 // advice.batch_size
    code, names = advice.snippet("make"), {"jb": jb, "make": MAKERS[name]}
    exec(code, names)
    assert f"make({advice.learning_rate:.3g}, {advice.run_length})" in code and names["config"].batch_size == advice.batch_size


WRONG = {
    "three arguments": (lambda rate, length, decay: optax.sgd(rate), "cannot be called with a learning rate alone"),
    "three with num_steps": (lambda rate, num_steps, decay: optax.sgd(rate), "cannot be called with a learning rate and num_steps alone"),
    "no optimizer": (lambda rate, num_steps: rate, "makes .*, which is no optimizer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_makes_no_optimizer_is_one_line(name):
    make, message = WRONG[name]
    limits = {"batch_size": 8, "seeds": [0], "duration": jb.epochs(2)}
    with shapes_unchecked(), pytest.raises(ValueError, match=f"^optimizer {message}") as raised:
        jb.advise(TASK, "loss<0.1", optimizer=make, on_progress=None)
    assert "\n" not in str(raised.value)
    with shapes_unchecked(), pytest.raises(ValueError, match=f"^make_optimizer {message}") as raised:
        next(jb.tune_learning_rate(TASK, make, [0.1], goal="loss<0.1", **limits))
    assert "\n" not in str(raised.value)
