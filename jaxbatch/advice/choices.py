"""What is expected of every batch size: numbers with their intervals, from the draws of an estimate and the times of an update.

Axes: D draws, S batch sizes, R learning rates.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import ndtr, ndtri

from jaxbatch.advice.estimates import Estimate, Space, best_setting, count_reached
from jaxbatch.advice.probes import Probe, even_looks
from jaxbatch.advice.throughput import Throughput
from jaxbatch.advice.updates_model import ROUGHNESS, Posterior, predict_by_law
from jaxbatch.intervals import Interval, around, unknown

Objective = Literal["time", "examples", "balanced"]
_CLOSE = 1.1  # sizes that cost at most so many times the best belong to the range
_PRIOR_RUNS = 6  # the weight of the spread of all probes against that of one setting's runs
_LAW_ERROR = 0.3  # how far the critical batch size may be from that of the law, as the standard deviation of its logarithm
_SURELY = 0.95  # the part of the runs that reach the goal within the duration that is advised


class Choice(NamedTuple):
    """What is expected of one batch size at its best learning rate. Updates, examples and seconds are those until the goal is met.

    A run notices that at its next evaluation, up to ``look`` updates later. Runs that diverge are not counted in them.
    """

    batch_size: int
    learning_rate: float
    updates: Interval  # the mean over runs
    next_run: Interval  # the updates of one more run: 95% of runs lie between these ends
    examples: Interval  # the mean over runs
    seconds: Interval  # of training, the mean over runs; its interval includes the error of timing
    relative_cost: Interval  # the objective, relative to the advised setting; runs that diverge cost, too
    chance: float  # that it costs at most a tenth more than the best size
    probes: int  # how many runs were made at this size
    runs: int  # how many of them at this learning rate
    reached: int  # how many of those reached the goal
    diverged: int  # how many of those diverged
    repeats: int  # how many of those that reached it repeat the setting, after it had been the best
    evaluations_per_epoch: int  # of its runs; 0: they are not counted by epochs
    look: int  # updates from one evaluation to the next
    enough_updates: int  # within so many, about 95% of the runs that do not diverge notice the goal


def summarize(
    estimate: Estimate,
    space: Space,
    throughput: Throughput,
    probes: Sequence[Probe],
    objective: Objective,
    *,
    prefer: str,
    evaluations_per_epoch: int,
    num_examples: int,
    looks: Mapping[int, int] | None = None,
) -> dict[str, Any]:
    """The fields of :class:`jaxbatch.advice.advice.Advice` that follow from an estimate.

    With ``looks``, the updates between two looks by batch size, evaluations are not counted by epochs.
    """
    expected = estimate.log_cost.mean(0)
    seconds = draw_seconds(throughput, space.batch_sizes, len(estimate.log_cost))
    unit = cost_from_seconds(objective, space.batch_sizes, seconds)
    log_cost = estimate.log_updates + estimate.log_trials + np.log(unit)[:, :, None]
    chosen = log_cost[:, estimate.best[0], estimate.best[1]]
    by_size = log_cost.min(2)  # in every draw, a size at the best rate of that draw
    near = by_size - by_size.min(1, keepdims=True) <= np.log(_CLOSE)
    choices = []
    for row, size in enumerate(space.batch_sizes):
        rate = int(expected[row].argmin()) if row != estimate.best[0] else estimate.best[1]
        runs = [probe for probe in probes if (probe.batch_size, probe.learning_rate) == (size, space.learning_rates[rate])]
        steps_per_epoch = max(1, num_examples // size)
        evaluations = even_looks(steps_per_epoch, evaluations_per_epoch)
        look = math.ceil(steps_per_epoch / evaluations) if looks is None else looks[size]
        choices.append(
            Choice(
                batch_size=size,
                learning_rate=space.learning_rates[rate],
                **_expected_of_runs(estimate.posterior, seconds[:, row], runs, (size, space.learning_rates[rate]), look),
                relative_cost=_spread(np.exp(log_cost[:, row, rate] - chosen), len(runs)),
                chance=float(near[:, row].mean()),
                probes=sum(probe.batch_size == size for probe in probes),
                runs=len(runs),
                reached=sum(probe.reached for probe in runs),
                diverged=sum(probe.diverged for probe in runs),
                repeats=sum(probe.repeat and probe.reached for probe in runs),
                evaluations_per_epoch=evaluations if looks is None else 0,
            )
        )
    advised = space.batch_sizes[estimate.best[0]]
    close = close_sizes(choices)
    elsewhere = tuple((factor, _best_size_elsewhere(estimate, space, throughput, factor, probes, prefer)) for factor in (0.1, 10.0))
    several = len(space.batch_sizes) > 1
    return {
        "elsewhere": elsewhere if objective == "time" and several else (),
        "batch_size": advised,
        "learning_rate": space.learning_rates[estimate.best[1]],
        "choices": tuple(choices),
        "close_sizes": close,
        "candidates": tuple(c.batch_size for c in choices if c.chance >= 0.1 or c.batch_size in (advised, *close)),
        "critical_batch_size": _critical_batch_size(estimate, len(probes)) if several else unknown(),
        "expected_regret": float(np.expm1(np.mean(chosen - log_cost.min((1, 2))))),
    }


def _critical_batch_size(estimate: Estimate, runs: int) -> Interval:
    """Where all runs had smaller batches, the law is read beyond them, and it is only approximate."""
    draws = estimate.posterior.critical_batch_size
    return _spread(draws * np.exp(_LAW_ERROR * np.random.default_rng(4).standard_normal(len(draws))), runs)


def _expected_of_runs(posterior: Posterior, seconds: np.ndarray, runs: Sequence[Probe], setting: tuple[int, float], look: int):
    """The fields of :class:`Choice` that tell how long runs of a setting take; ``seconds`` are of an update, ``(D,)``."""
    repeats = [probe for probe in runs if probe.repeat and not probe.diverged]
    typical, sigma = draw_typical(posterior, setting, repeats)
    mean = np.exp(typical + sigma**2 / 2)
    one_run = np.exp(typical + sigma * np.random.default_rng(1).standard_normal(len(typical)))
    return {
        "updates": _spread(mean, len(runs)),
        "next_run": _spread(one_run, len(runs)),
        "examples": _spread(mean * setting[0], len(runs)),
        "seconds": _spread(mean * seconds, len(runs)),
        "look": look,
        "enough_updates": look * math.ceil(float(np.quantile(one_run, _SURELY)) / look),
    }


def draw_typical(posterior: Posterior, setting: tuple[int, float], repeats: Sequence[Probe]) -> tuple[Float[np.ndarray, "D"], Float[np.ndarray, "D"]]:
    """Draws of the mean and the standard deviation of log S at a setting from the runs that repeat it, without the winner's gain.

    The best of many noisy settings looks better than it is, and so does the best rate of every size. The runs that repeat it were not
    chosen for their own luck, and the law rests on all probes; it counts as one run more. The standard deviation is that of all
    probes, as if it came from six runs of this setting, together with what the runs that repeat it show. A setting that no run
    repeats follows the law, as far as settings do.
    """
    random, count = np.random.default_rng(3), len(repeats)
    reached = [number for number, probe in enumerate(posterior.probes) if probe in repeats]
    law, spread = predict_by_law(posterior, *setting), posterior.sigma[:, None]
    if not count:
        return law + ROUGHNESS * posterior.sigma * random.standard_normal(len(law)), posterior.sigma
    late = np.log([max(probe.more_than, 1) for probe in repeats if not probe.reached])
    below = ndtr((late - law[:, None]) / spread)  # what the law expects of a run that needs more than it made, however few those are
    uniform = random.uniform(size=(len(posterior.draws), len(late)))
    beyond = np.maximum(late, law[:, None] + spread * ndtri(np.minimum(below + (1 - below) * uniform, 1 - 1e-12)))
    drawn = np.concatenate([posterior.crossings[:, reached], beyond], 1)
    squares = ((drawn - drawn.mean(1, keepdims=True)) ** 2).sum(1) + _PRIOR_RUNS * posterior.sigma**2
    sigma = np.sqrt(squares / random.chisquare(_PRIOR_RUNS + count - 1, len(drawn)))
    center = (law + drawn.sum(1)) / (1 + count)
    return center + sigma / math.sqrt(1 + count) * random.standard_normal(len(drawn)), sigma


def close_sizes(choices: Sequence[Choice]) -> tuple[int, ...]:
    """The sizes whose expected cost is at most a tenth above the least one, by the numbers that a table shows."""
    least = min(choice.relative_cost.value for choice in choices)
    return tuple(choice.batch_size for choice in choices if round(choice.relative_cost.value / least, 2) <= _CLOSE)


def draw_seconds(throughput: Throughput, batch_sizes: Sequence[int], count: int, *, seed: int = 2) -> Float[np.ndarray, "D S"]:
    """Draws of the seconds of an update at several sizes, as uncertain as the intervals of the timed sizes say.

    Example:
        >>> from jaxbatch.advice.throughput import fit_throughput
        >>> times = fit_throughput({8: [1.0, 1.1, 1.2, 1.1, 1.0], 64: [2.0] * 5})
        >>> drawn = draw_seconds(times, [8, 64], 1000)
        >>> bool(0.03 < drawn[:, 0].std() < 0.1), bool(drawn[:, 1].std() < 1e-9)
        (True, True)
    """
    timed = sorted(throughput.seconds)
    random, factors = np.random.default_rng(seed), np.zeros((count, len(timed)))
    for column, known in enumerate(throughput.seconds[size] for size in timed):
        z = random.standard_normal(count)
        ends = [abs(math.log(end / known.value)) / 1.96 if end > 0 and math.isfinite(end) else 0.0 for end in (known.low, known.high)]
        factors[:, column] = z * np.where(z < 0, *ends)
    between = np.array([np.interp(np.log(batch_sizes), np.log(timed), one) for one in np.eye(len(timed))])
    return np.array([throughput.seconds_at(size) for size in batch_sizes]) * np.exp(factors @ between)


def cost_from_seconds(objective: Objective, batch_sizes: Sequence[int], seconds: Float[np.ndarray, "*D S"]) -> Float[np.ndarray, "*D S"]:
    """What an update costs at each size: seconds, examples, or the square root of their product.

    Raises:
        ValueError: the objective is unknown.

    Example:
        >>> cost_from_seconds("balanced", [4, 9], np.array([1.0, 4.0])).tolist()
        [2.0, 6.0]
    """
    if objective == "time":
        return seconds
    if objective == "examples":
        return np.broadcast_to(np.asarray(batch_sizes, float), seconds.shape)
    if objective == "balanced":
        return np.sqrt(seconds * np.asarray(batch_sizes, float))
    raise ValueError(f"objective={objective!r} must be 'time', 'examples' or 'balanced'.")


def _best_size_elsewhere(estimate: Estimate, space: Space, throughput: Throughput, factor: float, probes: Sequence[Probe], prefer: str) -> int:
    """The best size, by time, on a device whose fixed time of an update is ``factor`` times as long, all else equal."""
    fixed = (factor - 1) * float(throughput.seconds_per_update)
    shortest = 0.01 * min(throughput.seconds_at(size) for size in space.batch_sizes)  # the line is only approximate
    seconds = np.array([max(throughput.seconds_at(size) + fixed, shortest) for size in space.batch_sizes])
    expected = (estimate.log_updates + estimate.log_trials).mean(0) + np.log(seconds)[:, None]
    return space.batch_sizes[best_setting(expected, count_reached(probes, space), prefer)[0]]


def _spread(draws: np.ndarray, count: int) -> Interval:
    """The median of draws with the interval that holds 95% of them; ``count`` runs of the setting are behind it, often none."""
    low, middle, high = np.quantile(draws, [0.025, 0.5, 0.975])
    return around(float(middle), float(low), float(high), count)
