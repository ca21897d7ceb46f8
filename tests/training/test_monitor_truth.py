"""What a monitor says of noise against known truths: scales, no signal, parts of unequal sizes, running averages."""

import functools
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
        summed = spread_sum(monitor, metric, batch[0], False)
        spreads = [summed.of_part(Measured(part, jnp.zeros(size), None)) for part, size in zip(parts, sizes, strict=True)]
        return statistics_of_parts(monitor, metric, functools.reduce(summed.add, spreads, summed.start()), batch.sum(0), sum(sizes))

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


@pytest.mark.parametrize("weights", [None, [1.0] * 8, [3.0, 1.0, 2.0, 0.0, 5.0, 1.0, 4.0, 2.0]])
@pytest.mark.parametrize("num_devices", [1, 2])
def test_noise_far_below_the_signal_keeps_its_digits(weights, num_devices):
    """Gradients of 100, give or take 0.01: a sum of squares less the square of a sum has no digit left in float32."""
    random, monitor, size = np.random.default_rng(0), NoiseMonitor(), 5
    metric = metric_of(monitor, jnp.zeros(3), (), 0)
    of_parts = [size] * 8 if weights is None else weights
    gradients = jnp.asarray([[weight] for weight in of_parts] * (100 + 0.01 * random.normal(size=(8, 3))), jnp.float32)

    def measure(gradients, weights):
        summed, total = spread_sum(monitor, metric, jnp.zeros(3), weights is not None), None
        for number in range(8 // num_devices):
            losses = jnp.zeros(size) if weights is None else jb.Weighted(jnp.zeros(1), weights[number][None])
            part = summed.of_part(Measured(gradients[number], losses, None))
            total = part if total is None else summed.add(total, part)
        total = summed.over_devices("devices", total)
        return statistics_of_parts(monitor, metric, total, jax.lax.psum(gradients.sum(0), "devices"), 8 * size)

    dealt = lambda leaf: leaf.reshape(num_devices, 8 // num_devices, *leaf.shape[1:])
    noise = jax.vmap(measure, axis_name="devices")(dealt(gradients), None if weights is None else dealt(jnp.asarray(weights)))
    summed, own = np.asarray(gradients, np.float64), np.array(of_parts)
    mean, squares = summed.sum(0) / own.sum(), (summed**2).sum(1)
    if weights is None:
        expected = ((squares / own).sum() - own.sum() * (mean**2).sum()) / 7
    else:
        expected = 8 * size * (squares.sum() - (own**2).sum() * (mean**2).sum()) / (own.sum() ** 2 - (own**2).sum())
    np.testing.assert_allclose(noise.trace[:, 0], expected, rtol=1e-2)


def test_a_run_whose_noise_is_far_below_its_signal():
    config = jb.FitConfig(optax.sgd(0.0), 32, jb.steps(1), microbatch_size=8, monitor=NoiseMonitor())
    task = quadratic(1e-8, signal=4e4)
    (record,) = jb.fit(task, config)
    batch = np.asarray(task.train_data, np.float64)[jb.epoch_batches(0, 0, 4096, 32).indices[0]]
    means = batch.reshape(4, 8, 4).mean(1)
    assert record["noise_trace"] == pytest.approx(8 * ((means - means.mean(0)) ** 2).sum() / 3, rel=1e-2)
