"""Noise measured while training: against slow twins and known truths, in every way through training, without changing a bit."""

import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.gradients.noise import GradientStatistics
from jaxbatch.gradients.part_norms import NoiseMonitor, inverse_moments
from jaxbatch.gradients.spreads import layers_of
from jaxbatch.training.steps import make_task_step
from tests import reference
from tests.conftest import ROOT, make_problem
from tests.data.test_streams import streamed
from tests.gradients.test_moments import batch_norm_task
from tests.training.test_loops import convolution_task

LOSS, PARAMS, DATA = make_problem(24)
TASK = jb.Task(lambda key: PARAMS, LOSS, None, DATA, None)
CONFIG = jb.FitConfig(optax.sgd(0.01, 0.9), 12, jb.epochs(2), seed=1)


def noise(record):
    return {name: value for name, value in record.items() if name.startswith("noise")}


def without_noise(record):
    kept = {name: value for name, value in record.items() if "noise" not in name and "seconds" not in name}
    return jax.tree.leaves(kept | {"state": record["state"]._replace(noise=())})


def assert_same(with_monitor, without):
    for a, b in zip(with_monitor, without, strict=True):
        jax.tree.map(np.testing.assert_array_equal, without_noise(a), without_noise(b))


def batch_of(number, size=12, seed=1):
    index = jb.epoch_batches(seed, 0, 24, size).indices[number]
    return jax.tree.map(lambda leaf: leaf[index], DATA)


def cut(batch, *ends):
    return [jax.tree.map(lambda leaf: leaf[a:b], batch) for a, b in zip((0, *ends[:-1]), ends, strict=True)]


@pytest.mark.parametrize(
    ("settings", "ends"),
    [
        ({}, (6, 12)),  # cut in two
        ({"microbatch_size": 3}, (3, 6, 9, 12)),
        ({"batch_size": 11, "microbatch_size": 4}, (4, 8, 11)),  # the last is not full
        ({"num_groups": 4}, (3, 6, 9, 12)),
        ({"num_groups": 2, "microbatch_size": 3}, (3, 6, 9, 12)),
        ({"num_groups": 12}, range(1, 13)),  # groups of one example
    ],
)
def test_the_first_batch_against_a_loop_over_its_parts(settings, ends):
    config = CONFIG._replace(duration=jb.steps(1), monitor=NoiseMonitor(per_layer=True), **settings)
    (record,) = jb.fit(TASK, config)
    signal, trace = reference.noise_of_parts(LOSS, PARAMS, cut(batch_of(0, config.batch_size), *ends))
    np.testing.assert_allclose([record["noise_signal"], record["noise_trace"]], [signal.sum(), trace.sum()], rtol=1e-4)
    assert record["noise_scale"] == record["noise_trace"] / record["noise_signal"] and record["noise_measurements"] == 1
    assert record["noise_scale_high"] == math.inf  # of one measurement nothing is sure
    by_layer = record["noise_by_layer"]
    assert list(by_layer) == ["hidden", "out"]
    np.testing.assert_allclose([by_layer["hidden"]["trace"], by_layer["out"]["trace"]], [trace[:2].sum(), trace[2]], rtol=1e-4)
    np.testing.assert_allclose([by_layer["hidden"]["signal"], by_layer["out"]["signal"]], [signal[:2].sum(), signal[2]], rtol=1e-3)


def test_equal_parts_are_the_groups_of_gradient_statistics():
    (record,) = jb.fit(TASK, CONFIG._replace(duration=jb.steps(1), microbatch_size=4, monitor=NoiseMonitor()))
    expected = jb.gradient_statistics(LOSS, PARAMS, batch_of(0), num_groups=3)
    np.testing.assert_allclose([record["noise_signal"], record["noise_trace"]], expected, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"microbatch_size": 4}, {"microbatch_size": 5}, {"num_groups": 3}, {"num_groups": 2, "microbatch_size": 3}])
@pytest.mark.parametrize("monitor", [NoiseMonitor(), NoiseMonitor(every=2, per_layer=True)])
def test_a_monitor_changes_no_bit_where_there_are_parts(settings, monitor):
    config = CONFIG._replace(evaluations_per_epoch=2, **settings)
    assert_same(jb.fit(TASK, config._replace(monitor=monitor)), jb.fit(TASK, config))


def test_batches_between_measurements_stay_whole():
    # Batches 1 and 2 of the three are not cut, so that only the first one's sums are in another order.
    config = CONFIG._replace(batch_size=8, duration=jb.steps(3))
    losses = [[record["loss"] for record in jb.fit(TASK, config._replace(evaluations_per_epoch=3, monitor=m))] for m in (None, NoiseMonitor(every=3))]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    (measured,) = jb.fit(TASK, config._replace(monitor=NoiseMonitor(every=3)))
    (cut_always,) = jb.fit(TASK, config._replace(duration=jb.steps(1), monitor=NoiseMonitor()))
    assert measured["noise_measurements"] == 1
    np.testing.assert_allclose(measured["noise_trace"], cut_always["noise_trace"], rtol=1e-5)


DEVICES = """
import json
import jax, numpy as np, optax
import jaxbatch as jb
from tests.conftest import make_problem

loss_fn, params, data = make_problem(24)
task = jb.Task(lambda key: params, loss_fn, None, data, None)
found = {}
cases = (4, 12, None, None), (2, 12, None, 3), (4, 7, None, None), (4, 6, None, 1), (2, 12, 2, None), (4, 9, 3, None)
for count, size, groups, microbatch in cases:
    for method in ("jit", "pmap"):
        settings = {"num_groups": groups, "microbatch_size": microbatch, "num_devices": count, "parallel": method}
        config = jb.FitConfig(optax.sgd(0.01, 0.9), size, jb.steps(1), seed=1, **settings)
        (off,), (on,) = jb.fit(task, config), jb.fit(task, config._replace(monitor=jb.NoiseMonitor(per_layer=True)))
        same = all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(off["state"].params), jax.tree.leaves(on["state"].params), strict=True))
        found[f"{count} {size} {groups} {microbatch} {method}"] = same, on["noise_signal"], on["noise_trace"]
print(json.dumps(found))
"""
ENDS = {
    "4 12 None None": (3, 6, 9, 12),
    "2 12 None 3": (3, 6, 9, 12),
    "4 7 None None": (2, 4, 6, 7),  # the last share has a filler
    "4 6 None 1": range(1, 7),  # the last share holds fillers alone
    "2 12 2 None": (3, 6, 9, 12),
    "4 9 3 None": range(1, 10),
}


@pytest.mark.slow
def test_shares_of_devices_are_parts():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", DEVICES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 2 * len(ENDS)
    for name, (same, *statistics) in found.items():
        ends = ENDS[name.rsplit(" ", 1)[0]]
        expected = reference.noise_of_parts(LOSS, PARAMS, cut(batch_of(0, ends[-1]), *ends))
        assert same, name
        np.testing.assert_allclose(statistics, [value.sum() for value in expected], rtol=1e-3, err_msg=name)


def test_bits_of_other_ways_through_training():
    settings = {"microbatch_size": 3, "monitor": NoiseMonitor()}
    adam = CONFIG._replace(optimizer=optax.adam(0.01), microbatch_size=3)
    assert_same(jb.fit(TASK, adam._replace(monitor=NoiseMonitor(preconditioned=True))), jb.fit(TASK, adam))
    for task in (convolution_task(), batch_norm_task()):
        config = CONFIG._replace(batch_size=6, microbatch_size=3)
        assert_same(jb.fit(task, config._replace(**settings)), jb.fit(task, config))
    tupled = TASK._replace(loss_fn=lambda p, batch: LOSS(p, {"x": batch[0], "y": batch[1]}), train_data=(DATA["x"], DATA["y"]))
    for groups in (1, 2):
        config = CONFIG._replace(microbatch_size=3, num_groups=groups)
        stream = tupled._replace(train_data=streamed(tupled._replace(test_data=tupled.train_data)).train_data)
        found = list(jb.fit(stream, config._replace(monitor=NoiseMonitor())))
        assert_same(found, jb.fit(stream, config))
        on_device = list(jb.fit(tupled, config._replace(monitor=NoiseMonitor())))
        np.testing.assert_allclose(*([record["noise_trace"] for record in records] for records in (found, on_device)), rtol=1e-3)


def test_off_costs_nothing():
    state, data = jb.init_state(TASK, CONFIG.optimizer, 0), DATA
    text = lambda **monitor: make_task_step(TASK, CONFIG.optimizer, 24, num_groups=2, **monitor).lower(state, data).as_text()
    assert text() == text(monitor=None) and text() != text(monitor=NoiseMonitor())
    (record,) = jb.fit(TASK, CONFIG._replace(duration=jb.steps(1)))
    assert noise(record) == {} and record["state"].noise == ()


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_run_goes_on_bit_for_bit(tmp_path, per_layer):
    config = CONFIG._replace(duration=jb.epochs(4), microbatch_size=3, monitor=NoiseMonitor(halflife=3, per_layer=per_layer))
    whole = list(jb.fit(TASK, config))
    rest = list(jb.fit(TASK, config, state=whole[1]["state"]))
    stream = jb.fit_with_checkpoints(TASK, config, tmp_path)
    next(stream), next(stream)
    stream.close()
    for records in (rest, list(jb.fit_with_checkpoints(TASK, config, tmp_path))):
        assert noise(records[-1]) == noise(whole[-1])
        jax.tree.map(np.testing.assert_array_equal, records[-1]["state"], whole[-1]["state"])
    *_, often = jb.fit(TASK, config._replace(evaluations_per_epoch=2))
    np.testing.assert_array_equal(often["state"].noise, whole[-1]["state"].noise)
    with pytest.raises(ValueError, match="holds another run .*monitor"):
        next(jb.fit_with_checkpoints(TASK, config._replace(monitor=None), tmp_path))
    changed = jb.fit(TASK, config._replace(monitor=NoiseMonitor(per_layer=not per_layer)), state=whole[1]["state"])
    assert next(changed)["noise_scale_average"] > 0  # other averages start anew


def test_every_counts_batches():
    config = CONFIG._replace(batch_size=4, duration=jb.steps(10), microbatch_size=2)
    for groups in (None, 2):
        records = list(jb.fit(TASK, config._replace(num_groups=groups, monitor=NoiseMonitor(every=4))))
        assert [record["noise_measurements"] for record in records] == [2, 1]  # batches 0 and 4 of 6, batch 8 of 4


def test_the_metric_of_adam():
    optimizer = optax.adam(0.01, b2=0.9, eps=1e-3)
    config = CONFIG._replace(optimizer=optimizer, microbatch_size=3, duration=jb.steps(2), evaluations_per_epoch=2)
    monitor = NoiseMonitor(preconditioned=True, b2=0.9, eps=1e-3)
    first, second = jb.fit(TASK, config._replace(monitor=monitor))
    assert first["noise_measurements"] == 0 and first["noise_scale"] is None  # Adam has seen no gradient yet
    adam = first["state"].opt_state[0]
    metric = jax.tree.map(lambda v: 1 / (np.sqrt(np.asarray(v, np.float64) / (1 - 0.9)) + 1e-3) ** 2, adam.nu)
    signal, trace = reference.noise_of_parts(LOSS, first["state"].params, cut(batch_of(1), 3, 6, 9, 12), metric)
    np.testing.assert_allclose([second["noise_signal"], second["noise_trace"]], [signal.sum(), trace.sum()], rtol=1e-3)
    for other in (optax.rmsprop(0.01), optax.MultiSteps(optimizer, 2), optax.chain(optax.clip(1.0), optax.adamw(0.01))):
        inverse_moments(monitor, other.init(PARAMS), PARAMS)


def test_divergence_raises_nothing():
    config = CONFIG._replace(optimizer=optax.sgd(1e20), microbatch_size=3, duration=jb.epochs(50), monitor=NoiseMonitor(per_layer=True))
    *_, last = jb.fit(TASK, config)
    values = [*noise(last).values(), *last["noise_by_layer"]["out"].values()]
    assert last["diverged"] and not any(isinstance(value, float) and math.isnan(value) for value in values)


def test_single_examples():
    config = CONFIG._replace(monitor=NoiseMonitor())
    with pytest.raises(ValueError, match="batch_size=1 with a monitor.*Take batch_size=2"):
        next(jb.fit(TASK, config._replace(batch_size=1)))
    records = list(jb.fit(TASK, config._replace(batch_size=lambda epoch: 1 + epoch)))
    assert [record["noise_measurements"] for record in records] == [0, 12]


@pytest.mark.parametrize(
    ("monitor", "message"),
    [
        (NoiseMonitor(every=0), "monitor.every=0"),
        (NoiseMonitor(halflife=0), "monitor.halflife=0"),
        (NoiseMonitor(parts=1), "monitor.parts=1"),
        (NoiseMonitor(preconditioned=True), "has 0 trees of second moments"),
        (True, "monitor=True must be a jaxbatch.NoiseMonitor"),
    ],
)
def test_refusals(monitor, message):
    with pytest.raises(ValueError, match=message):
        next(jb.fit(TASK, CONFIG._replace(monitor=monitor)))


def test_more_parts_on_request():
    (record,) = jb.fit(TASK, CONFIG._replace(duration=jb.steps(1), monitor=NoiseMonitor(parts=6)))
    _, trace = reference.noise_of_parts(LOSS, PARAMS, cut(batch_of(0), *range(2, 13, 2)))
    np.testing.assert_allclose(record["noise_trace"], trace.sum(), rtol=1e-4)
    assert layers_of({"params": jnp.zeros(2)}) == ["params"] and layers_of((0.0, {"a": 1.0})) == ["0", "1"]
    assert isinstance(jb.gradient_noise_scale(GradientStatistics(jnp.ones(3), jnp.ones(3))), jb.Interval)
