"""Texts: the generated language and its entropy, the official file, sequences."""

import hashlib

import numpy as np
import pytest

import jaxbatch as jb
from jaxbatch.data import generated, prepared, text
from jaxbatch.data.generated import ALPHABET, NUM_GROUPS, NUM_WORDS, SENTENCE, entropy_rate, generate_language, spellings
from jaxbatch.data.published import FileFacts

TEXT = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 3


def test_the_language_is_the_same_everywhere():
    tokens = generate_language()
    assert tokens.dtype == np.uint8 and tokens.shape == (1_200_000,)
    assert hashlib.sha256(tokens.tobytes()).hexdigest() == "ee299591601e77b5c34fd08a48908607a205fad81c6808aaa12c6375e32a62ae"
    np.testing.assert_array_equal(generate_language(7), tokens[: 7 * SENTENCE])  # a longer text begins with the shorter one


def zipf():
    shares = 1 / np.arange(1, NUM_WORDS + 1)
    return shares / shares.sum()


def likely_words(sentence, place):
    """The probabilities of the words at a place of a sentence, from the words before: the language by its description."""
    if place >= 6:
        return np.eye(NUM_WORDS)[sentence[place - 6]]
    first = 0 if place in (0, 3) else sentence[place - 1] % NUM_GROUPS * (NUM_WORDS // NUM_GROUPS)
    return np.roll(zipf(), first)


def words_of(tokens):
    """Numbers of words, by sentence; every token is checked."""
    parts = tokens.reshape(-1, 8, 4)
    assert (parts[:, :-1, 3] == ALPHABET.index(" ")).all() and (parts[:, -1, 3] == ALPHABET.index(".")).all()
    known = {tuple(letters): number % NUM_WORDS for number, letters in enumerate(spellings().reshape(-1, 3).tolist())}
    assert len(known) == 3 * NUM_WORDS
    return np.array([[known[tuple(letters)] for letters in sentence] for sentence in parts[:, :, :3].tolist()])


def test_probabilities_are_zipf_s_law_and_the_entropy_is_the_closed_form():
    shares = np.diff(generated._cumulative().astype(np.float64), prepend=0) / 2**32
    assert generated._cumulative()[-1] == 2**32
    np.testing.assert_allclose(shares, zipf(), rtol=1e-6)
    np.testing.assert_allclose(entropy_rate(), -6 * (zipf() @ np.log2(zipf())) / 32, rtol=1e-7)


def test_an_exact_predictor_of_words_reaches_the_entropy_on_the_whole_text():
    tokens = generate_language()
    words = words_of(tokens)
    bits = np.zeros(len(words))
    for place in range(6):
        first = 0 if place in (0, 3) else words[:, place - 1] % NUM_GROUPS * (NUM_WORDS // NUM_GROUPS)
        bits -= np.log2(zipf()[(words[:, place] - first) % NUM_WORDS])
    np.testing.assert_array_equal(words[:, 6:], words[:, :2])
    error = bits.std() / SENTENCE / np.sqrt(len(bits))
    assert error < 0.001
    np.testing.assert_allclose(bits.mean() / SENTENCE, entropy_rate(), atol=4 * error)


def test_an_exact_predictor_of_tokens_reaches_the_entropy():
    """Letter by letter: of the words that begin as this one does, the share that goes on with each letter."""
    tokens = generate_language(400)
    letters, bits = spellings(), []
    for sentence, spelled in zip(words_of(tokens), tokens.reshape(-1, 8, 4), strict=True):
        for place in range(8):
            shares, own = likely_words(sentence, place), letters[(0, 1, 2, 0, 1, 2, 0, 1)[place]]
            for column in range(3):
                chances = np.bincount(own[:, column], shares, len(ALPHABET)) / shares.sum()
                np.testing.assert_allclose(chances.sum(), 1)
                bits.append(-np.log2(chances[spelled[place, column]]))
                shares = shares * (own[:, column] == spelled[place, column])
    per_sentence = np.array(bits).reshape(400, -1).sum(1)
    np.testing.assert_allclose(per_sentence.mean() / SENTENCE, entropy_rate(), atol=4 * per_sentence.std() / SENTENCE / 20)


def test_few_tokens_of_context_do_not_suffice():
    tokens = generate_language().astype(np.int64)

    def entropy(values):
        shares = np.unique(values, return_counts=True)[1] / len(values)
        return -(shares * np.log2(shares)).sum()

    context, bounds = np.zeros(len(tokens), np.int64), []
    for length in range(5):
        bounds.append(entropy(context * 28 + tokens) - entropy(context))
        context = np.roll(context, 1) + 28**length * np.roll(tokens, 1)
    assert np.diff(bounds).max() < 0 and bounds[0] > 4 and bounds[4] > 1.5 * entropy_rate()


def test_the_parts_of_the_generated_text():
    dataset = jb.load_text("generated")
    parts = [dataset.train_tokens, dataset.validation_tokens, dataset.test_tokens]
    assert [len(part) for part in parts] == [1_000_000, 100_000, 100_000]
    assert all(len(part) % SENTENCE == 0 for part in parts)  # so that sequences of 32, 64, ... tokens begin where sentences do
    assert dataset.vocab_size == 28 and dataset.entropy == entropy_rate()
    rows = jb.sequences(dataset.validation_tokens, 64)
    assert all(dataset.decode(row[:64]).endswith(".") for row in rows)


def test_sequences_predict_every_token_once():
    tokens = np.arange(100, dtype=np.uint8)
    rows = jb.sequences(tokens, 7)
    assert rows.shape == (14, 8) and rows.dtype == np.uint8
    np.testing.assert_array_equal(rows[:, 1:].ravel(), np.arange(1, 99))
    np.testing.assert_array_equal(rows[:, :-1].ravel(), np.arange(98))
    assert jb.sequences(tokens, 99).shape == (1, 100)
    with pytest.raises(ValueError, match="length=100: an example takes 101 tokens, and the text has 100. Take shorter examples."):
        jb.sequences(tokens, 100)
    with pytest.raises(ValueError, match="length=0 must be a whole number of at least 1."):
        jb.sequences(tokens, 0)


@pytest.fixture
def small_file(tmp_path, monkeypatch):
    """A text in place of the official one."""
    monkeypatch.setattr(text, "TINY_SHAKESPEARE", FileFacts(len(TEXT), hashlib.sha256(TEXT).hexdigest()))
    (tmp_path / "tiny_shakespeare").mkdir()
    (tmp_path / "tiny_shakespeare" / "input.txt").write_bytes(TEXT)
    return tmp_path


@pytest.mark.parametrize("folder", [".", "tiny_shakespeare"])
def test_the_file_is_found_under_the_folder_and_in_it(cache, small_file, folder):
    dataset = jb.load_text("tiny_shakespeare", data_dir=small_file / folder)
    parts = [dataset.train_tokens, dataset.validation_tokens, dataset.test_tokens]
    assert [len(part) for part in parts] == [164, 9, 10]
    assert "".join(map(dataset.decode, parts)).encode() == TEXT and dataset.entropy is None
    assert dataset.vocab_size == len(dataset.alphabet) == len(set(TEXT))


def test_a_broken_file_is_refused(cache, small_file):
    path = small_file / "tiny_shakespeare" / "input.txt"
    path.write_bytes(TEXT[:-1])
    with pytest.raises(ValueError, match=r"tiny_shakespeare: .*input.txt: truncated, 182 bytes where the official file has 183"):
        jb.load_text("tiny_shakespeare", data_dir=small_file)
    path.write_bytes(TEXT[:-1] + b"!")
    with pytest.raises(ValueError, match="checksum"):
        jb.load_text("tiny_shakespeare", data_dir=small_file)


@pytest.mark.filterwarnings("ignore")  # TFDS and protobuf warn as they are imported
def test_no_network_is_one_line(cache, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(ConnectionError, match="tiny_shakespeare: could not be downloaded .* Put input.txt into .*'generated'") as error:
        jb.load_text("tiny_shakespeare", data_dir=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_the_file_is_downloaded_once_through_tfds_whose_digest_is_ours(cache, small_file, monkeypatch):
    import tensorflow_datasets as tfds

    from jaxbatch.data.published import TINY_SHAKESPEARE

    ((url, info),) = tfds.builder("tiny_shakespeare", data_dir=str(small_file)).url_infos.items()
    assert (url.rsplit("/", 1)[-1], info.size, info.checksum) == ("input.txt", *TINY_SHAKESPEARE)
    asked = []

    def download(self, urls):
        asked.append(urls)
        return dict.fromkeys(urls, small_file / "tiny_shakespeare" / "input.txt")

    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    monkeypatch.setattr(prepared, "check_reachable", lambda url: None)
    for _ in range(2):
        assert len(jb.load_text("tiny_shakespeare").train_tokens) == 164
    assert len(asked) == 1


def test_the_official_file(real_data_dir):
    if not any((real_data_dir / place).is_file() for place in ("tiny_shakespeare/input.txt", "input.txt")):
        pytest.skip("no tiny_shakespeare under JAXBATCH_DATA_DIR")
    dataset = jb.load_text("tiny_shakespeare", data_dir=real_data_dir)
    assert [len(part) for part in dataset[1:4]] == [1_003_854, 55_770, 55_770] and dataset.vocab_size == 65
    assert dataset.decode(dataset.train_tokens[:30]) == "First Citizen:\nBefore we proce"


def test_unknown_names_and_texts_among_images():
    with pytest.raises(ValueError, match=r"unknown text name='shakespeare'. Did you mean 'tiny_shakespeare'\? Known: generated, tiny_shakespeare."):
        jb.load_text("shakespeare")
    with pytest.raises(ValueError, match=r"name='generated' is a text: jb.load_text\('generated'\) loads it."):
        jb.load_dataset("generated")


def test_more_of_the_generated_language_to_train_on_leaves_the_other_parts_as_they_are():
    usual, longer, shorter = (jb.load_text("generated", train_tokens=count) for count in (None, 1_200_000, 320))
    for other in (longer, shorter):
        np.testing.assert_array_equal(other.validation_tokens, usual.validation_tokens)
        np.testing.assert_array_equal(other.test_tokens, usual.test_tokens)
    assert (len(usual.train_tokens), len(longer.train_tokens)) == (1_000_000, 1_200_000)
    np.testing.assert_array_equal(longer.train_tokens[:1_000_000], usual.train_tokens)
    np.testing.assert_array_equal(shorter.train_tokens, usual.train_tokens[:320])
    text = usual.decode(longer.train_tokens)
    assert all(len(sentence) == 31 for sentence in text.split(".")[:-1])
    assert text[1_000_000:1_000_320] not in usual.decode(np.concatenate([usual.validation_tokens, usual.test_tokens]))


@pytest.mark.parametrize(
    ("name", "count", "message"), [("generated", 33, "whole sentences"), ("generated", 0, "whole"), ("tiny_shakespeare", 64, "alone")]
)
def test_numbers_of_training_tokens_that_cannot_be(name, count, message):
    with pytest.raises(ValueError, match=message):
        jb.load_text(name, train_tokens=count)
