"""Which examples go into which batch: pure functions of (seed, epoch, batch size).

A batch is a row of indices. So the data stay on the device, and a batch of any size can be cut from any place in an epoch.
Axes: N examples in the data set, S batches, B examples in a batch.
"""

import math
from fractions import Fraction
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

from jaxbatch.kinds import as_plain, check_kind

Unit = Literal["steps", "examples", "epochs", "tokens"]
Partial = Literal["drop", "pad"]  # what becomes of a last batch that is not full: left out, or filled up with masked slots
_ORDER = 0x6F726465  # "orde" in ASCII: makes the keys of shuffling differ from the keys of init and dropout


class IndexBatches(NamedTuple):
    """Batches as indices into the data set, with a mask that is False where a slot holds no example."""

    indices: Int32[Array, "S B"]
    mask: Bool[Array, "S B"]


class Duration(NamedTuple):
    """A length of training with its unit. Make one with :func:`steps`, :func:`examples`, :func:`epochs`, :func:`tokens`."""

    amount: int | float
    unit: Unit


def steps(amount: int | float | np.number) -> Duration:
    """A duration in optimizer updates of one batch each."""
    return _duration(amount, "steps")


def examples(amount: int | float | np.number) -> Duration:
    """A duration in examples seen."""
    return _duration(amount, "examples")


def epochs(amount: int | float | Fraction | np.number) -> Duration:
    """A duration in passes over the data set; a fraction is allowed."""
    return _duration(amount, "epochs")


def tokens(amount: int | float | np.number) -> Duration:
    """A duration in tokens seen, for a task that says how many an example has (``Task.tokens_per_example``)."""
    return _duration(amount, "tokens")


def in_examples(duration: Any, tokens_per_example: Any) -> Duration:
    """A duration in tokens as one in examples, rounded up in exact arithmetic; others as they are.

    Raises:
        ValueError: the duration has no unit, or it is in tokens and ``tokens_per_example`` is no whole number of at least 1.

    Example:
        >>> in_examples(tokens(1025), 512), in_examples(epochs(2), None)
        (Duration(amount=3, unit='examples'), Duration(amount=2, unit='epochs'))
    """
    check_duration(duration)
    check_kind("tokens_per_example", tokens_per_example, int | None)
    if duration.unit != "tokens":
        return duration
    if tokens_per_example is None or tokens_per_example < 1:
        raise ValueError(
            f"duration=tokens({duration.amount}) with tokens_per_example={tokens_per_example!r}: give the number of tokens of an example, as "
            "task._replace(tokens_per_example=1024), or a duration in steps(n), examples(n) or epochs(n)."
        )
    return examples(-(-int(duration.amount) // int(tokens_per_example)))


def _duration(amount, unit) -> Duration:
    check_kind(unit, amount, float)
    if not (amount >= 0 and math.isfinite(amount)) or (unit != "epochs" and amount != int(amount)):
        raise ValueError(f"{unit}={amount!r} must be a finite {'number' if unit == 'epochs' else 'whole number'} of at least 0.")
    return Duration((amount.item() if isinstance(amount, np.generic) else as_plain(amount)) if unit == "epochs" else int(amount), unit)


def steps_per_epoch(num_examples: int, batch_size: int, *, partial: Partial = "drop") -> int:
    """Number of batches in one epoch.

    Args:
        num_examples: examples in the data set.
        batch_size: examples in a batch.
        partial: what becomes of a last batch that is not full: ``"drop"`` leaves it out, ``"pad"`` fills it up with masked slots.

    Raises:
        ValueError: a size is below 1, ``partial`` is unknown, or a batch is larger than the data with ``"drop"``.

    Example:
        >>> steps_per_epoch(10, 4), steps_per_epoch(10, 4, partial="pad")
        (2, 3)
    """
    _check_sizes(num_examples, batch_size, partial)
    return num_examples // batch_size if partial == "drop" else -(-num_examples // batch_size)


def num_steps(duration: Duration, *, num_examples: int, batch_size: int, partial: Partial = "drop", tokens_per_example: int | None = None) -> int:
    """Converts a duration to optimizer updates, rounded up, so that a run is never shorter than the duration.

    Steps, examples and tokens are counted exactly. A duration above 0 is at least one update.

    Example:
        >>> num_steps(epochs(1.5), num_examples=10, batch_size=4)
        3
        >>> num_steps(examples(9), num_examples=10, batch_size=4), num_steps(tokens(900), num_examples=10, batch_size=4, tokens_per_example=100)
        (3, 3)
    """
    duration = in_examples(duration, tokens_per_example)
    per_epoch = steps_per_epoch(num_examples, batch_size, partial=partial)
    if duration.unit == "examples" and partial == "pad":  # the last batch of an epoch holds fewer
        whole, rest = divmod(int(duration.amount), int(num_examples))
        return whole * per_epoch + -(-rest // int(batch_size))
    count = batches_left(duration, 0, batch_size=batch_size, per_epoch=per_epoch)
    return max(count, 1) if duration.amount > 0 else 0


def batches_left(duration: Duration, done: int, *, batch_size: int, per_epoch: int) -> int:
    """The number of batches left in a duration after ``done`` of its units, rounded up, in exact arithmetic.

    A number of epochs may be a fraction that has no exact binary form, such as 0.1. So a rest below a millionth of a batch,
    or below the rounding error of the number itself, adds no batch.

    Example:
        >>> batches_left(examples(10**12), 10**12 - 1, batch_size=60, per_epoch=1000)
        1
        >>> batches_left(epochs(3.1), 3, batch_size=60, per_epoch=1000)
        100
    """
    if duration.unit == "steps":
        return max(int(duration.amount) - done, 0)
    if duration.unit == "examples":
        return max(-(-(int(duration.amount) - done) // int(batch_size)), 0)
    asked, before = Fraction(float(duration.amount)) * int(per_epoch), done * int(per_epoch)
    rounding = min(max(Fraction(1, 10**6), asked / 2**50), Fraction(1, 2))
    return max(math.ceil(asked - rounding) - before, 0)


def check_duration(duration: Any) -> None:
    """Raises a ValueError for a bare number, and for a :class:`Duration` whose amount or unit makes no sense."""
    if not isinstance(duration, Duration):
        raise ValueError(f"duration={duration!r} has no unit. Use steps(n), examples(n) or epochs(n).")
    if duration.unit not in get_args(Unit):
        raise ValueError(f"duration's unit={duration.unit!r} must be 'steps', 'examples', 'epochs' or 'tokens'.")
    _duration(*duration)


def check_seed(seed: Any) -> None:
    """Raises a ValueError unless ``seed`` is a whole number from 0 to 2**32 - 1, which every part of the library can take.

    Example:
        >>> check_seed(2**32)
        Traceback (most recent call last):
        ValueError: seed=4294967296 must be a whole number from 0 to 4294967295.
    """
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r} must be a whole number from 0 to {2**32 - 1}.")


def epoch_order(seed: int | np.integer, epoch: int | Int[Array, ""], num_examples: int) -> Int32[Array, "N"]:
    """The order in which epoch ``epoch`` visits the examples: a permutation, a pure function of its arguments.

    It does not depend on the batch size. So runs with different batch sizes see the same examples in the same order, and a
    run can continue at any place with any batch size.

    Raises:
        ValueError: the seed is outside [0, 2**32), or there are 2**31 examples or more, too many for 32-bit indices.

    Example:
        >>> [int(i) for i in sorted(epoch_order(0, 3, 5))]
        [0, 1, 2, 3, 4]
    """
    check_seed(seed)
    check_kind("epoch", epoch, int)
    check_kind("num_examples", num_examples, int)
    if num_examples >= 2**31:
        raise ValueError(f"num_examples={num_examples} must be below 2**31: an order is made of indices of 32 bits. Take a part of the data.")
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _ORDER), epoch)
    return jax.random.permutation(key, num_examples).astype(jnp.int32)


def cut_batches(order: Int32[Array, "N"], batch_size: int, *, partial: Partial = "drop") -> IndexBatches:
    """Cuts an order of examples into batches of ``batch_size``, front to back.

    Args:
        order: indices in the order of visit, ``(N,)``: an :func:`epoch_order` or any slice of it.
        batch_size: examples in a batch.
        partial: see :func:`steps_per_epoch`.

    Returns:
        Indices and mask of shape ``(S, B)``. Padded slots have mask False and point at ``order[0]``, a real example, whose values are defined.

    Example:
        >>> batches = cut_batches(jnp.arange(5), 2, partial="pad")
        >>> batches.indices.tolist(), batches.mask.tolist()
        ([[0, 1], [2, 3], [4, 0]], [[True, True], [True, True], [True, False]])
    """
    check_kind("order", order, Int32[Array, "N"])
    num_batches = steps_per_epoch(order.shape[0], batch_size, partial=partial)
    slots = num_batches * batch_size
    filler = jnp.broadcast_to(order[:1], (max(0, slots - order.shape[0]),))
    indices = jnp.concatenate([order[:slots], filler]).reshape(num_batches, batch_size)
    mask = (jnp.arange(slots) < order.shape[0]).reshape(num_batches, batch_size)
    return IndexBatches(indices.astype(jnp.int32), mask)


def epoch_batches(seed: int, epoch: int, num_examples: int, batch_size: int, *, partial: Partial = "drop") -> IndexBatches:
    """The batches of one epoch: :func:`cut_batches` of :func:`epoch_order`.

    Example:
        >>> epoch_batches(0, 0, num_examples=10, batch_size=4).indices.shape
        (2, 4)
    """
    _check_sizes(num_examples, batch_size, partial)
    return cut_batches(epoch_order(seed, epoch, num_examples), batch_size, partial=partial)


def _check_sizes(num_examples: int, batch_size: int, partial: Partial) -> None:
    if not type(num_examples) is type(batch_size) is int:  # plans check a million epochs
        check_kind("num_examples", num_examples, int)
        check_kind("batch_size", batch_size, int)
    if num_examples < 1:
        raise ValueError(f"num_examples={num_examples} must be at least 1: there is nothing to cut into batches.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    if partial not in ("drop", "pad"):
        raise ValueError(f"partial={partial!r} must be 'drop' or 'pad'.")
    if partial == "drop" and batch_size > num_examples:
        raise ValueError(f"batch_size={batch_size} is larger than the data set (num_examples={num_examples}): no batch is full. Take a smaller one.")


def even_part(batch_size: int, at_most: int) -> int:
    """The largest divisor of ``batch_size`` from half of ``at_most`` up to ``at_most``; without one, ``at_most`` itself.

    Example:
        >>> even_part(600, 128), even_part(509, 128)
        (120, 128)
    """
    largest = min(batch_size, at_most)
    parts = range(-(-batch_size // largest), batch_size // (at_most // 2 + 1) + 1)
    if len(parts) < largest - at_most // 2:  # few large parts: their numbers are fewer than their sizes
        return next((batch_size // count for count in parts if batch_size % count == 0), largest)
    return next((size for size in range(largest, at_most // 2, -1) if batch_size % size == 0), largest)
