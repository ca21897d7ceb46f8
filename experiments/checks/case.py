"""One computation of the cross-check: how it is called, what it is held against, and how its bound comes about."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.checks.truth import Rounding

FACTOR = 4.0  # a bound is so many times the expected rounding: four standard deviations
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
    number: int  # of what the figure draws the error against: the longest sum
    make: Callable[[str], Callable[..., Any]]  # precision -> function of the inputs
    draw: Callable[[np.random.Generator], tuple]  # inputs: trees of float64 and integers
    truth: Callable[..., Any]  # of the same inputs
    bound: Callable[..., Any] | None = None  # (rounding, inputs, truth) -> bound; None: from ``number`` alone
    forms: tuple[str, ...] = FORMS
    precisions: tuple[str, ...] = tuple(ROUNDING)
    quick: bool = False
    parameters_float32: bool = False  # in bfloat16 the inputs stay float32: the network rounds them itself
    parts: tuple[str, ...] = ()  # entries of the output that are rows of their own, with bounds of their own


def length_bound(rounding: Rounding, length: int, results: int = 2) -> float:
    """The bound of a sum of ``length`` terms that passes through ``results`` roundings."""
    return FACTOR * (math.sqrt(length) * rounding.sums + results * rounding.stored)


def moved_bound(run: Callable[..., Any], rounding: Rounding, truth: dict[str, Any]) -> dict[str, float]:
    """How far rounding and kinks move each part of what a tape computes, relative to its size.

    ``run(**tape)`` computes it on a tape with these settings. Rounding is scaled down to where no kink is met, and its effect
    up again; the kinks' effect is that of taking them all one way and all the other.
    """
    small = 2.0**-53 / rounding.stored
    tiny = Rounding(rounding.sums * small, rounding.stored * small)
    moved = [run(rounding=tiny, random=np.random.default_rng(n)) for n in range(2)]
    # In float64 no branch is near enough to a kink to be taken otherwise.
    sides = [truth, truth] if rounding.stored < 1e-12 else [run(rounding=rounding, side=side) for side in (1, -1)]
    return {
        part: FACTOR * max(apart(one[part], truth[part]) for one in moved) / small + apart(sides[0][part], sides[1][part], truth[part])
        for part in truth
    }


def apart(a: Any, b: Any, size: Any = None) -> float:
    """‖a − b‖ ÷ ‖b‖ (or ‖size‖) over all leaves together."""
    norm = lambda tree: math.sqrt(sum(float((np.asarray(leaf, np.float64) ** 2).sum()) for leaf in jax.tree.leaves(tree)))
    difference = norm(jax.tree.map(lambda x, y: np.asarray(x, np.float64) - np.asarray(y, np.float64), a, b))
    return difference / max(norm(b if size is None else size), 1e-300)
