"""Rates that are chosen on a held-out part."""

import pytest

from experiments.harness.tuned_runs import best_rate


def rows(measured):
    """Held-out runs of one arm: ``{rate: [(accuracy, loss, diverged), ...]}``."""
    fields = {"kind": "run", "part": "held_out", "arm": "a"}
    return [
        fields | {"learning_rate": rate, "seed": seed, "accuracy": accuracy, "loss": loss, "diverged": diverged}
        for rate, runs in measured.items()
        for seed, (accuracy, loss, diverged) in enumerate(runs)
    ]


@pytest.mark.parametrize(
    ("measured", "best"),
    [
        ({0.1: [(0.9, 0.5, False)], 0.3: [(0.92, 0.6, False)]}, 0.3),
        ({0.1: [(0.9, 0.5, False)], 0.3: [(0.9, 0.4, False)]}, 0.3),  # equally accurate on few examples: the loss tells more
        ({0.1: [(0.9, 0.4, False)], 0.3: [(0.9, 0.5, False)]}, 0.1),
        ({0.1: [(0.9, 0.4, False)], 0.3: [(0.9, 0.4, False)]}, 0.1),  # of equal ones in both the lowest
        ({0.1: [(0.8, 0.9, False)], 0.3: [(0.9, 0.4, False), (None, None, True)]}, 0.1),
        ({0.3: [(None, 0.4, False)]}, None),
    ],
)
def test_the_rate_of_an_arm(measured, best):
    assert best_rate(rows(measured), {"arm": "a"}, "accuracy") == best
