"""What runs of one task share: each program is traced once for all of them."""

import collections

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.training import run_programs
from jaxbatch.training.run_programs import Once, RunPrograms

FLAT = jb.fit_throughput({size: [1e-3 + 1e-5 * size] * 3 for size in (2, 32)})
DATA = jnp.asarray(np.random.default_rng(0).standard_normal((64, 3)), jnp.float32)


def counting_task(counts):
    """Its functions count how often they are traced."""

    def loss_fn(w, x):
        counts["loss"] += 1
        return 0.5 * ((x - w[None]) ** 2).sum(-1)

    def metrics_fn(w, x):
        counts["metrics"] += 1
        return {"distance": jnp.full(len(x), (w**2).sum())}

    def init(key):
        counts["init"] += 1
        return jnp.full(3, 3.0)

    return jb.Task(init, loss_fn, metrics_fn, DATA, DATA[:4])


def test_advice_traces_a_program_once_for_all_its_runs():
    """Not once a run and more."""
    counts, rates = collections.Counter(), (0.01, 0.0316, 0.1, 0.316, 1.0)
    limits = {"longest": jb.epochs(20), "evaluations_per_epoch": 4, "max_probes": 8, "throughput": FLAT, "on_progress": None}
    advice = jb.advise(counting_task(counts), "distance<0.1", optimizer=optax.sgd, batch_sizes=(8,), learning_rates=rates, **limits)
    assert len(advice.probes) == 8
    assert counts["loss"] <= 18 and counts["metrics"] <= 6 and counts["init"] <= 9


def test_an_error_is_not_remembered():
    once = Once()
    with pytest.raises(ZeroDivisionError):
        once("a", lambda: 1 / 0)
    assert once("a", lambda: 3) == once("a", lambda: 4) == 3


def test_programs_that_take_any_number_of_batches_are_made_once(monkeypatch):
    made = []

    def compile_task_epoch(task, optimizer, state, num_steps, batch_size, **settings):
        made.append((num_steps, batch_size))
        run = lambda *given: given
        run.any_length = batch_size == 4
        return run

    monkeypatch.setattr(run_programs, "compile_task_epoch", compile_task_epoch)
    programs = RunPrograms(counting_task(collections.Counter()), optax.sgd(0.1))
    state = programs.begin(0, None)
    for size in (4, 8):
        for length in (2, 3, 2):
            programs.epoch(state, length, size)
    assert made == [(2, 4), (2, 8), (3, 8)]


def test_states_of_another_form_are_refused_though_one_was_taken():
    programs = RunPrograms(counting_task(collections.Counter()), optax.sgd(0.1))
    state = programs.begin(0, None)
    programs.begin(0, state)
    with pytest.raises(ValueError, match="state.params is not of this task"):
        programs.begin(0, state._replace(params=jnp.zeros(4)))
