"""Gradients of losses that couple the batch, against those of the whole batch in one piece; memory; refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxbatch as jb
from tests import reference


def make_pairs(batch_size: int = 12, dtype=np.float64, seed: int = 0, width: int = 5):
    """Two views of each example, a two-layer encoder, a learned temperature: ``(loss_fn, encode, params, batch)``."""
    random = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    params = {"w": normal(width, 8), "out": normal(8, 4), "log_temperature": jnp.asarray(-0.5, dtype)}
    batch = {"a": normal(batch_size, width), "b": normal(batch_size, width)}
    one = lambda params, x: jnp.tanh(x @ params["w"]) @ params["out"]
    encode = lambda params, batch: (one(params, batch["a"]), one(params, batch["b"]))
    loss_fn = lambda params, views: jb.info_nce(*views, jnp.exp(params["log_temperature"]))
    return loss_fn, encode, params, batch


def assert_close(found, expected, tolerance=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, expected)


@pytest.mark.parametrize(("microbatch_size", "compiled"), [(1, True), (4, True), (5, False), (100, True)])
def test_the_gradient_is_that_of_the_whole_batch(x64, microbatch_size, compiled):
    loss_fn, encode, params, batch = make_pairs()
    run = lambda params, batch: jb.coupled_gradient(loss_fn, encode, params, batch, microbatch_size)
    losses, gradient = (jax.jit(run) if compiled else run)(params, batch)
    expected, expected_gradient = reference.coupled_gradient(loss_fn, encode, params, batch)
    assert losses.shape == (12,)
    assert_close((losses, gradient), (expected, expected_gradient))
    assert abs(gradient["log_temperature"]) > 1e-3  # what the loss takes from the parameters itself


def test_parts_alone_have_another_gradient(x64):
    loss_fn, encode, params, batch = make_pairs()
    whole = reference.coupled_gradient(loss_fn, encode, params, batch)[1]["w"]
    parts = [reference.coupled_gradient(loss_fn, encode, params, part)[1]["w"] for part in reference.groups_of(batch, 3)]
    assert np.abs(np.mean(parts, 0) - whole).max() > 1e-2  # so the other tests can fail


@pytest.mark.parametrize("microbatch_size", [5])
def test_both_passes_drop_the_same(x64, microbatch_size):
    loss_fn, plain, params, batch = make_pairs()

    def encode(params, batch):
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (8,)))(batch["key"])
        one = lambda x: jnp.where(kept, jnp.tanh(x @ params["w"]), 0) @ params["out"]
        return one(batch["a"]), one(batch["b"])

    batch = batch | {"key": jax.random.split(jax.random.key(3), 12)}
    found = jax.jit(lambda params: jb.coupled_gradient(loss_fn, encode, params, batch, microbatch_size))(params)
    assert_close(tuple(found), reference.coupled_gradient(loss_fn, encode, params, batch))
    assert np.abs(found.losses - loss_fn(params, plain(params, batch))).max() > 1e-2  # something was dropped


def test_two_encoders_of_different_numbers_of_examples(x64):
    _, _, params, batch = make_pairs()
    _, _, other, more = make_pairs(24, seed=1)
    encoders = (lambda p, x: x @ p["w"], lambda p, x: jnp.sin(x @ p["w"]))

    def loss_fn(params, found):  # the first 12 of the others belong to an example, the rest are further negatives
        return jb.chunked_cross_entropy(found[0], found[1].T, jnp.arange(12), chunk_size=7, scale=params[0]["log_temperature"])

    whole = lambda params, batch: tuple(f(p, x) for f, p, x in zip(encoders, params, batch, strict=True))
    expected = reference.coupled_gradient(loss_fn, whole, (params, other), (batch["a"], more["a"]))
    for sizes in (5, (12, 7)):
        run = lambda *params: tuple(jb.coupled_gradient(loss_fn, encoders, params, (batch["a"], more["a"]), sizes))
        assert_close(jax.jit(run)(params, other), expected)


def test_labels_and_weights_are_passed_on(x64):
    _, encode, params, batch = make_pairs()
    batch = batch | {"label": jnp.arange(12) % 3, "weight": jnp.arange(12.0) % 4}

    def loss_fn(params, found):  # supervised: the mean distance to others of the same class
        (z, _), label, weight = found
        same = label[:, None] == label[None]
        return jb.Weighted(jnp.where(same, ((z[:, None] - z[None]) ** 2).sum(-1), 0).sum(1) * weight, weight)

    with_labels = lambda params, batch: (encode(params, batch), batch["label"], batch["weight"])
    found, gradient = jb.coupled_gradient(loss_fn, with_labels, params, batch, 5)
    expected = jax.grad(lambda p: (lambda losses: losses.total.sum() / losses.weight.sum())(loss_fn(p, with_labels(p, batch))))(params)
    assert_close(gradient, expected)
    assert isinstance(found, jb.Weighted) and found.weight.tolist() == batch["weight"].tolist()


def test_a_single_number_is_a_loss_too(x64):
    _, encode, params, batch = make_pairs()

    def decorrelate(params, views):  # Barlow Twins has no loss of an example
        a, b = ((z - z.mean(0)[None]) / z.std(0)[None] for z in views)
        return ((a.T @ b / len(a) - jnp.eye(4)) ** 2).sum()

    found = jb.coupled_gradient(decorrelate, encode, params, batch, 5)
    assert found.losses.shape == ()
    assert_close(tuple(found), reference.coupled_gradient(decorrelate, encode, params, batch))


def test_sums_of_bfloat16_are_kept_in_float32():
    encode, loss_fn = lambda w, x: w * x, lambda w, z: z.astype(jnp.float32) * 4096
    _, gradient = jb.coupled_gradient(loss_fn, encode, jnp.array(1.0, jnp.bfloat16), jnp.ones(4096, jnp.bfloat16), 1)
    assert gradient.dtype == jnp.bfloat16 and float(gradient) == 4096.0  # a sum in bfloat16 would stay at 256


@pytest.mark.parametrize("microbatch_size", [2, 3])
def test_convolutions_run_in_a_python_loop(microbatch_size):
    random = np.random.default_rng(0)
    kernel, images = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((3, 3, 1, 2), (8, 6, 6, 1)))
    encode = lambda k, x: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")).reshape(len(x), -1)
    loss_fn = lambda k, z: jb.nt_xent(z, jnp.roll(z, 1, 0), 0.5)
    expected = reference.coupled_gradient(loss_fn, encode, kernel, images)
    run = lambda kernel, images: tuple(jb.coupled_gradient(loss_fn, encode, kernel, images, microbatch_size))
    assert_close(run(kernel, images), expected, 1e-5)
    assert_close(jax.jit(run)(kernel, images), expected, 1e-5)


def test_memory_is_that_of_a_microbatch(optimized):
    batch_size, size, layers = 1024, 64, 6
    params = [jnp.ones((256, 256))] * layers

    def encode(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return x[:, :32]

    loss_fn = lambda params, z: jb.info_nce(z, jnp.roll(z, 1, 0), 0.1, chunk_size=64)
    batch = jnp.ones((batch_size, 256))
    temporaries = lambda f, *given: jax.jit(f).lower(*given).compile().memory_analysis().temp_size_in_bytes
    found = temporaries(lambda p, x: tuple(jb.coupled_gradient(loss_fn, encode, p, x, size)), params, batch)
    plain = temporaries(lambda p, x: reference.coupled_gradient(loss_fn, encode, p, x), params, batch)
    of_chunk = temporaries(lambda p, x, c: jax.vjp(lambda p: encode(p, x), p)[1](c), params, batch[:size], jnp.ones((size, 32)))
    of_loss = temporaries(lambda z: jax.value_and_grad(lambda z: loss_fn((), z).mean())(z), jnp.ones((batch_size, 32)))
    kept = 2 * batch_size * 32 * 4  # representations and their gradients

    assert found < 1.2 * (max(of_chunk, of_loss) + kept) and found < plain / 3


class Normalised(nn.Module):
    """An encoder with batch normalisation."""

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))


def test_an_encoder_that_couples_examples_is_refused():
    model, x = Normalised(), jnp.arange(12.0).reshape(4, 3)
    variables = model.init(jax.random.key(0), x)
    encode = lambda params, x: model.apply({"params": params, "batch_stats": variables["batch_stats"]}, x, mutable=["batch_stats"])[0]
    with pytest.raises(ValueError, match="changes with the others in its microbatch, as through batch normalisation"):
        jb.coupled_gradient(lambda p, z: z[:, 0], encode, variables["params"], x, 2)
    with pytest.raises(ValueError, match=r"encode\[1\]: the representation"):
        encoders, both = (lambda p, x: x, encode), (jnp.ones(1), variables["params"])
        jax.jit(lambda p: jb.coupled_gradient(lambda p, z: z[0][:, 0], encoders, p, (x, x), 2))(both)


def test_an_encoder_may_be_an_object_without_a_hash():
    @dataclasses.dataclass  # with eq, and so without a hash
    class Linear:
        scale: float

        def __call__(self, w, x):
            return self.scale * x @ w

    w, x, loss = jnp.ones((3, 2)), jnp.arange(12.0).reshape(4, 3), lambda _, z: (z[:, 0] - z.mean(0)[1]) ** 2
    of = lambda encode: jb.coupled_gradient(loss, encode, w, x, 2)
    jax.tree.map(np.testing.assert_array_equal, of(Linear(2.0)), of(lambda w, x: 2.0 * x @ w))


def test_slips_are_named():
    x = jnp.ones((4, 2))
    first = lambda p, z: z[:, 0]
    product = lambda p, x: x * p
    for message, given in {
        "one representation per example, 4, but returned 2": (first, lambda p, x: (p * x).T, jnp.array(1.0), x, 2),
        "is a single number": (first, lambda p, x: (p * x).sum(), jnp.array(1.0), x, 2),
        "no floating-point array": (first, lambda p, x: x > p, jnp.array(1.0), x, 2),
        "returned int32": (lambda p, z: jnp.arange(4), product, jnp.array(1.0), x, 2),
        "of shape \\(4, 2\\)": (lambda p, z: z, product, jnp.array(1.0), x, 2),
        "microbatch_size=0": (first, product, jnp.array(1.0), x, 0),
        "params must be a tuple of 2": (first, (product, product), jnp.array(1.0), (x, x), 2),
        "one for each of 2 encoders": (first, (product, product), (jnp.array(1.0),) * 2, (x, x), (1, 2, 3)),
        "params is int32": (first, product, jnp.array(1), x, 2),
    }.items():
        with pytest.raises(ValueError, match=message):
            jb.coupled_gradient(*given)
