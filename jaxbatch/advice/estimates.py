"""What the model says of every setting, and which of them is best.

Axes: D draws, S batch sizes, R learning rates.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxbatch.advice.probes import Probe
from jaxbatch.advice.updates_model import Posterior, fit_updates, predict_divergence, predict_log_updates

_UNCERTAIN = 0.1  # added to the expected logarithm of the cost of a setting that no run has brought to the goal; less with each that has


class Space(NamedTuple):
    """The settings to choose from, and what an update costs at each size, in the objective's unit."""

    batch_sizes: tuple[int, ...]
    learning_rates: tuple[float, ...]
    cost_of_update: Mapping[int, float]

    def log_costs(self) -> Float[np.ndarray, "S"]:
        """The logarithm of an update's cost at every size."""
        return np.log([self.cost_of_update[size] for size in self.batch_sizes])


def usual_sizes(num_examples: int) -> tuple[int, ...]:
    """The sizes to choose from where none are given: powers of two, at least 2 and 4, up to half the data set.

    Example:
        >>> usual_sizes(70)
        (2, 4, 8, 16, 32)
    """
    return tuple(2**power for power in range(1, 25) if 2**power <= max(4, num_examples // 2))


def middle_size(sizes: Sequence[int]) -> int:
    """The size nearest to 64, or to the middle of the sizes if that is smaller: where a search begins.

    Example:
        >>> middle_size((4, 8, 16, 32)), middle_size((16, 64, 256))
        (32, 64)
    """
    aim = min(64.0, float(np.sqrt(sizes[0] * sizes[-1])) * 2)
    return min(sizes, key=lambda size: abs(np.log(size / aim)))


class Estimate(NamedTuple):
    """What the model says of every setting: draws of the logarithm of the cost to the goal, axes (D, S, R).

    The cost of runs that diverge is borne by those that reach the goal: if half of them diverge, the cost is twice that of one.
    """

    posterior: Posterior
    log_updates: Float[np.ndarray, "D S R"]  # of a typical run
    log_trials: Float[np.ndarray, "D S R"]  # of the runs that are made for one that does not diverge
    log_cost: Float[np.ndarray, "D S R"]
    best: tuple[int, int]  # indices of size and rate

    @property
    def regret(self) -> float:
        """The expected cost of the best setting above that of the true best one, as a part of it."""
        chosen, least = self.log_cost[:, self.best[0], self.best[1]], self.log_cost.min((1, 2))
        return float(np.expm1(np.mean(chosen - least)))


def make_estimate(probes: Sequence[Probe], space: Space, prefer: str) -> Estimate:
    """Fits the model to all probes and finds the setting with the least expected cost."""
    posterior = fit_updates(probes)
    log_updates = predict_log_updates(posterior, space.batch_sizes, space.learning_rates)
    log_trials = -np.log1p(-0.99 * predict_divergence(posterior, space.batch_sizes, space.learning_rates))
    log_cost = log_updates + log_trials + space.log_costs()[:, None]
    return Estimate(posterior, log_updates, log_trials, log_cost, best_setting(log_cost.mean(0), count_reached(probes, space), prefer))


def best_setting(expected: Float[np.ndarray, "S R"], reached: Float[np.ndarray, "S R"], prefer: str) -> tuple[int, int]:
    """The indices of the setting with the least expected logarithm of the cost; of equal ones, one that was seen to reach the goal.

    Args:
        expected: the logarithm of the cost.
        reached: how many runs of each setting reached the goal.
        prefer: of sizes that cost the same within 2%, the ``"smaller"`` or the ``"larger"``.

    Example:
        >>> best_setting(np.array([[0.0, 0.02], [0.5, 0.6]]), np.array([[0.0, 3.0], [0.0, 0.0]]), "smaller")
        (0, 1)
    """
    expected = expected + _UNCERTAIN / (1 + reached)
    by_size = expected.min(1)
    close = np.flatnonzero(by_size <= by_size.min() + 0.02)
    size = int(close[0] if prefer == "smaller" else close[-1])
    return size, int(expected[size].argmin())


def count_reached(probes: Sequence[Probe], space: Space, *, repeats: bool = False) -> Float[np.ndarray, "S R"]:
    """How many runs of each setting reached the goal; with ``repeats``, how many of those that repeat it."""
    count = np.zeros((len(space.batch_sizes), len(space.learning_rates)))
    for probe in probes:
        if probe.reached and probe.repeat >= repeats and probe.batch_size in space.batch_sizes and probe.learning_rate in space.learning_rates:
            count[space.batch_sizes.index(probe.batch_size), space.learning_rates.index(probe.learning_rate)] += 1
    return count


def cost_of_best(probes: Sequence[Probe], space: Space, estimate: Estimate) -> float:
    """What a typical run of the best setting costs: at least as much as the luckiest run, to which others must not be held."""
    luckiest = min(probe.updates * space.cost_of_update[probe.batch_size] for probe in probes if probe.reached)
    return max(luckiest, math.exp(estimate.log_cost[:, estimate.best[0], estimate.best[1]].mean()))
