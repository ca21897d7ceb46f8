"""Chooses probes one after another, until the best batch size and learning rate are known well enough.

First a *race* finds a rate that works at one middle size: rates over several powers of ten start side by side, and the worse
half ends at each round. Then a model of all probes so far (:mod:`jaxbatch.advice.updates_model`) says which setting may be
better than the best one, and that setting is probed. A probe ends when it has cost more than the best setting. The best of many
noisy runs looks better than it is, so the last runs repeat the setting that is to be advised, until three have reached the goal.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxbatch.advice.estimates import Estimate, Space, cost_of_best, count_reached, make_estimate
from jaxbatch.advice.probes import Probe

CONFIRMED = 3  # so many runs that repeat the advised setting reach the goal, if the number of probes allows
PATIENCE = 1.5  # a probe may cost so many times the best one before it ends
LONG_PATIENCE = 4.0  # likewise, of one that repeats the best setting: how much runs differ is to be seen
SPARE = 15  # one of so many runs is kept for repeating another setting
_STRIDE = 8  # a probe's size is within this factor of sizes that have reached the goal
_OPTIMISM = 1.0  # standard deviations by which an unknown setting may be better than expected


@runtime_checkable
class Runs(Protocol):
    """What makes runs: :class:`jaxbatch.advice.probes.Prober`, or a simulation."""

    @property
    def task(self) -> Any:
        """Of which only ``num_examples`` is used."""

    def run(self, batch_size: int, learning_rate: float, seed: int) -> Iterator[Probe]:
        """The run so far at each evaluation."""


class Outcome(NamedTuple):
    """All probes, and the estimate from them; None if no probe reached the goal."""

    probes: tuple[Probe, ...]
    estimate: Estimate | None


def search(
    prober: Runs,
    space: Space,
    *,
    first_size: int,
    max_probes: int,
    tolerance: float,
    prefer: str,
    seed: int,
    known: Sequence[Probe] = (),
    on_probe: Callable[[Probe, int], None] = lambda probe, number: None,
    within_budget: Callable[[Sequence[Probe]], bool] = lambda probes: True,
) -> Outcome:
    """Runs the race, then probe after probe.

    Args:
        prober: runs a probe.
        space: see :class:`Space`.
        first_size: the size of the race.
        max_probes: the most probes, those of the race included.
        tolerance: the search ends when the expected regret is below this.
        prefer: ``"smaller"`` or ``"larger"``: which size to take of those that cannot be told from the best.
        seed: the seed of the first probe; each later one has its own.
        known: the probes of an earlier call that was stopped, in their order. They are not run again.
        on_probe: called with each new probe and its number.
        within_budget: whether there is budget left after these probes.
    """
    probes = list(known)
    if len(probes) < len(_racers(space, max_probes)):  # the race did not end, or not all of it was kept: it gives the same again
        for probe in list(race(prober, space, first_size, seed, max_probes)):
            same = next((number for number, other in enumerate(probes) if probe[:3] == other[:3]), None)  # of one size, rate and seed
            if same is None:
                on_probe(probe, len(probes))
                probes.append(probe)
            elif probe.updates > probes[same].updates:  # a budget had cut it short; it counts once
                on_probe(probe, same)
                probes[same] = probe
    for rate in rates_beside(probes, _racers(space, max_probes), space.learning_rates):  # none, if a racer reached the goal
        if len(probes) < max_probes and within_budget(probes) and not any(probe.reached for probe in probes):
            *_, probe = prober.run(first_size, rate, seed + len(probes))
            on_probe(probe, len(probes))
            probes.append(probe)
    if not any(probe.reached for probe in probes):
        return Outcome(tuple(probes), None)
    estimate = make_estimate(probes, space, prefer)
    while len(probes) < max_probes and within_budget(probes) and not is_settled(probes, space, estimate, tolerance, max_probes - len(probes)):
        # Some runs are left for another setting, should those that repeat the first one show that it is worse than it looked.
        (size, rate), repeat = choose_next(probes, space, estimate, tolerance, max_probes - len(probes) - max_probes // SPARE)
        most = (LONG_PATIENCE if repeat else PATIENCE) * cost_of_best(probes, space, estimate)
        probe = run_capped(prober, space, size, rate, seed + len(probes), most)._replace(repeat=repeat)
        on_probe(probe, len(probes))
        probes.append(probe)
        estimate = make_estimate(probes, space, prefer)
    return Outcome(tuple(probes), estimate)


def race(prober: Runs, space: Space, batch_size: int, seed: int, most: int = 10**6) -> Iterator[Probe]:
    """At most ``most`` rates side by side; after rounds of doubling length the half with the larger loss ends. Yields how each one ended."""
    runners: dict[float, Iterator[Probe]] = {rate: prober.run(batch_size, rate, seed) for rate in _racers(space, most)}
    latest: dict[float, Probe] = {}
    length = max(8, prober.task.num_examples // batch_size // 8)
    while runners:
        for rate in list(runners):
            for probe in runners[rate]:
                latest[rate] = probe
                if probe.updates >= length or probe.reached:
                    break
            else:  # the longest duration is over, or the run diverged
                del runners[rate]
        winners = [probe for probe in latest.values() if probe.reached]
        if winners:
            break
        ranked = sorted(runners, key=lambda rate: _order(latest[rate]))
        for rate in ranked[max(2, math.ceil(len(ranked) / 2)) :]:
            del runners[rate]
        length *= 2
    yield from latest.values()


def _racers(space: Space, most: int) -> tuple[float, ...]:
    """The rates of the race: every second one, or as many as are allowed, from the whole range."""
    rates = space.learning_rates[::2]
    if len(rates) <= most:
        return rates
    return tuple(rates[round((number + 0.5) * len(rates) / most - 0.5)] for number in range(most))


def rates_beside(probes: Sequence[Probe], racers: Sequence[float], rates: Sequence[float]) -> list[float]:
    """Where no racer reached the goal, the rates beside the one with the least loss that have not been tried: they lie between the racers."""
    raced = [probe for probe in probes if probe.learning_rate in racers]
    if not raced or any(probe.reached for probe in raced):
        return []
    tried = {probe.learning_rate for probe in probes}
    best = rates.index(min(raced, key=_order).learning_rate)
    return [rates[index] for index in (best + 1, best - 1) if 0 <= index < len(rates) and rates[index] not in tried]


def _order(probe: Probe) -> float:
    return probe.loss if math.isfinite(probe.loss) else math.inf


def run_capped(prober: Runs, space: Space, batch_size: int, learning_rate: float, seed: int, most_cost: float) -> Probe:
    """Runs a probe until it has cost so much, or has not begun to learn in a quarter of that."""
    most = max(1, math.ceil(most_cost / space.cost_of_update[batch_size]))
    probe = first = None
    for probe in prober.run(batch_size, learning_rate, seed):
        if probe.reached or probe.updates >= most:
            break
        if first is None:
            first = probe.loss  # there is nothing to compare it with yet
        elif probe.updates >= most / 4 and not probe.loss < first:
            break  # what has not begun to learn in a quarter of the time is not ahead at the end
    assert probe is not None
    return probe


def choose_next(probes: Sequence[Probe], space: Space, estimate: Estimate, tolerance: float, left: int) -> tuple[tuple[int, float], bool]:
    """The setting to run next, and whether it repeats the best one, because the search is settled or only ``left`` probes are left.

    Else it is the setting whose cost may be least: the expected logarithm less its standard deviation; each is probed twice at most.
    """
    missing = CONFIRMED - count_reached(probes, space, repeats=True)[estimate.best]
    if missing > 0 and (left <= missing or has_small_regret(probes, space, estimate, tolerance)):
        return (space.batch_sizes[estimate.best[0]], space.learning_rates[estimate.best[1]]), True
    hopeful = estimate.log_cost.mean(0) - _OPTIMISM * estimate.log_cost.std(0)
    reached = {probe.batch_size for probe in probes if probe.reached}
    near = [min(reached) <= _STRIDE * size and size <= _STRIDE * max(reached) for size in space.batch_sizes]
    hopeful[~np.array(near)] = math.inf  # the model is not trusted far from what it has seen
    for cell in np.ndindex(hopeful.shape):
        setting = space.batch_sizes[cell[0]], space.learning_rates[cell[1]]
        times = sum((probe.batch_size, probe.learning_rate) == setting for probe in probes)
        hopeful[cell] += 0.05 * times if times < 2 else math.inf
    if not np.isfinite(hopeful.min()):  # every setting was probed twice
        return (space.batch_sizes[estimate.best[0]], space.learning_rates[estimate.best[1]]), True
    size, rate = np.unravel_index(hopeful.argmin(), hopeful.shape)
    return (space.batch_sizes[int(size)], space.learning_rates[int(rate)]), False


def is_settled(probes: Sequence[Probe], space: Space, estimate: Estimate, tolerance: float, left: int) -> bool:
    """Whether enough runs that repeat the best setting reached the goal, and the regret is small or too few are left to repeat another."""
    confirmed = count_reached(probes, space, repeats=True)[estimate.best] >= CONFIRMED
    return bool(confirmed) and (left < CONFIRMED or has_small_regret(probes, space, estimate, tolerance))


def has_small_regret(probes: Sequence[Probe], space: Space, estimate: Estimate, tolerance: float) -> bool:
    """Whether the expected regret is small, three sizes have been tuned, and a neighbour of the best setting reached the goal."""
    tuned = {size for size in space.batch_sizes if len({p.learning_rate for p in probes if p.batch_size == size}) >= 2}
    size, rate = estimate.best
    sizes, rates = space.batch_sizes[max(0, size - 1) : size + 2], space.learning_rates[max(0, rate - 1) : rate + 2]
    near = [probe for probe in probes if probe.reached and probe.batch_size in sizes and probe.learning_rate in rates]
    return estimate.regret <= tolerance and len(tuned) >= min(3, len(space.batch_sizes)) and len(near) >= 2
