"""Compilation: kept from run to run, done ahead of need, and timed apart from the work.

A step is compiled for one batch size, so a schedule of batch sizes is a ladder of programs. Compiling one takes
seconds; a change of size that has to wait for it stalls the run.
"""

import collections
import concurrent.futures
import hashlib
import os
import pathlib
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import jax

from jaxbatch.paths import cache_folder, local_path


def keep_compiled_programs(folder: str | os.PathLike | None = None) -> pathlib.Path | None:
    """Compiled programs are kept on disk and found again by later runs, on this machine with these versions.

    The studies call it unless told ``--no-keep-compiled``. A folder that JAX has already been given, as through
    ``JAX_COMPILATION_CACHE_DIR``, is left as it is.

    Args:
        folder: where; ``None``: ``compiled`` in the user's cache folder.

    Returns:
        The folder in use. None where none is named and the user's cannot be had, as without a home or with one that is
        read-only: programs are compiled anew then.

    Raises:
        ValueError: a ``folder`` that is an address; OSError: one that cannot be made.
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
    """``function.lower(*arguments).compile()`` of what ``jax.jit`` or ``jax.pmap`` returned.

    A program is compiled once for its text: a run with another seed, or another function of the same text, finds it again.
    Nothing is kept alive but the newest programs, and no function is taken for another because it has the same name, hash or
    identity. Where ``jax.disable_jit`` holds when it is called, it runs operation by operation, which a compiled program would
    refuse.

    Args:
        function: compiled, or about to be.
        arguments: of which only shapes are used.
        devices: those it is compiled for, if they are not the default one.

    Example:
        >>> double = compile_ahead(jax.jit(lambda x: 2 * x), 1.0)
        >>> with jax.disable_jit():
        ...     double(3.0)
        6.0
    """
    program = _compile_once(function.lower(*arguments), str(devices))
    return lambda *arguments: (function if jax.config.jax_disable_jit else program)(*arguments)  # type: ignore[attr-defined]


def _compile_once(lowered: Any, devices: str) -> Any:
    optimized = jax.config.read("jax_disable_most_optimizations")  # no part of the text
    # Nor are arguments that nothing depends on, which the program takes all the same.
    key = hashlib.sha256(f"{devices} {optimized} {lowered.args_info} {lowered.out_tree} {lowered.as_text()}".encode()).hexdigest()
    with _lock:
        if key in _compiled:
            _compiled.move_to_end(key)
            return _compiled[key]
    program = lowered.compile()  # without the lock: another thread may be minutes at another program
    with _lock:
        _compiled[key] = program
        while len(_compiled) > _KEPT:
            _compiled.popitem(last=False)
    return program


def call_compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """``jax.jit(function)(*arguments)``, with the arrays that ``function`` closes over as arguments of the program.

    Closed over, they would be constants of it, written out and compiled, as the parameters of a pretrained model that a
    task starts from.

    Example:
        >>> pretrained = jax.numpy.ones(3)
        >>> call_compiled(lambda scale: scale * pretrained, 2.0)
        Array([2., 2., 2.], dtype=float32)
    """
    return with_constants_as_arguments(function, *arguments)(*arguments)


def with_constants_as_arguments(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """What :func:`call_compiled` calls, to be called several times with arguments of the same shapes.

    Example:
        >>> pretrained = jax.numpy.ones(3)
        >>> run = with_constants_as_arguments(lambda scale: scale * pretrained, 2.0)
        >>> run(3.0), run(4.0)
        (Array([3., 3., 3.], dtype=float32), Array([4., 4., 4.], dtype=float32))
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)

    @jax.jit
    def run(constants, leaves):
        return jax.core.eval_jaxpr(closed.jaxpr, constants, *leaves)

    return lambda *arguments: jax.tree.unflatten(jax.tree.structure(shapes), run(closed.consts, jax.tree.leaves(arguments)))


class Program(NamedTuple):
    """Something compiled, and the seconds that took."""

    run: Any
    compile_seconds: float


class Programs:
    """Programs by key, compiled when first asked for, or ahead of that in one background thread.

    Args:
        compile: ``key -> program``. Called in another thread for what is asked for ahead.

    Example:
        >>> with Programs(lambda power: lambda x: x**power) as programs:
        ...     programs.ahead([2, 3])
        ...     programs[3].run(2), programs[2].run(2)
        (8, 4)
    """

    def __init__(self, compile: Callable[[Hashable], Any]):
        self._compile = compile
        self._futures: dict[Hashable, concurrent.futures.Future] = {}
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="jaxbatch-compile")
        self._x64 = jax.config.jax_enable_x64  # type: ignore[attr-defined]  # a setting of the thread that asks; the background has its own

    def ahead(self, keys: Iterable[Hashable]) -> None:
        """Compiles in the background, in this order, what has not been asked for yet."""
        for key in keys:
            if key not in self._futures:
                self._futures[key] = self._thread.submit(self._timed, key)

    def __getitem__(self, key: Hashable) -> Program:
        """The program, waited for if it is being compiled; an error in compiling is raised here."""
        future = self._futures.get(key)
        if future is None or future.cancel():  # not begun: here and now, rather than behind the others
            future = self._futures[key] = concurrent.futures.Future()
            future.set_result(self._timed(key))
        return future.result()

    def close(self) -> None:
        """Leaves what has not begun; what has begun ends by itself."""
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
