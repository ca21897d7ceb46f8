"""Studies with loops of their own judge a run as fit does: by its state, where the optimizer leaves out what is not finite."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbatch as jb
from experiments.gradient_smoothness import __main__ as gradient_smoothness
from experiments.harness import tuned_runs
from experiments.split_backward.training import Trainer

SKIPPING = "import optax\nmake = lambda rate: optax.apply_if_finite(optax.sgd(rate), 1000)\n"
X = jnp.ones(16).at[3].set(jnp.nan)  # so that one batch of four has no finite loss
LOSS = lambda w, x: 0.5 * (x - w) ** 2
TASK = jb.Task(lambda key: jnp.array(0.5), LOSS, lambda w, x: {"loss": LOSS(w, x)}, X, jnp.ones(4))


def split_backward(config):
    trainer = Trainer(TASK, config)
    state, losses, _ = trainer.train("split", 0.1, trainer.start(0), 0, trainer.segments[0])
    return trainer.judge(state, losses)


def smoothness(config):
    record = gradient_smoothness.measure_curve(TASK, config, 4, 0, gradient_smoothness.make_programs(TASK, config))
    return np.mean([loss for loss in record["loss"] if loss is not None]), record["diverged_at_iteration"] >= 0


def tuned(config):
    def gradient_on(data):
        def gradient(params, batch):
            of = lambda params: (LOSS(params, data[batch[0]]).mean(), LOSS(params, data[batch[0]]))
            (_, losses), gradient = jax.value_and_grad(of, has_aux=True)(params)
            return losses, gradient

        return gradient

    records = []
    run = SimpleNamespace(find=lambda **identity: [], append=records.append, records=records)
    train = tuned_runs.make_run(config, gradient_on, lambda seed, epochs, indices: indices, 4)
    start = lambda seed: (X, jnp.array(0.5), (jnp.arange(16).reshape(4, 4), jnp.zeros(4, int)))
    judge = lambda params, part: {"metric": float(params)}
    tuned_runs.measure_arm(config, run, {"arm": 1}, train, start, judge, lambda records: None, lambda seconds=None: None)
    (record,) = records
    assert ("metric" in record) != record["diverged"]
    return np.nan if record["loss"] is None else record["loss"], record["diverged"]


@pytest.mark.parametrize("study", [split_backward, smoothness, tuned])
@pytest.mark.parametrize("skips", [True, False])
def test_a_study_goes_on_where_its_optimizer_leaves_a_batch_out(study, skips, tmp_path):
    (tmp_path / "skipping.py").write_text(SKIPPING)
    config = SimpleNamespace(
        optimizer=f"{tmp_path / 'skipping.py'}:make" if skips else "sgd",
        momentum=None,
        weight_decay=None,
        clip_norm=None,
        batch_size=4,
        num_groups=2,
        epochs=1,
        evaluations_per_epoch=1,
        iterations=4,
        task="a task",
        learning_rate=0.1,
        learning_rates=(0.1,),
        choosing_seeds=1,
        seeds=0,
    )
    loss, diverged = study(config)
    assert diverged == (not skips)
    assert not skips or study is tuned or 0 < loss < 0.2  # of the tuned run the loss of the last update, which may have none
