"""From the command line to a study's configuration, and every error as one line."""

import contextlib
import dataclasses
import difflib
import io
import os
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import tyro

from experiments.harness.terminal import show_plainly
from jaxbatch.data import DATASETS, TEXTS, load_dataset

Config = TypeVar("Config")


def parse(config_type: type[Config], description: str | None, args: Sequence[str] | None = None) -> Config:
    """The configuration from the command line; a wrong flag ends the program with one line and exit code 2."""
    show_plainly()
    args, box, given = split_lists(config_type, sys.argv[1:] if args is None else args), io.StringIO(), set()
    with one_line_errors():
        if not {"-h", "--help"} & set(args):
            given = check_values(config_type, args)
        try:
            with contextlib.redirect_stderr(box):
                config, unknown = tyro.cli(config_type, prog=program(), description=description, args=args, return_unknown_args=True)
        except SystemExit as stopped:
            if stopped.code == 2:  # check_values accepts it, but tyro does not
                raise ValueError(f"this command line cannot be read: {' '.join(args)}. --help shows the flags.") from None
            raise
        if unknown:
            raise ValueError(describe_unknown(config_type, unknown[0]))
        texts = TEXTS if "transformer" in typing.get_args(typing.get_type_hints(config_type).get("model")) else ()
        if getattr(config_type, "dataset", None) in DATASETS and config.dataset not in (*DATASETS, *texts):  # streamed data: other names
            load_dataset(config.dataset)  # raises an error that names the nearest data set
    return dataclasses.replace(config, given=tuple(sorted(given))) if hasattr(config_type, "given") else config


def program() -> str | None:
    """How a study was called, for the first line of --help; None for a script, whose path is shown."""
    name = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "")
    return f"python -m {name.removesuffix('.__main__')}" if name.startswith("experiments.") else None


def describe_unknown(config_type: type, argument: str) -> str:
    """The error message for an argument that the study does not know.

    Example:
        >>> Config = dataclasses.make_dataclass("Config", [("dataset", str, "digits"), ("resume", bool, True)])
        >>> describe_unknown(Config, "--datset"), describe_unknown(Config, "--no-resum=1")
        ('unrecognized --datset; did you mean --dataset?', 'unrecognized --no-resum; did you mean --no-resume?')
        >>> describe_unknown(Config, "mnist")
        'unrecognized mnist; --help shows the flags.'
    """
    name = argument.partition("=")[0] if argument.startswith("-") else argument
    nearest = difflib.get_close_matches(name.replace("_", "-"), flags_of(config_type), n=1) if name.startswith("-") else []
    return f"unrecognized {name}; " + (f"did you mean {nearest[0]}?" if nearest else "--help shows the flags.")


def flags_of(config_type: type) -> dict[str, str]:
    """Every flag as the user writes it, with the field that it sets."""
    hints = typing.get_type_hints(config_type)
    flags = {}
    for field in dataclasses.fields(config_type):
        if field.name == "given":  # the other flags that were given
            continue
        name = field.name.replace("_", "-")
        flags[f"--{name}"] = field.name
        if hints[field.name] is bool:
            flags[f"--no-{name}"] = field.name
    return flags


def check_values(config_type: type, args: Sequence[str]) -> set[str]:
    """The fields whose flags are given; raises a ValueError for an unknown flag, a missing or wrong value, or a flag that is needed.

    Example:
        >>> check_values(dataclasses.make_dataclass("Config", [("seeds", int, 3)]), ["--seeds", "three"])
        Traceback (most recent call last):
        ValueError: --seeds three must be a whole number.
    """
    flags, hints, given = flags_of(config_type), typing.get_type_hints(config_type), {}
    for position, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        name = flags.get(flag.replace("_", "-"))
        if not arg.startswith("--"):
            continue
        if name is None:
            raise ValueError(describe_unknown(config_type, arg))
        rest = args[position + 1 :]
        values = [value] if equals else rest[: next((n for n, other in enumerate(rest) if other.startswith("--")), len(rest))]
        given[name] = values
        if hints[name] is bool:
            continue
        several, optional, kind = _kind_of(hints[name])
        if not values and not several:
            raise ValueError(f"{flag} needs a value: {_describe(kind)}.")
        for one in values if several else values[:1]:
            if not (optional and one == "None") and not _fits(kind, one):
                raise ValueError(f"{flag} {one} must be {_describe(kind)}.")
    for other in ("dataset", "data_dir", "model"):
        if "task" in given and other in given:
            raise ValueError(f"--task and --{other.replace('_', '-')} exclude each other: a task has data and a model of its own.")
    for field in dataclasses.fields(config_type):
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in given:
            raise ValueError(f"--{field.name.replace('_', '-')} is needed.")
    return set(given)


def is_given(config: Any, name: str) -> bool:
    """Whether a flag stands on the command line, or a field was set in Python to another value than its default.

    Example:
        >>> Config = dataclasses.make_dataclass("Config", [("seeds", int, 3), ("quick", bool, False), ("given", tuple, ())], frozen=True)
        >>> is_given(Config(given=("seeds",)), "seeds"), is_given(Config(seeds=4), "seeds"), is_given(Config(), "seeds")
        (True, True, False)
    """
    return name in config.given or getattr(config, name) != type(config).__dataclass_fields__[name].default


def for_quick(config: Config, **short: Any) -> Config:
    """What --quick sets where no flag says otherwise. To be called before other defaults are filled in.

    Args:
        config: as it comes from the command line.
        short: the values of a short run.

    Returns:
        The configuration with these values, except where a flag is given; without --quick as it was.

    Example:
        >>> fields = [("seeds", int, 3), ("epochs", int, 5), ("quick", bool, True), ("given", tuple, ("seeds",))]
        >>> config = for_quick(dataclasses.make_dataclass("Config", fields, frozen=True)(), seeds=1, epochs=2)
        >>> config.seeds, config.epochs
        (3, 2)
    """
    flags: Any = config
    if not flags.quick:
        return config
    return dataclasses.replace(flags, **{name: value for name, value in short.items() if not is_given(flags, name)})


def _kind_of(hint: Any) -> tuple[bool, bool, Any]:
    """Whether a field takes several values, whether it takes None, and the type or Literal of one value."""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else (hint,)
    (inner,) = (member for member in members if member is not types.NoneType)
    several = typing.get_origin(inner) is tuple
    return several, len(members) > 1, typing.get_args(inner)[0] if several else inner


def _fits(kind: Any, text: str) -> bool:
    if typing.get_origin(kind) is Literal:
        return text in typing.get_args(kind)
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(typing.get_args(kind))}"
    return {int: "a whole number", float: "a number"}.get(kind, "a text")


def split_lists(config_type: type, args: Sequence[str]) -> list[str]:
    """Turns ``--devices 1,2,4`` into ``--devices 1 2 4``, because users may write several numbers in either way."""
    lists = {field.name for field in dataclasses.fields(config_type) if "tuple" in str(field.type)}
    parts, flag = [], ""
    for arg in args:
        name, equals, value = arg.partition("=")
        if arg.startswith("--"):
            flag = name[2:].replace("-", "_")
        if flag not in lists:
            parts.append(arg)
        elif not arg.startswith("--"):
            parts += arg.split(",")
        else:
            parts += [name, *value.split(",")] if equals else [arg]
    return parts


@contextlib.contextmanager
def one_line_errors():
    """Turns errors such as bad input, missing files or a full disk into one line on stderr and exit code 2; Ctrl-C into 130."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("JAXBATCH_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted: finished measurements are kept; the same command continues from them.", file=sys.stderr)
        raise SystemExit(130) from None
