"""One computation of the cross-check: how it is called, what it is compared with, and how its bound is derived."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.cross_check.cases.truth import Rounding

FACTOR = 4.0  # a bound is this many times the expected rounding: four standard deviations
ROUNDING = {
    "float64": Rounding(2.0**-53, 2.0**-53),
    "float32": Rounding(2.0**-24, 2.0**-24),
    "bfloat16": Rounding(2.0**-24, 2.0**-8),  # sums are kept in float32
    "default": Rounding(2.0**-24, 2.0**-24),  # float32 arrays; the platform chooses how it multiplies them
}
FORMS = ("eager", "jit", "scan", "vmap")


class Case(NamedTuple):
    """One computation at one size."""

    name: str
    size: str
    number: int  # the size in the figure: the length of the longest sum
    make: Callable[[str], Callable[..., Any]]  # precision -> function of the inputs
    draw: Callable[[np.random.Generator], tuple]  # inputs: trees of float64 and integers
    truth: Callable[..., Any]  # function of the same inputs
    bound: Callable[..., Any] | None = None  # (rounding, inputs, truth) -> bound; None: the bound follows from ``number``
    forms: tuple[str, ...] = FORMS
    precisions: tuple[str, ...] = tuple(ROUNDING)
    quick: bool = False
    parameters_float32: bool = False  # inputs stay float32 even in bfloat16, since the network rounds them
    parts: tuple[str, ...] = ()  # entries of the output that have their own rows and bounds


def length_bound(rounding: Rounding, length: int, results: int = 2) -> float:
    """The bound of a sum of ``length`` terms that passes through ``results`` roundings."""
    return FACTOR * (math.sqrt(length) * rounding.sums + results * rounding.stored)


def moved_bound(run: Callable[..., Any], rounding: Rounding, truth: dict[str, Any]) -> dict[str, float]:
    """How far rounding and kinks move each part of a tape's result, relative to the size of the part.

    ``run(**tape)`` computes the result on a tape with these settings. Rounding is made so small that it changes no branch at a
    kink (see :mod:`experiments.cross_check.cases.truth`), and its effect is scaled up again. The effect of kinks is the difference
    between taking all of them one way and all of them the other way.
    """
    small = 2.0**-53 / rounding.stored
    tiny = Rounding(rounding.sums * small, rounding.stored * small)
    moved = [run(rounding=tiny, random=np.random.default_rng(n)) for n in range(2)]
    # In float64 no value is so near a kink that the machine may take the other branch.
    sides = [truth, truth] if rounding.stored < 1e-12 else [run(rounding=rounding, side=side) for side in (1, -1)]
    return {
        part: FACTOR * max(relative_difference(one[part], truth[part]) for one in moved) / small
        + relative_difference(sides[0][part], sides[1][part], truth[part])
        for part in truth
    }


def relative_difference(a: Any, b: Any, size: Any = None) -> float:
    """‖a − b‖ ÷ ‖b‖ (or ‖size‖) over all leaves together."""
    norm = lambda tree: math.sqrt(sum(float((np.asarray(leaf, np.float64) ** 2).sum()) for leaf in jax.tree.leaves(tree)))
    difference = norm(jax.tree.map(lambda x, y: np.asarray(x, np.float64) - np.asarray(y, np.float64), a, b))
    return difference / max(norm(b if size is None else size), 1e-300)
