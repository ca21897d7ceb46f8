"""The split study's verdict follows from the numbers: made-up curves with a known answer."""

import types

import numpy as np
import pytest

from experiments.split_backward.records import chosen_rate
from experiments.split_backward.verdict import verdict
from jaxbatch.training.goals import Goal


# The verdict follows from the numbers: made-up curves with a known answer.
def made_up(accuracies, n=6, protocol="original", rates=None):
    """Records in which arm ``a`` reaches accuracy ``accuracies[a]`` at the end, passing 0.9 on the way if it can."""
    random, records = np.random.default_rng(0), []
    for seed in range(n):
        for arm, end in accuracies.items():
            place = {"protocol": protocol, "arm": arm, "seed": seed, "learning_rate": (rates or {}).get(arm, 0.02)}
            for segment in range(10):
                accuracy = end * (1 - 0.6 ** (segment + 1)) + random.normal(0, 0.002)
                records.append(
                    {"kind": "curve", **place, "segment": segment, "examples": 100 * (segment + 1),
                     "updates": segment, "validation_accuracy": accuracy, "validation_loss": 1.0, "seconds": 1.0, "diverged": False}
                )  # fmt: skip
            records.append({"kind": "end", **place, "test_accuracy": accuracy, "test_loss": 1.0})
        for number in range(3):
            records.append({"kind": "cost", "round": 3 * seed + number, "one_ms": 1.0, "split_ms": 1.1, "small_ms": 2.0, "naive_ms": 5.0})
    return records


GOAL = Goal("accuracy", 0.9)
CONFIG = types.SimpleNamespace(
    num_groups=4, target="accuracy>0.9", optimizer="sgd", momentum=0.5, learning_rate=0.02, learning_rates=(0.01, 0.1, 1.0), tune_seeds=2
)


@pytest.mark.parametrize(
    ("ends", "sentences"),
    [
        ({"one": 0.92, "split": 0.98, "scaled": 0.98, "small": 0.98}, ["splitting is better", "no difference from a 4 times"]),
        ({"one": 0.98, "split": 0.98, "scaled": 0.93, "small": 0.99}, ["does better than a 4 times larger"]),
        ({"one": 0.98, "split": 0.93, "scaled": 0.98, "small": 0.98}, ["splitting is worse", "does worse than a 4 times"]),
        ({"one": 0.97, "split": 0.97, "scaled": 0.97, "small": 0.97}, ["shows no difference from one update"]),
    ],
)
def test_verdict_follows_from_the_numbers(ends, sentences):
    text = " ".join(verdict(CONFIG, made_up(ends)))
    for sentence in sentences:
        assert sentence in text
    assert "a split step takes 1.10 [1.10, 1.10] times an ordinary step" in text


def test_a_collapsed_run_is_a_lost_run():
    records = made_up({"one": 0.97, "split": 0.97, "scaled": 0.97, "small": 0.97})
    for record in records:
        if record["kind"] == "curve" and record["arm"] == "split" and record["seed"] == 2 and record["segment"] == 9:
            record["validation_accuracy"] = 0.1
    text = " ".join(verdict(CONFIG, records))
    assert "runs lost: 1 against 0" in text and "does worse than a 4 times larger learning rate" in text


def test_the_same_update_is_called_so_whatever_chance_does():
    # Without momentum (b) and (c) are one rule; made-up runs that differ must not be told apart.
    records = made_up({"one": 0.92, "split": 0.98, "scaled": 0.93, "small": 0.98})
    distance = {"kind": "distance", "batch_split_scaled": 1e-5, "batch_split_small": 0.3}
    text = " ".join(verdict(CONFIG, [*records, distance]))
    assert "it is a 4 times larger learning rate and nothing else" in text and "is chance" in text
    text = " ".join(verdict(CONFIG, [*records, distance | {"batch_split_scaled": 0.5}]))
    assert "does better than a 4 times larger" in text


def test_each_protocol_has_a_verdict_of_its_own():
    one_rate = made_up({"one": 0.92, "split": 0.98, "scaled": 0.98, "small": 0.98})
    own = made_up({"one": 0.98, "split": 0.93, "small": 0.98}, protocol="tuned", rates={"one": 1.0, "split": 0.1, "small": 0.01})
    told = verdict(CONFIG, [*one_rate, *(record for record in own if record["kind"] != "cost")])
    first, second = (next(text for text in told if text.startswith(start)) for start in ("Verdict at one", "Verdict with each"))
    assert "splitting is better than one update" in first and "splitting is worse than one update" in second
    text = " ".join(told)
    assert "(a) 1, (b) 0.1, (d) 0.01, of 3 tried with 2 other seeds" in text
    assert "The best rate of (a), 1, is the highest of the grid" in text and "The best rate of (d), 0.01, is the lowest" in text
    assert "best rate of (b)" not in text


def choosing(runs):
    """Choosing runs of one arm: rate to pairs of (examples to the target or None, accuracy at the end)."""
    for rate, pairs in runs.items():
        for seed, (examples, accuracy) in enumerate(pairs):
            place = {"kind": "tune", "arm": "one", "learning_rate": rate, "seed": 1000 + seed, "examples_to_target": examples}
            yield {**place, "validation_accuracy": accuracy, "best_validation_accuracy": 0.9, "diverged": accuracy == 0}


@pytest.mark.parametrize(
    ("runs", "chosen"),
    [
        ({0.01: [(500, 0.9), (700, 0.9)], 0.1: [(400, 0.9), (600, 0.9)]}, 0.1),  # the fewest examples
        ({0.01: [(500, 0.9), (700, 0.9)], 0.1: [(100, 0.99), (None, 0.99)]}, 0.01),  # all reach it, or it does not count
        ({0.01: [(None, 0.7), (None, 0.7)], 0.1: [(None, 0.6), (None, 0.7)]}, 0.01),  # none reaches it: the higher end
        ({0.01: [(None, 0.7), (None, 0.7)], 0.1: [(100, 0.9), (100, 0.2)]}, 0.01),  # a collapse loses
        ({0.01: [(None, 0.7), (None, 0.7)], 0.1: [(100, 0.9), (100, 0.0)]}, 0.01),  # so does a divergence
        ({0.01: [(400, 0.8), (400, 0.8)], 0.1: [(400, 0.9), (400, 0.9)]}, 0.1),  # equal: the higher end
    ],
)
def test_the_rate_is_the_one_that_the_choosing_runs_say(runs, chosen):
    records = list(choosing(runs))
    assert chosen_rate(records, "one", GOAL) == chosen == chosen_rate(records, "scaled", GOAL)  # (c) at a rate of its own is (a)
    assert chosen_rate([*records, *made_up({"one": 0.99}, rates={"one": 5.0})], "one", GOAL) == chosen  # no scored run has a part
