"""Tuners that people use, on the runs of a table, with the settings of their documentation.

Each chooses a batch size and a learning rate from the same grid as jaxbatch, run after run; a pruner ends a run at a look. What each would
answer after every run is the setting of its best whole run.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from against_tables import LOOKS, Table


class Answer(NamedTuple):
    """What a tuner would answer after it has spent so much."""

    spent: float  # in whole runs
    batch_size: int
    learning_rate: float


def optuna_tuner(make_sampler: Callable[[Any, int], Any], make_pruner: Callable[[Any], Any]) -> Callable[[Table, int, float], Iterator[Answer]]:
    """A tuner of Optuna.

    Args:
        make_sampler: from Optuna's samplers and a seed.
        make_pruner: from Optuna's pruners.
    """

    def tune(table: Table, seed: int, most: float) -> Iterator[Answer]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(direction="minimize", sampler=make_sampler(optuna.samplers, seed), pruner=make_pruner(optuna.pruners))
        sizes, rates, spent, best = table.case.batch_sizes, table.case.learning_rates, 0.0, (math.inf, 0, 0.0)
        while spent < most:
            trial = study.ask()
            size, rate = sizes[trial.suggest_int("batch_size", 0, len(sizes) - 1)], rates[trial.suggest_int("learning_rate", 0, len(rates) - 1)]
            value = state = None
            for number, (updates, seen) in enumerate(table.looks(size, rate, table.steps[size], seed + trial.number)):
                spent_here, value = updates / table.steps[size], None if seen is None else table.case.sign * seen
                if value is None:
                    state = optuna.trial.TrialState.FAIL
                    break
                trial.report(value, number + 1)
                if trial.should_prune() and number + 1 < LOOKS:
                    state = optuna.trial.TrialState.PRUNED
                    break
            spent += spent_here
            study.tell(trial, None if state is not None else value, state=state)
            if state is None and value is not None and value < best[0]:
                best = value, size, rate
            if best[1]:
                yield Answer(spent, *best[1:])

    return tune


PEERS = {
    "TPE": optuna_tuner(lambda samplers, seed: samplers.TPESampler(seed=seed), lambda pruners: pruners.NopPruner()),
    "TPE, median pruner": optuna_tuner(lambda samplers, seed: samplers.TPESampler(seed=seed), lambda pruners: pruners.MedianPruner()),
    "TPE, Hyperband": optuna_tuner(
        lambda samplers, seed: samplers.TPESampler(seed=seed), lambda pruners: pruners.HyperbandPruner(min_resource=1, max_resource=LOOKS)
    ),
    "GP": optuna_tuner(lambda samplers, seed: samplers.GPSampler(seed=seed), lambda pruners: pruners.NopPruner()),
    "GP, median pruner": optuna_tuner(lambda samplers, seed: samplers.GPSampler(seed=seed), lambda pruners: pruners.MedianPruner()),
    "random, successive halving": optuna_tuner(
        lambda samplers, seed: samplers.RandomSampler(seed=seed), lambda pruners: pruners.SuccessiveHalvingPruner()
    ),
}
