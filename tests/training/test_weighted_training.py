"""Training with weighted losses: devices, streams, pieces, sweeps; a noise that is known; durations in tokens."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from experiments.harness.user_task_check import check_task
from experiments.split_backward.steps import make_masked_step
from tests import reference
from tests.conftest import make_weighted, on_four_devices

SIZE = 10

RUN = """
import json
import jax, numpy as np, optax
import jax.numpy as jnp
import jaxbatch as jb
from jaxbatch.training.divergence import batch_means
from jaxbatch.training.epochs import compile_task_epoch
from tests import reference
from tests.conftest import make_weighted
from tests.gradients.test_weighted import convolved

jax.config.update("jax_enable_x64", True)
loss_fn, token_loss, params, data = make_weighted(20)
OPTIMIZER = optax.sgd(0.05, 0.9)


whole = jb.Task(lambda key: params, loss_fn, None, data, None)
kinds = {"arrays": whole, "stream": whole._replace(train_data=jb.ArrayStream(data)), "pieces": whole._replace(loss_fn=convolved(loss_fn))}


def apart(kind, size, count, method="jit", groups=None, microbatch_size=None):
    task, indices = kinds[kind], np.arange(2 * size, dtype=np.int32).reshape(2, size)
    state = jb.init_state(task, OPTIMIZER, 0)
    settings = {"num_groups": groups, "microbatch_size": microbatch_size, "devices": jax.devices()[:count], "parallel": method}
    state, losses = compile_task_epoch(task, OPTIMIZER, state, 2, size, **settings)(state, task.train_data, indices, [0, 0])
    batches = [jax.tree.map(lambda leaf: leaf[index], data) for index in indices]
    expected = reference.token_steps(token_loss, OPTIMIZER, params, batches, groups or 1)
    pairs = zip(jax.tree.leaves((state.params, batch_means(losses))), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(a - b).max() / (1 + np.abs(b).max())) for a, b in pairs)


found = {}
for case in (
    *(("arrays", size, count, "jit", None, bound) for size, count, bound in ((10, 1, 4), (10, 2, None), (9, 4, None))),
    *(("arrays", size, count, "jit", None, bound) for size, count, bound in ((10, 2, 2), (5, 4, 1), (10, 4, 3))),
    *(("arrays", 9, 4, "pmap", None, bound) for bound in (None, 2)),
    *(("arrays", 9, count, method, 3, bound) for count, method, bound in ((2, "jit", None), (4, "pmap", 1), (1, "jit", 2))),
    *(("stream", size, count, "jit", None, bound) for size, count, bound in ((10, 1, 3), (9, 2, None), (10, 4, 1))),
    *(("stream", 10, count, method, 2, 2) for count, method in ((1, "jit"), (2, "pmap"))),
    *(("pieces", size, count, "jit", groups, 2) for size, count, groups in ((10, 1, None), (9, 2, None), (10, 2, 2))),
):
    found[" ".join(map(str, case))] = apart(*case)

order = np.asarray(jb.epoch_order(0, 0, 20))
for kind, size, bound, ends in (
    *((kind, 10, None, (5, 10)) for kind in kinds if kind != "pieces"),
    *((kind, 9, None, (5, 9)) for kind in kinds if kind != "pieces"),  # the second device has 4 and a filler
    ("arrays", 10, 2, (2, 4, 5, 7, 9, 10)),
    ("stream", 10, 2, (2, 4, 6, 7, 9, 10)),
    ("pieces", 10, 2, (2, 4, 6, 7, 9, 10)),
):
    config = jb.FitConfig(OPTIMIZER, size, jb.steps(1), monitor=jb.NoiseMonitor(), num_devices=2, microbatch_size=bound)
    (record,) = jb.fit(kinds[kind], config)
    parts = [jax.tree.map(lambda leaf: leaf[order[a:b]], data) for a, b in zip((0, *ends[:-1]), ends)]
    weights = [part["counts"].sum() for part in parts]
    own = [reference.token_mean_gradient(token_loss, params, part)[1] for part in parts]
    summed = [w * np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(one)]) for w, one in zip(weights, own)]
    expected = reference.noise_of_weighted_parts(summed, weights, size)
    found[f"noise {kind} {size} {bound}"] = max(abs(record[f"noise_{n}"] / e - 1) for n, e in zip(("signal", "trace"), expected))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    return on_four_devices(RUN)


@pytest.mark.parametrize(("kind", "count"), [("arrays", 11), ("stream", 5), ("pieces", 3), ("noise", 7)])
def test_any_cut_over_devices_groups_and_parts_is_the_whole_batch(found, kind, count):
    errors = {key: value for key, value in found.items() if key.startswith(kind)}
    assert len(errors) == count and max(errors.values()) < (1e-9 if kind == "noise" else 1e-12), errors


def test_each_run_of_a_sweep_is_the_run_that_fit_makes():
    loss_fn, _, params, data = make_weighted(SIZE, np.float32)
    task = jb.Task(lambda key: params, loss_fn, lambda p, b: {"loss": loss_fn(p, b)}, data, data)
    for runs in ("threads", "vmap"):
        *_, swept = jb.sweep(task, optax.sgd, jnp.array([0.01, 0.1]), [0, 1], batch_size=4, duration=jb.epochs(2), runs=runs)
        for number, (rate, seed) in enumerate(((0.01, 0), (0.1, 1))):
            *_, one = jb.fit(task, jb.FitConfig(optax.sgd(rate), 4, jb.epochs(2), seed=seed))
            assert [swept["loss"][number], swept["test_loss"][number]] == pytest.approx([one["loss"], one["test_loss"]], rel=1e-5)


def test_branches_train_with_weights():
    loss_fn, _, params, data = make_weighted(40, np.float32)
    task = jb.Task(lambda key: params, loss_fn, lambda p, b: {"loss": loss_fn(p, b)}, data, data)
    (record,) = jb.fit(task, jb.FitConfig(optax.sgd(0.01), 4, jb.steps(2)))
    found = jb.branch(task, optax.sgd, record["state"], learning_rate=0.01, batch_size=4, factors=(1, 2), examples=16)
    assert np.isfinite(jax.tree.leaves(found._asdict())[0]).all()


def test_studies_take_a_task_with_weights(x64):
    loss_fn, token_loss, params, data = make_weighted(SIZE)
    task = jb.Task(lambda key: params, loss_fn, lambda p, b: {"loss": loss_fn(p, b), "plain": b["x"][:, 0, 0]}, data, data)
    where = "mine.py:make", pathlib.Path("mine.py")
    check_task(task, *where)
    with pytest.raises(ValueError, match=r"one value per example, shape \(2,\), but 'loss' has shape \(\)"):
        check_task(task._replace(metrics_fn=lambda p, b: {"loss": jb.Weighted(*map(jnp.sum, loss_fn(p, b)))}), *where)
    found, *_ = make_masked_step(loss_fn, optax.sgd(0.1), 2)(params, optax.sgd(0.1).init(params), data)
    expected, _ = reference.token_steps(token_loss, optax.sgd(0.1), params, [data], 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, expected)


class Noisy:
    """Sequences whose tokens are not independent: the sum of a sequence of w tokens has the noise w² shared + w own."""

    G, SHARED, OWN, DIMENSIONS = 0.5, 0.4, 3.0, 4

    def __init__(self, weights, repetitions, seed=0):
        random = np.random.default_rng(seed)
        weights = np.broadcast_to(weights, (repetitions, np.shape(weights)[-1])).astype(float)
        shape = (*weights.shape, self.DIMENSIONS)
        wide = weights[..., None]
        sums = wide * (self.G + self.SHARED**0.5 * random.normal(size=shape)) + np.sqrt(wide * self.OWN) * random.normal(size=shape)
        self.batches = jnp.asarray(sums, jnp.float32), jnp.asarray(weights, jnp.float32)
        self.signal = self.DIMENSIONS * self.G**2

    def variance(self, weight):  # of a sequence's summed gradient
        return self.DIMENSIONS * (weight**2 * self.SHARED + weight * self.OWN)

    @staticmethod
    def loss_fn(theta, batch):
        return jb.Weighted((batch[0] * theta[None]).sum(-1), batch[1])


THETA, WEIGHTS = jnp.ones(Noisy.DIMENSIONS), np.array([1, 9, 2, 20, 5, 0, 3, 8])


def near(values, truth):
    values = np.asarray(values, np.float64)
    assert abs(values.mean() - truth) < 4 * values.std() / len(values) ** 0.5, (values.mean(), truth)


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_noise_of_unequal_weights_has_no_bias(groups):
    noisy = Noisy(WEIGHTS, 20_000)
    found = jax.jit(jax.vmap(lambda *batch: jb.gradient_statistics(Noisy.loss_fn, THETA, batch, num_groups=groups)))(*noisy.batches)
    near(found.signal, noisy.signal)
    near(found.trace, 8 * noisy.variance(WEIGHTS).sum() / WEIGHTS.sum() ** 2)
    # What the trace is for: the squared error of a batch's gradient.
    gradients = noisy.batches[0].sum(1) / WEIGHTS.sum()
    near(((gradients - Noisy.G) ** 2).sum(1) * 8, np.asarray(found.trace, np.float64).mean())
    # The formula for counts of examples, with weights in their place, is biased, because noise is not proportional to weight.
    own, weight = noisy.batches[0].reshape(-1, groups, 8 // groups, Noisy.DIMENSIONS).sum(2), WEIGHTS.reshape(groups, -1).sum(1)
    own, weight = own[:, weight > 0], weight[weight > 0]
    anova = ((own**2).sum(2) / weight[None]).sum(1) - WEIGHTS.sum() * (gradients**2).sum(1)
    anova = np.asarray(anova) / (len(weight) - 1) * 8 / WEIGHTS.sum()
    assert abs(anova.mean() / np.asarray(found.trace).mean() - 1) > 0.1


def test_a_monitor_measures_what_the_statistics_of_its_parts_are():
    noisy = Noisy(WEIGHTS, 200)
    statistics = jax.jit(jax.vmap(lambda *batch: jb.gradient_statistics(Noisy.loss_fn, THETA, batch, num_groups=4)))(*noisy.batches)
    for changes in ({"microbatch_size": 2}, {"num_groups": 4}, {"num_groups": 2, "microbatch_size": 2}):
        step = jb.make_train_step(Noisy.loss_fn, optax.sgd(0.0), 8, monitor=jb.NoiseMonitor(per_layer=True), **changes)
        state = jb.TrainState(THETA, optax.sgd(0.0).init(THETA), jnp.array(0))
        found = jax.jit(jax.vmap(lambda *batch: step(state, batch)[1].noise))(*noisy.batches)
        np.testing.assert_allclose(found.signal[:, 0], statistics.signal, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found.trace[:, 1], statistics.trace, rtol=1e-3, atol=1e-3)
        assert found.measured.all()
    sums, weights = (np.asarray(leaf[0], np.float64) for leaf in noisy.batches)
    expected = reference.noise_of_weighted_parts(sums.reshape(4, 2, -1).sum(1), weights.reshape(4, 2).sum(1), 8)
    np.testing.assert_allclose([statistics.signal[0], statistics.trace[0]], expected, rtol=1e-4)


def test_equal_weights_have_the_noise_of_losses_without():
    noisy = Noisy(np.full(8, 7), 3)
    for batch in zip(*noisy.batches, strict=True):
        plain = lambda theta, batch: (batch[0] * theta[None]).sum(-1) / 7
        for groups in (2, 8):
            found, expected = (jb.gradient_statistics(loss, THETA, batch, num_groups=groups) for loss in (Noisy.loss_fn, plain))
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_with_random_weights_the_bias_is_small():
    noisy = Noisy(np.random.default_rng(1).integers(1, 20, (4000, 32)), 4000)
    found = jax.jit(jax.vmap(lambda *batch: jb.gradient_statistics(Noisy.loss_fn, THETA, batch)))(*noisy.batches)
    weights = np.arange(1, 20)
    trace = noisy.variance(weights).mean() / weights.mean() ** 2
    assert abs(float(found.trace.mean()) / trace - 1) < 0.03 and abs(float(found.signal.mean()) / noisy.signal - 1) < 0.03


def test_a_part_that_has_all_the_weight_is_not_a_measurement():
    noisy = Noisy(np.array([3, 4, 0, 0]), 4)
    data = jax.tree.map(lambda leaf: leaf.reshape(16, *leaf.shape[2:]), noisy.batches)
    task = jb.Task(lambda key: THETA, Noisy.loss_fn, None, data, None)
    step = jb.make_train_step(Noisy.loss_fn, optax.sgd(0.0), 4, microbatch_size=2, monitor=jb.NoiseMonitor())
    (_, (_, noise)) = step(jb.init_state(task, optax.sgd(0.0), 0), jax.tree.map(lambda leaf: leaf[0], noisy.batches))
    assert not noise.measured and np.isfinite([noise.signal, noise.trace]).all()


def test_durations_in_tokens(tmp_path):
    loss_fn, _, params, data = make_weighted(SIZE, np.float32)
    task = jb.Task(lambda key: params, loss_fn, None, data, None, tokens_per_example=6)
    for amount, batches in ((1, 1), (24, 1), (25, 2), (60, 3), (61, 3), (121, 6)):  # 4 examples of 6 tokens a batch, 2 batches an epoch
        *_, record = jb.fit(task, jb.FitConfig(optax.sgd(0.0), 4, jb.tokens(amount)))
        assert (record["batches"], record["tokens"]) == (batches, batches * 24)
    *_, record = jb.fit_with_checkpoints(task, jb.FitConfig(optax.sgd(0.0), 4, jb.tokens(61)), tmp_path)
    assert (record["batches"], record["tokens"]) == (3, 72)
    *_, record = jb.sweep(task, optax.sgd, jnp.zeros(2), [0, 1], batch_size=4, duration=jb.tokens(61))
    assert (record["batches"], record["tokens"]) == (3, 72)
    assert jb.num_steps(jb.tokens(10**15 + 1), num_examples=10, batch_size=1, tokens_per_example=10**3) == 10**12 + 1
    with pytest.raises(ValueError, match=r"duration=tokens\(24\) with tokens_per_example=None: give the number of tokens of an example"):
        next(jb.fit(task._replace(tokens_per_example=None), jb.FitConfig(optax.sgd(0.0), 4, jb.tokens(24))))
    with pytest.raises(ValueError, match="tokens_per_example=None"):
        jb.num_steps(jb.tokens(1), num_examples=10, batch_size=4)
    (record,) = jb.fit(task._replace(tokens_per_example=None), jb.FitConfig(optax.sgd(0.0), 4))
    assert "tokens" not in record
