"""Packed texts: which text stands where, and a task whose loss is per predicted token however batches are cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbatch as jb
from jaxbatch.data.packing import _first_fit

VOCAB = 9
MODEL = jb.TransformerLM(VOCAB, width=8, num_layers=1, num_heads=2)


def texts_of(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).astype(np.uint8) for length in lengths]


@given(st.lists(st.integers(0, 23), max_size=12).filter(lambda lengths: max(lengths, default=0) > 1), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_every_token_but_the_first_of_a_text_is_predicted_once_after_the_token_before_it(lengths, length):
    texts = [np.arange(100 * number, 100 * number + size) for number, size in enumerate(lengths)]
    packed = jb.pack_texts(texts, length)
    assert packed.tokens.shape == packed.segments.shape == (len(packed.tokens), length + 1)
    same = (packed.segments[:, 1:] == packed.segments[:, :-1]) & (packed.segments[:, 1:] > 0)
    pairs = sorted(zip(packed.tokens[:, :-1][same].tolist(), packed.tokens[:, 1:][same].tolist(), strict=True))
    assert pairs == sorted((token - 1, token) for text in texts for token in text[1:].tolist())
    assert not packed.tokens[packed.segments == 0].any()


def test_short_texts_fill_the_room_that_longer_ones_leave():
    packed = jb.pack_texts([np.full(size, size) for size in (6, 7, 4, 2, 3)], 9)
    assert packed.tokens.tolist() == [[6] * 6 + [4] * 4, [7] * 7 + [2] * 2 + [0], [3] * 3 + [0] * 7]
    assert packed.segments[1].tolist() == [1] * 7 + [2] * 2 + [0]


@pytest.mark.parametrize(
    ("texts", "length", "message"),
    [
        ([np.arange(3)], 0, "length=0 must be a whole number of at least 1"),
        ([np.arange(1), np.arange(0)], 4, "texts holds 2 texts, and none has the two tokens"),
        ([], 4, "texts holds 0 texts"),
        ([np.arange(3), np.zeros(4)], 4, r"texts\[1\] is float64 of shape \(4,\)"),
        (["a text"], 4, r"texts\[0\] is str"),
    ],
)
def test_what_cannot_be_packed(texts, length, message):
    with pytest.raises(ValueError, match=message):
        jb.pack_texts(texts, length)


def packed_task(**changes):
    texts = texts_of(3, 17, 5, 6, 2, 9, 12, 4, 4, 30, 7, 1, 3)
    return jb.packed_language_task(MODEL, jb.pack_texts(texts, 12), jb.pack_texts(texts[:5], 12), VOCAB, **changes), texts


def test_a_row_s_loss_is_the_sum_of_its_texts_losses_each_alone():
    task, _ = packed_task()
    texts = texts_of(4, 6)
    packed = jb.PackedText(*map(jnp.asarray, jb.pack_texts(texts, 12)))
    params = task.init(jax.random.key(1))
    alone = []
    for text in texts:
        shares = jax.nn.log_softmax(jax.jit(MODEL.apply)(params, jnp.asarray(text[None, :-1])))
        alone.append(-shares[0, jnp.arange(len(text) - 1), text[1:].astype(int)].sum())
    losses = jax.jit(task.loss_fn)(params, packed)
    np.testing.assert_allclose(losses.total, [sum(alone)], rtol=1e-5)
    assert losses.weight.tolist() == [3 + 5]
    metrics = jax.jit(task.metrics_fn)(params, packed)
    np.testing.assert_allclose(metrics["bits_per_token"].total, losses.total / np.log(2), rtol=1e-6)
    assert metrics["accuracy"].weight.tolist() == [8]


def test_packing_changes_no_mean_and_no_gradient():
    """One text a row, and many texts a row, have the same mean loss per token and the same gradient."""
    texts, params = texts_of(3, 9, 5, 6, 2, 9, 4), packed_task()[0].init(jax.random.key(1))
    found = []
    for rows in (jb.pack_texts(texts, 12), jb.PackedText(*map(np.concatenate, zip(*(jb.pack_texts([text], 12) for text in texts), strict=True)))):
        task = jb.packed_language_task(MODEL, rows, rows, VOCAB)
        gradients = jax.jit(functools.partial(jb.losses_and_mean_gradient, task.loss_fn))
        losses, gradient = gradients(params, task.train_data)
        found.append(
            (jb.make_evaluate(task.metrics_fn, len(rows.tokens))(params, task.test_data)["loss"], losses.total.sum() / losses.weight.sum(), gradient)
        )
    assert len(texts) > len(jb.pack_texts(texts, 12).tokens)
    assert found[0][0] == pytest.approx(float(found[0][1]), rel=1e-5)
    assert found[0][1] == pytest.approx(float(found[1][1]), rel=1e-5)
    for one, other in zip(*(jax.tree.leaves(gradient) for *_, gradient in found), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("microbatch_size", [1, 2, 3])
def test_training_is_the_same_however_rows_of_unequal_weight_are_cut(microbatch_size):
    ends = []
    for size in (None, microbatch_size):
        task, _ = packed_task(microbatch_size=size)
        assert task.num_examples >= 5
        *_, last = jb.fit(task, jb.FitConfig(optax.sgd(0.3), 4, jb.epochs(3)))
        ends.append(last)
    np.testing.assert_allclose(ends[1]["test_loss"], ends[0]["test_loss"], rtol=1e-4)
    assert ends[0]["tokens"] == ends[0]["examples"] * 12


def test_rows_that_would_train_wrongly_are_refused():
    rows = jb.pack_texts(texts_of(5, 6), 8)
    with pytest.raises(ValueError, match=r"validation.tokens go from .* and vocab_size=2 allows"):
        jb.packed_language_task(MODEL, jb.PackedText(rows.tokens * 0, rows.segments), rows, 2)
    with pytest.raises(ValueError, match=r"train: tokens \(1, 8\) and segments \(2, 9\)|train: tokens \(2, 8\) and segments \(2, 9\)"):
        jb.packed_language_task(MODEL, rows._replace(tokens=rows.tokens[:, :-1]), rows, VOCAB)


def first_fit(lengths, size):
    """Row and start of each piece: every row is looked at from the first on."""
    used, starts = [], []
    for length in lengths:
        row = next((row for row, taken in enumerate(used) if taken + length <= size), len(used))
        used += [0] * (row == len(used))
        starts.append((row, used[row]))
        used[row] += length
    return starts


@given(st.lists(st.integers(2, 10), min_size=1, max_size=200), st.integers(10, 14))
@settings(max_examples=50, deadline=None)
def test_a_piece_goes_into_the_first_row_that_has_room(lengths, size):
    assert _first_fit(lengths, size) == first_fit(lengths, size)


def test_packing_grows_in_proportion_to_the_texts():
    """Counted, not timed: the comparisons of a search through the rows would be ten thousand times as many."""
    looks = 0

    class Length(int):
        def __gt__(self, other):
            nonlocal looks
            looks += 1
            return int(self) > int(other)

    count = 20_000
    lengths = np.random.default_rng(0).integers(2, 257, count).tolist()
    _first_fit(list(map(Length, lengths)), 257)
    assert count < looks < 40 * count


def test_types_that_no_type_of_whole_numbers_holds():
    with pytest.raises(ValueError, match="texts are of int64 and uint64, which no type of whole numbers holds"):
        jb.pack_texts([np.arange(3), np.arange(3).astype(np.uint64)], 4)
