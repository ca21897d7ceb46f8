"""Compiles programs ahead of need, keeps them from run to run, and times compilation separately from training.

A step is compiled for one batch size, so a schedule of batch sizes needs one program for each size. Compiling takes seconds,
and a run that must wait for it at a change of size stalls.
"""

import collections
import concurrent.futures
import functools
import hashlib
import os
import pathlib
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import jax

from jaxbatch.kinds import checked
from jaxbatch.machine.constants import take_out_constants
from jaxbatch.paths import cache_folder, local_path


@checked
def keep_compiled_programs(folder: str | os.PathLike | None = None) -> pathlib.Path | None:
    """Keeps compiled programs on disk, so that later runs on this machine with the same versions need not compile them.

    The studies call it, except with ``--no-keep-compiled``. If JAX already has such a folder, for example from
    ``JAX_COMPILATION_CACHE_DIR``, that folder is used.

    Args:
        folder: where to keep the programs; ``None``: ``compiled`` in the user's cache folder.

    Returns:
        The folder in use. It is None if ``folder`` is None and the user's cache folder cannot be used, because there is no home
        folder or it is read-only. Then every run compiles its programs again.

    Raises:
        ValueError: ``folder`` is an address.
        OSError: ``folder`` cannot be made.
    """
    chosen = getattr(jax.config, "jax_compilation_cache_dir", None)
    if chosen:
        return pathlib.Path(chosen)
    cache = cache_folder()
    if folder:
        path = local_path(folder, "folder")
    elif cache is None:
        return None
    else:
        path = cache / "compiled"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        if folder:
            raise
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return path


_compiled: collections.OrderedDict[str, Any] = collections.OrderedDict()
_KEPT = 32  # programs in memory
_lock = threading.Lock()


def compile_ahead(function: Any, *arguments: Any, devices: Any = None) -> Callable[..., Any]:
    """Returns ``function.lower(*arguments).compile()``, or the same program from an earlier call.

    Programs are found by their text, the lowered code. So a run with another seed, or another function with the same text,
    uses the same program, and two functions are never confused because of an equal name, hash or identity. Only the newest
    programs stay in memory. Under ``jax.disable_jit`` a call runs the function operation by operation, because a compiled
    program would raise an error.

    Args:
        function: a result of ``jax.jit`` or ``jax.pmap``.
        arguments: only their shapes are used, and the devices of those that are arrays.
        devices: the devices that it is compiled for, if not the default device.

    Example:
        >>> double = compile_ahead(jax.jit(lambda x: 2 * x), 1.0)
        >>> with jax.disable_jit():
        ...     double(3.0)
        6.0
    """
    leaves = jax.tree.leaves(arguments)
    here = {str(leaf.sharding) for leaf in leaves if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)}
    where = f"{devices} {sorted(here)} {jax.config.jax_default_device}"  # type: ignore[attr-defined]
    program = _compile_once(function.lower(*arguments), where)
    return lambda *arguments: (function if jax.config.jax_disable_jit else program)(*arguments)  # type: ignore[attr-defined]


def _compile_once(lowered: Any, where: str) -> Any:
    # The text does not say where a program runs, how much it is optimized, and which arguments it takes without using them.
    optimized = jax.config.read("jax_disable_most_optimizations")
    key = hashlib.sha256(f"{where} {optimized} {lowered.args_info} {lowered.out_tree} {lowered.as_text()}".encode()).hexdigest()
    with _lock:
        if key in _compiled:
            _compiled.move_to_end(key)
            return _compiled[key]
    program = lowered.compile()  # without the lock, because compiling may take minutes and other threads compile too
    with _lock:
        _compiled[key] = program
        while len(_compiled) > _KEPT:
            _compiled.popitem(last=False)
    return program


class KeptPrograms:
    """Compiled programs by name and the shapes and devices of their arguments; each is traced once, so the functions of a name must be the same.

    Example:
        >>> kept = KeptPrograms()
        >>> [kept("double", lambda x: 2 * x, jax.numpy.array(value)).item() for value in (1.0, 3.0)]
        [2.0, 6.0]
    """

    def __init__(self) -> None:
        self._programs = dict[Hashable, Callable[..., Any]]()

    def __call__(self, name: Hashable, function: Callable[..., Any], *arguments: Any) -> Any:
        """What ``function`` returns."""
        leaves = jax.tree.leaves(arguments)
        where = tuple(str(leaf.sharding) for leaf in leaves if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer))
        key = (name, jax.tree.structure(arguments), *map(jax.typeof, leaves), where)
        if key not in self._programs:
            run, constants = take_out_constants(function, *arguments)
            self._programs[key] = functools.partial(compile_ahead(jax.jit(run), constants, *arguments), constants)
        return self._programs[key](*arguments)


class Program(NamedTuple):
    """A compiled program, and the seconds that compiling took."""

    run: Any
    compile_seconds: float


class Programs:
    """Programs by key. They are compiled at the first request, or ahead of it in one background thread.

    Args:
        compile: ``key -> program``. For programs compiled ahead, another thread calls it.

    Example:
        >>> with Programs(lambda power: lambda x: x**power) as programs:
        ...     programs.ahead([2, 3])
        ...     programs[3].run(2), programs[2].run(2)
        (8, 4)
    """

    def __init__(self, compile: Callable[[Any], Any]):
        self._compile = compile
        self._futures: dict[Hashable, concurrent.futures.Future] = {}
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="jaxbatch-compile")
        # The calling thread's setting; the background thread has its own.
        self._x64 = jax.config.jax_enable_x64  # type: ignore[attr-defined]

    def ahead(self, keys: Iterable[Hashable]) -> None:
        """Compiles the programs that were not requested before, in the background and in this order."""
        for key in keys:
            if key not in self._futures:
                self._futures[key] = self._thread.submit(self._timed, key)

    def __getitem__(self, key: Hashable) -> Program:
        """The program. This waits while it is being compiled, and raises an error of its compilation."""
        future = self._futures.get(key)
        if future is None or future.cancel():  # not begun yet: compile it here, and do not wait for the others
            future = self._futures[key] = concurrent.futures.Future()
            future.set_result(self._timed(key))
        return future.result()

    def close(self) -> None:
        """Cancels compilations that have not begun, and does not wait for one that has."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _timed(self, key) -> Program:
        started = time.perf_counter()
        with jax.enable_x64(self._x64):
            program = self._compile(key)
        return Program(program, time.perf_counter() - started)
