"""What must be set before JAX is loaded: huge pages for its memory, and the log level of XLA."""

import importlib.util
import os
import pathlib
import sys
from collections.abc import Mapping

_HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLE = "glibc.malloc.hugetlb=1"


def settle(environ: dict[str, str] = os.environ) -> None:
    """Sets the environment variables, and restarts the program where they only work from the start of a process.

    XLA:CPU takes the memory of a step from the system at every call and gives it back. With pages of 4 KiB, this takes a good
    part of a step's time (``scripts/bench.py adabatch`` with and without ``JAXBATCH_HUGE_PAGES=0`` shows how much).
    glibc requests huge pages (of 2 MiB) if an environment variable says so when the process starts. With
    ``JAXBATCH_HUGE_PAGES=0`` this function does not set that variable.
    """
    # When XLA:CPU reads a compiled program from the cache, it logs many false errors about the processor.
    environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if _HUGE_PAGES.exists() and wants_huge_pages(environ, _HUGE_PAGES.read_text()):
        before = environ.get("GLIBC_TUNABLES")
        environ["GLIBC_TUNABLES"] = f"{before}:{_TUNABLE}" if before else _TUNABLE
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], dict(environ))


def load_jax_silently() -> None:
    """Imports JAX without what a CUDA compiler, if there is one, prints when it finds no driver; no log level changes that."""
    if not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))):
        return
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        import jax  # noqa: F401
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def wants_huge_pages(environ: Mapping[str, str], enabled: str) -> bool:
    """Whether to request huge pages: only if the system gives them on request (``madvise``) and nothing is set already.

    Example:
        >>> wants_huge_pages({}, "always [madvise] never"), wants_huge_pages({}, "[always] madvise never")
        (True, False)
    """
    settled = environ.get("JAXBATCH_HUGE_PAGES") == "0" or "glibc.malloc.hugetlb" in environ.get("GLIBC_TUNABLES", "")
    return "[madvise]" in enabled and not settled


def started_as_module(package: str, argv: list[str], orig_argv: list[str]) -> bool:
    """Whether this process was started as ``python -m package...``; called while the package is being imported.

    Example:
        >>> started_as_module("experiments", ["-m"], ["python", "-m", "experiments.split_backward"])
        True
        >>> started_as_module("experiments", ["pytest"], ["python", "-m", "pytest"])
        False
    """
    if argv[:1] != ["-m"] or "-m" not in orig_argv:
        return False
    return orig_argv[orig_argv.index("-m") + 1].split(".")[0] == package
