"""The task of the next token of a text: its loss, what it refuses, and training on it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import jaxbatch as jb

SMALL = jb.TransformerLM(28, width=16, num_layers=1, num_heads=2)


def tiny_task(**settings):
    dataset = jb.load_text("generated")
    dataset = dataset._replace(train_tokens=dataset.train_tokens[:8000], validation_tokens=dataset.validation_tokens[:1000])
    return jb.language_task(SMALL, dataset, sequence_length=32, **settings)


def test_the_task_s_loss_is_the_mean_over_a_sequence_s_tokens():
    task = tiny_task()
    params = task.init(jax.random.key(3))
    batch = task.train_data[:4]
    assert batch.dtype == jnp.uint8 and batch.shape == (4, 33)
    logits = np.asarray(jax.jit(SMALL.apply)(params, batch[:, :-1]), np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    targets = np.asarray(batch[:, 1:], np.int64)[..., None]
    expected = -np.log(np.take_along_axis(shares, targets, -1))[..., 0].mean(1)
    np.testing.assert_allclose(task.loss_fn(params, batch), expected, rtol=1e-5)
    metrics = task.metrics_fn(params, batch)
    assert set(metrics) == {"loss", "bits_per_token", "accuracy"}
    np.testing.assert_allclose(metrics["bits_per_token"], expected / np.log(2), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(-1) == targets[..., 0]).mean(1), rtol=1e-6)
    assert abs(expected.mean() - np.log(28)) < 0.05  # nothing is known at the start


def test_the_task_trains_whatever_way_batches_are_cut():
    losses = []
    for microbatch_size in (None, 8):
        *_, last = jb.fit(tiny_task(microbatch_size=microbatch_size), jb.FitConfig(optax.adamw(0.01), 32, jb.epochs(2)))
        losses.append(last["test_loss"])
    assert losses[0] < 3.0
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


class TwoLogits(nn.Module):
    vocab_size: int = 28

    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(self.vocab_size)(nn.Embed(28, 4)(tokens).mean(1))


class Stateful(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        self.variable("counts", "calls", jnp.zeros, ())
        return nn.Embed(28, 28)(tokens)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (len, {}, "model=builtin_function_or_method is not a flax.linen module"),
        (jb.TransformerLM(27, 16, 1, 2), {}, "its logits have shape (1, 32, 27), and this text needs (1, 32, 28). Set its vocab_size to 28."),
        (TwoLogits(), {}, "model=TwoLogits: its logits have shape (1, 28), and this text needs (1, 32, 28)."),
        (Stateful(), {}, "model=Stateful keeps variables in 'counts'. language_task trains 'params' only"),
        (
            jb.TransformerLM(28, 16, 1, 2),
            {"train_tokens": np.full(99, 28)},
            "dataset.train_tokens go from 28 to 28, and vocab_size=28 allows 0 to 27.",
        ),
        (SMALL, {"validation_tokens": np.zeros(99)}, "dataset.validation_tokens are float64 of shape (99,) and must be"),
        (SMALL, {"validation_tokens": np.zeros(9, int)}, "an example takes 33 tokens, and the text has 9."),
    ],
)
def test_models_and_texts_that_would_train_wrongly_are_refused(model, changes, message):
    dataset = jb.load_text("generated")._replace(**changes)
    with pytest.raises(ValueError) as error:
        jb.language_task(model, dataset, sequence_length=32)
    assert message in str(error.value)


@pytest.mark.slow
def test_a_small_transformer_learns_to_copy():
    """Below what a model reaches that sees only the word before, which is 8 H(p) / 32: the last two words are copied."""
    dataset = jb.load_text("generated")
    model = jb.TransformerLM(28, width=64, num_layers=2, num_heads=4)
    task = jb.language_task(model, dataset, sequence_length=64)
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 100, 4 * 488)
    *_, last = jb.fit(task, jb.FitConfig(optax.adamw(rate, weight_decay=0.1), 32, jb.epochs(4)))
    assert dataset.entropy < last["test_bits_per_token"] < dataset.entropy * 8 / 6
