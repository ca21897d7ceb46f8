"""jb.advise_runs with several runs at a time."""

import pytest

import jaxbatch as jb
from jaxbatch.advice.any_runs import Shown
from jaxbatch.advice.probes import Probe
from jaxbatch.advice.run_race import RunQuestion
from jaxbatch.advice.run_search import next_runs
from tests.advice.simulated_runs import RATES, Script, regret
from tests.advice.test_advise_runs import GOAL, ask, law_of


def test_several_at_a_time_give_one_answer_however_they_end():
    kept = {}
    whole = Script(law_of(2))
    first = ask(whole, jobs=3, max_probes=16, on_run=lambda shown, number: kept.__setitem__(number, shown))
    assert sorted(kept) == list(range(len(first.probes))) and regret(whole, first) < 1.5
    some = {number: shown for number, shown in kept.items() if number not in (4, 11, len(kept) - 1)}  # killed while others were being made
    again = Script(law_of(2))
    second = ask(again, jobs=3, max_probes=16, known=some)
    assert again.begun == 3 and second.probes == first.probes and second.choices == first.choices


def test_runs_at_a_time_are_chosen_as_if_those_before_were_tried():
    question = RunQuestion("time", (64,), RATES, {64: 10_000})
    first = next_runs([], question, 4)
    assert [one.learning_rate for one in first] == list(RATES[:8:2]) and next_runs([], question, 99) == [
        next_runs([], question, 10)[n] for n in range(10)
    ]
    reached = [Shown(Probe(64, rate, n, 100 + n, True, False, 90, 0.05, 0.05, 0.05), 0.01, 10, 9) for n, rate in enumerate(RATES[8:11])]
    several = next_runs(reached, question, 3)
    assert len({one.learning_rate for one in several}) >= 2


def test_an_error_of_on_run_is_passed_on_from_threads_too():
    def fail(shown, number):
        raise OSError("disk full")

    for jobs in (1, 2):
        with pytest.raises(OSError, match="disk full"):
            jb.advise_runs(Script().run, GOAL, batch_sizes=[64], jobs=jobs, on_run=fail, on_progress=None)
