"""Packs texts of different lengths into rows of one length, so that few tokens are padding.

Axes: S rows, T tokens to predict in a row.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Integer

PADDING = 0  # the number of the text that padding belongs to


class PackedText(NamedTuple):
    """Rows of tokens in which several texts stand one after another; ``segments`` says which text a token belongs to.

    The texts of a row are numbered from 1; number 0 is padding.
    """

    tokens: Integer[np.ndarray | Array, "S T_and_1"]
    segments: Integer[np.ndarray | Array, "S T_and_1"]


def pack_texts(texts: Sequence[Any], length: int) -> PackedText:
    """Packs texts into rows of ``length`` tokens to predict, and one more.

    A text goes into the first row that has room for it. A text that is longer than a row is cut; the last token of a piece is
    the first of the next one, so that every token of a text but its first is predicted once. A text of one token predicts
    nothing, and is left out.

    Args:
        texts: the tokens of each text, NumPy arrays ``(tokens,)`` of whole numbers.
        length: T, tokens to predict in a row that one text fills.

    Raises:
        ValueError: ``length`` is below 1, a text is not a one-dimensional array of whole numbers, or no text has two tokens.

    Example:
        >>> packed = pack_texts([np.array([5, 6, 7]), np.array([8, 9, 10, 11]), np.array([12, 13])], 4)
        >>> packed.tokens.tolist(), packed.segments.tolist()
        ([[5, 6, 7, 12, 13], [8, 9, 10, 11, 0]], [[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]])

    References:
        Krell et al., `Efficient Sequence Packing without Cross-contamination <https://arxiv.org/abs/2107.02027>`_, 2021.
    """
    if length < 1:
        raise ValueError(f"length={length} tokens must be at least 1.")
    pieces = []
    for number, text in enumerate(texts):
        if not isinstance(text, np.ndarray) or text.ndim != 1 or not np.issubdtype(text.dtype, np.integer):
            kind = f"{text.dtype} of shape {text.shape}" if isinstance(text, np.ndarray) else type(text).__name__
            raise ValueError(f"texts[{number}] is {kind} and must be a NumPy array of whole numbers of shape (tokens,).")
        pieces += [text[start : start + length + 1] for start in range(0, len(text) - 1, length)]
    if not pieces:
        raise ValueError(f"texts holds {len(texts)} texts, and none has the two tokens that a prediction needs.")
    rows: list[list[np.ndarray]] = []
    room: list[int] = []
    first_with_room = 0  # rows before it hold no two tokens more, so that long lists of texts are packed in little time
    for piece in pieces:
        while first_with_room < len(rows) and room[first_with_room] < 2:
            first_with_room += 1
        row = next((row for row in range(first_with_room, len(rows)) if room[row] >= len(piece)), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(length + 1)
        rows[row].append(piece)
        room[row] -= len(piece)
    tokens = np.zeros((len(rows), length + 1), np.result_type(*pieces))
    segments = np.full(tokens.shape, PADDING, np.int32)
    for number, row_pieces in enumerate(rows):
        filled = np.concatenate(row_pieces)
        tokens[number, : len(filled)] = filled
        segments[number, : len(filled)] = np.repeat(np.arange(1, len(row_pieces) + 1), [len(piece) for piece in row_pieces])
    return PackedText(tokens, segments)
