"""Epochs as one program and as a Python loop, evaluation of either kind, programs compiled ahead and kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.gradients.cut import Cut
from jaxbatch.training import evaluation, loops, run_programs
from jaxbatch.training.devices import AXIS, put_once
from jaxbatch.training.layouts import lay_out_step
from jaxbatch.training.loops import compile_epoch, compile_epoch_in_pieces
from tests.conftest import make_problem
from tests.gradients.test_gradients import assert_close
from tests.gradients.test_moments import batch_norm_task


def convolution_task(num_examples=24, side=6):
    """A small network on XLA's own convolution, as a user would write it."""
    random = np.random.default_rng(0)
    data = (
        jnp.asarray(random.normal(size=(num_examples, side, side, 2)), jnp.float32),
        jnp.asarray(random.integers(0, 3, num_examples), jnp.int32),
    )

    def init(key):
        return {"conv": 0.3 * jax.random.normal(key, (3, 3, 2, 4)), "out": 0.3 * jax.random.normal(key, (4, 3))}

    def logits(params, images):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(images, params["conv"], (1, 1), "SAME", dimension_numbers=numbers)
        return jnp.tanh(x).mean((1, 2)) @ params["out"]

    def loss_fn(params, batch):
        return jb.cross_entropy(logits(params, batch[0]), batch[1])

    def metrics_fn(params, batch):
        out = logits(params, batch[0])
        return {"loss": jb.cross_entropy(out, batch[1]), "accuracy": jb.correct(out, batch[1])}

    return jb.Task(init, loss_fn, metrics_fn, data, jax.tree.map(lambda leaf: leaf[:7], data))


def test_a_network_on_xla_s_convolutions_is_looped_in_python_on_cpu():
    ours, theirs = jb.classification_task(jb.SimpleCNN(), jb.load_dataset("digits")), convolution_task()
    for task, expected in ((ours, "scan"), (theirs, "python" if jax.default_backend() == "cpu" else "scan")):
        step = jb.make_train_step(task.loss_fn, optax.sgd(0.1), 8)
        laid = lay_out_step(step, jb.init_state(task, optax.sgd(0.1), 0), task.train_data, Cut(8))
        assert loops.choose_loop(laid, jax.devices()[:1], "jit") == expected


@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_both_loops_give_the_same_epoch(microbatch_size):
    task, optimizer = convolution_task(), optax.sgd(0.1, 0.9)
    step = jb.make_train_step(task.loss_fn, optimizer, 8, microbatch_size=microbatch_size)
    indices = np.asarray(jb.epoch_batches(0, 0, 24, 8).indices)
    results = []
    for loop in ("scan", "python"):
        state = jb.init_state(task, optimizer, 3)
        run = loops.compile_epoch(step, state, task.train_data, 3, 8, loop=loop)
        results.append(run(state, task.train_data, indices))
    assert_close(results[0][0].params, results[1][0].params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5)
    assert results[1][0].step == 3


def test_unknown_loop():
    with pytest.raises(ValueError, match="loop='fast'"):
        loops.compile_epoch(lambda s, b: (s, b), jnp.zeros(()), jnp.zeros((4,)), 1, 2, loop="fast")


@pytest.mark.parametrize("batch_size", [2, 7, 50])
def test_evaluation_without_a_compiled_loop(batch_size):
    task = convolution_task()
    params = jax.jit(task.init)(jax.random.key(0))
    found = jb.make_evaluate(task.metrics_fn, 7, batch_size)(params, task.test_data)
    for name, expected in task.metrics_fn(params, task.test_data).items():
        np.testing.assert_allclose(found[name], expected.mean(), rtol=1e-5)


@pytest.mark.parametrize("num_groups", [1, 3, 8])
def test_groups_of_a_convolution_are_unrolled_and_exact(num_groups):
    task = convolution_task()
    params = jax.jit(task.init)(jax.random.key(1))
    text = str(jax.make_jaxpr(lambda p: jb.group_gradients(task.loss_fn, p, task.train_data, num_groups))(params))
    if jax.default_backend() == "cpu":
        assert "scan" not in text
    gradients = jb.group_gradients(task.loss_fn, params, task.train_data, num_groups)
    mean = jax.grad(lambda p: task.loss_fn(p, task.train_data).mean())(params)
    assert_close(jax.tree.map(lambda leaf: leaf.mean(0), gradients), mean, rtol=1e-5, atol=1e-7)
    split = jb.split_backward(task.loss_fn, optax.sgd(0.1), num_groups)
    moved, _, _ = split(params, optax.sgd(0.1).init(params), task.train_data)
    assert_close(moved, jax.tree.map(lambda p, g: p - 0.1 * num_groups * g, params, mean), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("microbatch_size", [1, 5, 8, 24])
def test_accumulation_over_convolutions(microbatch_size, monkeypatch):
    task = convolution_task()
    params = jax.jit(task.init)(jax.random.key(2))
    expected = jax.grad(lambda p: task.loss_fn(p, task.train_data).mean())(params)
    eager = jb.accumulated_gradient(task.loss_fn, params, task.train_data, microbatch_size)
    jitted = jax.jit(lambda p: jb.accumulated_gradient(task.loss_fn, p, task.train_data, microbatch_size))(params)
    for found in (eager, jitted):
        assert_close(found, expected, rtol=1e-5, atol=1e-7)
    if jax.default_backend() == "cpu":  # outside jit there is no compiled loop
        monkeypatch.setattr(jax.lax, "scan", None)
        jb.accumulated_gradient(task.loss_fn, params, task.train_data, microbatch_size)


def test_accumulation_with_a_loss_function_without_a_hash():
    task = convolution_task()
    params = jax.jit(task.init)(jax.random.key(2))

    class Loss:
        __hash__ = None

        def __call__(self, params, batch):
            return task.loss_fn(params, batch)

    found = jb.accumulated_gradient(Loss(), params, task.train_data, 8)
    assert_close(found, jb.accumulated_gradient(task.loss_fn, params, task.train_data, 8), rtol=1e-6, atol=1e-8)


def test_evaluation_finds_out_once_how_to_loop(monkeypatch):
    task, calls = convolution_task(), []
    found_out = evaluation.loops_are_slow
    monkeypatch.setattr(evaluation, "loops_are_slow", lambda *arguments: calls.append(1) or found_out(*arguments))
    evaluate = jb.make_evaluate(task.metrics_fn, 7, 4)
    for seed in range(3):
        evaluate(jax.jit(task.init)(jax.random.key(seed)), task.test_data)
    assert len(calls) == 1


def test_a_problem_without_convolutions_keeps_its_loop():
    loss_fn, params, batch = make_problem(8)
    text = str(jax.make_jaxpr(lambda p: jb.group_gradients(loss_fn, p, batch, 4))(params))
    assert ("scan" in text) == (jax.default_backend() == "cpu")


@pytest.mark.parametrize("batch_size", [12, 10])  # microbatches of 4, and 4, 4, 2
@pytest.mark.parametrize("prepared", [False, True])
def test_accumulation_over_a_python_loop_is_the_large_batch(batch_size, prepared):
    task, optimizer = convolution_task(), optax.sgd(0.1, 0.9)
    if prepared:
        noise = lambda key: jax.random.normal(key, (6, 6, 2))
        task = task._replace(prepare=lambda keys, batch: (batch[0] + jax.vmap(noise)(keys), batch[1]))
    config = jb.FitConfig(optimizer, batch_size, jb.epochs(2), seed=1)
    whole = list(jb.fit(task, config))
    parts = list(jb.fit(task, config._replace(microbatch_size=4)))
    for mine, theirs in zip(parts, whole, strict=True):
        np.testing.assert_allclose(mine["loss"], theirs["loss"], rtol=1e-5)
        assert mine["updates"] == theirs["updates"]
    assert_close(parts[-1]["state"].params, whole[-1]["state"].params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["scan", "python"])
def test_accumulation_with_running_moments(way):
    task, optimizer = batch_norm_task(), optax.sgd(0.1, 0.9)
    state = jb.init_state(task, optimizer, 0)
    indices = np.asarray(jb.epoch_batches(0, 0, 24, 12).indices)
    if way == "scan":
        step = jb.make_train_step(task.loss_fn, optimizer, 12, microbatch_size=4, update_model_state=task.update_model_state)
        run = loops.compile_epoch(step, state, task.train_data, 2, 12)
    else:
        run = compile_epoch_in_pieces(task, optimizer, state, Cut(12, microbatch_size=4))
    found, losses = run(jax.tree.map(jnp.copy, state), task.train_data, indices)
    expected = state
    for index, loss in zip(indices, losses, strict=True):  # moments of each 4 examples, as a loop spells it out
        total, model_state, seen = None, expected.model_state, 0.0
        for part in np.split(index, 3):
            batch = jax.tree.map(lambda leaf: leaf[part], task.train_data)
            value = lambda p: (lambda losses, aux: (losses.mean(), aux))(*task.loss_fn(p, batch))
            (mean, aux), gradient = jax.value_and_grad(value, has_aux=True)(expected.params)
            model_state, seen = task.update_model_state(model_state, aux), seen + mean / 3
            total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
        updates, opt_state = optimizer.update(jax.tree.map(lambda g: g / 3, total), expected.opt_state, expected.params)
        expected = jb.TrainState(optax.apply_updates(expected.params, updates), opt_state, expected.step + 1, model_state)
        np.testing.assert_allclose(loss, seen, rtol=1e-5)
    assert_close(found.params, expected.params, rtol=1e-4, atol=1e-6)
    assert_close(found.model_state, expected.model_state, rtol=1e-4, atol=1e-6)


def changed_losses(kind, num_devices):
    """The losses of two epochs between which the data are changed: in place, by another array in the same list, or not at all."""
    data = [np.arange(4.0, dtype=np.float32)] if kind == "numpy" else [jnp.arange(4.0)]
    step = jb.make_train_step(lambda w, batch: (batch[0] - w) ** 2, optax.sgd(0.0), 4, axis=AXIS if num_devices > 1 else None)
    start = lambda: jb.TrainState(jnp.array(0.0), optax.sgd(0.0).init(0.0), jnp.array(0))
    run = compile_epoch(step, start(), data, 1, 4, devices=jax.devices()[:num_devices])
    losses = []
    for _ in range(2):
        losses.append(float(run(start(), data, np.arange(4)[None])[1][0]))
        if kind == "numpy":
            data[0] += 10
        elif kind == "list":
            data[0] = data[0] + 10
    return losses


def test_data_that_were_changed_since_the_last_call_are_the_new_ones():  # on several devices: test_parallel.py
    assert changed_losses("numpy", 1) == changed_losses("list", 1) == [3.5, 133.5]


def test_arrays_of_jax_are_moved_to_the_devices_once():
    puts = []
    once = put_once(lambda tree: puts.append(0) or jax.device_put(tree))
    data = (jnp.ones(2), jnp.zeros(2))
    assert once(data) is once((data[0], data[1])) and len(puts) == 1
    for other in ((data[1], data[0]), [data[0], data[1]], (data[0],), (data[0], np.zeros(2)), (data[0], np.zeros(2)), data):
        once(other)
    assert len(puts) == 7


def test_a_run_moves_data_of_the_host_to_the_device_once(monkeypatch):
    trained, tested, compiled, make_test = [], [], run_programs.compile_task_epoch, run_programs.make_test
    look = lambda run, seen, number: lambda *given: seen.append(given[number]) or run(*given)
    monkeypatch.setattr(run_programs, "compile_task_epoch", lambda *given, **settings: look(compiled(*given, **settings), trained, 1))
    monkeypatch.setattr(run_programs, "make_test", lambda *given: look(make_test(*given), tested, 0))
    loss_fn, x = lambda w, x: (x - w) ** 2, np.arange(8.0, dtype=np.float32)
    task = jb.Task(lambda key: jnp.zeros(()), loss_fn, lambda w, x: {"loss": loss_fn(w, x)}, x, x)
    assert len(list(jb.fit(task, jb.FitConfig(optax.sgd(0.1), 2, jb.epochs(2), evaluations_per_epoch=2)))) == 4
    for seen in (trained, tested):
        assert len(seen) == 4 and all(isinstance(one, jax.Array) and one is seen[0] for one in seen)
