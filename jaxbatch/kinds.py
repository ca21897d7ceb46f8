"""Arguments of another kind than a function's annotations say, and numbers outside their range: each is one line that names it.

Only kinds are checked here, and ranges that are the same wherever a name comes in. Whether another number is in its range, and whether trees
of arrays fit each other, a function checks itself.
"""

import collections.abc
import contextlib
import functools
import inspect
import numbers
import os
import types
import typing
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
import optax

from jaxbatch.ranges import check_range

P = ParamSpec("P")
R = TypeVar("R")

_LISTS = (collections.abc.Sequence, collections.abc.Iterable, collections.abc.Iterator, tuple, list)
_NO_ARRAYS = (str, bytes, collections.abc.Mapping, type(None), set)
_SPECIAL = {  # in place of "must be", for what users mistake most
    "Duration": "has no unit. Give a duration, as jaxbatch.epochs(30) or jaxbatch.steps(1000)",
    "TrainState": "must be a jaxbatch.TrainState, as record['state'] is one",
    "Task": "must be a jaxbatch.Task, as from jaxbatch.classification_task",
    "FitConfig": "must be a jaxbatch.FitConfig, as FitConfig(optax.sgd(0.1), batch_size=64)",
}
_HINTS = {  # after "must be", of what fits elsewhere
    "BatchSizePolicy": ". A policy is for jaxbatch.fit alone: its sizes are not known beforehand, and its learning_rate says the rate of each",
}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a function refuse arguments of other kinds than its annotations say, before it does anything.

    Example:
        >>> def half(number: int) -> float:
        ...     return number / 2
        >>> checked(half)(3)
        1.5
        >>> checked(half)("3")
        Traceback (most recent call last):
        ValueError: number='3' must be a whole number.
    """
    signature = _signature(function)
    known = [one for one in signature.parameters.values() if one.kind not in _SEVERAL and one.annotation is not one.empty]
    wanted = {one.name: one.annotation for one in known}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:  # Python says it best
            return function(*args, **kwargs)
        for name, value in given.arguments.items():
            if name in wanted:
                check_kind(name, value, wanted[name])
                given.arguments[name] = as_plain(value)
        return function(*given.args, **given.kwargs)

    return call


def as_plain(value: Any) -> Any:
    """A fraction, or another real number that arrays of JAX do not mix with, as a float; anything else as it is.

    Example:
        >>> from fractions import Fraction
        >>> as_plain(Fraction(1, 2)), as_plain(3), as_plain("3")
        (0.5, 3, '3')
    """
    if isinstance(value, numbers.Real) and not isinstance(value, int | float | np.number):
        with contextlib.suppress(OverflowError):  # its range the function checks
            return float(value)
    return value


_SEVERAL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _signature(function: Callable) -> inspect.Signature:
    try:
        return inspect.signature(function, eval_str=True)
    except NameError:  # a class that its module defines later
        return inspect.signature(function)


def check_fields(record: Any, prefix: str = "") -> None:
    """Checks the fields of a named tuple by the annotations of its class.

    Args:
        record: the named tuple.
        prefix: stands before the names in messages.

    Raises:
        ValueError: one is of another kind.
    """
    for name, annotation in inspect.get_annotations(type(record), eval_str=True).items():
        check_kind(f"{prefix}{name}", getattr(record, name), annotation)


def check_kind(name: str, value: Any, annotation: Any) -> None:
    """Refuses a value of another kind.

    Raises:
        ValueError: as said.

    Example:
        >>> check_kind("sizes", [8, 2.5], collections.abc.Sequence[int])
        Traceback (most recent call last):
        ValueError: sizes=[8, 2.5] must be a list of whole numbers.
    """
    if name == "seeds":  # batches.check_seed says of each what it must be
        annotation = collections.abc.Sequence
    if name == "make_optimizer":  # updates.check_make_optimizer says what an optimizer in its place must become
        return
    if not _fits(value, annotation):
        choices = list(dict.fromkeys(_words(annotation, name)))
        special = next((_SPECIAL[words] for words in choices if words in _SPECIAL), None)
        must = special or f"must be {', or '.join(choices)}"
        raise ValueError(f"{name}={_brief(value)} {must}{_HINTS.get(type(value).__name__, '')}.")
    check_range(name, value)


def _parts(annotation: Any) -> tuple:
    """The members of a union, or the annotation alone."""
    origin = typing.get_origin(annotation)
    return typing.get_args(annotation) if origin in (typing.Union, types.UnionType) else (annotation,)


def _fits(value: Any, annotation: Any) -> bool:
    return any(_fits_one(value, part) for part in _parts(annotation))


def _fits_one(value: Any, kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is None or kind is type(None):
        return value is None
    if kind is Any:
        return True
    if kind in (int, float, bool, str, np.integer, np.number):
        return _is_number(value, kind)
    if origin is typing.Literal:  # which of them, the function checks
        return isinstance(value, str)
    if _is_array(kind) and (_of_keys(kind) or kind in (np.ndarray, jax.Array)):
        return hasattr(value, "dtype")
    if _is_array(kind) and getattr(kind, "dim_str", None) == "":
        return _is_number(value, int if "Int" in kind.__name__ else float)
    if _is_array(kind):
        return not isinstance(value, _NO_ARRAYS) and not callable(value) and (hasattr(value, "shape") or np.asarray(value).dtype.kind not in "OUSMm")
    if origin is collections.abc.Callable:
        return callable(value)
    if origin is collections.abc.Mapping:
        return isinstance(value, collections.abc.Mapping)  # what it holds, a function checks: it names the key
    if origin in _LISTS or kind is collections.abc.Sequence:
        return _is_list(value, arguments[0] if arguments else Any, read=hasattr(value, "__len__"))
    if isinstance(kind, type) and kind in (optax.GradientTransformation, optax.MultiSteps):
        return hasattr(value, "init") and hasattr(value, "update") and not isinstance(value, type)
    if origin is os.PathLike or kind is os.PathLike:
        return isinstance(value, os.PathLike)
    if not isinstance(kind, type) or origin is not None or getattr(kind, "_is_protocol", False) or kind.__module__.startswith("jaxtyping"):
        return True
    return isinstance(value, kind)


def _is_number(value: Any, kind: type) -> bool:
    """Numbers of Python and NumPy, and arrays of one number; a bool is none."""
    if kind in (bool, str):
        return isinstance(value, (bool, np.bool_) if kind is bool else str)
    if isinstance(value, bool | np.bool_):
        return False
    whole = kind in (int, np.integer)
    if isinstance(value, jax.Array | np.ndarray):
        return value.shape == () and np.issubdtype(value.dtype, np.integer if whole else np.number)
    return isinstance(value, int | np.integer if whole else numbers.Real)  # also fractions; NumPy's real numbers are registered there


def _is_list(value: Any, of: Any, *, read: bool) -> bool:
    if isinstance(value, str | bytes | collections.abc.Mapping) or not (hasattr(value, "__iter__") or hasattr(value, "__getitem__")):
        return False
    if hasattr(value, "shape") and np.shape(value) == ():
        return False
    if not read:
        return True
    if getattr(value, "ndim", 0) == 1 and value.dtype.kind in "biuf":  # by the type of all, because there may be millions
        return _fits(0.0 if value.dtype == bool else value.dtype.type(0), of)
    return all(_fits(one, of) or (of is float and isinstance(one, bool)) for one in value)


def _is_array(kind: Any) -> bool:
    return isinstance(kind, type) and (hasattr(kind, "dim_str") or kind in (np.ndarray, jax.Array))


def _of_keys(kind: type) -> bool:
    return kind.__name__.startswith("Key")


def _words(annotation: Any, name: str = "") -> list[str]:
    """What an annotation asks for, in words."""
    return [_words_of_one(part, name) for part in sorted(_parts(annotation), key=lambda part: part in (None, type(None)))]


def _words_of_one(kind: Any, name: str = "") -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in (int, np.integer):
        return f"a whole number from 0 to {2**32 - 1}" if name == "seed" else "a whole number"
    plain = {None: "None", type(None): "None", float: "a number", np.number: "a number", bool: "True or False", str: "a text"}
    if kind in plain:
        return plain[kind]
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if _is_array(kind):
        return (
            "a key, as jax.random.key(0)" if _of_keys(kind) else "a number" if getattr(kind, "dim_str", None) == "" else "an array: use numpy.asarray"
        )
    if origin is collections.abc.Callable:
        return "a function"
    if origin is collections.abc.Mapping:
        return f"a dict of {_plural(arguments[1])} by {_words(arguments[0])[0].removeprefix('a ')}"
    if origin in _LISTS or kind is collections.abc.Sequence:
        return f"a list of {_plural(arguments[0]) if arguments else 'whole numbers'}"
    if isinstance(kind, type) and kind in (optax.GradientTransformation, optax.MultiSteps):
        return "one of optax's, as optax.sgd(0.1)"
    if origin is os.PathLike or kind is os.PathLike:
        return "a path"
    if kind.__module__.startswith("jaxbatch"):
        return kind.__name__ if kind.__name__ in _SPECIAL else f"a jaxbatch.{kind.__name__}"
    return f"a {kind.__module__.partition('.')[0]} {kind.__name__}"


def _plural(annotation: Any) -> str:
    words = {"a whole number": "whole numbers", "a number": "numbers", "an array: use numpy.asarray": "arrays", "a text": "texts"}
    known = [words[one] for one in _words(annotation) if one in words] if typing.get_origin(annotation) is not tuple else []
    return known[0] if known else "values" if not isinstance(annotation, type) else f"{annotation.__name__}s"


def _brief(value: Any) -> str:
    """A value in one short line."""
    if hasattr(value, "shape") and np.shape(value) != ():
        return f"an array of shape {np.shape(value)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:76]} ..."
