"""A run with a monitor trains what the run without it trains, or is refused: whatever the loss, the data and the cut."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.advice.probes import ProbePrograms, Prober, with_rate_in_state
from tests.data.test_streams import streamed
from tests.gradients.test_moments import batch_norm_task

RANDOM = np.random.default_rng(3)
X, Y = jnp.asarray(RANDOM.normal(size=(48, 5)), jnp.float32), jnp.asarray(RANDOM.normal(size=48), jnp.float32)
TOKENS = jnp.asarray(RANDOM.integers(0, 11, (48, 9)), jnp.int32)


def zeros(key):
    return {"w": jnp.zeros(5)}


def task_of(loss_fn, init=zeros, data=(X, Y), **more):
    return jb.Task(init, loss_fn, None, data, None, **more)


def scores(params, batch):
    return batch[0] @ params["w"] + batch[1]


def experts(capacity):
    """A language model with a router: each of two experts has places for so many sequences of a batch; others pass it by."""

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            "embed": jax.random.normal(keys[0], (11, 6)),
            "experts": jax.random.normal(keys[1], (2, 6, 6)),
            "out": jax.random.normal(keys[2], (6, 11)),
        }

    def loss_fn(params, tokens):
        x = params["embed"][tokens[:, :-1]]
        chosen = jax.nn.one_hot(tokens[:, 0] % 2, 2)
        placed = chosen * (jnp.cumsum(chosen, 0) <= capacity(tokens.shape[0]))
        x = x + jnp.einsum("be,blh,ehk->blk", placed, x, params["experts"])
        losses = optax.softmax_cross_entropy_with_integer_labels(x @ params["out"], tokens[:, 1:])
        return jb.Weighted(losses.sum(1), jnp.full(len(losses), 8))

    return task_of(loss_fn, init, TOKENS)


def small_transformer():
    tokens = np.asarray(TOKENS).ravel()
    dataset = jb.TextDataset("tokens", tokens, tokens[:40], tokens[:40], 11)
    return jb.language_task(jb.TransformerLM(11, width=8, num_layers=1, num_heads=2), dataset, sequence_length=8)._replace(test_data=None)


def noisy(keys, batch):
    return batch[0] + jax.vmap(lambda key: jax.random.normal(key, (5,)))(keys), batch[1]


def with_keys(keys, batch):
    return *batch, keys


def dropped(params, batch):
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (5,)))(batch[2])
    return (scores(params, (batch[0] * keep, batch[1]))) ** 2


def dropped_by_one_key(params, batch):
    return scores(params, (batch[0] * jax.random.bernoulli(batch[2][0], 0.5, batch[0].shape), batch[1])) ** 2


ONE_BY_ONE = {
    "squares": lambda: task_of(lambda p, b: scores(p, b) ** 2),
    "weighted": lambda: task_of(lambda p, b: jb.Weighted(scores(p, b) ** 2, b[1] ** 2)),
    "dropout": lambda: task_of(dropped, prepare=with_keys),
    "noise in the data": lambda: task_of(lambda p, b: scores(p, b) ** 2, prepare=noisy),
    "stream": lambda: streamed(task_of(lambda p, b: scores(p, b) ** 2)._replace(test_data=(X, Y)))._replace(test_data=None),
    "microbatches that batch norm sees anyway": lambda: batch_norm_task()._replace(microbatch_size=3),
    "experts with places for all": lambda: experts(lambda count: count),
    "prepared by the whole batch": lambda: task_of(
        lambda p, b: scores(p, b) ** 2, prepare=lambda keys, b: (b[0] - b[0].mean(0, keepdims=True), b[1])
    ),
}
COUPLED = {
    "centred": lambda: task_of(lambda p, b: (lambda z: (z - z.mean()) ** 2)(b[0] @ p["w"] + 1)),
    "centred, seen only away from 0": lambda: task_of(lambda p, b: b[1] * (b[0] @ p["w"]) - (b[0] @ p["w"]).mean()),
    "contrastive": lambda: task_of(lambda p, b: -jnp.diag(jax.nn.log_softmax((b[0] * p["w"][None]) @ b[0].T))),
    "by the size of the batch": lambda: task_of(lambda p, b: scores(p, b) ** 2 / b[0].shape[0]),
    "by the number in the batch": lambda: task_of(lambda p, b: scores(p, b) ** 2 * jnp.arange(b[0].shape[0])),
    "weights by the batch's sum": lambda: task_of(lambda p, b: jb.Weighted(scores(p, b) ** 2, b[1] ** 2 / (b[1] ** 2).sum())),
    "one key for all": lambda: task_of(dropped_by_one_key, prepare=with_keys),
    "experts with places for half": lambda: experts(lambda count: count // 2),
    "experts with a place missing": lambda: experts(lambda count: count - 2),
    "batch norm": batch_norm_task,
    "stream, centred": lambda: streamed(task_of(lambda p, b: scores(p, b) - scores(p, b).mean())._replace(test_data=(X, Y)))._replace(test_data=None),
    "stream, prepared by the whole batch": lambda: streamed(
        task_of(lambda p, b: scores(p, b) ** 2, prepare=lambda keys, b: (b[0] - b[0].mean(0, keepdims=True), b[1]))._replace(test_data=(X, Y))
    )._replace(test_data=None),
}
CONFIG = jb.FitConfig(optax.sgd(0.05), 12, jb.steps(3))


def parameters(task, monitor, **settings):
    *_, last = jb.fit(task, CONFIG._replace(monitor=monitor, **settings))
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves((last["state"].params, last["state"].model_state, last["loss"]))]


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_a_monitor_changes_nothing(name):
    task = ONE_BY_ONE[name]()
    for one, other in zip(parameters(task, jb.NoiseMonitor(every=2, parts=3)), parameters(task, None), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", COUPLED)
def test_or_is_refused(name):
    advice = "Take monitor=None; or microbatch_size=[0-9]+( and task._replace.coupled=True.)?, "
    with pytest.raises(ValueError, match="^monitor: to be measured, a batch of 12 is cut into parts of .*" + advice):
        parameters(COUPLED[name](), jb.NoiseMonitor())


def test_what_the_refusal_advises_is_taken():
    centred = COUPLED["centred"]()._replace(coupled=True)
    for one, other in zip(*(parameters(centred, monitor, microbatch_size=6) for monitor in (None, jb.NoiseMonitor())), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="microbatch_size=1,"):
        parameters(centred, jb.NoiseMonitor(parts=12), microbatch_size=6)


def test_a_transformer_is_measured():
    for one, other in zip(*(parameters(small_transformer(), monitor) for monitor in (None, jb.NoiseMonitor())), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["squares", "centred", "batch norm"])
def test_a_probe_gives_the_number_without_the_monitor(name):
    """The noise is left out where it would change the model."""
    task = (ONE_BY_ONE | COUPLED)[name]()
    if name != "batch norm":
        task = task._replace(metrics_fn=lambda p, b: {"loss": jnp.full(len(b[1]), (p["w"] ** 2).sum())}, test_data=(X, Y))
    ends = []
    for measured in (True, False):
        optimizer = with_rate_in_state(optax.sgd)
        prober = Prober(ProbePrograms(task, optimizer, 0.1), jb.as_goal("loss<-1"), jb.epochs(3), 2, measured)
        *_, last = prober.run(12, 0.1, 0)
        ends.append(last)
    np.testing.assert_allclose(ends[0].value, ends[1].value, rtol=1e-5)
    assert np.isfinite(ends[0].trace) == (name == "squares")
