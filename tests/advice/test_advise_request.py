"""Whatever advise is asked by mistake is one line that names the argument; its limits hold from the call on; what it says of time."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from experiments.advise import records as advise_records
from jaxbatch.advice.advising import Begun, answer
from jaxbatch.advice.doubts import check_finite_data, why_none
from jaxbatch.advice.probes import Probe, even_looks
from jaxbatch.advice.request import Question
from jaxbatch.advice.search import race
from jaxbatch.advice.settling import Setting
from jaxbatch.advice.timed_updates import find_throughput
from jaxbatch.advice.watch import Watch, WatchedRuns
from jaxbatch.results.records import open_run
from tests.advice.simulated import Law, SimulatedProber, Spread, space
from tests.advice.test_advise import FLAT, quadratic_task
from tests.conftest import shapes_unchecked

TASK = quadratic_task()
ASKED = {"optimizer": optax.sgd, "throughput": FLAT, "longest": jb.epochs(10), "max_probes": 3, "batch_sizes": (2, 8, 32), "on_progress": None}
THINGS = [None, "much", -1, 0, 2.5, math.nan, math.inf, True, [], [None], [-1.0], (8, "9"), object(), {}, lambda: 3]
MAY_BE = {  # what of these is no mistake
    "batch_sizes": [None],
    "memory": [None, 2.5, True],
    "budget": [None, 0, 2.5],
    "max_probes": [],
    "tolerance": [0, 2.5],
    "measure_noise": [True],
    "seed": [0],
    "throughput": [None],
    "known": [[]],
    "on_probe": THINGS[-1:],
    "on_progress": [None, THINGS[-1]],
}
ARGUMENTS = (
    *("task", "goal", "optimizer", "objective", "batch_sizes", "learning_rates", "longest", "evaluations_per_epoch", "target", "budget"),
    *("max_probes", "tolerance", "measure_noise", "seed", "throughput", "known", "on_probe", "on_progress"),
)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_wrong_kind_is_one_line_that_names_the_argument(name):
    for thing in THINGS:
        if any(thing is right or (type(thing) is type(right) and thing == right) for right in MAY_BE.get(name, [])):
            continue
        asked = {"task": TASK, "goal": "distance<0.1", **ASKED, name: thing}
        with shapes_unchecked(), pytest.raises(ValueError) as raised:
            jb.advise(**asked)
        assert name in str(raised.value) and "\n" not in str(raised.value), (thing, str(raised.value))


PROBE = Probe(16, 0.1, 0, 9, True, False, 9, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": 64}, "batch_sizes=64 must be a list"),
        ({"batch_sizes": [8, 2.5]}, r"batch_sizes=\[8, 2.5\] must be a list of whole numbers"),
        ({"evaluations_per_epoch": 2.5}, "evaluations_per_epoch=2.5"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32 - 1}, "leaves no seeds for max_probes=3"),
        ({"longest": 30}, "longest=30 has no unit"),
        ({"longest": jb.epochs(0)}, r"longest=epochs\(0\)"),
        ({"known": [PROBE]}, r"known holds a run with batch size 16 .* among \[2, 8, 32\]"),
        ({"learning_rates": (rate for rate in (0.1, 0.2, 0.3))}, "learning_rates="),
        ({"task": quadratic_task(3), "batch_sizes": None}, "task has 3 training examples"),
        ({"goal": jb.Goal("distance", math.nan)}, "goal=Goal"),
    ],
)
def test_slips(changes, message):
    with shapes_unchecked(), pytest.raises(ValueError, match=message) as raised:
        jb.advise(**{"task": TASK, "goal": "distance<0.1", **ASKED, **changes})
    assert "batch_sizes" not in str(raised.value) or ("batch_sizes" in changes and changes["batch_sizes"] is not None)


def test_one_evaluation_an_epoch():
    assert [even_looks(count, 1) for count in range(1, 50)] == [1] * 49
    assert all(1 <= even_looks(count, looks) <= max(1, count) for count in range(1, 80) for looks in range(1, 20))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "complex64"])
def test_numbers_that_are_not_finite_are_seen_in_every_type(dtype):
    data = jnp.array([[1.0, 2.0], [3.0, jnp.nan], [5.0, 6.0]]).astype(dtype)
    for given in (data, np.asarray(data)):
        with pytest.raises(ValueError, match="train_data holds NaN or infinite numbers in 1 of 3 examples"):
            check_finite_data(TASK._replace(train_data=given))
    check_finite_data(TASK._replace(train_data=(data[:1], jnp.arange(1), jax.random.split(jax.random.key(0), 1))))


# Limits


@pytest.mark.parametrize("most", [1, 2, 3, 7, 10, 30])
def test_the_race_has_no_more_runs_than_are_allowed(most):
    rates = [probe.learning_rate for probe in race(SimulatedProber(Law(), Spread(0.0), 0), space("time"), 64, 0, most)]
    assert len(set(rates)) == len(rates) == min(most, 10)
    if most > 1:
        assert min(rates) < 1e-2 * max(rates)  # from the whole range


class SlowRuns:
    """Runs that need a twentieth of a second for each look and never end."""

    task = TASK

    def run(self, batch_size, learning_rate, seed):
        for number in range(1, 10_000):
            time.sleep(0.05)
            yield Probe(batch_size, learning_rate, seed, number, False, False, number, 0.0, 0.0, 1 / number)


def test_a_race_ends_with_the_time():
    started = time.perf_counter()
    probes = list(race(WatchedRuns(SlowRuns(), Watch(0.4, None)), space("time"), 64, 0))
    assert time.perf_counter() - started < 2 and 1 <= len(probes) <= 10
    assert all(probe.updates <= 10 for probe in probes)


def test_a_run_that_was_granted_shows_its_first_look():
    watch = Watch(0.2, None)
    runs = WatchedRuns(SlowRuns(), watch)
    assert watch.grant()
    time.sleep(0.25)
    assert len(list(runs.run(8, 0.1, 0))) == 1 and not watch.grant() and list(runs.run(8, 0.1, 0)) == []


def test_without_time_nothing_is_run_and_that_is_said():
    for throughput in (FLAT, None):  # nothing is timed either
        advice = jb.advise(TASK, "distance<0.1", **{**ASKED, "budget": 0.0, "throughput": throughput})
        assert advice.batch_size is None and advice.probes == () and bool(advice.throughput.seconds) == (throughput is FLAT)
    assert "The budget of 0 s was over after run 0" in " ".join(advice.sentences())
    assert why_none([], jb.as_goal("distance<0.1"), 1.0) == "No run was made."


def test_timing_ends_with_the_time():
    said = []
    throughput = find_throughput(TASK, optax.sgd(0.1), (2, 4, 8, 16, 32, 64, 128), "here", 0.0, said.append)
    assert list(throughput.seconds) == [2, 128] and {seconds.n for seconds in throughput.seconds.values()} == {2}
    assert said[0] == "timing an update at B = 128"


def test_three_probes_with_one_evaluation_an_epoch_and_progress_from_the_first_second(capsys):
    lines, started = [], time.perf_counter()
    asked = {**ASKED, "evaluations_per_epoch": 1, "measure_noise": False}
    advice = jb.advise(TASK, "distance<0.1", **{**asked, "on_progress": lambda line: lines.append((time.perf_counter() - started, line))})
    assert len(advice.probes) == 3
    assert lines[0][0] < 1 and lines[0][1] == "looking at the task"
    assert sum(line.startswith("run ") for _, line in lines) == 3
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="recall"):
        jb.advise(TASK, "recall>0.1", **{name: value for name, value in ASKED.items() if name != "on_progress"})
    assert capsys.readouterr().err == "jaxbatch.advise: looking at the task\n"


# Loading


class Slow:
    """A stream that takes a millisecond for each example."""

    num_examples, example = 256, jax.ShapeDtypeStruct((4,), jnp.float32)

    def parts(self, indices, seed_epoch=(0, 0)):
        for part in indices:
            time.sleep(1e-3 * len(part))
            yield np.ones((len(part), 4), np.float32)


def test_loading_counts_where_training_pays_for_it():
    task = TASK._replace(train_data=Slow(), test_data=None)
    throughput = find_throughput(task, optax.sgd(0.1), (8, 32, 64), "here")
    *_, last = jb.fit(task, jb.FitConfig(optax.sgd(0.1), 64, jb.epochs(1)))
    assert throughput.seconds_at(64) > 0.064 and throughput.ready_seconds[64] < throughput.seconds_at(64)
    assert 0.3 < throughput.seconds_at(64) / (last["train_seconds"] / last["updates"]) < 3


MADE = tuple(  # runs by the law 100 (1 + 8 / B), the best rate 0.1
    Probe(size, rate, seed, updates, True, False, updates - 1, 0.09, 0.09, 0.1)
    for seed, (size, rate, updates) in enumerate([(2, 0.1, 500), (8, 0.1, 200), (8, 0.3, 300), (8, 0.03, 260), (32, 0.1, 125), (32, 0.3, 160)])
)


def answered(throughput):
    """What is said after these runs, with other times."""
    asked = {**ASKED, "learning_rates": (0.03, 0.1, 0.3), "known": MADE, "max_probes": len(MADE), "throughput": throughput}
    return " ".join(jb.advise(TASK, "distance<0.1", **asked).sentences())


def test_what_loading_costs_is_said_and_kept(tmp_path):
    throughput = jb.fit_throughput({8: [0.01] * 3, 64: [0.08] * 3})._replace(ready_seconds={8: 0.001, 64: 0.004})
    text = answered(throughput)
    assert "Loading takes" in text and "if its examples were ready" in text
    for times in (throughput, throughput._replace(ready_seconds={64: 0.004}), throughput._replace(ready_seconds=None)):
        run = open_run(tmp_path / str(times.ready_seconds and len(times.ready_seconds)), "advise", {})
        run.append(advise_records.write_throughput(times))
        assert advise_records.read_throughput(run.records) == times


def test_seconds_that_do_not_matter_are_said_to():
    fast, slow = (answered(jb.fit_throughput({size: [unit * (1e-5 + 1e-7 * size)] * 3 for size in (2, 200)})) for unit in (1, 1e5))
    assert "Take any size between 2 and 32: time does not matter here" in fast and "does not matter here" not in slow
    assert "Seconds are of training alone" in fast and "Seconds are of training alone" in slow


# Records


def test_a_metric_that_is_nan_before_training_is_kept(tmp_path):
    goal = jb.Goal("distance", 0.123456789, above=False)
    setting = Setting(goal, "time", (2, 8), (0.1, 0.2, 0.3), 12, 400, math.nan, None, ("a",))
    run = open_run(tmp_path, "advise", {})
    run.append(advise_records.write_setting(setting))
    back = advise_records.read_setting(open_run(tmp_path, "advise", {}).records)
    assert math.isnan(back.start) and back._replace(start=0.0) == setting._replace(start=0.0)
    assert "No run reached" in why_none([Probe(8, 0.1, 0, 9, False, False, 9, 0.5, 0.5, 1.0)], goal, back.start)


def test_a_search_tells_what_it_measures_and_measures_nothing_again():
    question = Question("distance<0.1", optax.sgd, batch_sizes=(8,), learning_rates=(0.0316, 0.1, 0.316), max_probes=3, measure_noise=False)
    events, again = [], []
    first = answer(TASK, question, events.append)
    setting, throughput, *runs = [event for event in events if not isinstance(event, str)]
    assert isinstance(setting, Setting) and isinstance(throughput, jb.Throughput)
    assert [run.number for run in runs] == [0, 1, 2] and tuple(run.probe for run in runs) == first.probes
    second = answer(TASK, question, again.append, Begun(setting, throughput, first.probes))
    assert all(isinstance(event, str) for event in again) and str(second) == str(first)
