"""The platform that programs are compiled for. Every choice that depends on it asks this module, and no other.

Usually it is the platform that JAX computes on. While a program is compiled for an accelerator that is not there
(:mod:`jaxbatch.machine.cross_compiling`), it is the accelerator's.
"""

import contextlib
import importlib.machinery
import importlib.metadata
import importlib.util
import pathlib
import sys
import types
from collections.abc import Iterator
from typing import Literal

import jax

Platform = Literal["cpu", "gpu", "tpu"]

# jit keeps what it traced for one platform apart from what it traced for another, because this value is part of its keys.
_other_platform = jax.make_user_context(default_value=None)  # type: ignore[attr-defined]


def compiled_platform() -> str:
    """``"cpu"``, ``"gpu"`` or ``"tpu"``: the platform of programs that are traced now.

    Example:
        >>> with compiling_for("tpu"):
        ...     compiled_platform()
        'tpu'
    """
    return _other_platform.value or jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Within it, functions are traced for ``platform``, whatever JAX computes on."""
    with _other_platform(platform):
        yield


_CUDA_PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
_DEVICE_FILES = ("dev/nvidia*", "dev/dxg", "dev/accel*", "dev/vfio/*")


def skip_absent_accelerators(root: pathlib.Path = pathlib.Path("/")) -> bool:
    """Keeps JAX from looking for accelerators whose compilers are installed but which are not here.

    Otherwise JAX finds the compilers when it starts, looks for their devices, and prints long messages because there are none.
    Where there is a device, or no compiler, nothing is changed.

    Returns:
        Whether JAX was told to skip them.
    """
    cuda = [name for name in _CUDA_PLUGINS if is_installed(name)]
    if not (cuda or is_installed("libtpu")) or any(next(root.glob(pattern), None) for pattern in _DEVICE_FILES):
        return False
    for name in cuda:  # in place of the plugin, a module that registers nothing
        if name not in sys.modules:
            stand_in = types.ModuleType(name)
            stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None)
            stand_in.initialize = lambda: None  # type: ignore[attr-defined]
            sys.modules[name] = stand_in
    others = {entry.value for entry in importlib.metadata.entry_points(group="jax_plugins")} - set(_CUDA_PLUGINS)
    if not jax.config.jax_platforms and not others:  # type: ignore[attr-defined]
        jax.config.update("jax_platforms", "cpu")
    return True


def is_installed(name: str) -> bool:
    """Whether a module can be imported; it is not imported.

    Example:
        >>> is_installed("jax"), is_installed("no_package.no_module")
        (True, False)
    """
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that should hold it
        return False
