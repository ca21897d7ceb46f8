"""Convolution, pooling and SimpleCNN: every layout against its definition, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxbatch as jb
from jaxbatch import layers
from tests import reference

LAYOUTS = ("batch_minor", "native")


def random(shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def from_layout(x, layout):
    return x.transpose(3, 1, 2, 0) if layout == "batch_minor" else x


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strides", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize(("rows", "columns", "size", "channels"), [(7, 7, 3, 2), (6, 9, 5, 1), (2, 2, 2, 3), (8, 5, 1, 4)])
def test_conv_equals_its_definition(layout, strides, padding, rows, columns, size, channels):
    x, kernel = random((3, rows, columns, channels)), random((6, size, size, channels), 1)
    ours = layers.conv(layers.to_layout(x, layout), kernel, layout=layout, strides=strides, padding=padding)
    np.testing.assert_allclose(
        from_layout(ours, layout), reference.conv(x, kernel, strides, padding), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_larger_than_the_image_but_not_than_the_padded_image(layout):
    x, kernel = random((4, 2, 2, 3)), random((5, 3, 3, 3), 1)
    ours = layers.conv(layers.to_layout(x, layout), kernel, layout=layout, padding=1)
    np.testing.assert_allclose(from_layout(ours, layout), reference.conv(x, kernel, 1, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "window"), [((2, 6, 6, 3), 2), ((2, 7, 5, 1), 2), ((1, 9, 9, 2), 3), ((1, 4, 4, 1), 4)])
def test_max_pool_equals_its_definition(layout, shape, window):
    x = random(shape)
    ours = layers.max_pool(layers.to_layout(x, layout), window, layout=layout)
    np.testing.assert_array_equal(from_layout(ours, layout), reference.max_pool(x, window))


@pytest.mark.parametrize("batch_size", [1, 40])  # 1: im2col; 40: one product over the pooling phases
@pytest.mark.parametrize(
    ("side", "size", "window", "padding", "channels"), [(28, 5, 2, 0, 1), (12, 5, 2, 0, 3), (11, 3, 3, 1, 2), (10, 4, 2, 2, 1)]
)
def test_conv_max_pool_equals_conv_then_pool(x64, batch_size, side, size, window, padding, channels):
    x, kernel = random((batch_size, side, side, channels), dtype=np.float64), random((2, size, size, channels), 1, np.float64)

    def ours(x, kernel, layout):
        x = layers.to_layout(x, layout)
        return from_layout(layers.conv_max_pool(x, kernel, window=window, layout=layout, padding=padding), layout)

    expected = reference.max_pool(reference.conv(x, kernel, 1, padding), window)
    cotangent = random(expected.shape, 2, np.float64)
    gradients = []
    for layout in LAYOUTS:
        out, backward = jax.vjp(lambda x, kernel, layout=layout: ours(x, kernel, layout), x, kernel)
        np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)
        gradients.append(backward(cotangent))
    for mine, theirs in zip(*gradients):
        np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-10)


def test_conv_max_pool_takes_the_fast_way_where_it_should():
    def product_shape(batch_size):
        x, kernel = jnp.zeros((1, 28, 28, batch_size)), jnp.zeros((10, 5, 5, 1))
        jaxpr = str(jax.make_jaxpr(lambda x, k: layers.conv_max_pool(x, k, window=2, layout="batch_minor"))(x, kernel))
        return "f32[40,36]" in jaxpr  # the shifted kernels

    assert product_shape(60)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_against_finite_differences(x64, layout):
    x, kernel = random((2, 5, 5, 2), dtype=np.float64), random((3, 3, 3, 2), 1, np.float64)

    def function(x, kernel):
        x, kernel = jnp.asarray(x), jnp.asarray(kernel)
        return layers.conv(layers.to_layout(x, layout), kernel, layout=layout, strides=2, padding=1)

    check_grads(function, (x, kernel), order=1, modes=("rev", "fwd"))


def test_layouts_under_vmap_over_kernels(x64):
    x, kernels = random((3, 6, 6, 2), dtype=np.float64), random((4, 5, 3, 3, 2), 1, np.float64)
    ours = jax.vmap(lambda kernel: layers.conv(layers.to_layout(x, "batch_minor"), kernel, layout="batch_minor"))(kernels)
    for index in range(4):
        np.testing.assert_allclose(from_layout(ours[index], "batch_minor"), reference.conv(x, kernels[index], 1, 0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layers.conv(jnp.zeros((1, 5, 5, 2)), jnp.zeros((1, 3, 3, 4)), layout="native"), "2 channels .* for 4"),
        (lambda: layers.conv(jnp.zeros((1, 2, 2, 1)), jnp.zeros((1, 5, 5, 1)), layout="native"), "5x5 kernel .* 2x2"),
        (lambda: layers.max_pool(jnp.zeros((1, 1, 1, 1)), 2, layout="batch_minor"), "window=2 .* 1x1"),
        (lambda: jb.SimpleCNN().init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))), "does not fit"),
    ],
)
def test_bad_shapes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture(scope="module")
def digits():
    dataset = jb.load_dataset("digits")
    return jnp.asarray(dataset.train_images[:48] / np.float32(255)), jnp.asarray(dataset.train_labels[:48])


def test_simple_cnn_has_the_study_s_parameters():
    params = jb.SimpleCNN().init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
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
    params = model.init(jax.random.key(1), images)
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
    params = model.init(jax.random.key(0), images)
    np.testing.assert_allclose(model.apply(params, images), model.apply(params, images.astype(jnp.float32)))
