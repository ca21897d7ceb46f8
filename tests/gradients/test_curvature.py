"""Hessians: products, eigenvalues, traces and lines against dense matrices and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jaxbatch as jb
from jaxbatch.gradients import curvature
from jaxbatch.machine import compiling
from tests.conftest import make_problem, make_weighted
from tests.reference import dense_hessian

KEY = jax.random.key(0)


def quadratic(w, x):
    """The Hessian of its mean over a batch of rows x is diagonal, with the mean of the rows on it."""
    return 0.5 * (x * w[None] ** 2).sum(-1)


def rows(*diagonal):
    """Two rows whose mean is ``diagonal``."""
    diagonal = jnp.array(diagonal)
    return jnp.stack([diagonal + 1, diagonal - 1])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 11, 12, 50, None])
def test_products_are_those_of_the_dense_matrix_for_every_microbatch_size(x64, size):
    loss_fn, params, batch = make_problem(12, np.float64)
    matrix, vector = dense_hessian(loss_fn, params, batch), jax.tree.map(jnp.cos, params)
    found = jb.hessian_vector_product(loss_fn, params, vector, batch, microbatch_size=size)
    np.testing.assert_allclose(ravel_pytree(found)[0], matrix @ ravel_pytree(vector)[0], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("size", [1, 5, None])
def test_losses_with_weights(x64, size):
    loss_fn, token_loss, params, batch = make_weighted(12)
    mean = lambda p: jnp.where(batch["counts"], token_loss(p, batch), 0).sum() / batch["counts"].sum()
    vector = jax.tree.map(jnp.cos, params)
    wanted = jax.jvp(jax.grad(mean), (params,), (vector,))[1]
    found = jb.hessian_vector_product(loss_fn, params, vector, batch, microbatch_size=size)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13), found, wanted)
    line = jb.loss_along_line(loss_fn, params, vector, batch, [0.0, 0.25, 1.0], microbatch_size=size)
    between = [jax.tree.map(lambda a, b, t=t: (1 - t) * a + t * b, params, vector) for t in (0.0, 0.25, 1.0)]
    np.testing.assert_allclose(line, [mean(p) for p in between], rtol=1e-12)


@pytest.mark.parametrize("size", [5, None])
def test_eigenvalues_and_trace_in_float64(x64, size):
    loss_fn, params, batch = make_problem(12, np.float64)
    matrix = dense_hessian(loss_fn, params, batch)
    wanted = np.linalg.eigvalsh(matrix)
    found = jb.hessian_eigenvalues(loss_fn, params, batch, 3, key=KEY, num_steps=60, microbatch_size=size)
    np.testing.assert_allclose(found.largest, wanted[::-1][:3], rtol=1e-9)
    np.testing.assert_allclose(found.smallest, wanted[:3], rtol=1e-9, atol=1e-9)
    assert max(*found.largest_residuals, *found.smallest_residuals) < 1e-7 * wanted[-1]
    trace = jb.hessian_trace(loss_fn, params, batch, 400, key=KEY, microbatch_size=size)
    assert trace.n == 400 and trace.low < np.trace(matrix) < trace.high
    spread = np.sqrt(2 * (np.sum(matrix**2) - np.sum(np.diag(matrix) ** 2)) / 400)  # the standard error of random signs
    assert trace.high - trace.low == pytest.approx(2 * 1.966 * spread, rel=0.15)


def test_eigenvalues_in_float32(problem):
    loss_fn, params, batch = problem
    wanted = np.linalg.eigvalsh(dense_hessian(loss_fn, params, batch))
    found = jb.hessian_eigenvalues(loss_fn, params, batch, 2, key=KEY, num_steps=200, microbatch_size=7)  # more steps than parameters
    np.testing.assert_allclose(found.largest, wanted[::-1][:2], rtol=1e-3)
    np.testing.assert_allclose(found.smallest, wanted[:2], atol=1e-3 * wanted[-1])


def test_few_steps_stay_inside_and_the_residual_says_how_far(x64):
    diagonal = jnp.linspace(-1.0, 4.0, 200) ** 3
    found = jb.hessian_eigenvalues(quadratic, jnp.zeros(200), rows(*diagonal), 2, key=KEY, num_steps=8)
    for values, residuals in ((found.largest, found.largest_residuals), (found.smallest, found.smallest_residuals)):
        assert (values < 64).all() and (values > -1).all() and (residuals > 1e-6).all()
        for value, residual in zip(values, residuals, strict=True):
            assert np.abs(np.asarray(diagonal) - value).min() <= residual


@pytest.mark.parametrize(("dtype", "num_steps"), [(np.float32, 40), (np.float64, 4)])
@pytest.mark.parametrize(
    ("diagonal", "largest", "smallest"),
    [
        ((3, 3, 3, 1, 0, 0), (3, 3, 3, 1), (0, 0, 1, 3)),  # the space of one vector has three dimensions
        ((2, 2, 2, 2, 2), (2, 2, 2, 2), (2, 2, 2, 2)),
        ((0, 0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0)),
        ((5, 0, 0, 0, -7, 0), (5, 0, 0, 0), (-7, 0, 0, 0)),
        ((4, 3, 2, 1), (4, 3, 2, 1), (1, 2, 3, 4)),
    ],
)
def test_a_quadratic_with_repeated_and_zero_eigenvalues_is_exact(x64, dtype, diagonal, largest, smallest, num_steps):
    batch, params = rows(*map(float, diagonal)).astype(dtype), jnp.ones(len(diagonal), dtype)
    found = jb.hessian_eigenvalues(quadratic, params, batch, 4, key=KEY, num_steps=num_steps)
    close = 2e-5 if dtype == np.float32 else 1e-11
    np.testing.assert_allclose(found.largest, largest, atol=close)
    np.testing.assert_allclose(found.smallest, smallest, atol=close)
    assert max(*found.largest_residuals, *found.smallest_residuals) < close
    trace = jb.hessian_trace(quadratic, params, batch, 3, key=KEY)  # a diagonal matrix: every sample is the trace
    assert trace.value == pytest.approx(sum(diagonal), abs=close) and trace.high - trace.low < close


@pytest.mark.slow
def test_the_interval_of_the_trace_holds_it_as_often_as_it_says(x64):
    loss_fn, params, batch = make_problem(6, np.float64)
    matrix = dense_hessian(loss_fn, params, batch)
    loss = lambda w, x: 0.5 * jnp.repeat(w @ jnp.asarray(matrix) @ w, len(x))
    found = [jb.hessian_trace(loss, jnp.zeros(len(matrix)), jnp.zeros(1), 6, key=jax.random.key(seed)) for seed in range(200)]
    held = sum(one.low <= np.trace(matrix) <= one.high for one in found)
    assert 180 <= held <= 199  # 95% of 200 is 190, with a standard deviation of 3


def test_low_precision_is_differentiated_in_float32():
    loss_fn, params, batch = make_problem(6)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    vector = jax.tree.map(jnp.ones_like, params)
    found = jb.hessian_vector_product(loss_fn, low, vector, batch)
    wanted = jb.hessian_vector_product(loss_fn, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low), vector, batch)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("model", [jb.SimpleCNN(dtype=jnp.float64), jb.MLP((9,), dtype=jnp.float64)], ids=["simple_cnn", "mlp"])
def test_networks_of_the_house_have_hessian_vector_products(model, x64):
    dataset = jb.load_dataset("digits")
    loss_fn = jb.classification_task(model, dataset).loss_fn
    batch = jnp.asarray(dataset.train_images[:6]), jnp.asarray(dataset.train_labels[:6])
    params = model.init(jax.random.key(1), jnp.zeros((1, 28, 28, 1)))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    vector = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    gradient = jax.jit(lambda t: jax.grad(lambda p: loss_fn(p, batch).mean())(jax.tree.map(lambda a, b: a + t * b, params, vector)))
    wanted = jax.tree.map(lambda a, b: (a - b) / 2e-6, gradient(1e-6), gradient(-1e-6))
    found = jb.hessian_vector_product(loss_fn, params, vector, batch, microbatch_size=4)
    scale = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    assert scale > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * scale), found, wanted)


def test_examples_that_are_coupled_as_by_batch_normalisation_are_those_of_the_microbatch(x64):
    def loss_fn(w, x):  # as batch normalisation in training: the moments are the batch's, and an aux
        x = x @ w
        moments = x.mean(0), x.var(0)
        return ((x - moments[0][None]) / jnp.sqrt(moments[1] + 1)[None]).sum(-1) ** 3, moments

    w, x = jnp.cos(jnp.arange(6.0)).reshape(3, 2), jnp.sin(jnp.arange(24.0)).reshape(8, 3)
    ghost = lambda w: jnp.mean(jnp.stack([loss_fn(w, part)[0].mean() for part in (x[:4], x[4:])]))
    vector = jnp.sin(w)
    for size, mean in ((None, lambda w: loss_fn(w, x)[0].mean()), (4, ghost)):
        found = jb.hessian_vector_product(loss_fn, w, vector, x, microbatch_size=size, has_aux=True)
        np.testing.assert_allclose(found, jax.jvp(jax.grad(mean), (w,), (vector,))[1], atol=1e-10)


def test_products_that_are_not_finite_give_nan():
    loss = lambda w, x: jnp.sqrt(w[0] - 2) * x
    found = jb.hessian_eigenvalues(loss, jnp.ones(3), jnp.ones(2), key=KEY)
    assert np.isnan(np.concatenate(found)).all()
    assert jb.hessian_trace(loss, jnp.ones(3), jnp.ones(2), 2, key=KEY).n == 0


def test_the_same_program_is_found_again(monkeypatch):
    compiled = []
    monkeypatch.setattr(compiling, "compile_ahead", lambda function, *args: compiled.append(function.lower(*args).as_text()) or function)
    for key, shift in ((0, 0.0), (1, 1.0)):
        jb.hessian_eigenvalues(lambda w, x: quadratic(w, x), jnp.full(3, shift), rows(3.0, 2.0, 1.0), key=jax.random.key(key))
    assert len(compiled) == 4 and compiled[:2] == compiled[2:]


def test_one_curvature_compiles_once_for_many_parameters(monkeypatch):
    compile_ahead, compiled, batch = compiling.compile_ahead, [], rows(3.0, 2.0, 1.0, -1.0)
    monkeypatch.setattr(compiling, "compile_ahead", lambda *args: compiled.append(args) or compile_ahead(*args))
    loss_fn = lambda w, x: 0.25 * (x * w[None] ** 4).sum(-1)
    shared, at = curvature.Curvature(loss_fn, jnp.zeros(4), batch), jnp.arange(4.0)
    first = shared.eigenvalues(jnp.ones(4), key=KEY, num_steps=3)
    values, trace = shared.eigenvalues(at, 2, key=KEY, num_steps=3), shared.trace(at, 2, key=KEY)
    assert len(compiled) == 2  # Lanczos' steps, and a product alone
    shared.eigenvalues(at, key=KEY, num_steps=2)
    assert len(compiled) == 3
    wanted = jb.hessian_eigenvalues(loss_fn, at, batch, 2, key=KEY, num_steps=3)
    assert jax.tree.all(jax.tree.map(np.array_equal, values, wanted)) and trace == jb.hessian_trace(loss_fn, at, batch, 2, key=KEY)
    assert values.largest[0] != first.largest[0]


def test_the_line_goes_through_both_ends_exactly():
    loss_fn, params, batch = make_problem(10)
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    found = jb.loss_along_line(loss_fn, params, other, batch, np.linspace(0, 1, 5), microbatch_size=3)
    np.testing.assert_allclose(found[jnp.array([0, 4])], [loss_fn(p, batch).mean() for p in (params, other)], rtol=1e-6)
    assert found.shape == (5,)


def test_refusals(problem):
    loss_fn, params, batch = problem
    for settings, message in (
        ({"count": 0}, "count=0"),
        ({"count": 64}, "count=64 must be between 1 and the number of parameters, 63"),
        ({"count": 3, "num_steps": 2}, "num_steps=2 must be at least count=3"),
        ({"microbatch_size": 0}, "microbatch_size=0"),
    ):
        with pytest.raises(ValueError, match=message):
            jb.hessian_eigenvalues(loss_fn, params, batch, **settings, key=KEY)
    with pytest.raises(ValueError, match="num_samples=0"):
        jb.hessian_trace(loss_fn, params, batch, 0, key=KEY)
    with pytest.raises(ValueError, match="one loss per example"):
        jb.hessian_trace(lambda p, b: loss_fn(p, b).mean(), params, batch, key=KEY)
    with pytest.raises(ValueError, match=r"other\['out'\] has shape \(2,\)"):
        jb.loss_along_line(loss_fn, params, params | {"out": jnp.ones(2)}, batch, [0.0])
    with pytest.raises(ValueError, match="vector must be a pytree like params"):
        jb.hessian_vector_product(loss_fn, params, {}, batch)
    for points in ([], [0.0, np.nan]):
        with pytest.raises(ValueError, match="points="):
            jb.loss_along_line(loss_fn, params, params, batch, points)
