"""SimpleCNN against its definition and the same network of Flax layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbatch as jb
from tests import reference


@pytest.fixture(scope="module")
def digits():
    dataset = jb.load_dataset("digits")
    return jnp.asarray(dataset.train_images[:48] / np.float32(255)), jnp.asarray(dataset.train_labels[:48])


def test_simple_cnn_has_the_study_s_parameters():
    params = jax.jit(jb.SimpleCNN().init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 12_930
    for name, fan_in in (("ConvMaxPool_0", 25), ("ConvMaxPool_1", 250), ("ConvMaxPool_2", 180), ("Dense_0", 40)):
        for leaf in params[name].values():
            values, bound = np.abs(np.asarray(leaf)), fan_in**-0.5
            assert values.max() <= bound
            assert values.max() > 0.8 * bound or leaf.size < 20  # uniform up to the bound, not narrower
            if leaf.size > 200:
                np.testing.assert_allclose(np.asarray(leaf).std(), bound / 3**0.5, rtol=0.1)


@pytest.mark.parametrize(("layout", "batch_size"), [(None, 48), ("batch_minor", 1), ("batch_minor", 3), ("native", 3)])
def test_simple_cnn_equals_flax_layers(digits, layout, batch_size):
    images, labels = (leaf[:batch_size] for leaf in digits)
    model, plain = jb.SimpleCNN(layout=layout), reference.PlainSimpleCNN()
    params = jax.jit(model.init)(jax.random.key(1), images)
    theirs = plain.from_simple_cnn(params)
    np.testing.assert_allclose(jax.jit(model.apply)(params, images), jax.jit(plain.apply)(theirs, images), atol=2e-6)

    def loss(apply):
        return lambda p: jb.cross_entropy(apply(p, images), labels).mean()

    mine = plain.from_simple_cnn(jax.jit(jax.grad(loss(model.apply)))(params))
    expected = jax.jit(jax.grad(loss(plain.apply)))(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), mine, expected)


def test_simple_cnn_takes_integer_images():
    model = jb.SimpleCNN()
    images = jnp.arange(28 * 28, dtype=jnp.int32).reshape(1, 28, 28, 1) % 7
    params = jax.jit(model.init)(jax.random.key(0), images)
    np.testing.assert_allclose(model.apply(params, images), model.apply(params, images.astype(jnp.float32)))
