"""What a stream gives, looked at part by part, because a wrong one would train wrongly or fail elsewhere under another name.

Axes: M examples in a part.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, PyTree

from jaxbatch.data.streaming import own
from jaxbatch.data.streams import Stream
from jaxbatch.hints import call_function, describe
from jaxbatch.states import check_integers

_END = object()


def checked_parts(
    stream: Stream, indices: Callable[[], Iterable[Int[np.ndarray, "M"]]], seed_epoch: tuple[int, int] = (0, 0), *, name: str = "train_data"
) -> Iterator[PyTree]:
    """The parts of a stream in order: as many as were asked for, each of as many examples, and these as ``stream.example`` says.

    Args:
        stream: the data set.
        indices: makes the indices of each part, the same at each call.
        seed_epoch: see :class:`jaxbatch.data.streams.Stream`.
        name: what the data set is called in an error message.

    Raises:
        ValueError: there are fewer or more parts, or one has another length, width, structure or type. Of too many parts it is raised
            before the last is yielded.

    Example:
        >>> from jaxbatch import ArrayStream
        >>> asked = lambda: [np.array([2, 0]), np.array([1])]
        >>> [part.tolist() for part in checked_parts(ArrayStream(np.array([5, 6, 7])), asked)]
        [[7, 5], [6]]
    """
    drawn = 0

    def drawn_indices():
        nonlocal drawn
        for part in indices():
            drawn += 1
            yield part

    given = call_function(
        f"{name}.parts", stream.parts, drawn_indices(), seed_epoch, gets="an iterable of the indices of each part and (seed, epoch)"
    )
    if not isinstance(given, Iterable):
        raise ValueError(f"{name}.parts must yield the examples of each part in order, but returned {describe(given)}. Make it a generator.")
    given, asked, number = iter(given), iter(indices()), 0
    length = _next_length(asked)
    while length is not None:
        examples, following = next(given, _END), _next_length(asked)
        if examples is _END:
            raise ValueError(f"{name}.parts gave {number} of {_count(indices)} parts: yield one for each array of indices.")
        number += 1
        if drawn < number:
            raise ValueError(f"{name}.parts gave part {number} before it took its indices: yield one part for each array of indices.")
        _check_part(examples, stream, length, name, number)
        if following is None:
            examples = own(examples)  # what ends the stream may take its memory away
            if next(given, _END) is not _END:
                raise ValueError(f"{name}.parts gave more than {number} parts, as many as were asked for: yield one for each array of indices.")
        yield examples
        length = following


def _next_length(parts: Iterator[np.ndarray]) -> int | None:
    part = next(parts, None)
    return None if part is None else len(part)


def _count(indices: Callable[[], Iterable]) -> int:
    return sum(1 for _ in indices())


def _check_part(examples: Any, stream: Stream, length: int, name: str, number: int) -> None:
    what = f"{name}.parts gave part {number}"
    structure: Any
    expected: Any
    leaves, structure = jax.tree_util.tree_flatten_with_path(examples)
    wanted, expected = jax.tree_util.tree_flatten_with_path(stream.example)
    if structure != expected:
        raise ValueError(f"{what} as {structure}, and {name}.example is {expected}: make them one structure, with an array at every *.")
    for (path, leaf), (_, example) in zip(leaves, wanted, strict=True):
        leaf_name, shape = jax.tree_util.keystr(path) or "an array", (length, *example.shape)
        if not isinstance(leaf, np.ndarray | np.generic | jax.Array):
            raise ValueError(f"{what} with {leaf_name} of the class {type(leaf).__name__}: use numpy.asarray.")
        if leaf.shape != shape:
            raise ValueError(f"{what} with {leaf_name} of shape {leaf.shape}: {shape} is wanted, {length} examples as in {name}.example.")
        kind, kept = (jax.dtypes.canonicalize_dtype(one) for one in (leaf.dtype, example.dtype))
        if kind != kept:
            raise ValueError(f"{what} with {leaf_name} of {leaf.dtype}, and {name}.example says {example.dtype}. Make them one type.")
    check_integers(examples, f"{name}.parts: ")
