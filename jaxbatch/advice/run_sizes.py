"""Batch sizes and lengths of runs of which little is known beforehand."""

import math
from collections.abc import Sequence

from jaxbatch.advice.estimates import usual_sizes
from jaxbatch.batches import Duration, num_steps
from jaxbatch.kinds import check_kind

SIZES = tuple(2**power for power in range(3, 11))  # 8 to 1,024, where neither sizes nor the number of examples are given


def sizes_to_choose(batch_sizes: Sequence[int] | None, num_examples: int | None) -> tuple[int, ...]:
    """The batch sizes that are considered, in ascending order.

    Raises:
        ValueError: there is none, or one that is larger than the data set.

    Example:
        >>> sizes_to_choose(None, 70), sizes_to_choose([64, 8], None)
        ((2, 4, 8, 16, 32), (8, 64))
    """
    check_kind("num_examples", num_examples, int | None)
    if num_examples is not None and num_examples < 4:
        raise ValueError(f"num_examples={num_examples} must be at least 4, from which on there are two batch sizes to choose from.")
    usual = SIZES if num_examples is None else usual_sizes(num_examples)
    sizes = tuple(sorted(set(map(int, usual if batch_sizes is None else batch_sizes))))
    if not sizes or (num_examples is not None and sizes[-1] > num_examples):
        raise ValueError(f"batch_sizes={list(sizes)} must hold sizes from 1 to {num_examples or 'any'}, the examples of the data set.")
    return sizes


def steps_at(length: Duration | None, batch_sizes: Sequence[int], num_examples: int | None, name: str = "longest") -> dict[int, float]:
    """The updates of a run of a length, by batch size; infinite without a length. ``name`` is that of the argument.

    Raises:
        ValueError: it is in epochs, and the number of examples is not known; or in tokens.

    Example:
        >>> from jaxbatch import epochs, examples
        >>> steps_at(examples(100), [8, 64], None), steps_at(None, [8], 50), steps_at(epochs(2), [8], 50)
        ({8: 13, 64: 2}, {8: inf}, {8: 12})
    """
    if length is None:
        return dict.fromkeys(batch_sizes, math.inf)
    if length.unit == "epochs" and num_examples is None:
        raise ValueError(f"{name}=epochs({length.amount}) needs num_examples, the examples in the training set; or give steps or examples.")
    if length.unit == "tokens":
        raise ValueError(f"{name} is in tokens: give examples, which are sequences, or steps.")
    if length.unit == "examples":
        return {size: math.ceil(length.amount / size) for size in batch_sizes}
    return {size: num_steps(length, num_examples=num_examples or 2**62, batch_size=size) for size in batch_sizes}
