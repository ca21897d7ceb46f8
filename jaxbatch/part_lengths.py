"""The lengths of the parts of a batch that need not divide it: as equal as whole examples allow.

A part of one example beside a part of 64 would count as much where parts count alike: in the running moments of batch normalisation,
which each part updates in turn, and as a measurement of the noise. And the moments of one example are no moments.

Axes: B examples in a batch.
"""

from collections.abc import Iterator

from jaxbatch.batches import even_part


def part_lengths(batch_size: int, at_most: int) -> dict[int, int]:
    """The fewest parts of ``at_most`` examples: how many of them have which length. Lengths differ by 1 at most, longer parts come first.

    Example:
        >>> part_lengths(64, 16), part_lengths(65, 64), part_lengths(11, 4)
        ({16: 4}, {33: 1, 32: 1}, {4: 2, 3: 1})
    """
    count = -(-batch_size // at_most)
    shorter, longer = divmod(batch_size, count)
    return {length: number for length, number in ((shorter + 1, longer), (shorter, count - longer)) if number}


def part_size(batch_size: int, at_most: int | None) -> int:
    """The most examples in a part of ``at_most``: a divisor of the batch size if one is close below. ``None``: all.

    Example:
        >>> part_size(12, 5), part_size(12, 60), part_size(12, None)
        (4, 12, 12)
    """
    return batch_size if at_most is None else even_part(batch_size, at_most)


def part_slices(batch_size: int, at_most: int) -> Iterator[slice]:
    """The parts one after another, as slices of a batch.

    Example:
        >>> [part.stop for part in part_slices(11, 4)]
        [4, 8, 11]
    """
    start = 0
    for length, number in part_lengths(batch_size, at_most).items():
        for _ in range(number):
            yield slice(start, start + length)
            start += length
