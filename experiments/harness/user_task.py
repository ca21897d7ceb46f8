"""A user's own task, from ``--task FILE.py:FUNCTION``: the file is run, and the function is called. Likewise an optimizer, from ``--optimizer``."""

import contextlib
import difflib
import functools
import hashlib
import inspect
import pathlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxbatch as jb
from experiments.harness.user_task_check import check_task, first_line, line_in
from jaxbatch.data.streams import is_stream
from jaxbatch.gradients.run_lengths import for_length
from jaxbatch.paths import local_path
from jaxbatch.results.records import Record
from jaxbatch.states import is_key
from jaxbatch.training.tasks import fingerprint


class Source(NamedTuple):
    """Where a task comes from, or an optimizer."""

    text: str  # as the user wrote it
    path: pathlib.Path
    function: str
    flag: str

    @property
    def title(self) -> str:
        """What tables and figures show."""
        return f"{self.path.name}:{self.function}"


def find_source(text: str, flag: str = "--task") -> Source:
    """The file and the function; the last colon stands between them, because a path may hold others.

    Raises:
        ValueError: there is no colon, or no such file.

    Example:
        >>> find_source("C:\\\\train.py")
        Traceback (most recent call last):
        ValueError: --task C:\\train.py must name a file and a function in it, as my_task.py:make_task.
    """
    file, _, function = text.rpartition(":")
    if not file or not function.isidentifier():
        own = "my_task.py:make_task" if flag == "--task" else "my_optimizer.py:make_optimizer"
        raise ValueError(f"{flag} {text} must name a file and a function in it, as {own}.")
    path = local_path(file, flag)
    if not path.is_file():
        raise ValueError(f"{flag} {text}: there is no file {path.absolute()}.")
    return Source(text, path.resolve(), function, flag)


def title_of(text: str) -> str:
    """``FILE.py:FUNCTION`` without the folders.

    Example:
        >>> title_of("some/folder/my_task.py:make_task"), title_of("C:\\\\folder\\\\my_task.py:make_task")
        ('my_task.py:make_task', 'my_task.py:make_task')
    """
    file, _, function = text.rpartition(":")
    return f"{pathlib.PureWindowsPath(file).name}:{function}"


def load_user_task(text: str) -> jb.Task:
    """The task that the function returns, its data on the device, with its slips found by tracing before anything is trained.

    Raises:
        ValueError: one line on what is wrong, with the line of the user's file: see :func:`find_source` and
            :func:`experiments.harness.user_task_check.check_task`.
    """
    source = find_source(text)
    module = _run_file(source)
    task = _call(source, _find_function(source, module))
    check_task(task, source.text, source.path)
    return task._replace(**{name: _on_device(getattr(task, name)) for name in ("train_data", "test_data")})


def describe_user_task(text: str, task: jb.Task) -> Record:
    """What tells a task from others in a run folder: an edited file or other data do not continue earlier records."""
    source = find_source(text)
    data = [None if one is None else fingerprint(one) for one in (task.train_data, task.test_data)]
    return {"task": source.title, "task_file": _digest(source), "task_data": data}


def describe_user_optimizer(text: str) -> Record:
    """Likewise for an optimizer."""
    source = find_source(text, "--optimizer")
    return {"optimizer": source.title, "optimizer_file": _digest(source)}


def load_user_optimizer(text: str) -> Callable[[Any], Any]:
    """The function ``learning rate -> optimizer`` of ``--optimizer FILE.py:FUNCTION``, tried with a rate of 0.01; it may take ``num_steps`` too.

    Raises:
        ValueError: one line on what is wrong, with the line of the user's file.
    """
    source = find_source(text, "--optimizer")
    return _load_optimizer(source, source.path.read_bytes())


@functools.lru_cache(maxsize=8)
def _load_optimizer(source: Source, _: bytes) -> Callable[[Any], Any]:
    """The file is run once for each of its contents."""
    function = _find_function(source, _run_file(source))
    with _one_line_errors(source, f"--optimizer {source.text}: {source.function}"):
        optimizer = for_length(function, 1000)(0.01)
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(f"--optimizer {source.text}: {source.function} returns {_article(optimizer)}, but must return an optimizer of optax.")
    return function


def _digest(source: Source) -> str:
    return hashlib.blake2b(source.path.read_bytes(), digest_size=16).hexdigest()


def _run_file(source: Source) -> types.ModuleType:
    """Runs the file as a module with a name of its own; its folder comes first where it looks for others."""
    name = f"_user_{source.flag[2:]}_{source.path.stem}"
    module = types.ModuleType(name)
    module.__file__ = str(source.path)
    folder = str(source.path.parent)
    sys.path[:] = [folder, *(other for other in sys.path if other != folder)]
    sys.modules[name] = module  # dataclasses and pickle look for it there
    with _one_line_errors(source, f"{source.flag} {source.text}: {source.path.name}"):
        exec(compile(source.path.read_bytes(), str(source.path), "exec"), module.__dict__)
    return module


def _find_function(source: Source, module: types.ModuleType) -> Callable:
    member = getattr(module, source.function, None)
    if callable(member):
        return member
    own = [name for name, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__]
    near = sorted(own, key=lambda name: -difflib.SequenceMatcher(None, name, source.function).ratio())
    choices = f"its functions are {', '.join(near)}" if near else "it has no functions"
    what = f"no function {source.function}" if member is None else f"{source.function}, which is {_article(member)} and not a function"
    raise ValueError(f"{source.flag} {source.text}: {source.path.name} has {what}; {choices}.")


def _call(source: Source, function: Callable) -> jb.Task:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some functions written in C have no signature
        parameters = ()
    wanted = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if wanted:
        raise ValueError(f"--task {source.text}: {source.function} needs {', '.join(wanted)}, but is called without arguments. Give them defaults.")
    with _one_line_errors(source, f"--task {source.text}: {source.function}"):
        task = function()
    if not isinstance(task, jb.Task):
        raise ValueError(f"--task {source.text}: {source.function} returns {_article(task)}, but must return a jaxbatch.Task.")
    return task


@contextlib.contextmanager
def _one_line_errors(source: Source, who: str) -> Iterator[None]:
    """Turns whatever the user's code raises into one line with the line of the file."""
    try:
        yield
    except (Exception, SystemExit) as error:
        line = line_in(error, source.path)
        where = "" if line is None else f" in line {line}"
        raise ValueError(f"{who} raises {type(error).__name__}{where}: {first_line(error)}") from error


def _article(value: Any) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _on_device(data: Any) -> Any:
    if data is None or is_stream(data):
        return data
    return jax.tree.map(lambda leaf: leaf if is_key(leaf) else jnp.asarray(leaf), data)
