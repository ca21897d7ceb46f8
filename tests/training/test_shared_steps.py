"""Arrays that a step closes over are arguments of its program, so runs that differ in them share it."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from tests.conftest import ROOT


def _texts_of_fits(monkeypatch, configs, loss_fn):
    """The texts of the programs of steps that the runs compile."""
    texts, compile = [], jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self, *args: texts.append(self.as_text()) or compile(self, *args))
    task = jb.Task(lambda key: jax.random.normal(key, (5,)), loss_fn, None, np.ones((24, 5), np.float32), None)
    for config in configs:
        assert all(np.isfinite(record["loss"]) for record in jb.fit(task, config))
    return [text for text in texts if "result[0].params" in text]


@pytest.mark.parametrize("shape", [None, jb.cosine(2)], ids=["steps", "cosine"])
def test_schedules_that_differ_in_numbers_share_a_program(shape, monkeypatch):
    def config(rate, decay):
        schedule = jb.constant_schedule(6, every=1)
        rate = jb.coupled_learning_rate(schedule, init=rate, decay=decay, num_examples=24, num_epochs=2, shape=shape)
        return jb.FitConfig(optax.sgd(rate), schedule, jb.epochs(2))

    configs = [config(0.0011, 0.5), config(0.0012, 0.7), config(0.0013, 0.9)]
    assert len(_texts_of_fits(monkeypatch, configs, lambda w, x: (x @ w) ** 2)) == 1


def test_what_a_loss_closes_over_is_no_constant_of_a_step(monkeypatch):
    sizes = []
    for count in (5, 50_000):
        table = jnp.ones((count, 5))
        configs = [jb.FitConfig(optax.sgd(0.01), 6, jb.epochs(1))]
        texts = _texts_of_fits(monkeypatch, configs, lambda w, x, table=table: (x @ w + (table @ w)[0]) ** 2)
        sizes.append(len(texts[-1]))
    assert sizes[1] - sizes[0] < 100


def run_epoch(loss_fn, state=None, between=lambda: None):
    """The losses of two steps of :func:`jaxbatch.compile_epoch`, made after ``between``."""
    step = jb.make_train_step(loss_fn, optax.sgd(0.1), 12)
    state = jb.init_state(of(loss_fn), optax.sgd(0.1), 0) if state is None else state
    run = jb.compile_epoch(step, state, DATA, 2, 12)
    between()
    return run(state, DATA, np.arange(24).reshape(2, 12))


DATA = np.ones((24, 5), np.float32)
of = lambda loss_fn: jb.Task(lambda key: jnp.zeros(5), loss_fn, None, DATA, None)


def test_a_table_that_is_changed_later_changes_no_program():
    def losses(change):
        table = np.ones(5, np.float32)
        return run_epoch(lambda w, x: ((w - table) ** 2).sum() * x[:, 0], between=lambda: change and table.fill(9))[1].tolist()

    assert losses(True) == losses(False)


def test_parameters_that_a_loss_pulls_towards_may_be_those_that_training_starts_with():
    def losses(towards, start):
        loss_fn = lambda w, x: ((w - towards) ** 2).sum() + (x @ w) ** 2
        return run_epoch(loss_fn, jb.init_state(of(loss_fn), optax.sgd(0.01), 0)._replace(params=start))[1].tolist()

    start = jnp.arange(5.0)
    assert losses(start, start) == losses(jnp.arange(5.0), jnp.arange(5.0))  # the memory of the state is reused, that of the table is not


ELSEWHERE = """
import jax, jax.numpy as jnp, numpy as np, optax
import jaxbatch as jb

here, there = jax.devices()[:2]
tables = jax.device_put(jnp.ones(5), there), jax.device_put(jnp.ones(5), here)
task = jb.Task(lambda key: jnp.zeros(5), lambda w, x: ((w - tables[0] - tables[1]) ** 2).sum() * x[:, 0], None, np.ones((24, 5), np.float32), None)
*_, record = jb.fit(task, jb.FitConfig(optax.sgd(0.1), 6, jb.epochs(1)))
print(*(device.id for device in record["state"].params.devices()), float(record["loss"]) > 0)
"""


def test_training_stays_on_its_device_wherever_a_table_is():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["0", "True"], done.stderr
