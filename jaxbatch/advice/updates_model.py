r"""A model of the updates S to a goal by batch size B and learning rate :math:`\eta`, fitted to probes, censored ones too.

.. math::
    S(B, \eta) = S_\min \left(1 + \frac{B_c}{B}\right) \frac{c\,r^{-a} + a\,r^{c}}{a + c},\qquad
    r = \frac{\eta}{\eta_\max} \left(1 + \frac{B_c}{B}\right)^{p}.

The first factor is the law of the critical batch size (McCandlish et al., 2018, eq. 2.7); the best rate saturates at
:math:`\eta_\max` (ibid., eq. 2.6, there with p = 1; p is near 1/2 for Adam). The last factor is 1 at the best rate: a rate that
is too small needs :math:`r^{-a}` times the updates, and one that is too large :math:`r^{c}`. What this form does not catch is
left to a Gaussian process on the remaining differences of log S.

Parameters are drawn from their posterior by differential-evolution Markov chains (ter Braak, *A Markov Chain Monte Carlo
version of the genetic algorithm Differential Evolution*, 2006), because the posterior of so few probes is wide and skewed.

Axes: D draws, N probes, S sizes, R rates.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import ndtr

from jaxbatch.advice.probes import Probe

# Priors of (log S_min, log B_c, log eta_max, p, log a, log c, log sigma); the first and third are centred on the probes.
_MEAN = np.array([0.0, np.log(64.0), 0.0, 0.75, np.log(0.8), np.log(2.0), np.log(0.2)])
_SPREAD = np.array([4.0, 2.0, 4.0, 0.25, 0.4, 0.5, 0.5])
_CHAINS, _ITERATIONS, _KEPT_FROM, _KEPT_EVERY = 150, 450, 250, 40
_OUTLIER = 0.02  # the chance of a run for which the model does not hold
_SIZE_LENGTH, _RATE_LENGTH = 2.0, 0.6  # of the Gaussian process: factors of 2 in B, factors of 10 in the rate


class Posterior(NamedTuple):
    """Draws of the model's parameters given the probes."""

    draws: Float[np.ndarray, "D 7"]
    probes: tuple[Probe, ...]

    @property
    def critical_batch_size(self) -> Float[np.ndarray, "D"]:
        """Draws of B_c."""
        return np.exp(self.draws[:, 1])

    @property
    def min_updates(self) -> Float[np.ndarray, "D"]:
        """Draws of S_min."""
        return np.exp(self.draws[:, 0])


def fit_updates(probes: Sequence[Probe], *, seed: int = 0) -> Posterior:
    """The posterior of the model given probes, of which at least one has reached the goal.

    Raises:
        ValueError: no probe has reached the goal.
    """
    if not any(probe.reached for probe in probes):
        raise ValueError(f"probes: none of {len(probes)} has reached the goal, and the model needs one at least.")
    random, center = np.random.default_rng(seed), _center(probes)
    log_posterior = _make_log_posterior(probes, center)
    chains = center + 0.3 * _SPREAD * random.standard_normal((_CHAINS, len(center)))
    heights, kept = log_posterior(chains), []
    for iteration in range(_ITERATIONS):
        others = random.permuted(np.tile(np.arange(_CHAINS), (2, 1)), axis=1)
        # Every tenth jump is a whole difference, by which chains change between separate maxima.
        factor = 1.0 if iteration % 10 == 0 else 2.38 / np.sqrt(2 * len(center)) * random.uniform(0.4, 1.0, (_CHAINS, 1))
        proposed = chains + factor * (chains[others[0]] - chains[others[1]]) + 1e-3 * random.standard_normal(chains.shape)
        new = log_posterior(proposed)
        accepted = np.log(random.uniform(size=_CHAINS)) < new - heights
        chains, heights = np.where(accepted[:, None], proposed, chains), np.where(accepted, new, heights)
        if iteration >= _KEPT_FROM and iteration % _KEPT_EVERY == 0:
            kept.append(chains)
    return Posterior(np.concatenate(kept), tuple(probes))


def predict_log_updates(
    posterior: Posterior, batch_sizes: Sequence[int], learning_rates: Sequence[float], *, seed: int = 0
) -> Float[np.ndarray, "D S R"]:
    """Draws of log S on a grid of sizes and rates: the model and a draw of the Gaussian process given the probes."""
    sizes, rates = (axis.ravel() for axis in np.meshgrid(np.asarray(batch_sizes, float), np.asarray(learning_rates, float), indexing="ij"))
    mean = _log_updates(posterior.draws, sizes, rates)
    reached = [probe for probe in posterior.probes if probe.reached]
    known_sizes, known_rates, observed = _columns(reached)
    sigma = np.exp(posterior.draws[:, 6])
    inverse = np.linalg.inv(_kernel(known_sizes, known_rates, known_sizes, known_rates) + np.eye(len(reached)))
    across = _kernel(sizes, rates, known_sizes, known_rates)
    residual = observed - _log_updates(posterior.draws, known_sizes, known_rates)
    covariance = _kernel(sizes, rates, sizes, rates) - across @ inverse @ across.T
    root = np.linalg.cholesky(covariance + 1e-6 * np.eye(len(sizes)))
    noise = np.random.default_rng(seed).standard_normal((len(mean), len(sizes)))
    drawn = mean + residual @ (across @ inverse).T + sigma[:, None] * (noise @ root.T)
    return drawn.reshape(len(mean), len(batch_sizes), len(learning_rates))


def _log_updates(draws: np.ndarray, sizes: np.ndarray, rates: np.ndarray) -> np.ndarray:
    least, critical, largest, power, a, c = (draws[:, [column]] for column in range(6))
    a, c = np.exp(np.clip(a, -4, 3)), np.exp(np.clip(c, -4, 3))
    noise = np.logaddexp(0.0, critical - np.log(sizes))
    log_ratio = np.log(rates) - largest + power * noise
    return least + noise + np.logaddexp(np.log(c) - a * log_ratio, np.log(a) + c * log_ratio) - np.log(a + c)


def _columns(probes: Sequence[Probe]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tuple(
        np.array(column, float) for column in ([p.batch_size for p in probes], [p.learning_rate for p in probes], [np.log(p.updates) for p in probes])
    )  # type: ignore[return-value]


def _kernel(sizes: np.ndarray, rates: np.ndarray, other_sizes: np.ndarray, other_rates: np.ndarray) -> np.ndarray:
    """The covariance of what the form does not catch, in units of sigma squared."""
    by_size = (np.log2(sizes)[:, None] - np.log2(other_sizes)) / _SIZE_LENGTH
    by_rate = (np.log10(rates)[:, None] - np.log10(other_rates)) / _RATE_LENGTH
    return np.exp(-0.5 * (by_size**2 + by_rate**2))


def _center(probes: Sequence[Probe]) -> np.ndarray:
    """The middle of the priors: S_min and the largest rate from the probe that needed the fewest examples."""
    best = min((probe for probe in probes if probe.reached), key=lambda probe: probe.updates * probe.batch_size)
    center, noise = _MEAN.copy(), np.log1p(np.exp(_MEAN[1]) / best.batch_size)
    center[0] = np.log(best.updates) - noise
    center[2] = np.log(best.learning_rate) + _MEAN[3] * noise
    return center


def _make_log_posterior(probes: Sequence[Probe], center: np.ndarray):
    reached, censored = [p for p in probes if p.reached], [p for p in probes if not p.reached]
    sizes, rates, _ = _columns([*reached, *censored])
    observed, count = np.log([probe.updates for probe in reached]), len(reached)
    inverse = np.linalg.inv(_kernel(sizes[:count], rates[:count], sizes[:count], rates[:count]) + np.eye(count))
    bounds = np.log([max(probe.more_than, 1) for probe in censored])

    def log_posterior(draws):
        sigma = np.exp(np.clip(draws[:, 6], -6, 2))
        expected = _log_updates(draws, sizes, rates)
        residual = observed - expected[:, :count]
        total = -0.5 * ((residual @ inverse) * residual).sum(1) / sigma**2 - count * np.log(sigma)
        if len(bounds):
            beyond = (expected[:, count:] - bounds) / (np.sqrt(2) * sigma[:, None])
            total += np.log(_OUTLIER + (1 - _OUTLIER) * ndtr(beyond)).sum(1)
        return total - 0.5 * (((draws - center) / _SPREAD) ** 2).sum(1)

    return log_posterior
