"""The time of an update by batch size, from the runs of a search."""

import numpy as np
import pytest

from jaxbatch.advice.any_runs import Shown
from jaxbatch.advice.probes import Probe
from jaxbatch.advice.run_search import sizes_that_fit, times_of
from jaxbatch.advice.run_times import throughput_of_runs
from tests.advice.simulated_runs import SIZES, seconds_of


def test_times_of_runs_hold_the_truth_in_95_of_100():
    random, inside = np.random.default_rng(0), {"seconds": 0, "knee": 0}
    rounds = 400
    for _ in range(rounds):
        spread = random.choice([0.03, 0.1, 0.2])
        seconds = {size: (seconds_of(size) * np.exp(spread * random.standard_normal(random.integers(2, 6)))).tolist() for size in (8, 64, 256)}
        found = throughput_of_runs(seconds, SIZES)
        inside["seconds"] += found.seconds[64].low <= seconds_of(64) <= found.seconds[64].high
        inside["knee"] += found.knee.low <= 48 <= found.knee.high
    assert all(count >= 0.93 * rounds for count in inside.values()), inside


def test_runs_with_one_look_are_timed_only_where_there_are_no_others():
    probe = Probe(8, 0.1, 0, 10, False, False, 10, 0.5, 0.5, 0.5)
    one, several = Shown(probe, 5.0, 10, 1), Shown(probe, 0.02, 10, 4)
    assert times_of([one], [8, 16]).seconds[8].value == pytest.approx(5.0)
    assert times_of([one, several], [8, 16]).seconds[8].value == pytest.approx(0.02)
    other = one._replace(probe=probe._replace(batch_size=16))
    assert set(times_of([several, other], [8, 16]).seconds) == {8, 16}
    assert times_of([several, other], [8, 16]).seconds[16].value == pytest.approx(0.03)
    assert sizes_that_fit([several._replace(fits=False)], [4, 8, 16]) == (4,)
