"""Draws from a posterior of a dozen parameters, by Markov chains that begin about its mode.

The chains jump by differences of each other (ter Braak, *A Markov Chain Monte Carlo version of the genetic algorithm Differential
Evolution*, 2006).

Axes: D draws, P parameters, N points.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize

_CHAINS, _ITERATIONS, _KEPT_FROM, _KEPT_EVERY = 100, 240, 120, 30


def draw_posterior(
    log_posterior: Callable[[Float[np.ndarray, "N P"]], Float[np.ndarray, "N"]],
    center: Float[np.ndarray, "P"],
    spread: Float[np.ndarray, "P"],
    shifts: Float[np.ndarray, "K P"],
    random: np.random.Generator,
) -> Float[np.ndarray, "D P"]:
    """Draws from a posterior.

    Args:
        log_posterior: of each of several points, up to a constant.
        center: the middle of the prior.
        spread: the prior's standard deviations; they are the units of the search for the mode.
        shifts: from the middle, in these units, to where the searches for the mode begin.
        random: the generator.

    Example:
        >>> normal = lambda points: -0.5 * (points**2 / [1.0, 0.25]).sum(1)
        >>> draws = draw_posterior(normal, np.zeros(2), np.ones(2), np.zeros((1, 2)), np.random.default_rng(0))
        >>> draws.shape, draws.std(0).round(1).tolist()
        ((400, 2), [1.0, 0.5])
    """
    size, pairs = len(center), np.tile(np.arange(_CHAINS), (2, 1))
    chains = _draw_near_mode(log_posterior, center, spread, shifts, random)
    heights, kept = log_posterior(chains), []
    for iteration in range(_ITERATIONS):
        others = random.permuted(pairs, axis=1)
        # Every tenth jump is a whole difference, by which chains change between separate maxima.
        factor = 1.0 if iteration % 10 == 0 else 2.38 / np.sqrt(2 * size) * random.uniform(0.3, 1.0, (_CHAINS, 1))
        proposed = chains + factor * (chains[others[0]] - chains[others[1]]) + 1e-3 * random.standard_normal(chains.shape)
        new = log_posterior(proposed)
        accepted = np.log(random.uniform(size=_CHAINS)) < new - heights
        chains, heights = np.where(accepted[:, None], proposed, chains), np.where(accepted, new, heights)
        if iteration >= _KEPT_FROM and iteration % _KEPT_EVERY == 0:
            kept.append(chains)
    return np.concatenate(kept)


def _draw_near_mode(
    log_posterior, center: np.ndarray, spread: np.ndarray, shifts: np.ndarray, random: np.random.Generator
) -> Float[np.ndarray, "D P"]:
    """Draws from a normal distribution about the mode, with the curvature there: chains that begin far off would need thousands of steps."""
    size, steps = len(center), np.diag(1e-4 * spread)

    def cost(z: np.ndarray) -> tuple[float, np.ndarray]:
        point = center + z * spread
        heights = log_posterior(np.concatenate([point[None], point + steps, point - steps]))
        return -heights[0], -(heights[1 : size + 1] - heights[size + 1 :]) / 2e-4

    modes = [minimize(cost, start, jac=True, method="L-BFGS-B", options={"maxiter": 200, "ftol": 1e-7}) for start in shifts]
    mode = center + min(modes, key=lambda one: one.fun).x * spread
    wide = 10 * steps  # for second differences
    corners = np.array([mode + wide[i] * s + wide[j] * t for i in range(size) for j in range(size) for s in (1, -1) for t in (1, -1)])
    heights = log_posterior(corners).reshape(size, size, 2, 2)
    hessian = -(heights[..., 0, 0] - heights[..., 0, 1] - heights[..., 1, 0] + heights[..., 1, 1]) / 4e-6  # in units of the priors' spreads
    curvatures, directions = np.linalg.eigh((hessian + hessian.T) / 2)
    widths = 1 / np.sqrt(np.maximum(curvatures, 1.0))  # no direction is wider than its prior
    return mode + random.standard_normal((_CHAINS, size)) * widths @ directions.T * spread
