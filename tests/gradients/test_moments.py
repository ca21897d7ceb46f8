"""Running moments in training and evaluation; programs that runs with other seeds find again."""

import jax
import numpy as np
import optax
import pytest

import jaxbatch as jb
from tests.gradients.test_gradients import assert_close
from tests.training.test_train import task  # noqa: F401 (fixtures among them)


def batch_norm_task():
    """A little network with batch normalisation on random images."""
    from flax import linen as nn

    from jaxbatch.layers import ConvBatchNorm

    class Network(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            x = nn.relu(ConvBatchNorm(4, 3, padding=1, use_bias=True)(images, train=train))
            return nn.Dense(3)(x.mean((1, 2)))

    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (24, 6, 6, 2), dtype=np.uint8), random.integers(0, 3, 24).astype(np.int32)
    dataset = jb.Dataset("random", images, labels, images[:9], labels[:9], 3, (0.5, 0.5), (0.25, 0.25))
    return jb.classification_task(Network(), dataset)


@pytest.mark.parametrize("num_groups", [None, 2])
def test_running_moments_follow_pytorch_s_rule(num_groups):
    task = batch_norm_task()
    config = jb.FitConfig(optax.sgd(0.0), 8, jb.epochs(1), num_groups=num_groups, seed=1)  # the parameters stay
    (record,) = jb.fit(task, config)
    start = jb.init_state(task, config.optimizer, 1)
    expected = start.model_state
    for index in jb.epoch_batches(1, 0, 24, 8).indices.reshape(-1, 8 // (num_groups or 1)):
        _, found = task.loss_fn(start.params, jax.tree.map(lambda leaf: leaf[index], task.train_data))
        expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, expected, found)
    assert_close(record["state"].model_state, expected, rtol=1e-5, atol=1e-6)
    assert record["updates"] == 3 * (num_groups or 1)


def test_evaluation_uses_the_running_moments():
    task = batch_norm_task()
    *_, last = jb.fit(task, jb.FitConfig(optax.sgd(0.1, 0.9), 8, jb.epochs(60)))
    state = last["state"]
    one_by_one = [task.metrics_fn((state.params, state.model_state), jax.tree.map(lambda leaf: leaf[i : i + 1], task.test_data)) for i in range(9)]
    np.testing.assert_allclose(last["test_loss"], np.mean([float(m["loss"][0]) for m in one_by_one]), rtol=1e-5)
    assert last["test_loss"] < 0.7 * np.log(3)  # it has learned its own training images


def test_gradients_of_single_examples_are_refused_through_batch_statistics():
    task = batch_norm_task()
    with pytest.raises(ValueError, match="has_aux"):
        jb.per_example_gradients(task.loss_fn, jb.init_state(task, optax.sgd(0.1), 0).params, task.train_data)


def test_runs_with_other_seeds_find_their_programs_again(task, monkeypatch):
    compiled = []
    compile = jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self, *args: compiled.append(self) or compile(self, *args))
    losses = []
    for seed in range(3):
        config = jb.FitConfig(optax.sgd(0.0123), 3, jb.epochs(2), seed=seed)  # a rate that no other test has
        losses.append([record["loss"] for record in jb.fit(task, config)])
        assert len(compiled) == 2  # the start and the step, compiled for the first seed
    assert losses[0] != losses[1]
