"""jb.advise_runs_within: runs of a fixed length that a function makes."""

import math
import re

import pytest

import jaxbatch as jb
from jaxbatch.advice.any_runs import AnyEndRuns
from jaxbatch.advice.end_failures import Failed
from jaxbatch.advice.end_search import search_endings
from jaxbatch.advice.ending import Ending
from tests.advice.simulated_ends import NUM_EXAMPLES, RATES, EndLaw, SimulatedEnds, space_of
from tests.conftest import shapes_unchecked

SIZES = (16, 64, 256)


class Script:
    """A training script whose runs end as a law says; it fails where ``fails`` says so, which gets the number of runs before."""

    def __init__(self, law, fails=lambda number, size: None):
        self.ends, self.fails, self.closed, self.begun = SimulatedEnds(law), fails, 0, 0

    def run(self, batch_size, learning_rate, seed, num_steps):
        self.begun += 1
        try:
            if (error := self.fails(self.begun - 1, batch_size)) is not None:
                raise error
            for ending in self.ends.run(batch_size, learning_rate, num_steps, seed):
                yield jb.Look(ending.updates, None, None, ending.value)
        finally:
            self.closed += 1


def ask(script, law, **changes):
    settings = {"batch_sizes": SIZES, "learning_rates": RATES[4:], "start": math.exp(law.start), "full_runs": 3, "on_progress": None} | changes
    return jb.advise_runs_within(script.run, "loss<", jb.examples(NUM_EXAMPLES), **settings)


def test_it_makes_the_runs_that_the_search_over_endings_makes():
    law = EndLaw(1)
    script = Script(law)
    advice, space = ask(script, law, seed=7), space_of(law, SIZES, RATES[4:])
    space = space._replace(num_steps={size: math.ceil(NUM_EXAMPLES / size) for size in SIZES}, length=float(math.ceil(NUM_EXAMPLES / 64) * 64))
    twin = search_endings(SimulatedEnds(law), space._replace(payable_steps=space.num_steps), first_size=64, most=3, seed=7)
    told = lambda endings: [(one.batch_size, one.learning_rate, one.num_steps, one.updates, one.diverged, one.looks) for one in endings]
    assert [row[:5] for row in told(advice.endings)] == [row[:5] for row in told(twin)]
    assert script.begun == script.closed == len(twin) and advice.batch_size in SIZES and advice.throughput is None


def test_what_was_stopped_goes_on_and_what_does_not_fit_is_out():
    law, kept = EndLaw(2), []
    too_large = lambda number, size: MemoryError("no") if size > 50 else ValueError("a\nfault") if number == 5 else None
    sizes = {"batch_sizes": (8, 16, 64, 256)}
    first = ask(Script(law, too_large), law, **sizes, on_run=lambda one, number: kept.append(one))
    assert [choice.batch_size for choice in first.choices] == [8, 16] and first.largest_batch_size == 16
    assert [type(one) for one in kept].count(Failed) == 2 and kept[5] == Failed(*kept[5][:4], "ValueError: a fault", True)
    assert "B = 64 did not fit into memory, and it and larger ones are left out." in first.doubts
    assert any(re.fullmatch(r"1 of \d+ runs failed; the last one: ValueError: a fault", doubt) for doubt in first.doubts)
    for count in (3, 6, len(kept)):
        begun = Script(law, lambda number, size, count=count: too_large(number + count, size))
        second = ask(begun, law, **sizes, known=kept[:count])
        assert second.endings == first.endings and second.doubts == first.doubts and begun.begun == len(kept) - count


def test_runs_that_always_fail_end_the_search():
    script = Script(EndLaw(0), lambda number, size: RuntimeError("exit code 2: no module named torch"))
    advice = ask(script, EndLaw(0))
    assert script.begun == 3 and advice.batch_size is None
    assert advice.doubts[-1] == "3 of 3 runs failed one after another, so the search ended; the last one: exit code 2: no module named torch"


def test_a_run_may_end_a_little_early_but_not_half_way():
    def run(batch_size, learning_rate, seed, num_steps):
        yield jb.Look(0, 0, 0.0, 2.3)
        for updates in range(10, int(num_steps * share) + 1, 10):
            yield jb.Look(updates, None, None, 1.0)

    share = 0.97
    *_, last = AnyEndRuns(run).run(8, 0.1, 104, 0)
    assert last == Ending(8, 0.1, 0, 104, 104, False, 1.0, tuple((updates, 1.0) for updates in range(10, 110, 10)))
    share = 0.5
    with pytest.raises(RuntimeError, match="the run ended by itself after 50 of num_steps=104 updates"):
        list(AnyEndRuns(run).run(8, 0.1, 104, 0))


def test_a_run_that_goes_on_is_closed_at_its_length_or_where_it_diverged():
    ended = []

    def run(batch_size, learning_rate, seed, num_steps):
        try:
            for updates in range(30, 1000, 30):
                yield jb.Look(updates, None, None, math.nan if updates > 200 else 1.0)
        finally:
            ended.append(updates)

    *_, last = AnyEndRuns(run).run(8, 0.1, 100, 0)
    assert last.updates == 100 and last.ended and ended == [120]
    *_, last = AnyEndRuns(run).run(8, 0.1, 500, 0)
    assert last.diverged and last.updates == 210 and ended == [120, 210]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": lambda batch_size, learning_rate, seed: []}, "run must take num_steps"),
        ({"goal": "loss<0.4"}, "goal='loss<0.4' must name a metric and a direction and no value"),
        ({"within": 5}, "within=5 has no unit. Give jaxbatch.epochs(10), examples, tokens, steps."),
        ({"within": jb.seconds(5)}, "has no unit"),
        ({"within": jb.epochs(5)}, "within=epochs(5) needs num_examples"),
        ({"within": jb.steps(5), "batch_sizes": None}, "fewer than 8 updates"),
        ({"horizon": jb.steps(5)}, "must not be shorter than within"),
        ({"full_runs": 1}, "full_runs=1"),
        ({"seed": -1}, "seed"),
        ({"num_examples": "100"}, "num_examples='100'"),
        ({"start": "a"}, "start='a'"),
        ({"known": 5}, "known=5 must be a list"),
        ({"budget": "1h"}, "budget='1h'"),
        ({"known": [Ending(9, 0.1, 0, 9, 9, False, 0.3, ())]}, "known holds a run of 9 updates with batch size 9"),
    ],
)
def test_slips_are_one_line(changes, message):
    settings = {"run": Script(EndLaw(0)).run, "goal": "loss<", "within": jb.steps(100), "batch_sizes": SIZES, "on_progress": None} | changes
    with shapes_unchecked(), pytest.raises(ValueError, match=re.escape(message)) as caught:
        jb.advise_runs_within(settings.pop("run"), settings.pop("goal"), settings.pop("within"), **settings)
    assert "\n" not in str(caught.value)
