"""The chunked cross-entropy against the plain one: values, gradients, memory, margins, strange labels, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbatch as jb
from tests import reference
from tests.conftest import shapes_unchecked


def make_classes(batch_size=7, features=5, classes=23, dtype=np.float64, seed=0):
    random = np.random.default_rng(seed)
    x, kernel, bias = (jnp.asarray(random.normal(size=shape), dtype) for shape in ((batch_size, features), (features, classes), (classes,)))
    return x, kernel, bias, jnp.asarray(random.integers(0, classes, batch_size)), jnp.asarray(random.normal(size=batch_size), dtype)


def with_margin(x, kernel, labels, scale, margin):
    """A one-hot mask over all cosines, as papers have it."""
    cosines = jb.unit_length(x) @ jb.unit_length(kernel, axis=0)
    target = jax.nn.one_hot(labels, kernel.shape[1], dtype=bool)
    return jb.cross_entropy(scale * jnp.where(target, margin(cosines), cosines), labels)


def assert_same_gradients(ours, plain, arguments, tolerance=1e-10):
    both = jax.jit(lambda *given: [jax.value_and_grad(f, tuple(range(len(given))))(*given) for f in (ours, plain)])
    found, expected = both(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, expected)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 22, 23, 40])
def test_value_and_gradients_are_those_of_all_logits(x64, chunk_size):
    x, kernel, bias, labels, weights = make_classes()
    plain = lambda x, kernel, bias, scale: (weights * jb.cross_entropy(scale * x @ kernel + bias[None], labels)).sum()
    ours = lambda x, kernel, bias, scale: (weights * jb.chunked_cross_entropy(x, kernel, labels, chunk_size=chunk_size, bias=bias, scale=scale)).sum()
    assert_same_gradients(ours, plain, (x, kernel, bias, jnp.array(1.7)))


@pytest.mark.parametrize(("batch_size", "classes", "chunk_size"), [(1, 1, 1), (1, 2, 1), (3, 1, 2), (5, 9, 8)])
def test_small_sizes(batch_size, classes, chunk_size):
    x, kernel, _, labels, weights = make_classes(batch_size, 3, classes, np.float32, seed=classes)
    ours = lambda x, kernel: (weights * jb.chunked_cross_entropy(x, kernel, labels, chunk_size=chunk_size)).sum()
    assert_same_gradients(ours, lambda x, kernel: (weights * jb.cross_entropy(x @ kernel, labels)).sum(), (x, kernel), 2e-5)


@pytest.mark.parametrize("margin", [jb.additive_margin(0.35), jb.angular_margin(0.5), lambda cosine: cosine**3])
def test_margins(x64, margin):
    x, kernel, _, labels, weights = make_classes()
    unit = lambda x, kernel: (jb.unit_length(x), jb.unit_length(kernel, axis=0))
    ours = lambda x, kernel: (weights * jb.chunked_cross_entropy(*unit(x, kernel), labels, chunk_size=5, scale=16.0, margin=margin)).sum()
    assert_same_gradients(ours, lambda x, kernel: (weights * with_margin(x, kernel, labels, 16.0, margin)).sum(), (x, kernel))


def test_a_margin_may_be_learned(x64):
    x, kernel, _, labels, _ = make_classes()
    ours = lambda m, s: jb.chunked_cross_entropy(x, kernel, labels, chunk_size=5, scale=s, margin=jb.additive_margin(m)).sum()
    assert_same_gradients(ours, lambda m, s: with_plain_margin(x, kernel, labels, m, s), (jnp.array(0.2), jnp.array(2.0)))


def with_plain_margin(x, kernel, labels, margin, scale):
    products = x @ kernel - margin * jax.nn.one_hot(labels, kernel.shape[1])
    return jb.cross_entropy(scale * products, labels).sum()


def test_the_angular_margin_is_an_angle_and_falls_everywhere(x64):
    angle = np.linspace(0.001, np.pi - 0.001, 999)
    turned = np.asarray(jb.angular_margin(0.5)(jnp.cos(angle)))
    np.testing.assert_allclose(turned[angle < np.pi - 0.5], np.cos(angle + 0.5)[angle < np.pi - 0.5], atol=1e-12)
    assert (np.diff(turned) < 0).all()  # past π a cosine alone would rise again
    assert np.isfinite(jax.vmap(jax.grad(lambda c: jb.angular_margin(0.5)(c[None])[0]))(jnp.array([-1.0, 0.0, 1.0]))).all()


def test_bfloat16_sums_in_float32():
    x, kernel, _, labels, _ = make_classes(16, 32, 4096, np.float32)
    low, low_kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    exact = jb.cross_entropy(low.astype(jnp.float32) @ low_kernel.astype(jnp.float32), labels)
    losses = jax.jit(lambda x, k: jb.chunked_cross_entropy(x, k, labels, chunk_size=100))(low, low_kernel)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, exact, rtol=1e-5)
    gradients = jax.jit(jax.grad(lambda x, k: jb.chunked_cross_entropy(x, k, labels, chunk_size=100).mean(), (0, 1)))(low, low_kernel)
    expected = jax.grad(lambda x, k: jb.cross_entropy(x @ k, labels).mean(), (0, 1))(*(g.astype(jnp.float32) for g in (low, low_kernel)))
    for found, wanted in zip(gradients, expected, strict=True):
        assert found.dtype == jnp.bfloat16
        assert jnp.linalg.norm(found.astype(jnp.float32) - wanted) < 0.01 * jnp.linalg.norm(wanted)


def test_large_logits_and_sure_answers():
    kernel = jnp.array([[1e4, -1e4, 30.0]])
    losses = jb.chunked_cross_entropy(jnp.ones((3, 1)), kernel, jnp.array([0, 1, 0]), chunk_size=1)
    assert losses.tolist() == [0.0, 2e4, 0.0]
    small = jb.chunked_cross_entropy(jnp.ones((1, 1)), jnp.array([[30.0, 0.0]]), jnp.array([0]), chunk_size=2)
    np.testing.assert_allclose(small, np.exp(-30.0), rtol=1e-5)  # log-sum-exp minus logit would be 0


def test_sequences_and_labels_that_are_none(x64):
    x, kernel, _, labels, _ = make_classes(6)
    labels = labels.at[4].set(-1).reshape(2, 3)
    losses = jax.jit(lambda x: jb.chunked_cross_entropy(x, kernel, labels, chunk_size=4))(x.reshape(2, 3, 5))
    assert losses.shape == (2, 3) and np.isnan(losses).sum() == 1 and np.isnan(losses[1, 1])
    counted = lambda x: jnp.where(labels >= 0, jb.chunked_cross_entropy(x, kernel, labels, chunk_size=4), 0).sum()
    gradient = jax.jit(jax.grad(counted))(x.reshape(2, 3, 5))
    assert np.isfinite(gradient).all() and not gradient[1, 1].any() and gradient[0].all()


def test_memory_is_that_of_a_chunk(optimized):
    x, kernel, _, labels, _ = make_classes(512, 32, 20_000, np.float32)
    temporaries = lambda f: jax.jit(jax.value_and_grad(f, (0, 1))).lower(x, kernel).compile().memory_analysis().temp_size_in_bytes
    chunked = temporaries(lambda x, k: jb.chunked_cross_entropy(x, k, labels, chunk_size=500).mean())
    assert chunked < 5 * 4 * 512 * 500  # two chunks side by side on a CPU, each in a copy or two, where all logits are 41 MB
    assert temporaries(lambda x, k: jb.cross_entropy(x @ k, labels).mean()) > 10 * chunked


def test_slips_are_named():
    x, kernel, bias, labels, _ = make_classes(dtype=np.float32)
    with shapes_unchecked(), pytest.raises(ValueError, match="do not go together"):
        jb.chunked_cross_entropy(x, kernel.T, labels, chunk_size=5)
    with shapes_unchecked(), pytest.raises(ValueError, match="bias has shape"):
        jb.chunked_cross_entropy(x, kernel, labels, chunk_size=5, bias=bias[1:])
    for message, slip in {
        "chunk_size=0": {"chunk_size": 0},
        "leave out bias": {"bias": bias, "margin": jb.additive_margin(0.1)},
        "num_classes=20 is for": {"num_classes": 20},
    }.items():
        with pytest.raises(ValueError, match=message):
            jb.chunked_cross_entropy(x, kernel, labels, **({"chunk_size": 5} | slip))


@pytest.mark.parametrize("chunk_size", [1, 5, 23])
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing(x64, chunk_size, smoothing):
    x, kernel, bias, labels, weights = make_classes()
    ours = lambda x, kernel, bias: jb.chunked_cross_entropy(x, kernel, labels, chunk_size=chunk_size, bias=bias, scale=2.0, label_smoothing=smoothing)
    plain = lambda x, kernel, bias: jb.cross_entropy(2.0 * x @ kernel + bias[None], labels, label_smoothing=smoothing)
    np.testing.assert_allclose(ours(x, kernel, bias), reference.smoothed_cross_entropy(2 * x @ kernel + bias[None], labels, smoothing), rtol=1e-11)
    assert_same_gradients(lambda *a: (weights * ours(*a)).sum(), lambda *a: (weights * plain(*a)).sum(), (x, kernel, bias))


def test_label_smoothing_with_a_margin(x64):
    x, kernel, _, labels, weights = make_classes()
    unit, margin = lambda x, kernel: (jb.unit_length(x), jb.unit_length(kernel, axis=0)), jb.additive_margin(0.35)
    ours = lambda x, kernel: jb.chunked_cross_entropy(*unit(x, kernel), labels, chunk_size=5, scale=16.0, margin=margin, label_smoothing=0.2)

    def plain(x, kernel):
        cosines = jnp.matmul(*unit(x, kernel))
        target = jax.nn.one_hot(labels, kernel.shape[1], dtype=bool)
        return jb.cross_entropy(16.0 * jnp.where(target, margin(cosines), cosines), labels, label_smoothing=0.2)

    assert_same_gradients(lambda *a: (weights * ours(*a)).sum(), lambda *a: (weights * plain(*a)).sum(), (x, kernel))
