r"""Fits the law of endings (:mod:`jaxbatch.advice.end_law`) to runs, and tells what settings would end with.

A run that was made whole shows its value: the law's, a Gaussian process for what the law does not catch, and the noise from run to
run with standard deviation sigma. Far above the best value the law is only trusted to a part of the distance. A run that was ended
early, because it was behind, shows that it ends above a bound. A run that diverged shows that its rate is near or above a threshold.
The posterior is drawn by :mod:`jaxbatch.advice.end_draws`.

Axes: D draws, N runs, M settings.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import expit, ndtr

from jaxbatch.advice import end_law
from jaxbatch.advice.end_draws import draw_posterior
from jaxbatch.advice.end_law import BEND, BETA, CLIFF, CRITICAL, EARLY, GAMMA, NAMES, POWER, RATE, SIGMA, SLOPE, SMALL, Y0, A, C, Scale
from jaxbatch.advice.ending import Ending

# Priors. The first and the rate are centred on the best run.
_MEAN = {Y0: 0.0, SLOPE: np.log(0.3), BEND: 0.15, CRITICAL: np.log(128.0), BETA: 0.45, RATE: 0.0, GAMMA: 0.2, POWER: 0.85}
_MEAN |= {A: np.log(1.0), C: np.log(2.0), SIGMA: np.log(0.054), CLIFF: np.log(5.0), SMALL: np.log(0.5), EARLY: np.log(0.03)}
_SPREAD = {
    Y0: 1.5,
    SLOPE: 1.2,
    BEND: 0.3,
    CRITICAL: 1.5,
    BETA: 0.35,
    RATE: 3.0,
    GAMMA: 0.22,
    POWER: 0.3,
    A: 0.5,
    C: 0.6,
    SIGMA: 0.7,
    CLIFF: 1.0,
    SMALL: 1.5,
    EARLY: 1.5,
}
_PRIOR_MEAN, _PRIOR_SPREAD = (np.array([of[key] for key in range(len(NAMES))]) for of in (_MEAN, _SPREAD))
LEARNED = 0.1  # on the law's scale; a run that is better than before training by so much has begun to learn
_FAR = 0.1, 0.1  # the parts of a run's distance to the best value of its length, and of all runs, by which the law may be wrong
_ROUGHNESS = 0.7  # the standard deviation of the Gaussian process ÷ sigma
_WIDTHS = np.array([2.0 * np.log(2), 0.6 * np.log(10), 2.0 * np.log(2)])  # of the Gaussian process: in log B, log rate, log D
_CLIFF_WIDTH = 0.2  # how much log r differs between the runs that begin to diverge
_SHORTER = 0.15  # runs that are n times shorter differ by chance n ** _SHORTER times as much
_OUTLIER = 0.02  # the chance of a run for which the model does not hold


class Fitted(NamedTuple):
    """Draws of the law's parameters given the runs."""

    draws: Float[np.ndarray, "D 14"]
    settings: Float[np.ndarray, "N 3"]  # batch size, learning rate, logarithm of the length, of the runs that ended
    values: Float[np.ndarray, "N"]  # of these runs, on the law's scale
    start: float  # the value before training, on the law's scale
    length: float  # D_0, in examples

    @property
    def sigma(self) -> Float[np.ndarray, "D"]:
        """Draws of the standard deviation from run to run, on the law's scale."""
        return np.exp(np.clip(self.draws[:, SIGMA], -9, 2))

    @property
    def sigma_of_one(self) -> Float[np.ndarray, "D"]:
        """Draws of how far one run lies from the law: by chance, and by what the law does not catch, which no single run can tell apart."""
        return self.sigma * np.hypot(1, _ROUGHNESS)


def fit_endings(endings: Sequence[Ending], scale: Scale, start: float, length: float, *, seed: int = 0) -> Fitted:
    """The posterior of the law given runs, of which at least one has ended.

    Args:
        endings: the runs.
        scale: of the metric.
        start: the metric before training.
        length: examples of the run that the answer is for; others are measured by it.
        seed: of the draws.

    Raises:
        ValueError: no run has ended.
    """
    return _fit(tuple(endings), scale, start, length, seed)


@functools.lru_cache(8)  # a report asks for its answer several times
def _fit(endings: tuple[Ending, ...], scale: Scale, start: float, length: float, seed: int) -> Fitted:
    before = scale.write(start)
    lost = which_are_lost(endings, scale, start)
    ended = [ending for ending, is_lost in zip(endings, lost, strict=True) if ending.ended and not is_lost]
    if not ended:
        raise ValueError(f"endings: none of {len(endings)} runs has come to its end, and the law needs one at least.")
    values = np.minimum([scale.write(ending.value) for ending in ended], before)  # how much worse than before training says nothing more
    log_posterior, center = _make_log_posterior(_Runs(ended, *_others(endings, lost)), values, before, length)
    shifts = np.zeros((2, len(center)))  # the search for the mode begins with little and with much noise
    shifts[:, SIGMA] = -1.5, 1.0
    draws = draw_posterior(log_posterior, center, _PRIOR_SPREAD, shifts, np.random.default_rng(seed))
    return Fitted(draws, _settings(ended, length), values, before, length)


def which_are_lost(endings: Sequence[Ending], scale: Scale, start: float) -> list[bool]:
    """Which runs were lost to a rate that is too large: they diverged, or ended as if they had learned nothing.

    A run that has learned nothing may also have had too small a rate. It was lost if it had learned on the way, or if another run
    learned from no more examples with a rate that is no larger and a batch that is no smaller.

    Example:
        >>> learned = Ending(8, 0.1, 0, 90, 90, False, 0.3, ((90, 0.3),))
        >>> dead = Ending(8, 0.1, 1, 300, 300, False, 2.3, ((300, 2.3),))
        >>> which_are_lost([learned, dead, dead._replace(learning_rate=0.001)], Scale("log", False), 2.3)
        [False, True, False]
    """
    has_learned = lambda value: scale.write(value) < scale.write(start) - LEARNED
    learned = [ending for ending in endings if not ending.diverged and has_learned(ending.value)]

    def is_lost(ending: Ending) -> bool:
        if ending.diverged or not ending.ended or has_learned(ending.value):
            return ending.diverged
        as_much = [one for one in learned if one.learning_rate <= ending.learning_rate and one.batch_size >= ending.batch_size]
        return any(has_learned(value) for _, value in ending.looks) or any(one.examples <= ending.examples for one in as_much)

    return [is_lost(ending) for ending in endings]


def predict_values(fitted: Fitted, settings: Float[np.ndarray, "M 3"], *, seed: int = 0, smooth: bool = False) -> Float[np.ndarray, "D M"]:
    """Draws of the mean value of runs with these settings, on the law's scale: the law, and what runs nearby showed beside it.

    Args:
        fitted: from :func:`fit_endings`.
        settings: batch size, learning rate, logarithm of the length ÷ ``fitted.length``.
        seed: of the draws.
        smooth: the law alone, which rests on all runs: no lucky run of a setting stands out in it.
    """
    law = law_values(fitted, settings)
    if smooth:
        return law
    residual = fitted.values - law_values(fitted, fitted.settings)
    sigma, far, chance = fitted.sigma, _trusted_to(fitted.values, fitted.settings[:, 2]), _by_chance(fitted.settings[:, 2])
    own = _kernel(fitted.settings, fitted.settings)
    across, among = _kernel(settings, fitted.settings), _kernel(settings, settings)
    noise = np.random.default_rng(seed).standard_normal((len(law), len(settings)))
    drawn = np.empty_like(law)
    # In groups of draws whose sigma is about the same, because each needs a matrix of its own.
    order = np.argsort(sigma)
    for group in np.array_split(order, min(24, len(order))):
        variance = float(np.median(sigma[group])) ** 2
        gain = np.linalg.solve(variance * (own + np.diag(chance**2)) + np.diag(far**2), variance * across.T).T
        covariance = variance * among - gain @ (variance * across.T)
        root = np.linalg.cholesky(covariance + (1e-6 * variance + 1e-14) * np.eye(len(settings)))
        drawn[group] = law[group] + residual[group] @ gain.T + noise[group] @ root.T
    return np.minimum(drawn, fitted.start)  # no setting is expected to end worse than before training


def law_values(fitted: Fitted, settings: Float[np.ndarray, "M 3"]) -> Float[np.ndarray, "D M"]:
    """The law's values at settings."""
    sizes, _, log_length = settings.T
    ratio = end_law.log_ratio(fitted.draws, *settings.T)
    return end_law.value_of(fitted.draws, end_law.log_effective(fitted.draws, sizes, log_length, ratio), fitted.start)


def predict_divergence(fitted: Fitted, settings: Float[np.ndarray, "M 3"]) -> Float[np.ndarray, "D M"]:
    """Draws of the part of the runs that diverge."""
    return expit((end_law.log_ratio(fitted.draws, *settings.T) - fitted.draws[:, [CLIFF]]) / _CLIFF_WIDTH)


def _settings(endings: Sequence[Ending], length: float) -> Float[np.ndarray, "N 3"]:
    return np.array([(one.batch_size, one.learning_rate, np.log(one.examples / length)) for one in endings], float).reshape(-1, 3)


def _kernel(settings: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The covariance of what the law does not catch, in units of sigma squared."""
    features = [np.column_stack([np.log(rows[:, 0]), np.log(rows[:, 1]), rows[:, 2]]) / _WIDTHS for rows in (settings, others)]
    squares = ((features[0][:, None] - features[1][None]) ** 2).sum(-1)
    return _ROUGHNESS**2 * np.exp(-0.5 * squares)


def _trusted_to(values: np.ndarray, log_lengths: np.ndarray) -> np.ndarray:
    """By how much the law may be wrong about runs that are not the best of about their length."""
    alike = np.abs(log_lengths[:, None] - log_lengths) < 0.4
    best = np.where(alike, values, np.inf).min(1)
    return _FAR[0] * (values - best) + _FAR[1] * (values - values.min())


def _by_chance(log_lengths: np.ndarray) -> np.ndarray:
    """The standard deviation between runs ÷ that of runs of the length that is asked about."""
    return np.exp(-_SHORTER * log_lengths)


class _Runs(NamedTuple):
    """Runs by what they show."""

    ended: list[Ending]
    behind: list[Ending]  # that were ended early
    lost: list[Ending]


def _others(endings: Sequence[Ending], lost: Sequence[bool]) -> tuple[list[Ending], list[Ending]]:
    behind = [ending for ending, is_lost in zip(endings, lost, strict=True) if not is_lost and not ending.ended and ending.looks]
    return behind, [ending for ending, is_lost in zip(endings, lost, strict=True) if is_lost]


def _make_log_posterior(runs: _Runs, values: np.ndarray, start: float, length: float):
    ended, behind, lost = runs
    settings = _settings([*ended, *behind, *lost], length)
    count, finite = len(ended), len(ended) + len(behind)
    bound, far = np.min(values), _trusted_to(values, settings[:count, 2])
    chance = np.hypot(_by_chance(settings[:count, 2]), _ROUGHNESS)
    sign = np.repeat([1.0, -1.0], [count, len(lost)])
    longest = max(ending.examples for ending in ended)
    best = int(np.argmin(np.where([ending.examples >= 0.9 * longest for ending in ended], values, np.inf)))
    center = _PRIOR_MEAN.copy()
    center[Y0] = values[best] + np.exp(center[SLOPE]) * settings[best, 2]
    noise = np.log1p(np.exp(center[CRITICAL]) / settings[best, 0])
    center[RATE] = np.log(settings[best, 1]) + center[GAMMA] * settings[best, 2] + center[POWER] * noise

    def log_posterior(draws: np.ndarray) -> np.ndarray:
        sigma = np.exp(np.clip(draws[:, [SIGMA]], -9, 2))
        ratio = end_law.log_ratio(draws, *settings.T)
        law = end_law.value_of(draws, end_law.log_effective(draws, settings[:finite, 0], settings[:finite, 2], ratio[:, :finite]), start)
        spread = np.hypot(sigma * chance, far)
        away = (values - law[:, :count]) / spread
        usual = np.exp(-0.5 * np.minimum(away**2, 600)) / spread
        total = np.log((1 - _OUTLIER) * usual + _OUTLIER * 0.1 / (1 + away**2)).sum(1)  # any run may be one for which the law does not hold
        if len(behind):
            total += _log_product(ndtr((law[:, count:] - bound) / np.hypot(sigma, 0.02)))
        threshold = np.concatenate([ratio[:, :count], ratio[:, finite:]], 1)
        total += _log_product(expit(sign * (draws[:, [CLIFF]] - threshold) / _CLIFF_WIDTH))
        off = draws - center
        off[:, SIGMA] -= off[:, SLOPE]  # where runs differ more by their settings, they differ more by chance
        return total - 0.5 * ((off / _PRIOR_SPREAD) ** 2).sum(1)

    return log_posterior, center


def _log_product(chances: np.ndarray) -> np.ndarray:
    return np.log(_OUTLIER + (1 - _OUTLIER) * chances).sum(1)
