r"""The law of what a run ends with: its metric after :math:`D` examples with batch size :math:`B` and learning rate :math:`\eta`.

A larger batch and a rate beside the best one act as if the run had seen fewer examples,

.. math::
    D_\text{eff} = \frac{D}{(1 + B / B_c) (1 + B_s / B)\, h(r)},\qquad h(r) = \frac{c\,r^{-a} + a\,r^{c}}{a + c},\qquad
    r = \frac{\eta}{\eta_\max (1 + D_e / D)^{0.8}} \left(1 + \frac{B_c(D_0)}{B}\right)^{p},

the law of the critical batch size solved for the data (McCandlish et al., 2018, eq. 2.7; :mod:`jaxbatch.advice.updates_model` has the
same factors for the updates to a goal), with a price of small batches, too. What a run ends with falls with the data by a power law that
may level off or steepen,

.. math::
    y = y_0 + k\,\frac{(D_\text{eff} / D_0)^{-\alpha} - 1}{\alpha},

and is never above its value before training. :math:`B_c` and :math:`B_s` grow as :math:`D^\beta` (Bergsma et al., 2025, arXiv 2505.13738), and
:math:`\eta_\max` falls as :math:`D^{-\gamma}` (Bjorck et al., 2024, arXiv 2409.19913), so that short runs tell of long ones. Where runs are
shorter than :math:`D_e`, the best rate falls faster with the length: they end before noise matters, and all that counts is how far they get.
:math:`y` is the logarithm of a metric, see :class:`Scale`.

Axes: D draws, N runs.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

NAMES = (
    "y0",
    "log_slope",
    "bend",
    "log_critical",
    "beta",
    "log_rate",
    "gamma",
    "power",
    "log_a",
    "log_c",
    "log_sigma",
    "cliff",
    "log_small",
    "log_early",
)
Y0, SLOPE, BEND, CRITICAL, BETA, RATE, GAMMA, POWER, A, C, SIGMA, CLIFF, SMALL, EARLY = range(len(NAMES))
_EARLIER = 0.8  # the power by which the best rate falls with the length while runs are short, beside gamma; see scripts/within_building.py
_SHARP = 20.0  # how sharply the value before training caps the law, in units of 1 / y


class Scale(NamedTuple):
    """How a metric enters the law, so that less is better and a power law is a line.

    Of a metric that shall fall and is above 0, such as a loss, it is the logarithm; of one that shall rise and lies between 0 and 1,
    such as an accuracy, the logarithm of what is missing to 1; of any other the metric itself, in units of ``unit``.
    """

    kind: str  # "log", "log missing" or "linear"
    above: bool
    unit: float = 1.0  # of "linear"; of "log missing" the least that can be missing, half an example of the test set

    def write(self, value: float) -> float:
        """The metric on the law's scale; infinite where it is not finite."""
        if not math.isfinite(value):
            return math.inf
        if self.kind == "log":
            return math.log(max(value, 1e-12))
        if self.kind == "log missing":
            return math.log(max(1 - value, 0.0) + self.unit)
        return (-value if self.above else value) / self.unit

    def read(self, y: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
        """The metric from the law's scale."""
        if self.kind == "log":
            return np.exp(y)
        if self.kind == "log missing":
            return np.clip(1 + self.unit - np.exp(y), 0, 1)
        return y * self.unit * (-1 if self.above else 1)

    def suited_to(self, start: float, values: Sequence[float]) -> "Scale":
        """The scale, or a linear one once the metric has left the range of the logarithm; its unit is how far the best value is from the start.

        Example:
            >>> Scale("log", False).suited_to(2.0, [0.5]).kind, Scale("log", False).suited_to(2.0, [0.5, -8.0])
            ('log', Scale(kind='linear', above=False, unit=10.0))
        """
        seen = [value for value in [start, *values] if math.isfinite(value)]
        inside = {"log": lambda value: value > 0, "log missing": lambda value: 0 <= value <= 1}
        if self.kind in inside and all(map(inside[self.kind], seen)):
            return self
        best = (max if self.above else min)(seen, default=0.0)
        far = abs(best - start) if math.isfinite(start) else max(seen, default=0.0) - min(seen, default=0.0)
        return Scale("linear", self.above, far or 1.0)


def choose_scale(above: bool, start: float, values: list[float], num_tests: int) -> Scale:
    """The scale for a metric.

    Args:
        above: whether larger values are better.
        start: the metric before training.
        values: what was seen of it so far.
        num_tests: examples in the test set.

    Example:
        >>> choose_scale(False, 2.3, [0.4], 100).kind, choose_scale(True, 0.1, [0.9], 100).kind, choose_scale(False, -1.0, [-5.0], 100)
        ('log', 'log missing', Scale(kind='linear', above=False, unit=4.0))
    """
    hoped = Scale("log missing", above, 0.5 / num_tests) if above else Scale("log", above)
    return hoped.suited_to(start, values)


def log_ratio(draws: np.ndarray, sizes: np.ndarray, rates: np.ndarray, log_length: np.ndarray) -> np.ndarray:
    """The logarithm of each rate ÷ the best one at its size and length ``(D, N)``; ``log_length`` is of D / D_0."""
    noise = np.log1p(np.exp(np.minimum(draws[:, [CRITICAL]], 60)) / sizes)
    early = _EARLIER * np.log1p(np.exp(np.clip(draws[:, [EARLY]] - log_length, -60, 30)))
    return np.log(rates) - draws[:, [RATE]] + draws[:, [GAMMA]] * log_length - early + draws[:, [POWER]] * noise


def log_effective(draws: np.ndarray, sizes: np.ndarray, log_length: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """The logarithm of D_eff / D_0 ``(D, N)``; ``ratio`` is from :func:`log_ratio`."""
    near = np.minimum(np.maximum(ratio, -30), 30)
    a, c = np.exp(np.minimum(np.maximum(draws[:, [A, C]], -4), 3)).T[:, :, None]
    off = np.log((c * np.exp(-a * near) + a * np.exp(c * near)) / (a + c))
    return log_length - log_batch_cost(draws, sizes, log_length) - off


def log_batch_cost(draws: np.ndarray, sizes: np.ndarray, log_length: np.ndarray) -> np.ndarray:
    """The logarithm of (1 + B / B_c) (1 + B_s / B) ``(D, N)``."""
    growth = draws[:, [BETA]] * log_length
    large, small = draws[:, [CRITICAL]] + growth, draws[:, [SMALL]] + growth
    return np.log1p(sizes * np.exp(-np.clip(large, -30, 60))) + np.log1p(np.exp(np.clip(small, -60, 30)) / sizes)


def value_of(draws: np.ndarray, log_data: np.ndarray, start: float) -> np.ndarray:
    """y of effective data, given as the logarithm of D_eff / D_0 ``(D, N)``; it is at most ``start``, that before training."""
    bend, slope = _bend(draws), np.exp(np.clip(draws[:, [SLOPE]], -12, 4))
    law = draws[:, [Y0]] + slope * np.expm1(np.clip(-bend * log_data, -50, 50)) / bend
    return np.minimum(law, start) - np.log1p(np.exp(-_SHARP * np.abs(law - start))) / _SHARP


def data_for(draws: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The logarithm of the effective data D_eff / D_0 with which the law has the value ``y``; infinite where no data suffice.

    Example:
        >>> draws = np.array([[0.0, np.log(0.5), 0.3, *[0.0] * 11]])
        >>> data = np.array([[-1.0, 0.0, 2.0]])
        >>> np.allclose(data_for(draws, value_of(draws, data, 9.0)), data)
        True
    """
    bend, slope = _bend(draws), np.exp(np.clip(draws[:, [SLOPE]], -12, 4))
    inside = 1 + bend * (y - draws[:, [Y0]]) / slope
    with np.errstate(divide="ignore", invalid="ignore"):
        data = -np.log(inside) / bend
    return np.where(inside > 0, data, np.where(bend > 0, np.inf, -np.inf))


def _bend(draws: np.ndarray) -> np.ndarray:
    bend = np.clip(draws[:, [BEND]], -0.6, 2.5)
    return np.where(np.abs(bend) < 1e-4, 1e-4, bend)
