"""What a training run of any kind, in any framework, shows of itself: a look now and then, and that it does not fit."""

import math
import numbers
from typing import Any, NamedTuple


class Look(NamedTuple):
    """What a run shows at one moment. Of ``examples`` and ``seconds`` either may be None: seconds are then counted here.

    Example:
        >>> Look(updates=200, examples=6400, seconds=1.5, value=0.93)
        Look(updates=200, examples=6400, seconds=1.5, value=0.93, loss=None)
    """

    updates: int  # that were made since the run began; 0: before training
    examples: int | None  # that were seen
    seconds: float | None  # of training since the run began, or since any moment that stays the same
    value: float  # the metric that the goal is about, such as the loss on held-out data; NaN: training has diverged
    loss: float | None = None  # on training examples, if it is known


class OutOfMemory(Exception):
    """A run's batch does not fit into memory. A run may raise it; errors of this name of other frameworks are recognised, too."""


_NAMES = ("OutOfMemory", "OutOfMemoryError", "MemoryError", "ResourceExhaustedError", "_ArrayMemoryError")
_TEXTS = ("out of memory", "RESOURCE_EXHAUSTED", "OOM when allocating", "bad_alloc", "Unable to allocate", "DefaultCPUAllocator: can't allocate")


def speaks_of_memory(text: str) -> bool:
    """Whether a message says that memory was not enough, in the words of JAX, PyTorch, TensorFlow, NumPy or C++.

    Example:
        >>> speaks_of_memory("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB"), speaks_of_memory("shape mismatch")
        (True, False)
    """
    return any(known.lower() in text.lower() for known in (*_TEXTS, *_NAMES[:3]))


def does_not_fit(error: BaseException) -> bool:
    """Whether an error says that a batch does not fit into memory: by its own name, that of a parent, or its text.

    Example:
        >>> does_not_fit(OutOfMemory()), does_not_fit(RuntimeError("RESOURCE_EXHAUSTED: ...")), does_not_fit(ValueError("no such file"))
        (True, True, False)
    """
    return any(kind.__name__ in _NAMES for kind in type(error).__mro__) or speaks_of_memory(str(error))


def checked_look(look: Any, before: Look | None) -> Look:
    """A look with Python's numbers.

    Args:
        look: what a run gave.
        before: the look before it, at fewer updates and no later; None: it is the first.

    Raises:
        ValueError: it is no look, its updates do not grow, or its seconds fall.

    Example:
        >>> checked_look((8, None, None, 0.5), None)
        Look(updates=8, examples=None, seconds=None, value=0.5, loss=None)
        >>> checked_look(Look(4, None, None, 0.5), Look(4, None, None, 0.6))
        Traceback (most recent call last):
        ValueError: run gave a look at 4 updates after one at 4: updates are counted from the start of the run, and must grow from look to look.
    """
    if not isinstance(look, tuple) or not 4 <= len(look) <= 5:
        raise ValueError(f"run gave {look!r}, which is no look. Let it yield jaxbatch.Look(updates, examples, seconds, value).")
    updates, examples, seconds, value, loss = Look(*look)
    for name, number in (("updates", updates), ("examples", examples), ("seconds", seconds)):
        if number is None and name != "updates":
            continue
        if number is None or not (_is_number(number) and number >= 0 and math.isfinite(number)):
            lacking = "" if name == "updates" else ", or None"
            raise ValueError(f"run gave a look with {name}={number!r}, which must be a finite number of at least 0{lacking}.")
    if not _is_number(value) or not (loss is None or _is_number(loss)):
        raise ValueError(f"run gave a look with value={value!r} and loss={loss!r}, which must be numbers; loss may be None.")
    if int(updates) != updates or (examples is not None and int(examples) != examples):
        raise ValueError(f"run gave a look with updates={updates!r} and examples={examples!r}, which must be whole numbers.")
    if before is not None and updates <= before.updates:
        raise ValueError(
            f"run gave a look at {int(updates)} updates after one at {before.updates}: updates are counted from the start of the run, and must grow "
            "from look to look."
        )
    if before is not None and seconds is not None and before.seconds is not None and seconds < before.seconds:
        raise ValueError(
            f"run gave a look with seconds={seconds:g} after one with {before.seconds:g}: seconds are counted from one moment on, and do not fall. "
            "Where they are of an interval, leave them None."
        )
    as_float = lambda number: None if number is None else float(number)
    return Look(int(updates), None if examples is None else int(examples), as_float(seconds), float(value), as_float(loss))


def _is_number(number: Any) -> bool:
    """Whether it is a number, or an array that holds just one, as metrics often are."""
    if isinstance(number, bool):
        return False
    return isinstance(number, numbers.Real) or (getattr(number, "ndim", None) == 0 and hasattr(number, "__float__"))
