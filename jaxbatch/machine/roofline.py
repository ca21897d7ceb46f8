"""A lower bound on the time of a program on a device (roofline): it must do its operations and move its bytes.

The time is at least ``max(operations / peak, bytes / bandwidth)``. It is a bound, never a measurement: real programs reach the
peaks of a data sheet rarely. Source: Williams, Waterman and Patterson, *Roofline: an insightful visual performance model*, 2009.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxbatch.machine.platform import compiling_for
from jaxbatch.machine.targets import Target


class Work(NamedTuple):
    """What a program does, as lowered: before the compiler changes it."""

    operations: float  # floating-point operations; loops count as one pass
    precision: str  # of its products: "bfloat16", "float16", "tensorfloat32" or "float32"


class Bound(NamedTuple):
    """A lower bound on the seconds of a program."""

    compute: float  # operations / peak
    transfer: float  # bytes / bandwidth

    @property
    def seconds(self) -> float:
        """The larger one."""
        return max(self.compute, self.transfer)


def count_work(function: Callable[..., Any], *arguments: Any) -> Work:
    """The operations of ``function(*arguments)`` on an accelerator, counted on the lowered program; nothing is compiled.

    Raises:
        ValueError: JAX cannot count them.

    Example:
        >>> import jax.numpy as jnp
        >>> work = count_work(lambda a, b: a @ b, jnp.ones((8, 16)), jnp.ones((16, 4)))
        >>> work.operations == 2 * 8 * 16 * 4, work.precision
        (True, 'tensorfloat32')
    """
    with compiling_for("gpu"):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    costs = lowered.cost_analysis()
    if not costs or "flops" not in costs:
        raise ValueError("JAX does not count the operations of this program.")
    return Work(float(costs["flops"]), _precision(lowered.as_text()))


def _precision(text: str) -> str:
    """The lowest precision among a lowered program's products, since the bound must hold for the fastest of them."""
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line or "stablehlo.convolution" in line]
    for dtype, name in (("bf16", "bfloat16"), ("f16", "float16")):
        if any(re.search(rf"[x<]{dtype}>", line) for line in products):
            return name
    return "float32" if products and all("HIGHEST" in line for line in products) else "tensorfloat32"


def time_bound(target: Target, work: Work, moved: float) -> Bound:
    """The least seconds that a program needs on a target.

    Args:
        target: with known peaks and bandwidth.
        work: from :func:`count_work`.
        moved: bytes that the program must move between the memory and the cores at least.

    Raises:
        ValueError: the target's figures are not known.

    Example:
        >>> from jaxbatch.machine.targets import find_target
        >>> bound = time_bound(find_target("t4"), Work(8.1e12, "float32"), 320.064e9)
        >>> bound.compute, bound.transfer
        (1.0, 1.0)
    """
    if not target.peak or not target.bandwidth:
        raise ValueError(f"target={target.name!r}: its peak and bandwidth are not known, so there is no bound.")
    peak = target.peak.get(work.precision, max(target.peak.values()))
    return Bound(work.operations / peak, moved / target.bandwidth)
