"""The time of an update by batch size: the line against closed forms, its intervals against chance, real timings, bounds."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.advice.memory_parts import Memory
from jaxbatch.advice.timed_updates import _Ready
from tests.conftest import make_problem
from tests.data.test_streams import Arrays

SIZES = (1, 8, 64, 512)


def exact(alpha, beta, rounds=3):
    return {size: [alpha + beta * size] * rounds for size in SIZES}


def test_times_on_a_line_give_the_line():
    found = jb.fit_throughput(exact(3e-4, 2e-6))
    assert found.seconds_per_update == pytest.approx((3e-4, 3e-4, 3e-4, 3, 0)) and found.seconds_per_example.value == pytest.approx(2e-6)
    assert found.knee.value == pytest.approx(150) and found.error < 1e-9 and not found.bound
    assert found.seconds_at(150) == pytest.approx(2 * 3e-4)  # half of the time at the knee


def test_the_knee_of_times_in_proportion_is_zero_and_of_equal_times_infinite():
    proportional, flat = jb.fit_throughput(exact(0, 2e-6)), jb.fit_throughput(exact(3e-4, 0))
    assert proportional.knee[:3] == (0, 0, 0) and proportional.seconds_per_update.value == 0
    assert flat.knee[:3] == (math.inf,) * 3 and flat.seconds_per_example.value == 0 and flat.error < 1e-9


@pytest.mark.parametrize("times", [(1.0, 30.0), (4.0, 1.0), (2.0, 3.0)])
def test_no_part_of_the_line_is_below_zero(times):
    """Against the non-negative least squares of SciPy."""
    from scipy.optimize import nnls

    rounds = {1: [times[0]], 7: [5.0], 10: [times[1]]}
    found, seconds = jb.fit_throughput(rounds), np.array([times[0], 5.0, times[1]])
    expected, _ = nnls(np.stack([1 / seconds, np.array([1, 7, 10]) / seconds], 1), np.ones(3))
    assert (found.seconds_per_update.value, found.seconds_per_example.value) == pytest.approx(tuple(expected))
    line = expected @ np.array([[1, 1, 1], [1, 7, 10]])
    assert found.error == pytest.approx(np.abs(line / seconds - 1).max())


def test_intervals_hold_the_truth():
    random, inside, truth = np.random.default_rng(0), np.zeros(3), (3e-4, 2e-6, 150)
    for _ in range(200):
        machine = np.exp(0.1 * random.normal(size=10))  # slow in some rounds, for all sizes
        rounds = {size: list((truth[0] + truth[1] * size) * machine * np.exp(0.03 * random.normal(size=10))) for size in SIZES}
        found = jb.fit_throughput(rounds)
        inside += [part.low <= true <= part.high for part, true in zip(found[:3], truth, strict=True)]
    assert (inside / 200 >= 0.93).all(), inside


def test_rounds_are_paired():
    """What slows all sizes of a round changes no ratio, so the knee is exact although the times are not."""
    machine = np.array([1.0, 1.3, 0.8, 2.0, 1.1])
    found = jb.fit_throughput({size: list((3e-4 + 2e-6 * size) * machine) for size in SIZES})
    assert found.knee[:3] == pytest.approx((150, 150, 150)) and found.seconds_per_update.high > 1.1 * found.seconds_per_update.low


def test_times_between_the_measured_ones():
    found = jb.fit_throughput({10: [2.0], 20: [3.0], 40: [4.0]})
    assert [found.seconds_at(size) for size in (10, 15, 20, 30, 40)] == pytest.approx([2, 2.5, 3, 3.5, 4])
    assert [found.seconds_at(size) for size in (80, 5, 1)] == pytest.approx([6, 1.5, 1.1])
    steep = jb.fit_throughput({10: [1.0], 20: [3.0], 40: [2.0]})  # beyond: neither below zero nor less for more examples
    assert [steep.seconds_at(size) for size in (1, 80)] == pytest.approx([0.1, 2.0])
    with pytest.raises(ValueError, match="batch_size=0"):
        found.seconds_at(0)


def task_of(data):
    loss_fn, params, _ = make_problem(4)
    return jb.Task(lambda key: params, lambda p, batch: loss_fn(p, dict(zip("xy", batch, strict=True))), None, data, None)


def arrays(count=4096):
    batch = make_problem(count)[2]
    return batch["x"], batch["y"]


def test_real_updates_are_timed():
    found = jb.measure_throughput(task_of(arrays()), optax.adam(0.01), [4096, 4, 256, 4], rounds=4, seconds_per_timing=0.01)
    assert list(found.seconds) == [4, 256, 4096] and all(one.n == 4 and one.low <= one.value <= one.high for one in found.seconds.values())
    assert 1e-7 < found.seconds[4].value < found.seconds[4096].value < 1 and found.seconds_per_example.value > 0


def test_streams_are_timed_with_and_without_decoding(monkeypatch):
    stream = Arrays(arrays(64))
    decoded = []
    parts = stream.parts
    monkeypatch.setattr(stream, "parts", lambda indices, place=(0, 0): (decoded.append(1) or part for part in parts(indices, place)))
    ready = _Ready(stream)
    indices = [np.arange(8), np.arange(8, 16), np.arange(4)]
    assert [len(part[0]) for part in ready.parts(indices, (0, 0))] == [8, 8, 4] and len(decoded) == 2
    settings = {"rounds": 2, "seconds_per_timing": 1e-4}
    counts = {}
    for loading in (False, True):
        decoded.clear()
        found = jb.measure_throughput(task_of(stream), optax.sgd(0.1), [8, 32], loading=loading, **settings)
        counts[loading] = len(decoded)
        assert found.seconds[8].value > 0
    assert counts[False] == 2 < counts[True]


def test_bounds_for_a_device_that_is_not_here(monkeypatch):
    memory = lambda size: Memory(size, 1000, 2000, 0, 0, 0, 0, 0.0)
    monkeypatch.setattr("jaxbatch.advice.throughput.make_measure", lambda task, optimizer, target, step_alone: memory)
    found = jb.predicted_throughput(task_of(arrays()), optax.sgd(0.1), [8, 64, 1024], "t4")
    moved = 2 * 3000 + 8 * 4 * (5 + 3)
    assert found.bound and found.seconds[8].value == pytest.approx(moved / jb.find_target("t4").bandwidth) and math.isnan(found.seconds[8].low)
    assert found.seconds_at(512) > found.seconds_at(8)


def test_what_a_user_gets_wrong_is_said():
    task, optimizer = task_of(arrays(64)), optax.sgd(0.1)
    for sizes, words in (([8], "at least 2"), ([0, 8], "at least 1"), ([8, 65], "num_examples=64")):
        with pytest.raises(ValueError, match=words):
            jb.measure_throughput(task, optimizer, sizes)
    for settings, words in (({"rounds": 0}, "rounds=0"), ({"seconds_per_timing": 0}, "seconds_per_timing=0"), ({"num_devices": 99}, "at least 1")):
        with pytest.raises(ValueError, match=words):
            jb.measure_throughput(task, optimizer, [8, 16], **settings)
    with pytest.raises(ValueError, match="measure_throughput"):
        jb.predicted_throughput(task, optimizer, [8, 16], "cpu")
    for rounds, words in (
        ({8: [1.0]}, "at least 2"),
        ({8: [1.0], 16: [1.0, 2.0]}, "every round"),
        ({8: [1.0], 16: [0.0]}, "finite seconds above 0"),
        ({8: [], 16: []}, "finite seconds above 0"),
    ):
        with pytest.raises(ValueError, match=words):
            jb.fit_throughput(rounds)


def test_training_that_diverges_is_timed_all_the_same():
    found = jb.measure_throughput(task_of(arrays(64)), optax.sgd(1e9), [8, 32], rounds=2, seconds_per_timing=1e-3)
    assert jnp.isfinite(found.seconds[8].value)
