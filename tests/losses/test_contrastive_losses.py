"""Contrastive losses against loops over pairs, in one piece and in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbatch as jb
from tests.conftest import shapes_unchecked


def cosines(a, b):
    a, b = (np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return a @ b.T


def info_nce(a, b, temperature):
    s = cosines(a, b) / temperature
    return [(np.log(np.exp(s[i]).sum()) + np.log(np.exp(s[:, i]).sum())) / 2 - s[i, i] for i in range(len(a))]


def nt_xent(a, b, temperature):
    s, count = cosines(np.concatenate([a, b]), np.concatenate([a, b])) / temperature, len(a)
    one = lambda i: np.log(sum(np.exp(s[i, j]) for j in range(2 * count) if j != i)) - s[i, (i + count) % (2 * count)]
    return [(one(i) + one(i + count)) / 2 for i in range(count)]


def sigmoid(a, b, temperature, bias=-3.0):
    z = cosines(a, b) / temperature + bias
    return [sum(np.log1p(np.exp(-z[i, j] if i == j else z[i, j])) for j in range(len(a))) for i in range(len(a))]


LOSSES = {
    "info_nce": (jb.info_nce, info_nce),
    "nt_xent": (jb.nt_xent, nt_xent),
    "sigmoid": (lambda a, b, t, **k: jb.sigmoid_contrastive(a, b, t, -3.0, **k), sigmoid),
}


def make_views(batch_size=7, dtype=np.float64):
    random = np.random.default_rng(0)
    return tuple(jnp.asarray(random.normal(size=(batch_size, 4)), dtype) for _ in range(2))


@pytest.mark.parametrize("name", LOSSES)
def test_a_loop_over_pairs_and_every_chunk(x64, name):
    ours, by_hand = LOSSES[name]
    a, b = make_views()
    np.testing.assert_allclose(jax.jit(ours)(a, b, 0.3), by_hand(a, b, 0.3), rtol=1e-12)
    both = lambda **chunk: jax.jit(jax.value_and_grad(lambda a, b, t: (jnp.arange(7.0) * ours(a, b, t, **chunk)).sum(), (0, 1, 2)))(a, b, 0.3)
    whole = both()
    for chunk_size in (1, 3, 9):
        found = both(chunk_size=chunk_size)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), found, whole)
    step = 1e-6
    differences = [(by_hand(a, b, 0.3 + sign * step) @ np.arange(7.0)) * sign / (2 * step) for sign in (1, -1)]
    np.testing.assert_allclose(whole[1][2], sum(differences), rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_lengths_do_not_matter_and_sums_are_in_float32(name):
    a, b = make_views(dtype=np.float32)
    loss = jax.jit(LOSSES[name][0], static_argnames="chunk_size")
    np.testing.assert_allclose(loss(3 * a, b / 7, 0.3), loss(a, b, 0.3), rtol=1e-5)
    low = loss(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), 0.3, chunk_size=3)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, loss(a.astype(jnp.bfloat16).astype(jnp.float32), b.astype(jnp.bfloat16).astype(jnp.float32), 0.3), rtol=1e-5)


def test_one_example_alone():
    a, b = make_views(1, np.float32)
    assert jb.info_nce(a, b, 0.1).item() == pytest.approx(0, abs=1e-5)  # nothing to be told apart from
    assert jb.nt_xent(a, b, 0.1).item() == pytest.approx(0, abs=1e-5)


def test_a_cold_temperature_overflows_nowhere():
    a = jnp.eye(4)
    for chunk_size in (None, 2):
        value, gradient = jax.jit(jax.value_and_grad(lambda a: jb.info_nce(a, jnp.roll(jnp.eye(4), 1, 0), 1e-3, chunk_size=chunk_size).mean()))(a)
        assert value.item() == pytest.approx(1000) and np.isfinite(gradient).all()


def test_a_vector_of_zeros_has_no_direction():
    gradient = jax.grad(lambda x: (jb.unit_length(x) * jnp.arange(4.0).reshape(2, 2)).sum())(jnp.array([[0.0, 0.0], [3.0, 4.0]]))
    assert gradient[0].tolist() == [0, 0] and np.isfinite(gradient).all()
    assert jb.unit_length(jnp.array([[3.0], [4.0]]), axis=0).ravel().tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("name", LOSSES)
def test_the_matrix_is_never_whole(optimized, name):
    a = b = jnp.ones((2048, 16))
    temporaries = lambda **chunk: (
        jax.jit(jax.value_and_grad(lambda a, b: LOSSES[name][0](a, b, 0.1, **chunk).mean(), (0, 1)))
        .lower(a, b)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )
    assert temporaries(chunk_size=64) < temporaries() / 6


def test_slips_are_named():
    a, b = make_views(dtype=np.float32)
    with shapes_unchecked(), pytest.raises(ValueError, match="must have the same shape"):
        jb.nt_xent(a, b[1:], 0.1)
    with pytest.raises(ValueError, match="temperature=0.0 must be above 0"):
        jb.nt_xent(a, b, 0.0)
    with pytest.raises(ValueError, match="chunk_size=0"):
        jb.info_nce(a, b, 0.1, chunk_size=0)


def contrastive(name, first, second, temperature, labels=None, same_label="left_out", bias=-3.0):
    """``info_nce``, ``nt_xent`` or ``sigmoid_contrastive`` by loops over pairs, in float64, without a difference of nearly equal numbers."""
    unit = [np.asarray(x, np.float64) / np.linalg.norm(np.asarray(x, np.float64), axis=1, keepdims=True) for x in (first, second)]
    count, labels = len(unit[0]), np.arange(len(unit[0])) if labels is None else np.asarray(labels)

    def told_from(similarities, own, of_rows, row):
        """One row: how well its own and those of its label are told from all others."""
        same = [j for j in range(len(similarities)) if of_rows[j] == of_rows[row] and j != own and similarities[j] is not None]
        left_out = same if same_label == "left_out" else []
        compared = [j for j in range(len(similarities)) if similarities[j] is not None and j not in left_out]
        belonging = [own] + (same if same_label == "positive" else [])
        one = lambda p: np.log1p(sum(np.exp(similarities[j] - similarities[p]) for j in compared if j != p))
        return np.mean([one(p) for p in belonging])

    if name == "info_nce":
        s = unit[0] @ unit[1].T / temperature
        return np.array([(told_from(list(s[i]), i, labels, i) + told_from(list(s[:, i]), i, labels, i)) / 2 for i in range(count)])
    if name == "nt_xent":
        views, of_views = np.concatenate(unit), np.concatenate([labels, labels])
        s = views @ views.T / temperature
        rows = [told_from([None if i == j else s[i, j] for j in range(2 * count)], (i + count) % (2 * count), of_views, i) for i in range(2 * count)]
        return np.reshape(rows, (2, count)).mean(0)
    z = unit[0] @ unit[1].T / temperature + bias
    losses = np.zeros(count)
    for i in range(count):
        for j in range(count):
            together = i == j or (same_label == "positive" and labels[i] == labels[j])
            if together or labels[i] != labels[j]:
                losses[i] += np.log1p(np.exp(-z[i, j] if together else z[i, j]))
    return losses


LABELS = ([0, 0, 1, 2, 2, 2, 3], [5] * 7, [-1, 4, 8, 0, 2, 9, 1])


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("same_label", ["left_out", "positive"])
@pytest.mark.parametrize("name", ["info_nce", "nt_xent", "sigmoid_contrastive"])
def test_examples_of_one_label(x64, name, same_label, labels):
    loss = getattr(jb, name)
    more = (-3.0,) if name == "sigmoid_contrastive" else ()
    a, b = make_views()
    expected = contrastive(name, a, b, 0.3, labels, same_label)
    values = lambda a, chunk_size=None: loss(a, b, 0.3, *more, labels=jnp.array(labels), same_label=same_label, chunk_size=chunk_size)
    slopes = [(contrastive(name, a.at[2, 1].add(sign * 1e-6), b, 0.3, labels, same_label).sum() * sign) / 2e-6 for sign in (1, -1)]
    for chunk_size in (None, 1, 3):
        np.testing.assert_allclose(values(a, chunk_size), expected, rtol=1e-12, atol=1e-14)
        gradient = jax.grad(lambda a: values(a, chunk_size).sum())(a)
        np.testing.assert_allclose(gradient[2, 1], sum(slopes), rtol=1e-6, atol=1e-9)
        assert np.isfinite(gradient).all()
    if len(set(labels)) == 7:  # every example of a kind of its own
        np.testing.assert_array_equal(values(a), loss(a, b, 0.3, *more))


def test_labels_that_are_refused():
    x = jnp.eye(3)
    with shapes_unchecked(), pytest.raises(ValueError, match=r"labels have shape \(2,\) and must be \(3,\)"):
        jb.info_nce(x, x, 0.1, labels=jnp.zeros(2, int))
    with shapes_unchecked(), pytest.raises(ValueError, match="same_label='other' must be 'left_out' or 'positive'"):
        jb.nt_xent(x, x, 0.1, labels=jnp.zeros(3, int), same_label="other")
