r"""A generated language whose entropy is known exactly, so that a model's loss can be compared with the best possible one.

**The language.** A sentence is eight words of three letters: adjective, noun, verb, adjective, noun, verb, and at the end the first
adjective and the first noun again. Words are separated by spaces, and a full stop ends the sentence: 32 tokens of 28 symbols.
Each class has 128 words, whose ranks follow Zipf's law: the word of rank r has a probability near 1 / (5.4 r). A noun's rank is
counted from a place in the list of nouns that depends on the adjective before it, and a verb's from one that depends on its noun
(8 different places).

**Why it needs context.** The letters of a word tell which letters may follow. The word before tells which words are likely. The last
two words of a sentence are known for certain, but only from 24 tokens before, so that a model has to find and copy them. Rare
words come so seldom that a model still learns them when it knows everything else, as in real text.

**Its entropy.** Six words of a sentence are free; their letters tell the word, so nothing is lost. With p the probabilities of the
ranks, the entropy is :math:`6\,H(p) / 32` bits per token. A model that sees only the word before cannot copy, and needs
:math:`8\,H(p) / 32` at least.

Probabilities are whole multiples of :math:`2^{-32}`, and the random numbers come from whole-number arithmetic alone, so that every
machine and version makes the same tokens.
"""

import numpy as np
from jaxtyping import UInt8, UInt64

ALPHABET = "abcdefghijklmnopqrstuvwxyz ."
SENTENCE = 32  # tokens
NUM_WORDS = 128  # of a class: adjectives, nouns, verbs
NUM_GROUPS = 8  # of the words of a class: what the next word is counted from
_FREE = 6  # words of a sentence that are drawn
_SEED = 20_190_711


def generate_language(num_sentences: int = 37_500) -> UInt8[np.ndarray, "N"]:
    """The first sentences of the language, as numbers of symbols in ``ALPHABET``.

    Example:
        >>> "".join(ALPHABET[token] for token in generate_language(2))
        'wef zup vuh zil zea gej wef zup.ruj sem fox nac kiw duo ruj sem.'
    """
    ranks = np.searchsorted(_cumulative(), random_bits(_SEED, num_sentences * _FREE) >> np.uint64(32), side="right")
    adjective, noun, verb, adjective_2, noun_2, verb_2 = ranks.reshape(num_sentences, _FREE).T
    noun = _counted_from(adjective, noun)
    verb = _counted_from(noun, verb)
    noun_2 = _counted_from(adjective_2, noun_2)
    verb_2 = _counted_from(noun_2, verb_2)
    words = [adjective, noun, verb, adjective_2, noun_2, verb_2, adjective, noun]
    classes = [0, 1, 2, 0, 1, 2, 0, 1]
    spelled = np.stack([spellings()[of_class, word] for of_class, word in zip(classes, words, strict=True)], 1)
    tokens = np.full((num_sentences, len(words), 4), ALPHABET.index(" "), np.uint8)
    tokens[:, :, :3] = spelled
    tokens[:, -1, 3] = ALPHABET.index(".")
    return tokens.reshape(-1)


def entropy_rate() -> float:
    """Bits per token of a predictor that knows the language and sees the sentence so far: no model does better on average.

    Example:
        >>> round(entropy_rate(), 4)
        1.0412
    """
    shares = np.diff(_cumulative(), prepend=np.uint64(0)) / 2.0**32
    return float(-_FREE * (shares * np.log2(shares)).sum() / SENTENCE)


def spellings() -> UInt8[np.ndarray, "3 words 3"]:
    """The three letters of each word, by class (adjectives, nouns, verbs); no two words are spelled alike.

    Example:
        >>> "".join(ALPHABET[letter] for letter in spellings()[1, 0])
        'jur'
    """
    vowels = [ALPHABET.index(letter) for letter in "aeiou"]
    consonants = [number for number in range(26) if number not in vowels]
    possible = np.array([(first, second, third) for first in consonants for second in vowels for third in range(26)], np.uint8)
    order = np.argsort(random_bits(_SEED + 1, len(possible)), kind="stable")
    return possible[order[: 3 * NUM_WORDS]].reshape(3, NUM_WORDS, 3)


def random_bits(seed: int, count: int) -> UInt64[np.ndarray, "count"]:
    """Numbers of 64 random bits from the generator SplitMix64.

    Example:
        >>> [hex(number) for number in random_bits(1234567, 2)]
        ['0x599ed017fb08fc85', '0x2c73f08458540fa5']

    References:
        Steele, Lea and Flood, `Fast Splittable Pseudorandom Number Generators <https://doi.org/10.1145/2660193.2660195>`_, 2014.
    """
    state = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _cumulative() -> UInt64[np.ndarray, "words"]:
    """For each rank, the number of the 2³² values of a draw that fall on it or on a lower one; Zipf's law in whole numbers."""
    scale = sum(2**32 // rank for rank in range(1, NUM_WORDS + 1))
    shares = [2**32 * (2**32 // rank) // scale for rank in range(1, NUM_WORDS + 1)]
    shares[0] += 2**32 - sum(shares)
    return np.cumsum(np.array(shares, np.uint64))


def _counted_from(before: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """The word whose rank, counted from the place of the word before, is ``rank``."""
    return (rank + before % NUM_GROUPS * (NUM_WORDS // NUM_GROUPS)) % NUM_WORDS
