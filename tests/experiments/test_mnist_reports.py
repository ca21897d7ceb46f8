"""What the reports of the batch-size studies make of records whose answer is known."""

import math
import types

import numpy as np
import pytest

from experiments.batch_shape.report import bytes_per_example, effect, window
from experiments.convergence.report import fit_critical, noise_scale, runs_of, to_target
from experiments.convergence.report import verdict as convergence_verdict
from experiments.gradient_smoothness.report import error_slope, fate
from experiments.harness.rate_grid import best_rates, results
from experiments.harness.sentences import BETWEEN
from experiments.iteration_speed.report import loading_decides_from
from experiments.learning_rate_grid.report import verdict as grid_verdict
from experiments.nose_game import __main__ as nose_game
from jaxbatch.advice.learning_rates import rate_exponent
from jaxbatch.training.goals import Goal

ACCURACY = Goal("accuracy", 0.98)


def grid_records(config, best, spread=1.0):
    """Runs that reach the target soonest at ``best[size]``, later the farther the rate is from it."""
    random = np.random.default_rng(0)
    for size in config.batch_sizes:
        for rate in config.learning_rates:
            for seed in range(config.seeds):
                updates = 100 * (1 + abs(math.log(rate / best[size]))) + spread * random.normal()
                place = {"kind": "run", "batch_size": size, "learning_rate": rate, "seed": seed, "diverged_at_update": -1}
                yield {**place, "updates": 10, "validation_accuracy": 0.5}
                yield {**place, "updates": round(updates), "validation_accuracy": 0.99}
        yield {"kind": "size", "batch_size": size}


def grid_config(rates):
    return types.SimpleNamespace(batch_sizes=(1, 10, 100, 1000), learning_rates=rates, seeds=3, target="accuracy>0.98")


@pytest.mark.parametrize(("power", "holds"), [(1.0, "linear (1)"), (0.5, "square root (0.5)"), (0.0, "none (0)")])
def test_the_exponent_is_found(power, holds):
    config = grid_config(tuple(10.0 ** (n / 4) for n in range(-16, 5)))
    best = {size: min(config.learning_rates, key=lambda r: abs(math.log(r / (0.001 * size**power)))) for size in config.batch_sizes}
    records = list(grid_records(config, best))
    assert best_rates(config, records) == best
    p = rate_exponent(results(config, records))
    assert abs(p.value - power) < 0.06 and p.low < power < p.high and p.high - p.low < 0.3
    (sentence,) = (text for text in grid_verdict(config, records) if "grows as" in text)
    assert sentence.count(holds) == 1 and sum(name in sentence for name in ("linear", "square root", "none")) == 1


def test_an_edge_of_the_grid_is_told_and_left_out():
    config = grid_config((0.001, 0.01, 0.1, 1.0))
    records = list(grid_records(config, {1: 0.001, 10: 0.01, 100: 0.1, 1000: 1.0}))
    assert any("edge of the grid at B = 1, 1000;" in text for text in grid_verdict(config, records))
    p = rate_exponent(results(config, records))
    assert p.n == 2 and abs(p.value - 1) < 1e-6


def test_runs_that_did_not_arrive_have_no_exponent():
    config = grid_config((0.001, 0.01, 0.1, 1.0))
    rows = list(grid_records(config, {1: 0.01, 10: 0.01, 100: 0.1, 1000: 0.1}))

    def short_of(*sizes):
        return [row | {"validation_accuracy": 0.9} if row["kind"] == "run" and row["batch_size"] in sizes else row for row in rows]

    (sentence,) = (text for text in grid_verdict(config, short_of(1, 10, 100, 1000)) if "xponent" in text)
    assert sentence == "No exponent: no run reaches 98% validation accuracy within the budget."
    (sentence,) = (text for text in grid_verdict(config, short_of(1, 10, 100)) if "xponent" in text)
    assert sentence.startswith("No exponent: fewer than two batch sizes have a best rate that lies inside the grid and reaches the target")
    sentences = " ".join(grid_verdict(config, short_of(1)))
    assert (
        "over 3 batch sizes" in sentences and "left out of the fit" in sentences and "neighbouring sizes is 10 to 100: 1.00, 100 to 1000" in sentences
    )


def convergence_records(critical, least, seeds=4, sizes=(1, 6, 60, 600)):
    random = np.random.default_rng(0)
    for size in sizes:
        yield {"kind": "speed", "batch_size": size, "round": 0, "resident_ms": 0.1 + 0.01 * size, "streamed_ms": 0.2 + 0.02 * size}
    for table in ("same", "tuned"):
        for size in sizes:
            yield {"kind": "rate", "table": table, "batch_size": size, "learning_rate": 0.1}
            for seed in range(seeds):
                updates = least * (1 + critical / size) * math.exp(0.03 * random.normal())
                yield {
                    "kind": "run", "table": table, "batch_size": size, "seed": seed, "learning_rate": 0.1, "reached": True,
                    "updates": updates, "epochs": 1.0, "examples": size * updates, "compute_seconds": 1.0,
                    "best_validation_accuracy": 0.985, "validation_accuracy": 0.985, "test_accuracy": 0.98, "diverged": False,
                }  # fmt: skip


def test_the_critical_batch_size_is_found():
    records = list(convergence_records(critical=40.0, least=200.0))
    found = fit_critical(records, "tuned")
    assert found.critical_batch_size.low < 40 < found.critical_batch_size.high
    assert abs(found.critical_batch_size.value / 40 - 1) < 0.15 and abs(found.min_updates.value / 200 - 1) < 0.1
    place = {"kind": "noise", "table": "tuned", "batch_size": 6, "learning_rate": 0.1}
    noise = [
        {**place, "validation_accuracy": 0.5, "signal": 1.0 + 0.1 * (-1) ** n, "trace": scale} for n, scale in enumerate([38.0, 42.0, 41.0, 39.0])
    ]
    assert abs(noise_scale(records + noise, ACCURACY).value - 40) < 1e-9
    of_another_rate = {**noise[0], "learning_rate": 0.2, "trace": 1e6}
    assert noise_scale([*records, of_another_rate, *noise], ACCURACY) == noise_scale(records + noise, ACCURACY)
    config = types.SimpleNamespace(target="accuracy>0.98", seeds=4)
    assert any("lies within the range of this scale" in text for text in convergence_verdict(config, records + noise))
    far = [{**record, "trace": 100 * record["trace"]} for record in noise]
    assert any("lies below" in text for text in convergence_verdict(config, records + far))
    both = [*noise, *({**record, "validation_accuracy": 0.99} for record in far)]
    assert any("40 [" in text and "and 4,000 [" in text and "within" in text for text in convergence_verdict(config, records + both))


def test_updates_are_counted_to_the_middle_between_two_looks():
    exact = list(convergence_records(critical=40.0, least=200.0))
    late = []  # by half of 1,000 examples, and the look before was as much too early
    for record in exact:
        wait = 500 / record["batch_size"]
        noticed = {"updates": record["updates"] + wait, "more_than": record["updates"] - wait - 1} if record["kind"] == "run" else {}
        late.append(record | noticed)
    found, expected = fit_critical(late, "tuned"), fit_critical(exact, "tuned")
    assert found.critical_batch_size.value == pytest.approx(expected.critical_batch_size.value, rel=1e-6)
    runs = runs_of(late, "tuned", 6)
    assert to_target(runs, "updates").value == pytest.approx(to_target(runs_of(exact, "tuned", 6), "updates").value, rel=1e-9)
    config = types.SimpleNamespace(target="accuracy>0.98", seeds=4)
    assert convergence_verdict(config, late)[-1] == BETWEEN and BETWEEN not in convergence_verdict(config, exact)
    rows = list(grid_records(grid_config((0.001, 0.01, 0.1)), dict.fromkeys((1, 10, 100, 1000), 0.01), spread=0.0))
    result = results(grid_config((0.001, 0.01, 0.1)), rows)[10]
    assert result.updates_to_goal[1].tolist() == [55.5] * 3  # after 10 updates, and at 100
    assert grid_verdict(grid_config((0.001, 0.01, 0.1)), rows)[-1] == BETWEEN


def test_no_fixed_memory_is_below_zero():
    config = types.SimpleNamespace(models=("mlp",), dtypes=("float32",))
    rows = [{"kind": "memory", "model": "mlp", "dtype": "float32", "batch_size": size, "bytes": size**2} for size in (32, 64, 128)]
    fixed, slope = bytes_per_example(config, rows, "mlp", "float32")  # a line through them begins at -4,000
    assert fixed == 0 and 64 < slope < 128
    rows = [row | {"bytes": 5000 + 7 * row["batch_size"]} for row in rows]
    assert bytes_per_example(config, rows, "mlp", "float32") == pytest.approx((5000, 7))


def test_a_size_that_misses_the_target_is_left_out_of_the_fit():
    records = list(convergence_records(critical=40.0, least=200.0))
    for record in records:
        if record["kind"] == "run" and record["batch_size"] == 600 and record["seed"] == 0:
            record |= {"reached": False, "best_validation_accuracy": 0.8, "validation_accuracy": 0.1}
    config = types.SimpleNamespace(target="accuracy>0.98", seeds=4)
    told = " ".join(convergence_verdict(config, records))
    assert "600 (3 of 4)" in told and "B = 600 at rate 0.1 is lost in 1 of 4 runs: from 80.0% at best to 10.0% at the end" in told
    two = [record for record in records if record["batch_size"] in (6, 60)]
    assert fit_critical(two, "tuned") is None


def test_a_size_whose_rate_was_chosen_anew_is_told_at_that_rate_alone():
    records = list(convergence_records(critical=40.0, least=200.0))
    again = [{**r, "learning_rate": 0.2, "updates": 7.0} for r in records if r["kind"] == "run" and r["table"] == "tuned"]
    rate = {"kind": "rate", "table": "tuned", "batch_size": 6}
    there = [*records, {**rate, "learning_rate": 0.2}, *(r for r in again if r["batch_size"] == 6)]
    assert {r["updates"] for r in runs_of(there, "tuned", 6)} == {7.0} and 7.0 not in {r["updates"] for r in runs_of(there, "same", 6)}
    back = [*there, {**rate, "learning_rate": 0.1}]  # nothing is measured again, and the first rate's runs count
    assert runs_of(back, "tuned", 6) == runs_of(records, "tuned", 6)


def test_where_loading_decides():
    def records(loading):
        for size, ms in zip((1, 10, 100), loading, strict=True):
            for number in range(3):
                yield {"kind": "speed", "batch_size": size, "round": number, "loading_ms": ms, "compute_ms": 1.0}

    config = types.SimpleNamespace(batch_sizes=(1, 10, 100))
    assert loading_decides_from(config, list(records([0.1, 0.1, 10.0]))) == pytest.approx(10**1.5)
    assert loading_decides_from(config, list(records([0.1, 0.2, 0.9]))) is None
    assert loading_decides_from(config, list(records([2.0, 2.0, 9.0]))) == 1


def test_the_effect_of_a_shape_is_told_from_that_of_size():
    config = types.SimpleNamespace(centres=(64, 512), models=("mlp",), dtypes=("float32",), rounds=12)
    random = np.random.default_rng(0)
    records = []
    for size, kind in {**window(64), **window(512)}.items():
        for number in range(12):
            factor = {"power": 0.9, "eight": 0.95}.get(kind, 1.0) * math.exp(0.005 * random.normal())
            records.append({"kind": "time", "model": "mlp", "dtype": "float32", "batch_size": size, "round": number, "ms": (3 + 0.1 * size) * factor})
    for kind, expected in (("power", 0.9), ("eight", 0.95), ("round", 1.0)):
        found = effect(config, records, "mlp", "float32", kind)
        assert abs(found.value - expected) < 0.01 and (expected == 1 or found.high < 0.98)


def test_the_slope_of_the_error_and_a_run_that_is_lost():
    random = np.random.default_rng(0)
    config = types.SimpleNamespace(batch_sizes=(1, 10, 100))
    records = [
        {"kind": "error", "place": "start", "batch_size": size, "seed": 0, "cosine": [0.5],
         "error": list(random.chisquare(20, 200) / 20 * 30 / size)}
        for size in config.batch_sizes
    ]  # fmt: skip
    slope = error_slope(config, records, "start")
    assert abs(slope.value + 1) < 0.03 and not slope.excludes(-1)
    curve = {"kind": "curve", "batch_size": 1, "seed": 0, "guess_loss": math.log(10), "diverged_at_iteration": -1}
    assert fate([{**curve, "loss": [2.3, 0.5, 0.2, 0.1] * 5}], 1) == "learned"
    assert fate([{**curve, "loss": [2.3] * 20}], 1) == "1 of 1 no better than a guess"
    bad = {**curve, "loss": [2.3, None], "diverged_at_iteration": 1}
    assert fate([bad], 1) == "1 of 1 diverged, first at iteration 1"


def test_a_path_of_everyone_is_straight_and_that_of_one_is_not():
    config = nose_game.Config()
    lengths = {}
    for size in (1, 12):
        paths = [nose_game.play(config, seed, size) for seed in range(5)]
        lengths[size] = np.mean([nose_game.describe_path(path, nose_game.target(nose_game.make_helpers(config, seed)))["length"]
                                 for seed, path in enumerate(paths)])  # fmt: skip
    assert lengths[1] > 1.3 * lengths[12]
    one = nose_game.make_helpers(config, 0)
    full = nose_game.play(nose_game.Config(num_steps=400), 0, 12)
    np.testing.assert_allclose(full[-1], nose_game.target(one), atol=1e-4)
