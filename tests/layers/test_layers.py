"""Convolution, pooling and batch normalisation: every layout against its definition, values and gradients."""

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
    ours = jax.jit(lambda x, k: layers.conv(layers.to_layout(x, layout), k, layout=layout, strides=strides, padding=padding))
    np.testing.assert_allclose(from_layout(ours(x, kernel), layout), reference.conv(x, kernel, strides, padding), rtol=1e-5, atol=1e-5)


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
@pytest.mark.parametrize(("side", "size", "window", "padding", "channels"), [(28, 5, 2, 0, 1), (12, 5, 2, 0, 3), (11, 3, 3, 1, 2), (10, 4, 2, 2, 1)])
def test_conv_max_pool_equals_conv_then_pool(x64, batch_size, side, size, window, padding, channels):
    x, kernel = random((batch_size, side, side, channels), dtype=np.float64), random((2, size, size, channels), 1, np.float64)

    def ours(x, kernel, layout):
        x = layers.to_layout(x, layout)
        return from_layout(layers.conv_max_pool(x, kernel, window=window, layout=layout, padding=padding), layout)

    expected = reference.max_pool(reference.conv(x, kernel, 1, padding), window)
    cotangent = random(expected.shape, 2, np.float64)
    gradients = []
    for layout in LAYOUTS:

        def both(x, kernel, cotangent, layout=layout):
            out, backward = jax.vjp(lambda x, kernel: ours(x, kernel, layout), x, kernel)
            return out, backward(cotangent)

        out, gradient = jax.jit(both)(x, kernel, cotangent)
        np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)
        gradients.append(gradient)
    for mine, theirs in zip(*gradients):
        np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-10)


WAYS = ("platform", "dense", "patches", "xla")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("rows", "columns", "size", "strides", "padding"),
    [(8, 8, 3, 1, 1), (7, 5, 3, 2, 1), (2, 2, 3, 1, 1), (4, 4, 5, 1, 2), (9, 7, 5, 4, 2), (5, 6, 2, 3, 0), (4, 4, 3, 1, 4), (3, 3, 1, 2, 0)],
)
def test_every_way_and_its_gradients_equal_the_platform_s(x64, way, rows, columns, size, strides, padding):
    x, kernel = random((5, rows, columns, 3), dtype=np.float64), random((4, size, size, 3), 1, np.float64)

    def run(way):
        function = lambda x, kernel: layers.conv(x, kernel, layout="native", strides=strides, padding=padding, algorithm=way)
        out, backward = jax.vjp(function, x, kernel)
        _, tangent = jax.jvp(function, (x, kernel), (random(x.shape, 3, np.float64), random(kernel.shape, 4, np.float64)))
        return out, *backward(random(out.shape, 2, np.float64)), tangent

    mine, platform = (jax.jit(run, static_argnums=0)(name) for name in (way, "platform"))
    np.testing.assert_allclose(mine[0], reference.conv(x, kernel, strides, padding), atol=1e-12)
    for ours, theirs in zip(mine, platform, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-11)


def test_the_product_way_is_a_convolution_with_a_kernel_of_one_pixel(x64):
    x, kernel = random((3, 5, 4, 2), dtype=np.float64), random((6, 1, 1, 2), 1, np.float64)
    for strides in (1, 2):
        ours = layers.conv(x, kernel, layout="native", strides=strides, algorithm="product")
        np.testing.assert_allclose(ours, reference.conv(x, kernel, strides, 0), atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 6, 7, 11])  # parts of 3: one, two, with a rest of 1 and of 2
def test_patches_are_gathered_in_parts(x64, batch_size, monkeypatch):
    monkeypatch.setattr(layers.choose, "PATCH_BYTES", 3 * 36 * 18 * 8)
    x, kernel = random((batch_size, 6, 6, 2), dtype=np.float64), random((4, 3, 3, 2), 1, np.float64)
    for way in ("xla", "patches"):
        gradient = lambda way: jax.jit(jax.grad(lambda k: (layers.conv(x, k, layout="native", padding=1, algorithm=way) ** 2).sum()))(kernel)
        np.testing.assert_allclose(gradient(way), gradient("platform"), rtol=1e-11)


@pytest.mark.parametrize("way", WAYS)
def test_a_convolution_is_differentiable_in_every_order_and_mode(x64, way):
    x, kernel = random((2, 4, 4, 2), dtype=np.float64), random((3, 3, 3, 2), 1, np.float64)
    function = lambda x, k: layers.conv(x, k, layout="native", padding=1, algorithm=way)
    check_grads(jax.jit(function), (x, kernel), order=2, modes=("rev", "fwd"))


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_each_example_equal_a_loop(x64, way):
    x, kernel = random((5, 6, 6, 2), dtype=np.float64), random((3, 3, 3, 2), 1, np.float64)
    loss = lambda kernel, image: (layers.conv(image[None], kernel, layout="native", padding=1, algorithm=way) ** 2).sum()
    ours = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(kernel, x)
    one = jax.jit(jax.grad(loss))
    for index in range(5):
        np.testing.assert_allclose(ours[index], one(kernel, x[index]), rtol=1e-11)


def test_gradients_of_each_example_never_become_a_grouped_convolution():
    loss = lambda kernel, image: (layers.conv(image[None], kernel, layout="native", padding=1, algorithm="xla") ** 2).sum()
    gradient = jax.vmap(jax.grad(loss), (None, 0))
    text = str(jax.make_jaxpr(gradient)(jnp.zeros((3, 3, 3, 2)), jnp.zeros((5, 6, 6, 2))))
    assert "conv_general_dilated" in text
    assert "feature_group_count=5" not in text
    assert "batch_group_count=5" not in text


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16(way):
    x, kernel = random((4, 4, 4, 8)), random((6, 3, 3, 8), 1)
    small = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    function = jax.jit(lambda x, k: layers.conv(x, k, layout="native", padding=1, algorithm=way))
    out, backward = jax.vjp(function, *small)
    expected, exact = jax.vjp(function, *(leaf.astype(jnp.float32) for leaf in small))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.02 * np.abs(expected).max())
    for mine, theirs in zip(backward(out), exact(out.astype(jnp.float32)), strict=True):
        assert mine.dtype == jnp.bfloat16
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs, atol=0.02 * np.abs(theirs).max())


def test_what_is_chosen_on_which_platform():
    choose = layers.choose_conv
    assert choose((32, 32), 3, batch_size=128, padding=1, platform="gpu") == "platform"
    assert choose((32, 32), 3, batch_size=128, padding=1, platform="cpu") == "xla"
    assert choose((2, 2), 3, batch_size=128, padding=1, platform="cpu") == "dense"
    assert choose((2, 2), 3, batch_size=1, padding=1, platform="cpu") == "patches"
    assert choose((16, 16), 17, batch_size=128, padding=8, platform="cpu") == "patches"  # the matrix would be huge
    assert choose((8, 8), 1, batch_size=1, platform="cpu") == "product"


def test_loops_are_slow_looks_into_inner_functions():
    image, kernel = jnp.zeros((1, 4, 4, 1)), jnp.zeros((1, 3, 3, 1))
    conv = lambda kernel: layers.conv(image, kernel, layout="native").sum()
    scanned = lambda kernel: jax.lax.scan(lambda c, _: (c + jax.jit(jax.grad(conv))(kernel).sum(), None), 0.0, None, 2)[0]
    assert layers.loops_are_slow(conv, kernel, platform="cpu")
    assert layers.loops_are_slow(scanned, kernel, platform="cpu")
    assert not layers.loops_are_slow(scanned, kernel, platform="gpu")
    ours = lambda kernel: layers.conv(image, kernel, layout="batch_minor").sum()
    assert not layers.loops_are_slow(ours, kernel, platform="cpu")


def test_batch_norm_equals_its_definition_and_its_derivatives(x64):
    x, scale, bias = random((4, 3, 5, 2), dtype=np.float64), random((2,), 1, np.float64), random((2,), 2, np.float64)

    def plain(x, scale, bias):
        mean = x.mean((0, 1, 2), keepdims=True)
        variance = ((x - mean) ** 2).mean((0, 1, 2), keepdims=True)
        per_channel = lambda v: v.reshape(1, 1, 1, 2)
        return per_channel(scale) * (x - mean) / jnp.sqrt(variance + 1e-5) + per_channel(bias)

    np.testing.assert_allclose(layers.batch_norm(x, scale, bias), plain(x, scale, bias), rtol=1e-9)
    cotangent = random(x.shape, 3, np.float64)
    for mine, theirs in zip(*(jax.vjp(f, x, scale, bias)[1](cotangent) for f in (layers.batch_norm, plain)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-8, atol=1e-10)
    check_grads(jax.jit(layers.batch_norm), (x, scale, bias), order=2, modes=("rev", "fwd"))


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
        return layers.conv(layers.to_layout(x, layout), kernel, layout=layout, strides=2, padding=1)

    check_grads(jax.jit(function), (x, kernel), order=1, modes=("rev", "fwd"))


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
        (lambda: jax.eval_shape(jb.SimpleCNN().init, jax.random.key(0), jnp.zeros((1, 8, 8, 1))), "does not fit"),
    ],
)
def test_bad_shapes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
