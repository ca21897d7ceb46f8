"""Checks whether this machine computes correctly: a few important checks, which take about a second.

Compilers sometimes give wrong numbers, and a study of batch size compares small differences. Each check compares a result
with NumPy in float64. ``python -m experiments.cross_check`` runs the full set of checks.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32

from jaxbatch.gradients.exact import group_gradients
from jaxbatch.layers import conv

_ROUNDOFF = 2.0**-24  # of float32


class BackendCheck(NamedTuple):
    """One check: its relative error in the Euclidean norm, and the bound that rounding can explain."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound; NaN is not."""
        return self.error <= self.bound


@functools.cache
def check_backend() -> tuple[BackendCheck, ...]:
    r"""Runs the checks on the default device, once per process.

    A sum of n terms with independent roundings has a relative error of about :math:`\sqrt n\,u`, where u is the unit roundoff
    of float32. The bound of a check is about four times the error of its longest sum.

    Returns:
        The checks of a sum after a product (which jaxlib 0.10.2 computes wrongly on CPU), a matrix product, a convolution with
        its gradients, gradients of groups, and random bits.

    Example:
        >>> [check.name for check in check_backend() if not check.passed]
        []

    References:
        Higham and Mary, `A New Approach to Probabilistic Rounding Error Analysis <https://doi.org/10.1137/18M1226312>`_,
        2019. Random bits: Salmon et al., `Parallel Random Numbers: As Easy as 1, 2, 3
        <https://doi.org/10.1145/2063384.2063405>`_, 2011.
    """
    with jax.enable_x64(False), jax.default_matmul_precision("highest"):
        return tuple(check() for check in (_sum_after_product, _product, _convolution, _groups, _random_bits))


def _held(name: str, computed: tuple, truth: tuple, length: int) -> BackendCheck:
    def relative_error(a, b):
        return float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))

    errors = [relative_error(a, b) for a, b in zip(computed, truth, strict=True)]
    error = math.nan if any(math.isnan(one) for one in errors) else max(errors)
    return BackendCheck(name, error, 4 * _ROUNDOFF * (math.sqrt(length) + 2))


def _normal(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


def _sum_after_product() -> BackendCheck:
    first = np.arange(32_769, dtype=np.float32)
    rows = np.stack([first, 0 * first, 0 * first], 1)
    sums = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(rows)
    return _held("sum of squares after a product (jax issue 39103)", (sums,), (first.astype(np.float64) ** 2,), 3)


def _product() -> BackendCheck:
    a, b = _normal((63, 129), (129, 65))
    return _held("matrix product", (jax.jit(jnp.matmul)(a, b),), (a.astype(np.float64) @ b,), 129)


def _convolution() -> BackendCheck:
    x, kernel, cotangent = _normal((3, 7, 7, 5), (9, 3, 3, 5), (3, 7, 7, 9))

    def run(x, kernel, cotangent):
        out, back = jax.vjp(lambda *pair: conv(*pair, layout="native", padding=1), x, kernel)
        return out, *back(cotangent)

    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    out, dx, dk = np.zeros(cotangent.shape), np.zeros(padded.shape), np.zeros(kernel.shape)
    for i in range(3):
        for j in range(3):
            part = padded[:, i : i + 7, j : j + 7]
            out += part @ kernel[:, i, j].T
            dx[:, i : i + 7, j : j + 7] += cotangent.astype(np.float64) @ kernel[:, i, j]
            dk[:, i, j] = np.tensordot(cotangent, part, ((0, 1, 2), (0, 1, 2)))
    return _held("convolution and its gradients", jax.jit(run)(x, kernel, cotangent), (out, dx[:, 1:-1, 1:-1], dk), 147)


def _groups() -> BackendCheck:
    w, x, y = _normal((8,), (24, 8), (24,))
    gradients = group_gradients(lambda w, batch: 0.5 * (batch[0] @ w - batch[1]) ** 2, jnp.asarray(w), (x, y), 4)
    wide = x.astype(np.float64)
    truth = np.stack([part.mean(0) for part in np.split(wide * (wide @ w - y)[:, None], 4)])
    return _held("gradients of groups", (gradients,), (truth,), 16)


def _random_bits() -> BackendCheck:
    words: Callable = jax.jit(threefry_2x32)
    bits = words(np.array([0x13198A2E, 0x03707344], np.uint32), np.array([0x243F6A88, 0x85A308D3], np.uint32))
    check = _held("random bits", (bits,), (np.array([0xC4923A9C, 0x483DF7A0], np.float64),), 1)
    return check._replace(bound=0.0)
