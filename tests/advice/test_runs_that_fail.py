"""jb.advise_runs where runs fail, do not fit, are cut short or are timed badly: what a user's script does on a bad day."""

import math
import time

import pytest

import jaxbatch as jb
from jaxbatch.advice.any_runs import AnyRuns, Shown, _pace
from jaxbatch.advice.end_failures import Failed, endings_of, fails_always, space_that_fits
from jaxbatch.advice.ending import Ending
from jaxbatch.advice.probes import Probe
from jaxbatch.advice.run_race import RunQuestion
from jaxbatch.advice.run_search import next_run, next_runs, search_runs, sizes_that_fit, without_shorter
from jaxbatch.training.goals import as_goal
from tests.advice.simulated_ends import EndLaw, space_of
from tests.advice.simulated_runs import RATES, SIZES

GOAL = "loss<0.1"


def shown(size, rate, updates, *, reached=False, failure="", fits=True, loss=1.0, looks=3):
    value = 0.05 if reached else 0.5
    probe = Probe(size, rate, 0, updates, reached, False, 0 if reached else updates, value, value, loss)
    return Shown(probe, 0.01 if updates else math.nan, 10 if updates else 0, looks if updates else 0, math.nan, failure, fits)


def test_rates_at_which_a_script_stops_with_an_error_do_not_end_the_search():
    def run(batch_size, learning_rate, seed):
        for updates in range(10, 400, 10):
            if learning_rate > 0.3:
                raise FloatingPointError("loss is NaN")
            yield jb.Look(updates, None, 0.01 * updates, 0.9 ** (updates * min(learning_rate, 0.1)))

    advice = jb.advise_runs(run, GOAL, batch_sizes=[16], learning_rates=[0.01, 0.1, 1, 3, 10], max_probes=9, on_progress=None)
    assert advice.batch_size == 16 and any("loss is NaN" in doubt for doubt in advice.doubts)


def test_a_machine_that_breaks_later_ends_the_search():
    question, worked = RunQuestion("time", (64,), RATES, {64: 1000}), [shown(64, rate, 10, loss=rate) for rate in RATES[:16:2]]
    broken = [shown(64, RATES[3], 0, failure="disk full")] * 3
    assert next_run([*worked, *broken], question) is None
    too_large = [shown(64, 100.0, 0, failure="NaN")] * 3
    assert next_run([*worked, *too_large], question) is not None


def test_a_size_that_has_run_is_not_out_for_one_error_of_memory():
    ran = [shown(64, 0.1, 40), shown(16, 0.1, 40)]
    assert sizes_that_fit([*ran, shown(16, 0.2, 0, failure="out of memory", fits=False)], (8, 16, 64, 128)) == (8, 16, 64, 128)
    assert sizes_that_fit([*ran, shown(128, 0.2, 0, failure="out of memory", fits=False)], (8, 16, 64, 128)) == (8, 16, 64)
    later = [shown(64, 0.1, 10), shown(64, 0.1, 30, failure="out of memory in evaluation", fits=False)]  # it came further than those that fit
    assert sizes_that_fit(later, (8, 64)) == (8,)
    space, ending = space_of(EndLaw(0), (16, 64)), Ending(64, 0.1, 0, 90, 90, False, 0.3, ())
    unfit = Failed(16, 0.1, 1, 90, "out of memory", False)
    assert space_that_fits([ending, unfit], space).batch_sizes == (16, 64) and space_that_fits([unfit], space).batch_sizes == ()


def test_a_failed_run_of_a_fixed_length_counts_as_lost_and_is_not_made_again():
    space, good = space_of(EndLaw(0), (16, 64)), Ending(64, 0.01, 0, 90, 90, False, 0.3, ())
    failed = Failed(64, 1.0, 1, 90, "NaN", True)
    assert [one.diverged for one in endings_of([good, failed], space)] == [False, True]
    assert not fails_always([good, failed, failed, failed]) and fails_always([failed] * 3)
    assert fails_always([good, *[failed._replace(learning_rate=0.001)] * 3])
    taken = failed._replace(learning_rate=0.001, fits=False)  # the device is another's from now on
    assert fails_always([good, taken, taken, taken]) and space_that_fits([good, taken, taken, taken], space).batch_sizes == (16, 64)


def test_an_error_of_on_run_is_not_a_failed_run():
    def on_run(one, number):
        raise RuntimeError("disk full")

    run = lambda batch_size, learning_rate, seed, num_steps: iter([jb.Look(num_steps, None, None, 1.0)])
    with pytest.raises(RuntimeError, match="disk full"):
        jb.advise_runs_within(run, "loss<", jb.steps(64), batch_sizes=[8], on_run=on_run, on_progress=None)


def test_the_code_of_an_advice_calls_the_function_that_was_given():
    run = lambda batch_size, learning_rate, seed: (jb.Look(u, None, 0.01 * u, 0.9 ** (u * learning_rate)) for u in range(10, 400, 10))
    advice = jb.advise_runs(run, GOAL, batch_sizes=[16], learning_rates=[0.1, 0.3, 1], max_probes=6, on_progress=None)
    assert advice.snippet().startswith(f"run(batch_size=16, learning_rate={advice.learning_rate:.3g}, seed=0)  # about 95% of runs reach loss<0.1")


def test_runs_that_the_budget_cut_are_made_again():
    clock = iter(range(1000))
    question = RunQuestion("time", (64,), (0.01, 0.03, 0.1), {64: 400.0}, max_probes=6)
    run = lambda batch_size, learning_rate, seed: (jb.Look(u, None, 0.01 * u, 0.9 ** (u * learning_rate)) for u in range(4, 401, 4))
    runs, kept = AnyRuns(run, as_goal(GOAL), question.num_steps), {}
    search_runs(runs, question, on_run=lambda one, number: kept.__setitem__(number, one), is_over=lambda: next(clock) > 2)
    assert [one.cut for one in kept.values()] == [False, True] and kept[1].probe.updates == 4
    whole = search_runs(runs, question)
    assert [one.probe[:5] for one in search_runs(runs, question, known=kept)] == [one.probe[:5] for one in whole] and not any(
        one.cut for one in whole
    )


def test_several_at_a_time_take_no_rate_twice_in_vain_and_no_more_repeats_than_count():
    question = RunQuestion("time", (64,), RATES, {64: 8.0})
    lost = [shown(64, rate, 10, loss=abs(math.log10(rate / 0.1))) for rate in RATES[::2]]
    beside = next_runs(lost, question, 4)
    assert [one.learning_rate for one in beside] == [pytest.approx(0.178, rel=0.01), pytest.approx(0.0562, rel=0.01)]
    assert next_run([*lost, *(shown(64, one.learning_rate, 4, failure="NaN") for one in beside)], question) is None
    reached = [shown(64, RATES[10], 100 + n, reached=True) for n in range(2)] + [shown(64, rate, 150, reached=True) for rate in RATES[9:12:2]]
    settled = RunQuestion("time", (64,), RATES[9:12], {64: 1e4}, max_probes=30, tolerance=9.0)
    chosen = next_runs(reached, settled, 8)
    assert sum(one.repeat for one in chosen) <= 3


def test_shorter_runs_of_the_race_count_once():
    heats = [shown(64, 0.1, 10), shown(64, 0.2, 10), shown(64, 0.1, 40), shown(64, 0.1, 120, reached=True), shown(64, 0.2, 20)]
    assert without_shorter(heats) == heats[3:]
    assert without_shorter(heats[:3]) == heats[1:3]


def test_a_goal_that_is_reached_before_training_gets_no_advice():
    run = lambda batch_size, learning_rate, seed: iter([jb.Look(0, None, 0.0, 0.05), jb.Look(4, None, 0.1, 0.04)])
    advice = jb.advise_runs(run, GOAL, batch_sizes=[8, 16], on_progress=None)
    assert advice.batch_size is None and advice.doubts == (
        "3 of 3 runs failed one after another, so the search ended; the last one: ValueError: loss<0.1 is reached before training, at 0.05. "
        "Take a goal that has to be learned.",
    )


def test_an_error_while_a_run_is_closed_is_not_ours():
    def run(batch_size, learning_rate, seed):
        try:
            for updates in range(10, 1000, 10):
                yield jb.Look(updates, None, 0.01 * updates, 1.0)
        finally:
            raise OSError("cannot close the writer")

    made = search_runs(AnyRuns(run, as_goal(GOAL), {8: 30.0}), RunQuestion("time", (8,), (0.1, 0.2, 0.3), {8: 30.0}, max_probes=3))
    assert len(made) == 3 and not any(one.failure for one in made)


def test_a_script_that_exits_has_failed():
    def run(batch_size, learning_rate, seed):
        yield jb.Look(1, None, None, 1.0)
        raise SystemExit(3)

    *_, last = AnyRuns(run, as_goal(GOAL), {8: math.inf}).show(8, 0.1, 0)
    assert last.failure == "SystemExit: 3" and last.fits


@pytest.mark.parametrize(
    ("clock", "own", "expected"),
    [
        ([30.0, 31.0, 32.0], [0.1, 0.2, 0.3], (0.1, 10, 3)),  # the run's own clock, whatever it begins with
        ([math.nan] * 3, [5.0, 6.0, 7.0], (0.1, 10, 3)),
        ([math.nan] * 3, [5.0, 5.0001, 5.0002], (5.0002 / 30, 10, 1)),  # they had been waiting for us
        ([0.2, math.nan, 0.4], [1.0, 1.0, 1.0], (1.0 / 30, 10, 1)),
        ([0.0, 0.0, 0.0], [1.0, 1.1, 1.2], (1.2 / 30, 10, 1)),
    ],
)
def test_what_an_update_takes(clock, own, expected):
    assert _pace([10, 20, 30], clock, own) == pytest.approx(expected)


def test_seconds_of_zero_and_single_looks_are_counted_here_and_said():
    def run(batch_size, learning_rate, seed):
        time.sleep(0.01)
        yield jb.Look(10, None, 0.0, 0.05)

    advice = jb.advise_runs(run, GOAL, batch_sizes=[8, 16], learning_rates=[0.1, 0.2, 0.3], max_probes=4, on_progress=None)
    assert advice.batch_size in (8, 16) and 5e-4 < advice.throughput.seconds_at(8) < 0.1
    assert any(doubt.startswith("No run gave two looks by which an update could be timed") for doubt in advice.doubts)


def test_every_setting_that_is_asked_for_is_one_of_the_question():
    assert next_run([], RunQuestion("time", SIZES, RATES, dict.fromkeys(SIZES, math.inf))).batch_size in SIZES
