"""jb.advise_runs: advice for runs that a function makes, in any framework."""

import math
import re

import numpy as np
import pytest

import jaxbatch as jb
from jaxbatch.advice.any_runs import AnyRuns, Shown, reason_of
from jaxbatch.advice.looks import checked_look, does_not_fit
from jaxbatch.advice.probes import Probe
from jaxbatch.advice.run_race import NextRun, RunQuestion
from jaxbatch.advice.run_search import make_run, next_run
from jaxbatch.training.goals import as_goal
from tests.advice.simulated import Law
from tests.advice.simulated_runs import RATES, SIZES, Script, regret, seconds_of
from tests.conftest import shapes_unchecked

GOAL = "loss<0.1"


def ask(script, **changes):
    settings = {"batch_sizes": SIZES, "learning_rates": RATES, "longest": jb.examples(1e6), "on_progress": None} | changes
    return jb.advise_runs(script.run, GOAL, **settings)


def law_of(seed):
    random = np.random.default_rng([5, seed])
    least, critical = math.exp(random.uniform(3, 6)), math.exp(random.uniform(2, 6))
    return Law(least=least, critical=critical, largest_rate=10 ** random.uniform(-2.5, 0), cliff=random.uniform(1.5, 5))


@pytest.mark.parametrize("seed", range(3))
def test_the_setting_costs_little_more_than_the_best_of_the_law(seed):
    script = Script(law_of(seed))
    advice = ask(script, seed=seed)
    assert regret(script, advice) < 1.25 and script.begun == script.closed == len(advice.probes)
    assert advice.throughput.seconds_at(64) == pytest.approx(seconds_of(64), rel=0.1)  # the half second of the start does not count


@pytest.mark.parametrize("objective", ["examples", "balanced"])
def test_other_objectives(objective):
    script = Script(law_of(3), sigma=0.05)
    advice = ask(script, objective=objective)
    cost = {"examples": lambda size: size, "balanced": lambda size: math.sqrt(size * seconds_of(size))}[objective]
    assert regret(script, advice, cost) < 1.25


def test_a_schedule_gets_the_length_of_its_run():
    seen = set()

    def run(batch_size, learning_rate, seed, num_steps):
        seen.add((batch_size, num_steps))
        yield from Script().run(batch_size, learning_rate, seed)

    jb.advise_runs(run, GOAL, batch_sizes=[16, 64, 256], longest=jb.epochs(200), num_examples=1000, max_probes=14, on_progress=None)
    assert seen and all(steps == 1000 // size * 200 for size, steps in seen)
    with pytest.raises(ValueError, match="give longest"):
        jb.advise_runs(run, GOAL)


def test_sizes_that_do_not_fit_are_out_and_said():
    script = Script(law_of(1), largest=100)
    advice = ask(script)
    assert advice.batch_size <= 64 and [choice.batch_size for choice in advice.choices] == [4, 8, 16, 32, 64] and advice.largest_batch_size == 64
    assert advice.doubts[-1] in [f"B = {size} did not fit into memory, and it and larger ones are left out." for size in (128, 256, 512)]


def test_the_race_goes_to_a_smaller_size_where_its_own_does_not_fit():
    script = Script(law_of(1), largest=30)
    advice = ask(script, max_probes=20)
    assert advice.batch_size <= 16 and regret(script, advice) < 1.4


def test_nothing_fits():
    advice = ask(Script(largest=1))
    assert advice.batch_size is None and advice.doubts == ("No batch size fits into memory: CUDA out of memory. Tried to allocate 20.00 GiB",)


class Failing(Script):
    def __init__(self, when, error, **settings):
        super().__init__(**settings)
        self.when, self.error = when, error

    def run(self, batch_size, learning_rate, seed):
        if self.when(self.begun):
            self.begun += 1
            raise self.error
        yield from super().run(batch_size, learning_rate, seed)


def test_a_run_that_always_fails_is_not_tried_forever():
    script = Failing(lambda number: True, KeyError("lr"))
    advice = ask(script)
    assert script.begun == 3 and advice.batch_size is None
    assert advice.doubts[-1] == "3 of 3 runs failed one after another, so the search ended; the last one: KeyError: 'lr'"


def test_runs_that_fail_now_and_then_are_said_and_do_not_stop_the_search():
    script = Failing(lambda number: number % 5 == 3, ValueError("disk\n full"), law=law_of(0))
    advice = ask(script)
    assert regret(script, advice) < 1.4 and re.search(r"^\d of \d+ runs failed; the last one: ValueError: disk full$", advice.doubts[-1])


def test_a_run_without_a_look_has_failed():
    advice = jb.advise_runs(lambda batch_size, learning_rate, seed: iter(()), GOAL, batch_sizes=[64], on_progress=None)
    assert advice.doubts[-1].endswith("so the search ended; the last one: it gave no look after an update")


def test_a_goal_that_no_run_reaches():
    advice = jb.advise_runs(Script().run, "loss<1e-30", batch_sizes=[64], longest=jb.steps(200), on_progress=None)
    assert advice.batch_size is None and advice.doubts[0].startswith("No run reached loss<1e-30: the best came to")


def test_a_search_that_was_stopped_goes_on_to_the_same_answer():
    whole, kept = Script(law_of(2)), []
    first = ask(whole, max_probes=18, on_run=lambda shown, number: kept.append(shown))
    for count in (4, len(kept) - 1):
        again = Script(law_of(2))
        second = ask(again, max_probes=18, known=kept[:count])
        assert again.begun == len(kept) - count
        assert second.probes == first.probes and second.choices == first.choices and second.doubts == first.doubts


def test_a_budget_ends_a_run_at_its_next_look():
    script = Script(look=1)
    advice = jb.advise_runs(script.run, "loss<1e-9", batch_sizes=[64], budget=0.0, on_progress=None)
    assert script.begun == 0 and advice.batch_size is None and advice.doubts[0].startswith("The budget of 0 s was over")


def test_runs_are_closed_where_they_need_not_go_on():
    ended = []

    def run(batch_size, learning_rate, seed):
        try:
            for updates in range(1, 1000):
                yield jb.Look(updates, None, 0.01 * updates, 1.0)
        finally:
            ended.append(updates)

    question = RunQuestion("time", (8,), (0.1, 0.2, 0.3), {8: math.inf})
    shown = make_run(AnyRuns(run, as_goal(GOAL), question.num_steps), NextRun(8, 0.1, 40, needs_progress=True), 0, lambda: False)
    assert ended == [10] and shown.probe.updates == 10 and not shown.probe.reached  # no progress in a quarter of what it may cost
    make_run(AnyRuns(run, as_goal(GOAL), question.num_steps), NextRun(8, 0.1, 40), 0, lambda: False)
    assert ended == [10, 40]


def test_what_diverges_and_what_comes_before_training():
    def run(batch_size, learning_rate, seed):
        yield jb.Look(0, 0, 0.0, 2.3)
        yield jb.Look(5, 40, 0.1, np.float32(1.5), loss=np.float64(1.0))
        yield jb.Look(10, 80, 0.2, math.nan)
        raise AssertionError("the run goes on after it diverged")

    *_, shown = AnyRuns(run, as_goal(GOAL), {8: math.inf}).show(8, 0.1, 0)
    assert shown.start == 2.3 and shown.probe.diverged and shown.probe.updates == 10 and shown.look == 5 and shown.looks == 2
    assert shown.probe.best == 1.5 and shown.seconds_per_update == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("look", "message"),
    [
        (3, "run gave 3, which is no look"),
        (jb.Look(-1, None, None, 0.5), "updates=-1, which must be a finite number of at least 0."),
        (jb.Look(5, None, math.nan, 0.5), "seconds=nan, which must be a finite number of at least 0, or None."),
        (jb.Look(5, None, None, "0.5"), "value='0.5'"),
        (jb.Look(5.5, None, None, 0.5), "must be whole numbers"),
        (jb.Look(4, None, None, 0.5), "after one at 4"),
        (jb.Look(8, None, 2.0, 0.5), "seconds=2 after one with 3"),
    ],
)
def test_what_is_no_look(look, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        checked_look(look, jb.Look(4, None, 3.0, 0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": 3}, "run=3 must be a function"),
        ({"run": lambda batch, lr: []}, "run must take batch_size, learning_rate and seed by name"),
        ({"goal": "loss<"}, "goal='loss<' must name a metric"),
        ({"batch_sizes": [0]}, "batch_sizes=[0] must be a list of whole numbers"),
        ({"learning_rates": [0.1]}, "at least 3 different"),
        ({"longest": 5}, "longest=5 has no unit"),
        ({"longest": jb.epochs(3)}, "needs num_examples"),
        ({"longest": jb.tokens(3)}, "longest is in tokens"),
        ({"num_examples": 10, "batch_sizes": [64]}, "must hold sizes from 1 to 10"),
        ({"num_examples": 0}, "num_examples=0 must be at least 4"),
        ({"batch_sizes": []}, "batch_sizes=[] must"),
        ({"known": {"0": None}}, "known must be the runs"),
        ({"objective": "money"}, "objective='money'"),
        ({"max_probes": 0}, "max_probes=0"),
        ({"known": [3]}, "known must be the runs"),
        ({"jobs": 0}, "jobs=0 must be at least 1"),
        ({"on_run": 3}, "on_run=3 must be a function"),
    ],
)
def test_slips_are_one_line(changes, message):
    settings = {"run": Script().run, "goal": GOAL} | changes
    with shapes_unchecked(), pytest.raises(ValueError, match=re.escape(message)) as caught:
        jb.advise_runs(settings.pop("run"), settings.pop("goal"), **settings)
    assert "\n" not in str(caught.value)


def test_errors_of_memory_by_any_name():
    class OutOfMemoryError(RuntimeError):
        pass

    texts = ["RESOURCE_EXHAUSTED: Out of memory while trying to allocate", "std::bad_alloc", "Unable to allocate 3.00 TiB for an array"]
    assert all(map(does_not_fit, [MemoryError(), OutOfMemoryError("x"), *map(RuntimeError, texts)]))
    assert not any(map(does_not_fit, [ValueError("memory=3 is wrong"), KeyError("OOM"), OSError("no space left on device")]))
    assert len(reason_of(RuntimeError("x " * 1000))) < 310 and "\n" not in reason_of(RuntimeError("a\nb"))


def test_the_race_keeps_the_better_third_and_makes_its_runs_longer():
    question, made = RunQuestion("time", (64,), RATES, {64: 10_000}), []
    while (following := next_run(made, question)) is not None and len(made) < 18:
        updates = int(following.most)
        rank = abs(math.log10(following.learning_rate) + 1.9)
        made.append(Shown(Probe(64, following.learning_rate, len(made), updates, False, False, updates, 1.0, 1.0, rank), 0.01, 1, 9))
    assert [shown.probe.updates for shown in made] == [10] * 10 + [40] * 4 + [160] * 2 + [640] * 2
    assert [round(math.log10(shown.probe.learning_rate), 2) for shown in made[10:]] == [-2.0, -1.5, -2.5, -1.0, -2.0, -1.5, -2.0, -1.5]
