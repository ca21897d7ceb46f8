"""Sentences of pages whose numbers follow from the kept runs, and how they are brought up to date.

A sentence stands in its page as people wrote it, with numbers in it. Here it stands once more, with a field in place of every number, such as
``{ratio:.2f}``, and with a function that computes the fields from the records. Line breaks do not matter.
"""

import math
import re
import string
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxbatch.intervals import Interval

# A number, in which commas and points may be, with its interval and with what was left out, where it has them.
NUMBER = r"(?:[^\s\[\]()|.,]|[.,](?=\d))+(?:\s+\[[^\[\]]*\])?(?:\s+\(\d+ of \d+[^()]*\))?"


class Sentence(NamedTuple):
    """A sentence of a page."""

    page: str  # README.md, docs/split_backward.md, ...
    text: str  # with its fields
    numbers: Callable[[], Mapping[str, Any]]  # the fields from the records
    holds: Callable[[], bool] = lambda: True  # whether the records allow what its words say
    runs: tuple[str, ...] = ()  # the kept runs that it needs


def words_of(sentence: Sentence) -> str:
    """The sentence with its numbers."""
    return sentence.text.format(**sentence.numbers())


def is_allowed(sentence: Sentence) -> bool:
    """Whether the records give all its numbers, and allow its words."""
    numbers = [number for number in sentence.numbers().values() if isinstance(number, float | Interval)]
    return not any(math.isnan(float(number)) for number in numbers) and sentence.holds()


def pattern_of(text: str) -> re.Pattern[str]:
    """Finds a sentence with any numbers and any line breaks.

    Example:
        >>> bool(pattern_of("It needs {ratio:.2f} times as many.").fullmatch("It needs 1.18 [1.08, 1.30] times\\nas many."))
        True
        >>> pattern_of("It falls by {gap:.2f}.").fullmatch("It falls by 0.07.")[1]  # the whole number, not what is before its point
        '0.07'
    """
    parts = []
    for literal, field, _, _ in string.Formatter().parse(text):
        parts.append(r"\s+".join(re.escape(word) for word in re.split(r"\s+", literal)))
        if field is not None:
            parts.append(f"({NUMBER})")
    return re.compile("".join(parts))


def bring_up_to_date(page: str, sentences: list[Sentence]) -> str:
    """The text of a page with the numbers of its sentences as they follow from the records.

    Raises:
        ValueError: the page does not hold a sentence exactly once.
    """
    for sentence in sentences:
        matches = list(pattern_of(sentence.text).finditer(page))
        if len(matches) != 1:
            raise ValueError(f"{sentence.page} holds this sentence {len(matches)} times, not once: {sentence.text}")
        numbers = sentence.numbers()
        fields = [(field, spec) for _, field, spec, _ in string.Formatter().parse(sentence.text) if field is not None]
        start = matches[0].start()
        pieces, end = [], start
        for group, (field, spec) in enumerate(fields, 1):
            pieces += [page[end : matches[0].start(group)], format(numbers[field], spec)]
            end = matches[0].end(group)
        page = page[:start] + "".join(pieces) + page[end:]
    return page


def changes(before: str, after: str, sentences: list[Sentence]) -> list[str]:
    """The sentences that differ between two texts of a page, as they were and as they are."""
    pairs = [tuple(re.sub(r"\s+", " ", pattern_of(one.text).search(text)[0]) for text in (before, after)) for one in sentences]  # type: ignore[index]
    return [f"- {old}\n+ {new}" for old, new in pairs if old != new]


def unheld_intervals(text: str, sentences: list[Sentence]) -> list[str]:
    """The intervals of a page, written as `1.2 [1.1, 1.3]`, that are in none of its sentences."""
    spans = [match.span() for sentence in sentences for match in pattern_of(sentence.text).finditer(text)]
    intervals = re.finditer(r"\S+ \[[^\[\]()]*\d[^\[\]()]*,[^\[\]()]*\](?!\()", text)
    return [one[0] for one in intervals if not any(start <= one.start(0) + one[0].index("[") < end for start, end in spans)]
