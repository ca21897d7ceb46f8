r"""A model of the updates S to a goal by batch size B and learning rate :math:`\eta`, fitted to probes, censored ones too.

.. math::
    S(B, \eta) = S_\min \left(1 + \frac{B_c}{B}\right) \frac{c\,r^{-a} + a\,r^{c}}{a + c},\qquad
    r = \frac{\eta}{\eta_\max} \left(1 + \frac{B_c}{B}\right)^{p}.

The first factor is the law of the critical batch size (McCandlish et al., 2018, eq. 2.7); the best rate saturates at
:math:`\eta_\max` (ibid., eq. 2.6, there with p = 1; p is near 1/2 for Adam). The last factor is 1 at the best rate: a rate that
is too small needs :math:`r^{-a}` times the updates, and one that is too large :math:`r^{c}`. What this form does not catch is
left to a Gaussian process on the remaining differences of log S, with half the standard deviation sigma of the runs of one setting.

A run reached the goal *between two looks*: its crossing is drawn from that interval, given the parameters and the other runs (data
augmentation; Tanner & Wong, *The Calculation of Posterior Distributions by Data Augmentation*, 1987). A run that ended before the
goal needs more than it made. A run that diverged has no crossing. It is an outcome of its own: runs diverge where log r is above a
threshold t, more or less, and reach the goal below it.

Parameters are drawn from their posterior by differential-evolution Markov chains (ter Braak, *A Markov Chain Monte Carlo
version of the genetic algorithm Differential Evolution*, 2006), because the posterior of so few probes is wide and skewed.

Axes: D draws, N probes, S sizes, R rates.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import expit, ndtr, ndtri

from jaxbatch.advice.probes import Probe

# Priors of (log S_min, log B_c, log eta_max, p, log a, log c, log sigma, t); the first and third are centred on the probes.
_MEAN = np.array([0.0, np.log(64.0), 0.0, 0.75, np.log(0.8), np.log(2.0), np.log(0.2), np.log(5.0)])
_SPREAD = np.array([4.0, 1.5, 4.0, 0.25, 0.4, 0.5, 0.5, 0.7])
_CHAINS, _ITERATIONS, _KEPT_FROM, _KEPT_EVERY = 150, 450, 250, 40
_CLIFF = 0.2  # how much log r differs between the runs that begin to diverge: the scale of a logistic distribution
_SOON = 0.5  # updates; no run reaches the goal before, so that a first look bounds the crossing from both sides
_REDRAWN_EVERY = 10  # iterations, the crossings
_OUTLIER = 0.02  # the chance of a run for which the model does not hold
ROUGHNESS = 0.5  # the standard deviation of the Gaussian process ÷ sigma; a larger one takes lucky runs for good settings
_SIZE_LENGTH, _RATE_LENGTH = 2.0, 0.6  # of the Gaussian process: factors of 2 in B, factors of 10 in the rate


class Posterior(NamedTuple):
    """Draws of the model's parameters given the probes, and of the crossings of those that reached the goal."""

    draws: Float[np.ndarray, "D 8"]
    crossings: Float[np.ndarray, "D N"]  # the logarithm of the updates at which the goal was met
    probes: tuple[Probe, ...]  # those that reached it

    @property
    def critical_batch_size(self) -> Float[np.ndarray, "D"]:
        """Draws of B_c."""
        return np.exp(self.draws[:, 1])

    @property
    def min_updates(self) -> Float[np.ndarray, "D"]:
        """Draws of S_min."""
        return np.exp(self.draws[:, 0])

    @property
    def sigma(self) -> Float[np.ndarray, "D"]:
        """Draws of the standard deviation of log S from run to run."""
        return np.exp(self.draws[:, 6])


def fit_updates(probes: Sequence[Probe], *, seed: int = 0) -> Posterior:
    """The posterior of the model given probes, of which at least one has reached the goal.

    Raises:
        ValueError: no probe has reached the goal.
    """
    reached = [probe for probe in probes if probe.reached]
    if not reached:
        raise ValueError(f"probes: none of {len(probes)} has reached the goal, and the model needs one at least.")
    random, center = np.random.default_rng(seed), _center(probes)
    log_posterior, (low, high) = _make_log_posterior(probes, center), _crossing_bounds(reached)
    sizes, rates = _settings(reached)
    precision = np.linalg.inv(_kernel(sizes, rates, sizes, rates) + np.eye(len(reached)))
    chains = center + 0.3 * _SPREAD * random.standard_normal((_CHAINS, len(center)))
    crossings = np.tile((low + high) / 2, (_CHAINS, 1))
    heights, kept, pairs = log_posterior(chains, crossings), [], np.tile(np.arange(_CHAINS), (2, 1))
    for iteration in range(_ITERATIONS):
        others = random.permuted(pairs, axis=1)
        # Every tenth jump is a whole difference, by which chains change between separate maxima.
        factor = 1.0 if iteration % 10 == 0 else 2.38 / np.sqrt(2 * len(center)) * random.uniform(0.4, 1.0, (_CHAINS, 1))
        proposed = chains + factor * (chains[others[0]] - chains[others[1]]) + 1e-3 * random.standard_normal(chains.shape)
        new = log_posterior(proposed, crossings)
        accepted = np.log(random.uniform(size=_CHAINS)) < new - heights
        chains, heights = np.where(accepted[:, None], proposed, chains), np.where(accepted, new, heights)
        if iteration % _REDRAWN_EVERY == 0:
            expected = _log_updates(chains, sizes, rates)
            crossings = expected + _redraw(random, crossings - expected, low - expected, high - expected, precision, np.exp(chains[:, 6]))
            heights = log_posterior(chains, crossings)
        if iteration >= _KEPT_FROM and iteration % _KEPT_EVERY == 0:
            kept.append((chains, crossings))
    return Posterior(np.concatenate([chains for chains, _ in kept]), np.concatenate([drawn for _, drawn in kept]), tuple(reached))


def predict_log_updates(
    posterior: Posterior, batch_sizes: Sequence[int], learning_rates: Sequence[float], *, seed: int = 0
) -> Float[np.ndarray, "D S R"]:
    """Draws of log S of a typical run on a grid of sizes and rates: the model and a draw of the Gaussian process given the probes."""
    sizes, rates = _grid(batch_sizes, learning_rates)
    mean = _log_updates(posterior.draws, sizes, rates)
    known_sizes, known_rates = _settings(posterior.probes)
    inverse = np.linalg.inv(_kernel(known_sizes, known_rates, known_sizes, known_rates) + np.eye(len(known_sizes)))
    across = _kernel(sizes, rates, known_sizes, known_rates)
    residual = posterior.crossings - _log_updates(posterior.draws, known_sizes, known_rates)
    covariance = _kernel(sizes, rates, sizes, rates) - across @ inverse @ across.T
    root = np.linalg.cholesky(covariance + 1e-7 * np.eye(len(sizes)))
    noise = np.random.default_rng(seed).standard_normal((len(mean), len(sizes)))
    drawn = mean + residual @ (across @ inverse).T + posterior.sigma[:, None] * (noise @ root.T)
    return drawn.reshape(len(mean), len(batch_sizes), len(learning_rates))


def predict_by_law(posterior: Posterior, batch_size: int, learning_rate: float) -> Float[np.ndarray, "D"]:
    """Draws of log S at one setting by the law alone, which rests on all probes: no lucky run of the setting stands out in it."""
    return _log_updates(posterior.draws, np.array([float(batch_size)]), np.array([learning_rate]))[:, 0]


def predict_divergence(posterior: Posterior, batch_sizes: Sequence[int], learning_rates: Sequence[float]) -> Float[np.ndarray, "D S R"]:
    """Draws of the part of the runs that diverge, on a grid of sizes and rates."""
    sizes, rates = _grid(batch_sizes, learning_rates)
    chance = expit((_log_ratio(posterior.draws, sizes, rates) - posterior.draws[:, [7]]) / _CLIFF)
    return chance.reshape(len(chance), len(batch_sizes), len(learning_rates))


def _grid(batch_sizes: Sequence[int], learning_rates: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    sizes, rates = np.meshgrid(np.asarray(batch_sizes, float), np.asarray(learning_rates, float), indexing="ij")
    return sizes.ravel(), rates.ravel()


def _log_ratio(draws: np.ndarray, sizes: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """The logarithm of each rate ÷ the best one at its size."""
    return np.log(rates) - draws[:, [2]] + draws[:, [3]] * _log_noise(draws, sizes)


def _log_noise(draws: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(np.minimum(draws[:, [1]], 60)) / sizes)


def _log_updates(draws: np.ndarray, sizes: np.ndarray, rates: np.ndarray) -> np.ndarray:
    return _log_typical(draws, _log_noise(draws, sizes), _log_ratio(draws, sizes, rates))


def _log_typical(draws: np.ndarray, noise: np.ndarray, log_ratio: np.ndarray) -> np.ndarray:
    a, c = np.exp(np.minimum(np.maximum(draws[:, 4:6], -4), 3)).T[:, :, None]
    near = np.minimum(np.maximum(log_ratio, -30), 30)  # so that nothing overflows; logaddexp would take most of the time of a fit
    return draws[:, [0]] + noise + np.log((c * np.exp(-a * near) + a * np.exp(c * near)) / (a + c))


def _settings(probes: Sequence[Probe]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([probe.batch_size for probe in probes], float), np.array([probe.learning_rate for probe in probes], float)


def _crossing_bounds(reached: Sequence[Probe]) -> tuple[np.ndarray, np.ndarray]:
    """The logarithms of the ends between which each run met the goal. Those of an old record, which lacks the lower one, are equal."""
    ends = [(probe.more_than if probe.more_than < probe.updates else probe.updates, probe.updates) for probe in reached]
    low, high = np.log(np.maximum(np.array(ends, float), _SOON)).T
    return low, high


def _redraw(random: np.random.Generator, residual, low, high, precision: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Gibbs draws of the runs' residuals between their ends ``(D, N)``, each given the others."""
    residual = residual.copy()
    for run in range(residual.shape[1]):
        mean = residual[:, run] - residual @ precision[:, run] / precision[run, run]
        deviation = sigma / np.sqrt(precision[run, run])
        ends = np.stack([low[:, run] - mean, high[:, run] - mean]) / deviation
        mirrored = ends[0] > 0  # the tail in which small numbers keep their digits
        below, above = ndtr(np.where(mirrored, -ends[::-1], ends))
        drawn = ndtri(below + random.uniform(size=len(mean)) * (above - below))
        residual[:, run] = np.clip(mean + deviation * np.where(mirrored, -drawn, drawn), low[:, run], high[:, run])
    return residual


def _kernel(sizes: np.ndarray, rates: np.ndarray, other_sizes: np.ndarray, other_rates: np.ndarray) -> np.ndarray:
    """The covariance of what the form does not catch, in units of sigma squared."""
    by_size = (np.log2(sizes)[:, None] - np.log2(other_sizes)) / _SIZE_LENGTH
    by_rate = (np.log10(rates)[:, None] - np.log10(other_rates)) / _RATE_LENGTH
    return ROUGHNESS**2 * np.exp(-0.5 * (by_size**2 + by_rate**2))


def _center(probes: Sequence[Probe]) -> np.ndarray:
    """The middle of the priors: S_min and the largest rate from the probe that needed the fewest examples."""
    best = min((probe for probe in probes if probe.reached), key=lambda probe: probe.updates * probe.batch_size)
    center, noise = _MEAN.copy(), np.log1p(np.exp(_MEAN[1]) / best.batch_size)
    center[0] = np.log(best.updates) - noise
    center[2] = np.log(best.learning_rate) + _MEAN[3] * noise
    return center


def _make_log_posterior(probes: Sequence[Probe], center: np.ndarray):
    reached, lost = [p for p in probes if p.reached], [p for p in probes if p.diverged]
    ended, count = [p for p in probes if not p.reached and not p.diverged], len(reached)
    sizes, rates = _settings([*ended, *reached, *lost])
    log_rates, first, finite = np.log(rates), len(ended), len(ended) + count  # the runs that reached the goal stand in the middle
    inner = slice(first, finite)
    precision = np.linalg.inv(_kernel(sizes[inner], rates[inner], sizes[inner], rates[inner]) + np.eye(count))
    bounds, sign = np.log([max(probe.more_than, _SOON) for probe in ended]), np.repeat([1.0, -1.0], [count, len(lost)])

    def log_posterior(draws, crossings):
        sigma = np.exp(np.minimum(np.maximum(draws[:, 6], -6), 2))
        noise = _log_noise(draws, sizes)
        log_ratio = log_rates - draws[:, [2]] + draws[:, [3]] * noise
        expected = _log_typical(draws, noise[:, :finite], log_ratio[:, :finite])
        residual = crossings - expected[:, first:]
        total = -0.5 * ((residual @ precision) * residual).sum(1) / sigma**2 - count * np.log(sigma)
        if len(bounds):
            beyond = (expected[:, :first] - bounds) / (np.hypot(1, ROUGHNESS) * sigma[:, None])
            total += _log_product(ndtr(beyond))
        total += _log_product(expit(sign * (draws[:, [7]] - log_ratio[:, first:]) / _CLIFF))  # one that ended early shows neither
        return total - 0.5 * (((draws - center) / _SPREAD) ** 2).sum(1)

    return log_posterior


def _log_product(chances: np.ndarray) -> np.ndarray:
    """The logarithm of the chance of all runs, any of which may be one for which the model does not hold."""
    return np.log(np.prod(_OUTLIER + (1 - _OUTLIER) * chances, 1))
