"""The installed jaxlib computes right sums where a known release does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.mark.parametrize("n", [1000, 32769])
def test_known_wrong_sum_of_squares(n):
    # jax issue 39103: with jaxlib 0.10.2 on CPU the last row comes out wrong at n = 32769.
    rows = jnp.stack((jnp.arange(n, dtype=jnp.float32), jnp.zeros(n), jnp.zeros(n)), axis=1)
    squares = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(rows)
    np.testing.assert_allclose(squares, np.arange(n, dtype=np.float64) ** 2, rtol=1e-6)


def test_known_wrong_sum_of_squares_float64(x64):
    n = 16385
    rows = jnp.stack((jnp.arange(n, dtype=jnp.float64), jnp.zeros(n), jnp.zeros(n)), axis=1)
    squares = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(rows)
    np.testing.assert_allclose(squares, np.arange(n, dtype=np.float64) ** 2, rtol=1e-12)


def test_reduction_of_high_rank():
    # jax issues 39257 and 40412: rank 7 and more crashed in 0.10.2 and 0.11.0.
    x = jnp.arange(2.0**8).reshape((2,) * 8)
    np.testing.assert_allclose(jax.jit(lambda x: x.sum((0, 2, 4, 6)))(x), np.asarray(x).sum((0, 2, 4, 6)))
