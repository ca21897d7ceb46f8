"""Steps, epochs, fit: against plain loops; divergence is a record; a run can go on where another ended."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import jaxbatch as jb
from jaxbatch.training.divergence import first_nonfinite
from tests.conftest import make_problem
from tests.gradients.test_gradients import assert_close
from tests.reference import plan_segments


@pytest.fixture
def task(problem):
    loss_fn, params, batch = problem

    def metrics_fn(params, batch):
        losses = loss_fn(params, batch)
        return {"loss": losses, "accuracy": (losses < 3).astype(jnp.float32)}

    def init(key):
        return jax.tree.map(lambda leaf: 0.3 * jax.random.normal(key, leaf.shape), params)

    return jb.Task(init, loss_fn, metrics_fn, batch, jax.tree.map(lambda leaf: leaf[:7], batch))


def strip(record):
    return {key: value for key, value in record.items() if "seconds" not in key and key != "state"}


@pytest.mark.parametrize(("num_groups", "microbatch_size"), [(None, None), (None, 3), (4, None), (4, 1)])
def test_fit_equals_a_python_loop(task, num_groups, microbatch_size):
    optimizer = optax.sgd(0.01, 0.9)
    config = jb.FitConfig(optimizer, batch_size=8, duration=jb.epochs(2), num_groups=num_groups, seed=5)
    records = list(jb.fit(task._replace(microbatch_size=microbatch_size), config))
    state = jb.init_state(task, optimizer, 5)
    step = jb.split_backward(task.loss_fn, optimizer, num_groups or 1)
    params, opt_state, seen = state.params, state.opt_state, []
    for epoch in range(2):
        for index in jb.epoch_batches(5, epoch, 24, 8).indices:
            params, opt_state, losses = step(params, opt_state, jax.tree.map(lambda leaf: leaf[index], task.train_data))
            seen.append(float(losses.mean()))
    assert_close(records[-1]["state"].params, params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose([r["loss"] for r in records], np.reshape(seen, (2, 3)).mean(1), rtol=1e-5)
    assert [r["batches"] for r in records] == [3, 6]
    assert [r["updates"] for r in records] == [3 * (num_groups or 1), 6 * (num_groups or 1)]
    assert [r["examples"] for r in records] == [24, 48]
    assert not any(r["diverged"] for r in records)


def test_fit_ends_within_an_epoch(task):
    config = jb.FitConfig(optax.sgd(0.01), batch_size=8, duration=jb.steps(4))
    records = list(jb.fit(task, config))
    assert [r["batches"] for r in records] == [3, 4]
    assert records[-1]["epoch"] == pytest.approx(4 / 3)


@pytest.mark.parametrize("num_groups", [None, 2])
def test_fit_goes_on_bit_exactly(task, num_groups):
    def run(duration, state=None):
        config = jb.FitConfig(optax.adam(0.01), 8, duration, num_groups=num_groups, seed=2)
        return list(jb.fit(task, config, state=state))

    whole = run(jb.steps(8))
    part = run(jb.steps(4))
    rest = run(jb.steps(8), part[-1]["state"])
    assert strip(rest[-1]) | {"loss": 0} == strip(whole[-1]) | {"loss": 0}
    jax.tree.map(np.testing.assert_array_equal, rest[-1]["state"], whole[-1]["state"])


def test_yielded_states_stay_usable(task):
    # The compiled epoch reuses its input's memory; what was yielded must not be what it reuses.
    states = [record["state"] for record in jb.fit(task, jb.FitConfig(optax.sgd(0.01), 8, jb.epochs(3)))]
    assert len({float(state.params["out"][0, 0]) for state in states}) == 3


def test_track_passes_the_records_on_and_shows_where_it_stands(task):
    out = io.StringIO()
    config = jb.FitConfig(optax.sgd(0.01), 8, jb.epochs(3))
    console = Console(file=out, force_terminal=True, width=100)
    records = list(jb.track(jb.fit(task, config), console))
    assert [r["batches"] for r in records] == [3, 6, 9] and records[-1]["total_batches"] == 9
    assert "100%" in out.getvalue() and "examples/s" in out.getvalue()


def test_divergence_is_a_record(task):
    records = list(jb.fit(task, jb.FitConfig(optax.sgd(1e20), 8, jb.epochs(50))))
    assert records[-1]["diverged"] and len(records) < 50
    assert 0 < records[-1]["diverged_at_batch"] < records[-1]["batches"]
    assert not any(r["diverged"] for r in records[:-1])


def test_nan_in_the_data_is_divergence_at_its_batch(task):
    index = int(jb.epoch_order(0, 0, 24)[10])  # in batch 1 of the first epoch
    data = {"x": task.train_data["x"].at[index].set(jnp.nan), "y": task.train_data["y"]}
    (record,) = jb.fit(task._replace(train_data=data), jb.FitConfig(optax.sgd(0.01), 8, jb.epochs(3)))
    assert record["diverged_at_batch"] == 1


def test_first_nonfinite():
    assert first_nonfinite(jnp.array([1.0, 2.0])) is None
    assert first_nonfinite(jnp.array([1.0, -jnp.inf])) == 1


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_evaluate_counts_every_example_once(task, batch_size):
    params = jax.jit(task.init)(jax.random.key(0))
    evaluate = jb.make_evaluate(task.metrics_fn, 7, batch_size)
    expected = task.metrics_fn(params, task.test_data)
    for name, value in evaluate(params, task.test_data).items():
        np.testing.assert_allclose(value, expected[name].mean(), rtol=1e-5)


def test_step_refuses_another_batch_size(problem):
    loss_fn, params, batch = problem
    step = jb.make_train_step(loss_fn, optax.sgd(0.1), 12)
    state = jb.TrainState(params, optax.sgd(0.1).init(params), jnp.zeros((), jnp.int32))
    with pytest.raises(ValueError, match="batch_size=12 .* 24"):
        step(state, batch)
    with pytest.raises(ValueError, match="batch_size=0"):
        jb.make_train_step(loss_fn, optax.sgd(0.1), 0)


def test_batch_larger_than_the_data(task):
    with pytest.raises(ValueError, match="batch_size=25 .*num_examples=24"):
        list(jb.fit(task, jb.FitConfig(optax.sgd(0.1), 25)))


def test_seeds_decide_everything(task):
    def end(seed):
        *_, last = jb.fit(task, jb.FitConfig(optax.sgd(0.01), 8, jb.epochs(1), seed=seed))
        return strip(last)

    assert end(0) == end(0) != end(1)


def test_simple_cnn_learns_digits():
    task = jb.classification_task(jb.SimpleCNN(), jb.load_dataset("digits"))
    *_, last = jb.fit(task, jb.FitConfig(optax.sgd(0.05, 0.5), 32, jb.epochs(8)))
    assert last["test_accuracy"] > 0.9


def test_losses_and_metrics():
    logits = jnp.array([[2.0, 1.0], [0.0, jnp.nan]])
    assert jb.correct(logits, jnp.array([0, 0])).tolist() == [1.0, 0.0]
    loss_fn, params, batch = make_problem(4)
    apply = lambda p, images: images.reshape(images.shape[0], -1) @ p
    loss = jb.classification_loss(apply, mean=(0.5,), std=(0.25,))
    images = jnp.full((2, 2, 2, 1), 255, jnp.uint8)
    expected = jb.cross_entropy(jnp.full((2, 4), 2.0) @ jnp.eye(4), jnp.array([0, 1]))
    np.testing.assert_allclose(loss(jnp.eye(4), (images, jnp.array([0, 1]))), expected, rtol=1e-6)


def test_a_schedule_of_batch_sizes_equals_a_python_loop(task):
    optimizer = optax.sgd(0.01, 0.9)
    sizes = [4, 8, 8, 24]
    records = list(jb.fit(task, jb.FitConfig(optimizer, lambda epoch: sizes[epoch], jb.epochs(4), seed=5)))
    state = jb.init_state(task, optimizer, 5)
    params, opt_state = state.params, state.opt_state
    for epoch, size in enumerate(sizes):
        step = jb.split_backward(task.loss_fn, optimizer, 1)
        for index in jb.epoch_batches(5, epoch, 24, size).indices:
            params, opt_state, _ = step(params, opt_state, jax.tree.map(lambda leaf: leaf[index], task.train_data))
    assert_close(records[-1]["state"].params, params, rtol=1e-5, atol=1e-6)
    assert [r["batch_size"] for r in records] == sizes
    assert [r["batches"] for r in records] == [6, 9, 12, 13]
    assert [r["examples"] for r in records] == [24, 48, 72, 96]
    assert [r["compile_seconds"] > 0 for r in records] == [True, True, False, True]


def test_a_ladder_compiled_first_stalls_no_change(task):
    config = jb.FitConfig(optax.sgd(0.1), lambda epoch: 4 * 2**epoch, jb.epochs(3))
    first = list(jb.fit(task, config._replace(compile_first=True)))
    assert first[0]["stall_seconds"] > 0 and all(record["stall_seconds"] < 0.01 for record in first[1:])
    assert all(record["compile_seconds"] > 0 for record in first)
    assert [record["loss"] for record in first] == [record["loss"] for record in jb.fit(task, config)]


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        (jb.epochs(2.5), [(0, 0, 2, 4), (1, 0, 4, 2), (2, 0, 8, 1)]),
        (jb.steps(5), [(0, 0, 2, 4), (1, 0, 4, 1)]),
        (jb.examples(9), [(0, 0, 2, 4), (1, 0, 4, 1)]),
        (jb.epochs(0), []),
    ],
)
def test_plans(duration, expected):
    doubling = jb.FitConfig(None, lambda epoch: 2 * 2**epoch, duration)
    assert [segment[:4] for segment in plan_segments(doubling, 8)] == expected


def test_a_schedule_goes_on_bit_exactly_from_any_record(task):
    def run(duration, state=None):
        return list(jb.fit(task, jb.FitConfig(optax.adam(0.01), lambda epoch: 4 * 2**epoch, duration, seed=2), state=state))

    whole = run(jb.epochs(3))
    for part in (run(jb.steps(3)), run(jb.epochs(1)), run(jb.steps(8))):
        rest = run(jb.epochs(3), part[-1]["state"])
        assert strip(rest[-1]) | {"loss": 0} == strip(whole[-1]) | {"loss": 0}
        jax.tree.map(np.testing.assert_array_equal, rest[-1]["state"], whole[-1]["state"])
