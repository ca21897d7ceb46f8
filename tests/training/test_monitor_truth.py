"""What a monitor says of noise against known truths: scales, no signal, parts of unequal sizes, running averages."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.gradients.accumulators import Measured
from jaxbatch.gradients.part_norms import NoiseMonitor, metric_of, spread_sum, statistics_of_parts
from jaxbatch.intervals import fieller
from jaxbatch.training.monitor import NoiseTrack


def quadratic(scale, signal=4.0, dimensions=4, num_examples=4096, seed=0):
    """Gradients w - x of a quadratic loss; at w = 0 the exact noise scale. A rate of 0 keeps it there."""
    random = np.random.default_rng(seed)
    data = math.sqrt(signal / dimensions) + math.sqrt(scale * max(signal, 1) / dimensions) * random.normal(size=(num_examples, dimensions))
    loss_fn = lambda w, x: 0.5 * ((x - w[None]) ** 2).sum(-1)
    return jb.Task(lambda key: jnp.zeros(dimensions), loss_fn, None, jnp.asarray(data, jnp.float32), None)


def test_the_interval_holds_the_scale_of_a_quadratic():
    config = jb.FitConfig(optax.sgd(0.0), 32, jb.epochs(1), microbatch_size=8, monitor=NoiseMonitor(halflife=1000))
    (record,) = jb.fit(quadratic(16.0), config)
    for name in ("noise_scale", "noise_scale_average"):
        assert record[f"{name}_low"] < 16 < record[f"{name}_high"] and abs(record[name] - 16) < 3
    schedule = config._replace(batch_size=lambda epoch: 16 * 2**epoch, duration=jb.epochs(4))
    *_, last = jb.fit(quadratic(16.0), schedule)  # the trace is that of an example, whatever the size
    assert last["noise_scale_average_low"] < 16 < last["noise_scale_average_high"]


def test_no_signal_has_no_upper_end():
    config = jb.FitConfig(optax.sgd(0.0), 32, jb.epochs(1), microbatch_size=8, monitor=NoiseMonitor())
    random = np.random.default_rng(3)
    half = random.normal(size=(2048, 4))
    task = quadratic(1.0)._replace(train_data=jnp.asarray(np.concatenate([half, -half]), jnp.float32))
    (record,) = jb.fit(task, config)
    assert record["noise_scale_high"] == record["noise_scale_average_high"] == math.inf


def test_parts_of_unequal_sizes_have_no_bias_and_intervals_cover():
    sizes, scale, dimensions, repetitions, steps = (1, 7, 3, 21), 16.0, 4, 200, 50
    random, monitor = np.random.default_rng(0), NoiseMonitor(halflife=30)
    data = 1 + math.sqrt(scale) * random.normal(size=(repetitions * steps, sum(sizes), dimensions))

    def measure(batch):
        metric = metric_of(monitor, batch[0], (), 0)
        parts = [part.sum(0) for part in jnp.split(batch, np.cumsum(sizes)[:-1])]
        of_part = spread_sum(monitor, metric, batch[0], False).of_part
        spreads = [of_part(Measured(part, jnp.zeros(size), None)) for part, size in zip(parts, sizes, strict=True)]
        return statistics_of_parts(monitor, metric, jax.tree.map(lambda *leaves: sum(leaves), *spreads), batch.sum(0), sum(sizes))

    found = jax.jit(jax.vmap(measure))(jnp.asarray(data, jnp.float32))
    np.testing.assert_allclose([found.signal.mean(), found.trace.mean()], [4.0, 64.0], rtol=0.03)
    hits = {"noise_scale": 0, "noise_scale_average": 0}
    for run in range(repetitions):
        own = jax.tree.map(lambda leaf: np.asarray(leaf)[run * steps : (run + 1) * steps], found)
        record = NoiseTrack(monitor, jnp.zeros(4)).read((np.zeros(steps), own))[1]
        for name in hits:
            hits[name] += record[f"{name}_low"] <= scale <= record[f"{name}_high"]
    assert min(hits.values()) >= 0.9 * repetitions, hits


def test_running_averages_against_weights_in_a_list():
    random, monitor = np.random.default_rng(0), NoiseMonitor(halflife=5)
    signal, trace, measured = random.normal(2, 1, (40, 1)), random.normal(30, 5, (40, 1)), np.arange(40) % 3 == 0
    track, again = NoiseTrack(monitor, jnp.zeros(2)), None
    for first, last in ((0, 7), (7, 8), (8, 40)):  # through a state, bit for bit
        track = NoiseTrack(monitor, jnp.zeros(2), jnp.asarray(track.written()))
        again = track.read((np.zeros(1), (signal[first:last], trace[first:last], measured[first:last], None)))[1]
    whole = NoiseTrack(monitor, jnp.zeros(2))
    found = whole.read((np.zeros(1), (signal, trace, measured, None)))[1]
    np.testing.assert_array_equal(whole.written(), track.written())
    assert found["noise_scale_average_high"] == again["noise_scale_average_high"]
    weights = 0.5 ** (np.arange(39, -1, -1) / 5) * measured
    means = [np.average(values[:, 0], weights=weights) for values in (signal, trace)]
    np.testing.assert_allclose([found["noise_signal_average"], found["noise_trace_average"]], means, rtol=1e-12)
    assert found["noise_scale_average"] == pytest.approx(means[1] / means[0])
    covariance = np.cov(signal[:, 0], trace[:, 0], aweights=weights) * (weights**2).sum() / weights.sum() ** 2
    expected = fieller(
        means[1], means[0], covariance[1, 1], covariance[0, 1], covariance[0, 0], weights.sum() ** 2 / (weights**2).sum(), nonnegative=True
    )
    np.testing.assert_allclose([found["noise_scale_average_low"], found["noise_scale_average_high"]], expected[1:3], rtol=1e-9)
