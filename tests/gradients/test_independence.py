"""An example that has no loss of its own gets no gradient of its own, and a batch that is cut gives the numbers of the whole."""

import gc
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.gradients.groups import Loss
from jaxbatch.gradients.independence import check_independent_losses
from jaxbatch.layers import BatchNorm

REFUSED = "the loss of an example changes with the others in its batch, as through batch normalisation"


class Normalised(nn.Module):
    """A dense layer, batch normalisation of ours or Flax's, another dense layer."""

    kind: str
    train: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(5)(x)
        if self.kind == "ours":
            x = BatchNorm()(x[:, None, None, :], train=self.train)[:, 0, 0, :]
        else:
            x = nn.BatchNorm(use_running_average=not self.train)(x)
        return nn.Dense(3)(nn.relu(x))


def model_loss(kind, train=True):
    """A bare loss function, its parameters and a batch of 6."""
    random = np.random.default_rng(0)
    batch = jnp.asarray(random.normal(size=(6, 4)), jnp.float32), jnp.asarray(random.integers(0, 3, 6), jnp.int32)
    model = Normalised(kind, train)
    variables = model.init(jax.random.key(0), batch[0])
    state = {name: value for name, value in variables.items() if name != "params"}

    def loss_fn(params, batch):
        logits, _ = model.apply({"params": params, **state}, batch[0], mutable=list(state))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])

    return loss_fn, variables["params"], batch


CALLS = {
    "per_example_gradients": jb.per_example_gradients,
    "clipped_gradient_sum": lambda *args: jb.clipped_gradient_sum(*args, 1.0),
    "sum_of_gradients": lambda *args: jb.sum_of_gradients(*args, lambda g: g),
    "gradient_statistics": jb.gradient_statistics,
    "group_gradients of one": lambda loss_fn, params, batch: jb.group_gradients(loss_fn, params, batch, 6),
    "split of one": lambda loss_fn, params, batch: jb.split_backward(loss_fn, optax.sgd(0.1), 6)(params, optax.sgd(0.1).init(params), batch),
}


@pytest.mark.parametrize("kind", ["ours", "flax"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("call", list(CALLS))
def test_batch_normalisation_has_no_gradient_of_one_example(call, compiled, kind):
    loss_fn, params, batch = model_loss(kind)
    function = lambda params, batch: CALLS[call](loss_fn, params, batch)
    with pytest.raises(ValueError, match=REFUSED):
        (jax.jit(function) if compiled else function)(params, batch)


@pytest.mark.parametrize("kind", ["ours", "flax"])
def test_groups_and_running_moments_are_taken(kind):
    loss_fn, params, batch = model_loss(kind)
    assert jax.tree.leaves(jb.group_gradients(loss_fn, params, batch, 2))[0].shape[0] == 2  # ghost batch norm
    jb.gradient_statistics(loss_fn, params, batch, num_groups=3)
    loss_fn, params, batch = model_loss(kind, train=False)
    for call in CALLS.values():
        call(loss_fn, params, batch)


def embedding_loss(params, tokens):
    logits = params["table"][tokens].mean(1) @ params["head"]
    return -jax.nn.log_softmax(logits)[:, 0]


def dropout_loss(w, batch):
    keys, x = batch
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (3,)))(keys)
    return ((x * keep) @ w) ** 2


X = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)
TAKEN = {
    "tokens": (embedding_loss, {"table": jnp.ones((7, 3)) * X[:1], "head": jnp.ones((3, 2))}, jnp.arange(8).reshape(4, 2) % 7),
    "dropout": (dropout_loss, jnp.ones(3), (jax.random.split(jax.random.key(0), 4), X)),
    "bfloat16": (lambda w, x: (x @ w) ** 2, jnp.ones(3, jnp.bfloat16), X.astype(jnp.bfloat16)),
    "place in the batch": (lambda w, x: (x @ w) * jnp.arange(x.shape[0]), jnp.ones(3), X),
    "one example": (lambda w, x: (x @ w) ** 2, jnp.ones(3), X[:1]),
    "not finite": (lambda w, x: jnp.log(-((x @ w) ** 2)), jnp.ones(3), X),
}
COUPLED = {
    "mean": (lambda w, x: (x - x.mean(0, keepdims=True)) @ w, jnp.ones(3), X),
    "a weight of zero": (lambda w, x: x @ w[:3] + w[3] * (x[:, 0] - x[:, 0].mean()), jnp.array([1.0, 2.0, 3.0, 0.0]), X),
    "one example": (lambda w, x: (x - x.mean(0, keepdims=True)) @ w, jnp.ones(3), X[:1]),
    "bfloat16": (lambda w, x: (x - x.mean(0, keepdims=True)) @ w, jnp.ones(3, jnp.bfloat16), X.astype(jnp.bfloat16)),
    "contrastive": (lambda w, x: -jnp.diag(jax.nn.log_softmax((x * w[None]) @ x.T)), jnp.ones(3), X),
    "tokens": (lambda w, t: w[t[:, 0]] - w[t[:, 0]].mean(), jnp.arange(7.0), jnp.arange(8).reshape(4, 2) % 7),
    "images": (lambda w, x: w * (x / 255 - (x / 255).mean()).sum((1, 2)), jnp.array(1.0), (X[:, :, None] * 99).astype(jnp.uint8)),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", TAKEN)
def test_losses_of_their_own_are_taken(name, compiled):
    loss_fn, params, batch = TAKEN[name]
    function = lambda params, batch: jb.per_example_gradients(loss_fn, params, batch)
    (jax.jit(function) if compiled else function)(params, batch)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", COUPLED)
def test_coupled_losses_are_refused(name, compiled):
    loss_fn, params, batch = COUPLED[name]
    function = lambda params, batch: jb.per_example_gradients(loss_fn, params, batch)
    with pytest.raises(ValueError, match=REFUSED):
        (jax.jit(function) if compiled else function)(params, batch)


def test_a_loss_that_closes_over_what_is_not_known_yet_is_taken():
    np.testing.assert_allclose(jax.jit(lambda scale: jb.per_example_gradients(lambda w, x: scale * (x @ w), jnp.ones(3), X))(2.0), 2 * X)


def test_what_was_checked_is_not_kept_alive():
    class Kept:
        def __call__(self, w, x):
            return x @ w

    loss_fn = Kept()
    gone = weakref.ref(loss_fn)
    check_independent_losses(Loss(loss_fn), jnp.ones(3), X)
    del loss_fn
    gc.collect()
    assert gone() is None


# prepare


def share_of_weights(keys, batch):
    del keys
    return batch * batch / batch.sum() * batch.shape[0]


def doubled(keys, batch):
    del keys
    return 2 * batch


def convolution_loss(w, x):
    # A network on XLA's convolutions: accumulation prepares each microbatch by itself.
    x = jnp.broadcast_to(x[:, None, None, None], (x.shape[0], 4, 4, 1))
    kernel = jnp.broadcast_to(w, (3, 3, 1, 1)) / 9
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")).mean((1, 2, 3))


class Numbers:
    """A stream of the numbers 1, 2, 3, 10."""

    num_examples, example = 4, jax.ShapeDtypeStruct((), jnp.float32)

    def parts(self, indices, place=(0, 0)):
        for index in indices:
            yield np.array([1, 2, 3, 10], np.float32)[index]


def task_of(loss_fn, prepare, data=None):
    data = jnp.array([1.0, 2.0, 3.0, 10.0]) if data is None else data
    return jb.Task(lambda key: jnp.array(0.0), loss_fn, None, data, None, prepare=prepare)


def gradient_of(task, **settings):
    (record,) = jb.fit(task, jb.FitConfig(optax.sgd(1.0), 4, jb.steps(1), **settings))
    return -float(record["state"].params)


def test_a_batch_seen_whole_may_be_weighted_by_its_sum():
    linear = task_of(lambda w, x: w * x, share_of_weights)
    np.testing.assert_allclose(gradient_of(linear), (1 + 4 + 9 + 100) / 16, rtol=1e-6)
    np.testing.assert_allclose(gradient_of(linear, microbatch_size=2), 7.125, rtol=1e-6)
    np.testing.assert_allclose(gradient_of(task_of(convolution_loss, share_of_weights)), 7.125, rtol=1e-5)


@pytest.mark.parametrize(
    ("loss_fn", "data", "settings"),
    [(convolution_loss, None, {"microbatch_size": 2}), (lambda w, x: w * x, Numbers(), {"microbatch_size": 2})],
)
def test_a_cut_batch_may_not(loss_fn, data, settings):
    with pytest.raises(ValueError, match="prepare changes an example with the others in its batch"):
        gradient_of(task_of(loss_fn, share_of_weights, data), **settings)
    np.testing.assert_allclose(gradient_of(task_of(loss_fn, doubled, data), **settings), 8.0, rtol=1e-5)


# Groups of one example on the other paths, and functions that look alike


def normalised_task(kind, streamed=False):
    loss_fn, params, batch = model_loss(kind)
    data = batch
    if streamed:
        parts = lambda indices, place=(0, 0): (jax.tree.map(lambda leaf: np.asarray(leaf)[index], batch) for index in indices)
        data = type("Streamed", (), {"parts": staticmethod(parts)})()
        data.num_examples, data.example = 6, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch)
    return jb.Task(lambda key: params, loss_fn, None, data, None)


@pytest.mark.parametrize("kind", ["ours", "flax"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_run_in_groups_of_one_is_refused_too(kind, streamed):
    task = normalised_task(kind, streamed)
    with pytest.raises(ValueError, match=REFUSED):
        next(jb.fit(task, jb.FitConfig(optax.sgd(0.1), 6, jb.steps(1), num_groups=6)))
    next(jb.fit(task, jb.FitConfig(optax.sgd(0.1), 6, jb.steps(1), num_groups=3)))  # ghost batch norm


class Alike:
    """Losses that are equal and have one hash, whatever they compute; one that changes its mind."""

    def __init__(self, coupled):
        self.coupled = coupled

    def __eq__(self, other):
        return isinstance(other, Alike)

    def __hash__(self):
        return 7

    def __call__(self, w, x):
        return (x - x.mean(0, keepdims=True)) @ w if self.coupled else x @ w


def test_no_loss_is_taken_for_another():
    jb.per_example_gradients(Alike(False), jnp.ones(3), X)
    with pytest.raises(ValueError, match=REFUSED):
        jb.per_example_gradients(Alike(True), jnp.ones(3), X)
    changing = Alike(False)
    jb.per_example_gradients(changing, jnp.ones(3), X)
    changing.coupled = True
    with pytest.raises(ValueError, match=REFUSED):
        jb.per_example_gradients(changing, jnp.ones(3), X)
