"""Packs texts of different lengths into rows of one length, so that few tokens are padding.

Axes: S rows, T tokens to predict in a row.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Integer

from jaxbatch.kinds import checked

PADDING = 0  # the number of the text that padding belongs to


class PackedText(NamedTuple):
    """Rows of tokens in which several texts stand one after another; ``segments`` says which text a token belongs to.

    The texts of a row are numbered from 1; number 0 is padding.
    """

    tokens: Integer[np.ndarray | Array, "S T_and_1"]
    segments: Integer[np.ndarray | Array, "S T_and_1"]


@checked
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
    pieces, kinds = [], set()
    for number, text in enumerate(texts):
        if not isinstance(text, np.ndarray) or text.ndim != 1 or not np.issubdtype(text.dtype, np.integer):
            kind = f"{text.dtype} of shape {text.shape}" if isinstance(text, np.ndarray) else type(text).__name__
            raise ValueError(f"texts[{number}] is {kind} and must be a NumPy array of whole numbers of shape (tokens,).")
        kinds.add(text.dtype)
        pieces += [text[start : start + length + 1] for start in range(0, len(text) - 1, length)]
    if not pieces:
        raise ValueError(f"texts holds {len(texts)} texts, and none has the two tokens that a prediction needs.")
    if not np.issubdtype(np.result_type(*kinds), np.integer):
        raise ValueError(f"texts are of {' and '.join(sorted(map(str, kinds)))}, which no type of whole numbers holds: take one type for all.")
    starts = _first_fit([len(piece) for piece in pieces], length + 1)
    tokens = np.zeros((max(row for row, _ in starts) + 1, length + 1), np.result_type(*kinds))
    segments = np.full(tokens.shape, PADDING, np.int32)
    texts_in = np.zeros(len(tokens), int)
    for piece, (row, start) in zip(pieces, starts, strict=True):
        texts_in[row] += 1
        tokens[row, start : start + len(piece)] = piece
        segments[row, start : start + len(piece)] = texts_in[row]
    return PackedText(tokens, segments)


def _first_fit(lengths: list[int], size: int) -> list[tuple[int, int]]:
    """Row and start of each piece: the first row with room for it, found in a binary tree of the most room in a range of rows.

    Example:
        >>> _first_fit([3, 4, 2], 5)
        [(0, 0), (1, 0), (0, 3)]
    """
    leaves = 1 << (len(lengths) - 1).bit_length()  # there are as many rows as pieces at most
    most = [size] * (2 * leaves)  # of node n, whose children are 2n and 2n + 1; the rows' own are the last half
    starts = []
    for length in lengths:
        node = 1
        while node < leaves:
            node *= 2
            if most[node] < length:
                node += 1
        room = most[node]
        starts.append((node - leaves, size - room))
        most[node] = room - length
        while node > 1:
            node //= 2
            left, right = most[2 * node], most[2 * node + 1]
            larger = left if left > right else right
            if most[node] == larger:
                break
            most[node] = larger
    return starts
