"""Every sentence of advice agrees with the table that it stands beside, over many made-up answers."""

import re

import numpy as np
import pytest

import jaxbatch as jb
from experiments.advise import records as advise_records
from jaxbatch.advice.advice import Advice, cost_of_update
from jaxbatch.advice.choices import draw_seconds, summarize
from jaxbatch.advice.doubts import doubts_of
from jaxbatch.advice.estimates import Estimate, Space, best_setting, count_reached
from jaxbatch.advice.probes import Probe
from jaxbatch.advice.updates_model import Posterior
from scripts import advice_promises
from tests.advice.simulated import random_law

RATES = (0.01, 0.1, 1.0)


def made_up(seed):
    """An answer from draws around a random law, with a few runs."""
    random = np.random.default_rng(seed)
    objective = str(random.choice(["time", "examples", "balanced"]))
    sizes = tuple(2 ** (1 + int(power)) for power in np.sort(random.choice(8, int(random.integers(1, 8)), replace=False)))
    slow, prefer = float(random.uniform(0, 0.05)), str(random.choice(["smaller", "larger"]))
    throughput = jb.fit_throughput({size: ((slow + 1e-3 * size) * random.lognormal(0, 0.1, 5)).tolist() for size in (2, 16, 256)})
    space = Space(sizes, RATES, cost_of_update(objective, throughput, sizes))
    law, draws = random_law(random), random.standard_normal((200, 8)) * 0.3
    typical = np.log([[law.updates(size, rate * law.largest_rate) for rate in RATES] for size in sizes])
    log_updates = typical + random.uniform(0.01, 0.5) * random.standard_normal((200, 1, 1)) + 0.1 * random.standard_normal((200, len(sizes), 3))
    log_trials = np.zeros_like(log_updates)
    log_cost = log_updates + log_trials + space.log_costs()[:, None]
    probes = []
    for number in range(int(random.integers(1, 12))):
        reached, diverged = number == 0 or random.uniform() < 0.5, random.uniform() < 0.2
        setting = int(random.choice(sizes)), float(random.choice(RATES))
        probes.append(Probe(*setting, number, 100, bool(reached), bool(diverged and not reached), 90 if reached else 100, 0.9, 0.9, 0.1))
    draws[:, 6] -= 1.5
    posterior = Posterior(draws, np.zeros((200, 1)), tuple(probes[:1]))
    best = best_setting(log_cost.mean(0), count_reached(probes, space), prefer)
    estimate = Estimate(posterior, log_updates, log_trials, log_cost, best)
    fields = summarize(estimate, space, throughput, probes, objective, prefer=prefer, evaluations_per_epoch=6, num_examples=700)
    doubts = tuple(doubts_of(probes, space, estimate, fields["choices"][best[0]], 700))
    unknown = jb.Interval(np.nan, np.nan, np.nan, 0)
    common = {"objective": objective, "goal": jb.as_goal("loss<0.4"), "noise_scale": unknown, "throughput": throughput, "largest_batch_size": None}
    return Advice(doubts=doubts, rules=(), probes=tuple(probes), **fields, **common)


ANSWERS = [made_up(seed) for seed in range(150)]


def listed(text):
    return {int(size) for size in re.findall(r"\d+", text)}


def shown_cost(choice):
    """As the table prints it."""
    return float(f"{choice.relative_cost:.2f}".split()[0])


@pytest.mark.parametrize("advice", [answer for answer in ANSWERS if len(answer.choices) > 1][::3])
def test_the_range_of_close_sizes_is_the_tables(advice):
    sentence = advice.comparison().split(". ")[-1]
    considered = [choice.batch_size for choice in advice.choices]
    many = re.match(r"B = (\d+) to (\d+) are", sentence)
    if many:
        sizes = {size for size in considered if int(many[1]) <= size <= int(many[2])}
    else:
        sizes = listed(re.match(r"(?:Only )?B = ([\d, and]+) (?:is|are)", sentence)[1])
    least = min(choice.relative_cost.value for choice in advice.choices)
    assert sizes == {choice.batch_size for choice in advice.choices if round(choice.relative_cost.value / least, 2) <= 1.1}
    if advice.batch_size in sizes and min(map(shown_cost, advice.choices)) == 1:
        assert all((choice.batch_size in sizes) == (shown_cost(choice) <= 1.1) for choice in advice.choices)


@pytest.mark.parametrize("advice", [answer for answer in ANSWERS if len(answer.choices) > 1][::3])
def test_no_size_is_said_to_be_worse_than_it_may_be(advice):
    sentence = advice.comparison()
    as_good = re.search(r"do not show that it is better than B = ([\d, and]+)\.", sentence)
    sizes = listed(as_good[1]) if as_good else set()
    close = {choice.batch_size for choice in advice.choices if choice.batch_size in advice.close_sizes or choice.chance >= 0.1}
    assert sizes == close - {advice.batch_size}
    assert bool(sizes) != ("no other size is likely to cost at most a tenth more" in sentence)


@pytest.mark.parametrize("advice", ANSWERS[::3])
def test_what_would_change_the_answer_changes_it(advice):
    text = " ".join(advice.sentences())
    others = re.findall(r"B = (\d+) if the fixed time of an update is ([\d.]+) times", text)
    assert {(float(factor), int(size)) for size, factor in others} == {pair for pair in advice.elsewhere if pair[1] != advice.batch_size}
    same = bool(advice.elsewhere) and not others
    assert ("times as long would not change it" in text) == same
    if len(advice.choices) == 1:
        assert "What would change" not in text and "do not show" not in text and "save few updates" not in text
        assert "the only one considered" in text


@pytest.mark.parametrize("advice", ANSWERS[::3])
def test_the_expectation_is_the_advised_row(advice):
    text, choice = " ".join(advice.sentences()), advice.choice
    assert f"batch size {advice.batch_size}" in text and f"learning rate {choice.learning_rate:.3g}" in text
    for number in (f"{choice.updates:,.0f} updates", f"{choice.examples:,.0f} examples", f"{choice.seconds:.3g} s of training"):
        assert number in text
    assert choice.updates.low <= choice.updates.value <= choice.updates.high
    assert choice.next_run.high >= choice.updates.value
    assert choice.enough_updates % choice.look == 0
    assert f"jb.steps({choice.enough_updates})" in advice.snippet()
    assert choice.relative_cost[:3] == (1, 1, 1)


@pytest.mark.parametrize("advice", ANSWERS[::3])
def test_what_was_not_seen_of_the_advised_setting_is_said(advice):
    runs = [probe for probe in advice.probes if (probe.batch_size, probe.learning_rate) == (advice.batch_size, advice.learning_rate)]
    reached, diverged, text = sum(probe.reached for probe in runs), sum(probe.diverged for probe in runs), " ".join(advice.doubts)
    assert ("was never run" in text) == (not runs)
    assert (f"reached the goal in only {reached} of {len(runs)} run" in text) == (len(runs) > 0 and reached < 3)
    assert (f"diverged in {diverged} of {len(runs)} runs" in text) == (diverged > 0)


@pytest.mark.parametrize("advice", ANSWERS[::3])
def test_the_data_set_is_not_blamed_for_what_was_asked(advice):
    text = " ".join(advice.doubts)
    assert "allows only" not in text  # 700 examples allow eight sizes
    assert ("There were only 2 batch sizes" in text) == (len(advice.choices) == 2)


def test_all_kinds_of_sentences_were_seen():
    texts = [" ".join(advice.sentences()) for advice in ANSWERS]
    for part in ("Only B =", " to ", " and ", "would not change it", "was never run", "diverged in", "the only one considered", "no other size is"):
        assert any(part in text for text in texts), part


# The error of timing


def test_the_error_of_timing_is_in_every_number_that_rests_on_it():
    """Times between 1 and 3 ms make a relative cost of 1 uncertain by as much, whatever is known of the updates."""
    rounds = {8: [1.0, 1.0, 2.0, 3.0, 3.0], 64: [2.0] * 5}
    throughput = jb.fit_throughput({size: [1e-3 * value for value in values] for size, values in rounds.items()})
    drawn = draw_seconds(throughput, (8, 16, 64), 4000)
    assert np.quantile(drawn[:, 0], 0.025) == pytest.approx(throughput.seconds[8].low, rel=0.05)
    assert np.quantile(drawn[:, 0], 0.975) == pytest.approx(throughput.seconds[8].high, rel=0.05)
    assert drawn[:, 2].std() < 1e-12 < drawn[:, 1].std() < drawn[:, 0].std()
    space = Space((8, 64), RATES, {8: 1.0, 64: 1.0})
    exact = np.zeros((1000, 2, 3)) + np.log(100)
    posterior = Posterior(np.full((1000, 8), -20.0), np.zeros((1000, 1)), ())
    for objective, uncertain in (("time", True), ("balanced", True), ("examples", False)):
        fields = summarize(
            Estimate(posterior, exact, 0 * exact, exact, (1, 1)),
            space,
            throughput,
            [],
            objective,
            prefer="smaller",
            evaluations_per_epoch=6,
            num_examples=700,
        )
        small, large = fields["choices"]
        assert small.seconds.high > 1.3 * small.seconds.value and large.seconds.high == pytest.approx(large.seconds.value)
        assert (small.relative_cost.high > 1.2 * small.relative_cost.value) == uncertain
        assert (small.chance < 1) == (objective == "time")  # for the others, the small batch is the best even at its longest time


# Records and scores


def test_old_records_are_read():
    fields = [name for name in Probe._fields if name != "repeat"]
    old = dict(zip(fields, (8, 0.1, 0, 50, True, False, 50, 0.9, 0.9, None, None, None), strict=True))
    (probe,) = advise_records.read_probes([{"kind": "probe", "number": 0, **old}])
    assert (probe.updates, probe.more_than, probe.repeat) == (50, 50, False)
    new = probe._replace(repeat=True, more_than=40, loss=0.1)
    (again,) = advise_records.read_probes([advise_records.write_probe(new, 0)])
    assert again[:10] == new[:10] and again.repeat


def test_a_promise_is_held_against_judged_runs():
    promised = {"updates": [100.0, 90.0, 120.0, 3], "next_run": [100.0, 60.0, 150.0, 3], "look": 10, "enough_updates": 150}
    kept = advice_promises.compare(promised, [{"updates": updates} for updates in (90, 100, 110, 120, 170)])
    assert kept.judged.value == 113  # half a look before they were noticed
    assert (kept.inside, kept.runs_inside, kept.in_time) == (True, 0.8, 0.8)
    broken = advice_promises.compare(promised, [{"updates": 150}] * 4 + [{"updates": None}])
    assert (broken.inside, broken.agrees, broken.in_time) == (False, False, 0.8)
