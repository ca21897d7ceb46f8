"""Loads a text by name, as arrays of tokens: ``load_text("generated")``; and cuts tokens into sequences.

Axes: N tokens, S sequences.
"""

import os
import pathlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer

from jaxbatch.data import TEXTS, did_you_mean, folders_to_search
from jaxbatch.data.generated import ALPHABET, SENTENCE, entropy_rate, generate_language
from jaxbatch.data.official import verify
from jaxbatch.data.prepared import download_files
from jaxbatch.data.published import TINY_SHAKESPEARE
from jaxbatch.kinds import checked

_FILE = "input.txt"  # of tiny_shakespeare


class TextDataset(NamedTuple):
    """Tokens of a text, on the host, in the order of the text; whole numbers from 0 to ``vocab_size - 1``."""

    name: str
    train_tokens: Integer[np.ndarray, "N"]
    validation_tokens: Integer[np.ndarray, "_"]
    test_tokens: Integer[np.ndarray, "_"]
    vocab_size: int
    entropy: float | None = None  # bits per token of the best possible predictor; None: not known
    alphabet: str = ""  # the symbol of each token, if tokens are symbols

    def decode(self, tokens: Integer[np.ndarray, "_"]) -> str:
        """The text of some tokens.

        Example:
            >>> dataset = load_text("generated")
            >>> dataset.decode(dataset.train_tokens[:32])
            'wef zup vuh zil zea gej wef zup.'
        """
        return "".join(self.alphabet[token] for token in tokens)


@checked
def load_text(name: str, *, data_dir: str | os.PathLike | None = None, train_tokens: int | None = None) -> TextDataset:
    """Loads a text by name. Tokens are characters, which here are bytes too, so that bits per token are bits per byte.

    Args:
        name: ``generated`` is made here: 1,000,000 + 100,000 + 100,000 tokens of a language whose entropy is known exactly
            (:mod:`jaxbatch.data.generated` describes it). ``tiny_shakespeare`` is the official file ``input.txt`` of 1,115,394
            characters, 65 different ones; the first 90% are for training, the next 5% for validation, the rest for the test.
        data_dir: folder with ``tiny_shakespeare/input.txt`` or ``input.txt``. Default: the environment variable
            ``JAXBATCH_DATA_DIR``, else jaxbatch's own cache folder, into which the file is downloaded.
        train_tokens: of ``generated``, how many tokens to train on, a multiple of 32, the length of a sentence. Default: 1,000,000.
            The validation and test parts stay the same: longer training texts go on after them.

    Returns:
        A :class:`TextDataset` of ``uint8`` tokens. ``entropy`` of ``generated`` is what no model can beat on average, in bits per
        token. A model reaches it on sequences of a multiple of 32 tokens, which begin where a sentence begins; on others it lacks the
        beginning of a sentence.

    Raises:
        ValueError: the name is unknown, the file is truncated or has a wrong checksum, or ``train_tokens`` is not a multiple of 32
            of at least 32, or is given for another text.
        FileNotFoundError: ``data_dir`` does not exist.
        ConnectionError: there is no local file, and no network.

    Example:
        >>> dataset = load_text("generated")
        >>> len(dataset.train_tokens), dataset.vocab_size, round(dataset.entropy, 4)
        (1000000, 28, 1.0412)
    """
    if name == "generated":
        return _generated(1_000_000 if train_tokens is None else train_tokens)
    if train_tokens is not None:
        raise ValueError(f"train_tokens={train_tokens} is for the generated language alone: a file has the tokens that it has.")
    if name != "tiny_shakespeare":
        raise ValueError(f"unknown text name={name!r}.{did_you_mean(name, TEXTS)} Known: {', '.join(TEXTS)}.")
    path = _find_file(name, data_dir)
    text = path.read_bytes()
    verify(text, TINY_SHAKESPEARE, f"{name}: {path}")
    symbols, tokens = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
    tokens = tokens.astype(np.uint8)
    first = int(0.9 * len(tokens))
    second = first + (len(tokens) - first) // 2
    return TextDataset(name, tokens[:first], tokens[first:second], tokens[second:], len(symbols), None, symbols.tobytes().decode("ascii"))


def _generated(train_tokens: int) -> TextDataset:
    """The generated language; its validation and test parts are tokens 1,000,000 to 1,200,000, whatever the training part."""
    if train_tokens < SENTENCE or train_tokens % SENTENCE:
        raise ValueError(f"train_tokens={train_tokens} must be a multiple of {SENTENCE} of at least {SENTENCE}: whole sentences.")
    tokens = generate_language(max(37_500, 37_500 + (train_tokens - 1_000_000) // SENTENCE))
    train = np.concatenate([tokens[:1_000_000], tokens[1_200_000:]])[:train_tokens]
    return TextDataset("generated", train, tokens[1_000_000:1_100_000], tokens[1_100_000:1_200_000], len(ALPHABET), entropy_rate(), ALPHABET)


@checked
def sequences(tokens: Integer[np.ndarray, "N"], length: int) -> Integer[np.ndarray, "S tokens"]:
    """Cuts a text into examples of ``length`` tokens to predict, each with the token before its first one.

    Every token but the first is predicted in one example at most; the last ones are left out if they fill no example.

    Args:
        tokens: the text.
        length: tokens to predict in an example.

    Returns:
        ``(S, length + 1)``; the last token of an example is the first one of the next.

    Raises:
        ValueError: ``length`` is below 1, or the text is too short for one example.

    Example:
        >>> sequences(np.arange(8), 3).tolist()
        [[0, 1, 2, 3], [3, 4, 5, 6]]
    """
    count = (len(tokens) - 1) // length
    if count < 1:
        raise ValueError(f"length={length}: an example takes {length + 1} tokens, and the text has {len(tokens)}. Take shorter examples.")
    return np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[: count * length : length].copy()


def _find_file(name: str, data_dir: str | os.PathLike | None) -> pathlib.Path:
    folders = folders_to_search(name, data_dir)
    for path in (folder / relative for folder in folders for relative in (f"{name}/{_FILE}", _FILE)):
        if path.is_file():
            return path
    return download_files(name, [_FILE], folders[0], embedded="generated")[0]
