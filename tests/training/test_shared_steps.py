"""Arrays that a step closes over are arguments of its program, so runs that differ in them share it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb


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
