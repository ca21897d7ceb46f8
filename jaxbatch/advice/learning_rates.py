"""Which learning rate goes with a batch size, and how it grows with the batch.

Axes: R rates, S seeds.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxbatch.batches import Duration
from jaxbatch.gradients.updates import Optimizer
from jaxbatch.intervals import Interval, around
from jaxbatch.kinds import checked
from jaxbatch.training.goals import Goal, check_goal
from jaxbatch.training.sweeps import sweep
from jaxbatch.training.tasks import Task


class RateResult(NamedTuple):
    """The results of all learning rates and seeds at one batch size."""

    goal: Goal
    learning_rates: tuple[float, ...]  # R, ascending
    updates_to_goal: Float[np.ndarray, "R S"]  # at the evaluation that showed it, as for every rate; NaN: not reached
    metric: Float[np.ndarray, "R S"]  # the goal's metric at the end; NaN: diverged
    diverged: Bool[np.ndarray, "R S"]

    @property
    def best(self) -> int | None:
        """Index of the best rate: most seeds reach the goal, then fewest updates on average.

        Where no run reaches the goal: fewest seeds diverge, then the best metric at the end. None where every run diverges.

        Example:
            >>> updates, ends = np.array([[50.0, 60.0], [20.0, 25.0], [10.0, np.nan]]), np.array([[0.3, 0.3], [0.5, 0.5], [0.1, np.nan]])
            >>> result = RateResult(Goal("loss", 0.4, above=False), (0.01, 0.1, 1.0), updates, ends, np.isnan(ends))
            >>> result.best, result._replace(updates_to_goal=np.full((3, 2), np.nan)).best
            (1, 0)
        """
        finite = np.isfinite(self.updates_to_goal)
        reached = finite.sum(1)
        if reached.max() > 0:
            updates = np.where(finite, self.updates_to_goal, 0).sum(1)
            return int(np.argmin(np.where(reached == reached.max(), updates, np.inf)))
        finite = np.isfinite(self.metric)
        ended = finite.sum(1)
        if not ended.any():
            return None
        worse = np.where(finite, -self.metric if self.goal.above else self.metric, 0).sum(1)
        return int(np.argmin(np.where(ended == ended.max(), worse, np.inf)))

    @property
    def arrived(self) -> bool:
        """Whether a run at the best rate reached the goal, so that :attr:`best` was chosen by updates."""
        return bool(np.isfinite(self.updates_to_goal).any())

    @property
    def best_rate(self) -> float | None:
        """The rate at :attr:`best`."""
        return None if self.best is None else self.learning_rates[self.best]

    @property
    def is_inside(self) -> bool:
        """Whether the best rate has a neighbour on both sides; if not, a better one may lie outside the grid."""
        return self.best is not None and 0 < self.best < len(self.learning_rates) - 1


@checked
def tune_learning_rate(
    task: Task,
    make_optimizer: Callable[..., Optimizer],
    learning_rates: Sequence[float],
    *,
    batch_size: int,
    seeds: Sequence[int],
    duration: Duration,
    goal: str | Goal,
    evaluations_per_epoch: int = 2,
    after: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Trains every learning rate with every seed at one batch size, as one program (:func:`jaxbatch.sweep`).

    Args:
        task: its ``test_data`` are what the rates are judged on: take a part of the training set that is held out
            (:func:`jaxbatch.hold_out`), not the test set.
        make_optimizer: ``learning_rate -> optimizer``, or ``(learning_rate, num_steps) -> optimizer`` with the updates in ``duration``; see
            :func:`jaxbatch.sweep` for schedules that cannot be traced.
        learning_rates: R rates, in any order.
        batch_size: B.
        seeds: S integers.
        duration: the longest time to train, see :class:`jaxbatch.FitConfig`.
        goal: see :func:`jaxbatch.as_goal`.
        evaluations_per_epoch: how often the goal is looked at.
        after: an earlier record of the same call, to continue from; ``batches``, ``diverged_at_batch``, ``updates_to_goal`` and
            ``state`` are read. After its last record nothing is yielded.

    Yields:
        The records of :func:`jaxbatch.sweep`, whose arrays of runs have shape ``(R, S)``, with ``updates_to_goal`` and the
        ``result`` so far, a :class:`RateResult`. Leaves of ``state`` have the leading axis R · S, seeds changing fastest.

    Raises:
        ValueError: no rate, or one that is not finite and above 0; the task has no such metric; the errors of
            :func:`jaxbatch.sweep`.

    Example:
        >>> import optax
        >>> from jaxbatch import epochs
        >>> loss_fn = lambda w, x: 0.5 * (x - w) ** 2
        >>> task = Task(lambda key: jnp.array(0.0), loss_fn, lambda w, x: {"loss": loss_fn(w, x)}, jnp.ones(4), jnp.ones(4))
        >>> rates = {"learning_rates": [0.01, 0.1, 0.9], "batch_size": 4, "seeds": [0, 1], "duration": epochs(30)}
        >>> *_, last = tune_learning_rate(task, optax.sgd, goal="loss<0.01", evaluations_per_epoch=1, **rates)
        >>> last["result"].best_rate, last["result"].updates_to_goal[1:].tolist()
        (0.9, [[19.0, 19.0], [1.0, 1.0]])
    """
    goal, rates = check_goal(task, goal), sorted({float(rate) for rate in learning_rates})
    if not rates or not all(0 < rate < np.inf for rate in rates):
        raise ValueError(f"learning_rates={list(learning_rates)} must hold at least one number, each above 0 and finite.")
    shape = (len(rates), len(seeds))
    reached_at = np.full(shape, np.nan)
    if after is not None:
        reached_at = np.array(after["updates_to_goal"], float).reshape(shape)
        after = {**after, "diverged_at_batch": np.ravel(after["diverged_at_batch"])}
    settings, repeated = jnp.repeat(jnp.array(rates), len(seeds)), [seed for _ in rates for seed in seeds]
    limits: dict[str, Any] = {"batch_size": batch_size, "duration": duration, "evaluations_per_epoch": evaluations_per_epoch}
    for record in sweep(task, make_optimizer, settings, repeated, **limits, after=after):
        tables = {name: np.reshape(value, shape) for name, value in record.items() if isinstance(value, np.ndarray)}
        diverged, measured = tables["diverged_at_batch"] >= 0, tables[f"test_{goal.metric}"].astype(float)
        reached = ~diverged & (measured >= goal.value if goal.above else measured <= goal.value)
        reached_at = np.where(np.isnan(reached_at) & reached, float(record["batches"]), reached_at)
        result = RateResult(goal, tuple(rates), reached_at, np.where(diverged, np.nan, measured), diverged)
        yield record | tables | {"updates_to_goal": reached_at, "result": result}


@checked
def rate_exponent(results: Mapping[int, RateResult], *, resamples: int = 2000, seed: int = 0) -> Interval:
    """The exponent p of rate ∝ B^p over the batch sizes whose best rate lies inside the grid and reaches the goal, with a 95% interval.

    Where no run reaches the goal, the rate that ends best is one of a training that has not arrived, and says nothing of the others.

    The interval covers the choice of seeds and the spacing of the grid. The mean updates of every rate are drawn anew with
    the error that the spread of seeds gives them, pooled over all rates and sizes, so it holds with 2 seeds, too. The best
    rate may then lie anywhere within half a spacing of the best one of the grid.

    Args:
        results: the :class:`RateResult` of each batch size. Sizes at which no run reaches the goal, or the best rate lies on the edge,
            are left out, and counted.
        resamples: how often means and places within the grid are drawn.
        seed: the seed of these draws.

    Returns:
        p, with n the number of sizes; NaN with fewer than 2. With one seed nothing is known of its error, and the ends are infinite.

    Example:
        >>> ends = np.zeros((5, 2))
        >>> def result(best):
        ...     updates = np.array([[10.0 + abs(n - best)] * 2 for n in range(5)])
        ...     return RateResult(Goal("accuracy", 0.9), (0.001, 0.01, 0.1, 1.0, 10.0), updates, ends, ends > 0)
        >>> round(rate_exponent({1: result(1), 10: result(2), 100: result(3)}).value, 3)
        1.0
    """
    inside = {size: one for size, one in sorted(results.items()) if one.is_inside and one.arrived}
    left_out = len(results) - len(inside)
    if len(inside) < 2:
        return Interval(np.nan, np.nan, np.nan, len(inside), left_out)
    sizes = np.log(list(inside))
    weights = (sizes - sizes.mean()) / ((sizes - sizes.mean()) ** 2).sum()  # of the best rates' logarithms in the slope
    value = float(weights @ [np.log(one.best_rate or np.nan) for one in inside.values()])
    spread, freedom = _pooled_spread(inside.values())
    if freedom == 0:
        return Interval(value, -np.inf, np.inf, len(inside), left_out)
    random = np.random.default_rng(seed)
    low, high = np.percentile(weights @ [_drawn_rates(one, spread, freedom, resamples, random) for one in inside.values()], [2.5, 97.5])
    return around(value, low, high, len(inside), left_out)


def _pooled_spread(results: Iterable[RateResult]) -> tuple[float, int]:
    """The standard deviation of the logarithm of a run's updates among seeds, and its degrees of freedom."""
    squares, freedom = 0.0, 0
    for result in results:
        for row in result.updates_to_goal:
            logs = np.log(row[np.isfinite(row)])
            if len(logs) > 1:
                squares, freedom = squares + float(((logs - logs.mean()) ** 2).sum()), freedom + len(logs) - 1
    return float(np.sqrt(squares / freedom)) if freedom else 0.0, freedom


def _drawn_rates(result: RateResult, spread: float, freedom: int, count: int, random: np.random.Generator) -> Float[np.ndarray, "draws"]:
    """Logarithms of rates that may be the best, within the grid."""
    finite, grid = np.isfinite(result.updates_to_goal), np.log(result.learning_rates)
    reached = finite.sum(1)
    means = np.where(finite, result.updates_to_goal, 0).sum(1) / np.maximum(reached, 1)
    logs = np.where(reached == reached.max(), np.log(np.maximum(means, 1e-300)), np.inf)
    errors = random.normal(size=(count, len(grid))) * np.sqrt(freedom / random.chisquare(freedom, (count, 1)))
    best = np.clip((logs + spread / np.sqrt(reached.max()) * errors).argmin(1), 1, len(grid) - 2)
    return random.uniform((grid[best - 1] + grid[best]) / 2, (grid[best] + grid[best + 1]) / 2)
