"""Accelerators that a program can be compiled for although they are not here, and what is known of them.

The figures, with their sources, stand in :mod:`jaxbatch.machine.target_table`.
"""

import difflib
import os
import re
from typing import Any, NamedTuple

import jax

from jaxbatch.machine.platform import Platform
from jaxbatch.machine.target_table import NVIDIA, TPU, XLA_SPECS

GIB = 2**30
# JAX takes three quarters of a GPU's memory for itself when it starts. Source: its page on GPU memory allocation.
GPU_SHARE = 0.75
_TPU_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}  # as JAX calls them
_NAMES_HERE = {"here": "the device that JAX computes on", "cpu": "this machine's CPU"}


class Target(NamedTuple):
    """An accelerator: what the compiler and the bound on time need to know about it."""

    name: str
    title: str
    platform: Platform
    memory: int  # bytes on the device
    usable: int  # bytes of it that JAX's programs and arrays can use by default
    bandwidth: float | None  # of the memory, bytes/s
    peak: dict[str, float]  # floating-point operations/s at most, by precision; "tensorfloat32" rounds float32 operands to 10 bits
    interconnect: float | None  # to all other devices together, bytes/s in both directions
    cache: int  # bytes of the last cache that all cores share; 0: none, or not known
    compiler: str | None  # the extra of jaxbatch that installs its compiler; None: it is JAX's own
    topology: str  # what the compiler is told of it
    sources: dict[str, str]  # where each figure is from

    @property
    def is_here(self) -> bool:
        """Whether its programs are compiled, and can run, on this machine."""
        return self.compiler is None

    @property
    def is_measured(self) -> bool:
        """Whether predictions of memory for it were compared with a real device (docs/memory.md)."""
        return self.is_here or self.name == "h200"


def _nvidia_targets():
    for name, (title, capability, cores, threads, lanes, shared, clock, memory, bandwidth, cache, peak, link, sources) in NVIDIA.items():
        info = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 49152,
            "shared_memory_per_core": shared[0],
            "threads_per_core_limit": threads,
            "core_count": cores,
            "fpus_per_core": lanes,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 65535,
            "block_dim_limit_z": 65535,
            "memory_bandwidth": int(bandwidth),
            "l2_cache_size": cache,
            "clock_rate_ghz": clock,
            "device_memory_size": memory,
            "shared_memory_per_block_optin": shared[1],
            "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536,
        }
        major, minor = capability
        lines = [f"{key}: {value}" for key, value in info.items()] + [f"cuda_compute_capability {{ major: {major} minor: {minor} }}"]
        text = "gpu_device_info {\n  " + "\n  ".join(lines) + "\n}\n"
        text += 'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 8 }\n' + f'device_description_str: "{title}"\n'
        usable, extra = int(GPU_SHARE * memory), "cuda-compiler"
        yield Target(name, title, "gpu", memory, usable, bandwidth, peak, link, cache, extra, text, {"topology": XLA_SPECS, **sources})


def _tpu_targets():
    for name, (title, topology, memory, usable, bandwidth, bfloat16, link, sources) in TPU.items():
        # XLA multiplies float32 in one pass of bfloat16 unless a higher precision is asked for, so the peak is the same.
        peak = {"float32": bfloat16, "bfloat16": bfloat16}
        yield Target(name, title, "tpu", memory, usable, bandwidth, peak, link, 0, "tpu-compiler", topology, sources)


TARGETS: dict[str, Target] = {target.name: target for target in (*_nvidia_targets(), *_tpu_targets())}


def find_target(name: "str | Target") -> Target:
    """The target of a name: one of :data:`TARGETS`, ``"here"`` (the device JAX computes on) or ``"cpu"``.

    Upper and lower case, spaces and hyphens do not matter. A :class:`Target`, such as ``TARGETS["h100"]._replace(...)``, is
    returned as it is.

    Raises:
        ValueError: no target has that name; the message lists similar ones.

    Example:
        >>> find_target("H100").title
        'NVIDIA H100 SXM 80 GB'
        >>> find_target("h10")
        Traceback (most recent call last):
        ValueError: target='h10' is unknown. Similar: h100, v100, p100. All: here, cpu, gtx1080ti, p100, v100, ... v6e.
    """
    if isinstance(name, Target):
        return name
    plain = re.sub(r"[\s_-]", "", str(name).lower())
    if plain in _NAMES_HERE:
        return _find_here(plain)
    known = {re.sub(r"-", "", one): one for one in TARGETS}
    if plain in known:
        return TARGETS[known[plain]]
    near = difflib.get_close_matches(plain, [*known, *_NAMES_HERE], 3, 0.5)
    starts = [key for key in known if plain and (key.startswith(plain) or key in plain)]
    if plain in ("gpu", "cuda", "tpu"):
        starts, near = [key for key, one in known.items() if TARGETS[one].platform == ("tpu" if plain == "tpu" else "gpu")], []
    similar = ", ".join(known.get(key, key) for key in dict.fromkeys(starts + near))
    similar = f" Similar: {similar}." if similar else ""
    raise ValueError(f"target={name!r} is unknown.{similar} All: {', '.join([*_NAMES_HERE, *TARGETS])}.")


def _find_here(name: str) -> Target:
    platform: Any = jax.default_backend() if name == "here" else "cpu"
    device = jax.devices(platform)[0]
    if platform == "cpu":
        memory, source = memory_of_machine(), "this machine's operating system"
        return Target(name, "this machine's CPU", "cpu", memory, memory, None, {}, None, 0, None, "cpu", {"memory": source})
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    base = _known_device(device.device_kind, limit) or Target(name, "", "gpu", 0, 0, None, {}, None, 0, None, "", {})
    usable = limit or base.usable
    sources = {**base.sources, "usable": "memory_stats() of the device"}
    return base._replace(name=name, title=device.device_kind, platform=platform, usable=usable, compiler=None, topology=platform, sources=sources)


def _known_device(kind: str, limit: int) -> Target | None:
    """The target of a device that JAX calls ``kind`` and that can use about ``limit`` bytes.

    Example:
        >>> [_known_device(kind, 60 * GIB).name for kind in ("NVIDIA A100-SXM4-80GB", "TPU v5 lite", "NVIDIA GeForce GTX 1080 Ti")]
        ['a100-80', 'v5e', 'gtx1080ti']
        >>> _known_device("NVIDIA L40S", 0) is _known_device("NVIDIA GeForce GTX 1660", 0) is None
        True
    """
    if kind in _TPU_KINDS:
        return TARGETS[_TPU_KINDS[kind]]
    card = lambda title: re.match(r"NVIDIA ((?:[GR]TX )?\w+)", title)
    gpus = [target for target in TARGETS.values() if target.platform == "gpu"]
    known = [target for target in gpus if re.search(rf"\b{card(target.title)[1]}\b", kind)]  # type: ignore[index]
    return min(known, key=lambda target: abs(target.usable - limit), default=None)


def memory_of_machine() -> int:
    """Bytes of main memory: the machine's, or less where a control group allows less.

    Example:
        >>> memory_of_machine() > 2**28
        True
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as file:
                total = min(total, int(file.read()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return total


def as_bytes(text: "str | float", name: str = "budget") -> int:
    """Bytes from a number or a text such as ``"8GiB"``, ``"500 MB"``; ``name`` is what the user gave it as.

    Raises:
        ValueError: it is no number of bytes above 0.

    Example:
        >>> as_bytes("8GiB") == 8 * 2**30, as_bytes("1.5 MB"), as_bytes(1000)
        (True, 1500000, 1000)
    """
    units = {"": 1, "b": 1, "k": 10, "m": 20, "g": 30, "t": 40}
    match = re.fullmatch(r"\s*([\d.]+(?:e\+?\d+)?)\s*([kmgt]?)(i?)b?\s*", str(text), re.IGNORECASE)
    try:
        number, unit, binary = float(match[1]), match[2].lower(), match[3]  # type: ignore[index]
        count = int(number * (2 ** units[unit] if binary else 1000 ** (units[unit] // 10))) if unit else int(number)
    except (TypeError, ValueError, OverflowError):  # no number, or an infinite one
        count = 0
    if count < 1:
        raise ValueError(f"{name}={text!r} is not an amount of memory. Write bytes or, for example, '8GiB' or '500MB'.")
    return count


def format_bytes(count: float) -> str:
    """Bytes for people.

    Example:
        >>> format_bytes(500), format_bytes(3 * 2**20), format_bytes(1.5 * 2**30)
        ('500 B', '3.0 MiB', '1.50 GiB')
    """
    for unit, size, digits in (("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 1)):
        if abs(count) >= size:
            return f"{count / size:,.{digits}f} {unit}"
    return f"{count:,.0f} B"
