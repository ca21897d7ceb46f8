"""Batch normalisation with a mask: gradients, an empty share, no cost without fillers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbatch.layers import BatchNorm, batch_norm, example_mask, own_examples
from jaxbatch.layers.normalisation import channel_moments


def four(values):
    return jnp.asarray(values).reshape(-1, 1, 1, 1)


def test_gradients_with_a_mask_are_those_of_the_own_examples(x64):
    random = np.random.default_rng(0)
    x, cotangent = jnp.asarray(random.normal(size=(2, 5, 2, 1, 3)))
    scale, bias = jnp.asarray(random.normal(size=(2, 3)))
    mask = jnp.array([True, False, True, True, False])

    def masked(x, scale, bias):
        return (batch_norm(x, scale, bias, mask=mask) * cotangent).sum()

    def own(x, scale, bias):
        return (batch_norm(x[mask], scale, bias) * cotangent[mask]).sum()

    for mine, theirs in zip(jax.grad(masked, (0, 1, 2))(x, scale, bias), jax.grad(own, (0, 1, 2))(x, scale, bias), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12)
    turned = jax.jit(jax.hessian(lambda s: masked(x * s, scale, bias)))(1.3)  # forward over reverse
    np.testing.assert_allclose(turned, jax.hessian(lambda s: own(x * s, scale, bias))(1.3), rtol=1e-9)


def test_a_share_without_an_example_brings_no_nan():
    x, none = four([1.0, jnp.inf, 3.0]), jnp.zeros(3, bool)
    assert [leaf.item() for leaf in channel_moments(x, none)] == [0.0, 0.0]
    value, gradient = jax.value_and_grad(lambda x: batch_norm(x, jnp.ones(1), jnp.ones(1), mask=none).sum())(x)
    assert value == 0 and not np.any(gradient)


def test_without_fillers_the_program_is_that_of_before():
    x, ones = four([1.0, 2.0, 4.0]), jnp.ones(1)

    def lowered(mask):
        def forward(x):
            with own_examples(mask):
                norm = BatchNorm()
                return norm.apply({"params": {"scale": ones, "bias": ones}}, x, train=True, mutable=["batch_stats"])

        return jax.jit(forward).lower(x).as_text()

    assert example_mask() is None
    assert "select" not in lowered(None) and "select" in lowered(jnp.array([True, True, False]))
    assert example_mask() is None


def test_a_layer_that_sees_other_examples_than_the_batch_is_refused():
    variables = {"params": {"scale": jnp.ones(1), "bias": jnp.ones(1)}}
    with own_examples(jnp.array([True, True, False])), pytest.raises(ValueError, match="6 examples where the batch has 3"):
        BatchNorm().apply(variables, four(jnp.arange(6.0)), train=True, mutable=["batch_stats"])
