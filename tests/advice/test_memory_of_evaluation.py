"""Evaluation obeys the bound of training, and counts in every number of memory, as do the test set and the record that is held."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbatch as jb
from jaxbatch.advice.memory_parts import ORDER_BYTES
from jaxbatch.training import run_programs
from jaxbatch.training.cut import choose_evaluation_size
from jaxbatch.training.evaluation import lay_out_evaluation
from jaxbatch.training.train_state import init_state, state_shapes

SGD, MIB = optax.sgd(0.1), 2**20
WIDTH = 2**16  # numbers that the evaluation of an example holds: 256 KiB


def wide_task(num_test=1000, metrics=True, **settings):
    """A task of few parameters whose metrics need far more memory than its steps."""
    loss_fn = lambda w, x: ((x - w[None]) ** 2).sum(-1)

    def metrics_fn(w, x):
        wide = jnp.sin(x[:, :1] * jnp.arange(WIDTH, dtype=jnp.float32)[None])
        return {"loss": loss_fn(w, x), "wide": jnp.sort(wide, 1)[:, 0]}

    data = jax.ShapeDtypeStruct((2000, 8), jnp.float32)
    test = jax.ShapeDtypeStruct((num_test, 8), jnp.float32)
    return jb.Task(lambda key: jnp.zeros(8), loss_fn, metrics_fn if metrics else None, data, test, **settings)


def test_what_lies_on_the_device_while_fit_runs_is_what_was_counted(monkeypatch):
    """Two states from the second record on: the loop holds one, and fit trains a copy."""
    loss_fn = lambda w, x: (x @ w).sum(-1) ** 2
    data, test = jnp.ones((64, 20)), jnp.ones((80, 20))
    task, optimizer = jb.Task(lambda key: jnp.ones((20, 3000)), loss_fn, lambda w, x: {"loss": loss_fn(w, x)}, data, test), optax.adam(1e-3)
    memory = jb.memory_profile(task, [16], optimizer=optimizer, target="cpu")[16]
    others, seen = sum(array.nbytes for array in jax.live_arrays()) - data.nbytes - test.nbytes, []
    make_test, compile_task_epoch = run_programs.make_test, run_programs.compile_task_epoch

    def looking(made):
        def look_and_call(*arguments):
            seen.append(sum(array.nbytes for array in jax.live_arrays()) - others)
            return made(*arguments)

        return look_and_call

    monkeypatch.setattr(run_programs, "make_test", lambda *given: looking(make_test(*given)))
    monkeypatch.setattr(run_programs, "compile_task_epoch", lambda *given, **settings: looking(compile_task_epoch(*given, **settings)))
    for record in jb.fit(task, jb.FitConfig(optimizer, 16, jb.epochs(3))):
        assert record["loss"] > 0
    assert len(seen) == 6 and max(seen) == pytest.approx(memory.kept, rel=0.002)  # losses and keys are some bytes


def test_evaluation_is_counted_and_named():
    task = wide_task()
    memory = jb.memory_profile(task, [8], optimizer=SGD, target="cpu")[8]
    assert memory.evaluation_batch_size == 500 and memory.total == memory.evaluation > 500 * 4 * WIDTH > memory.step
    with pytest.raises(ValueError, match=r"^evaluating 500 test examples at a time needs .* missing.*evaluation_batch_size, here .*and in FitConfig"):
        jb.max_batch_size(task, optimizer=SGD, target="cpu", budget="64MiB")
    assert jb.max_batch_size(task, optimizer=SGD, target="cpu", budget="64MiB", evaluation_batch_size=8) > 8


def test_a_bound_of_training_bounds_evaluation():
    small, large = (
        jb.memory_profile(wide_task(microbatch_size=bound), [600], optimizer=SGD, target="cpu", **more)[600]
        for bound, more in ((8, {}), (None, {"microbatch_size": 16}))
    )
    assert (small.evaluation_batch_size, large.evaluation_batch_size) == (8, 16)
    assert small.evaluation < large.evaluation < 64 * MIB


def seen_sizes(run):
    """The numbers of examples that metrics were traced with in a run of a task made by ``run(metrics_fn's wrapper)``."""
    sizes = []

    def watched(metrics_fn):
        def with_size(params, batch):
            sizes.append(len(batch))
            return metrics_fn(params, batch)

        return with_size

    run(watched)
    return set(sizes)


def small_task(watched, **settings):
    loss_fn = lambda w, x: (x - w) ** 2
    data = jnp.arange(1200.0) / 1200
    return jb.Task(lambda key: jnp.zeros(()), loss_fn, watched(lambda w, x: {"loss": loss_fn(w, x)}), data, data, **settings)


ONE_STEP = jb.FitConfig(SGD, 4, jb.steps(1))


@pytest.mark.parametrize(
    ("task", "config", "size"),
    [
        ({}, {}, 500),
        ({"microbatch_size": 8}, {}, 8),
        ({"microbatch_size": 8}, {"microbatch_size": 4}, 4),
        ({"cpu_microbatch_size": 16}, {}, 16),
        ({"microbatch_size": 8}, {"evaluation_batch_size": 100}, 100),
    ],
)
def test_fit_evaluates_as_many_as_were_counted(task, config, size):
    assert seen_sizes(lambda watched: list(jb.fit(small_task(watched, **task), ONE_STEP._replace(**config)))) == {size}
    memory = jb.memory_profile(small_task(lambda metrics_fn: metrics_fn, **task), [4], optimizer=SGD, target="cpu", **config)[4]
    assert memory.evaluation_batch_size == size


@pytest.mark.parametrize(("runs", "size"), [("vmap", 50), ("map", 500), ("threads", None)])
def test_the_runs_of_a_sweep_share_the_examples(runs, size):
    from jaxbatch.machine.cores import num_cores

    rates, seeds = jnp.linspace(0, 0.5, 10), list(range(10))
    sweep = lambda **bounds: (
        lambda watched: list(jb.sweep(small_task(watched, **bounds), optax.sgd, rates, seeds, batch_size=4, duration=jb.steps(1), runs=runs))
    )
    assert seen_sizes(sweep()) == {size or -(-500 // min(10, num_cores()))}
    assert seen_sizes(sweep(microbatch_size=8)) == {8}


def test_branches_obey_the_bound_too():
    start = init_state(small_task(lambda metrics_fn: metrics_fn), SGD, 0)
    settings = {"learning_rate": 0.1, "batch_size": 4, "examples": 64, "factors": (1, 2), "rule": "sqrt"}
    sizes = seen_sizes(lambda watched: jb.branch(small_task(watched, microbatch_size=8), optax.sgd, start, **settings))
    assert sizes - {1} == {8}  # with one example only the metrics' names are asked for


def test_means_are_those_of_any_size():
    plain = small_task(lambda metrics_fn: metrics_fn)
    values = [next(jb.fit(plain, ONE_STEP._replace(evaluation_batch_size=size)))["test_loss"] for size in (1, 7, 500, 5000)]
    np.testing.assert_allclose(values, values[0], rtol=1e-6)


@pytest.mark.slow
def test_a_language_model_is_evaluated_in_the_memory_of_its_steps():
    """At 64 MiB a batch of such a model was said to fit, and its evaluation took 15 times as much."""
    text = jb.load_text("generated")
    task = jb.language_task(jb.TransformerLM(text.vocab_size, width=32, num_layers=1), text)
    small, large = (jb.memory_profile(task, [18], optimizer=SGD, target="cpu", evaluation_batch_size=size)[18] for size in (None, 500))
    assert small.evaluation_batch_size == 16
    assert small.total < 64 * MIB < large.total == large.evaluation


def test_the_test_set_is_counted_once():
    bytes_of_test = 8 * 4 * 10**6
    task = wide_task(10**6, metrics=False)
    assert jb.memory_profile(task, [8], optimizer=SGD, target="cpu")[8].test_data == bytes_of_test
    with pytest.raises(ValueError, match=r"already needs .* test data 30.5 MiB"):
        jb.max_batch_size(task, optimizer=SGD, target="cpu", budget="30MiB")
    same = task._replace(train_data=task.test_data)  # who tests on the training set keeps it once
    assert jb.memory_profile(same, [8], optimizer=SGD, target="cpu")[8].test_data == 0


class Stream:
    """A stream that is never read."""

    num_examples, example = 1000, jax.ShapeDtypeStruct((8,), np.float32)

    def parts(self, indices, seed_epoch=(0, 0)):
        raise AssertionError("nothing is read")


def test_a_streamed_test_set_is_there_in_parts():
    whole = jb.memory_profile(wide_task(), [8], optimizer=SGD, target="cpu", evaluation_batch_size=10)[8]
    streamed = jb.memory_profile(wide_task()._replace(test_data=Stream()), [8], optimizer=SGD, target="cpu", evaluation_batch_size=10)[8]
    assert (whole.test_data, streamed.test_data) == (1000 * 32, 0)
    assert streamed.evaluation > 10 * 4 * WIDTH


def test_the_order_of_an_epoch_is_counted():
    scalar = jax.ShapeDtypeStruct((10**7,), jnp.float32)
    task = jb.Task(lambda key: jnp.zeros(()), lambda w, x: (x - w) ** 2, None, scalar, None)
    memory = jb.memory_profile(task, [8], optimizer=SGD, target="cpu")[8]
    assert memory.total == memory.ordering > memory.step and memory.ordering >= (4 + ORDER_BYTES) * 10**7
    for call in (jb.max_batch_size, functools.partial(jb.memory_plan, batch_size=8)):
        with pytest.raises(ValueError, match=r"^drawing the order of an epoch needs .*Take a part of the data at a time"):
            call(task, optimizer=SGD, target="cpu", budget="300MB")


def test_a_monitor_counts():
    task = jb.Task(lambda key: jnp.zeros((1000, 1000)), lambda w, x: (x @ w).sum(-1), None, jax.ShapeDtypeStruct((99, 1000), jnp.float32), None)
    profiles = (jb.memory_profile(task, [32], optimizer=SGD, target="cpu", microbatch_size=8, monitor=one)[32] for one in (None, jb.NoiseMonitor()))
    plain, monitored = profiles
    assert monitored.step >= plain.step + 3 * MIB  # at least one more gradient of 4 MB


def test_a_plan_chooses_a_smaller_evaluation_and_says_so():
    settings = {"optimizer": SGD, "batch_size": 100, "target": "cpu", "margin": 0}
    plan = jb.memory_plan(wide_task(), budget="64MiB", **settings)
    assert 1 < plan.evaluation_batch_size < 500 and plan.chosen.memory.total <= plan.limit
    assert f"with evaluation_batch_size={plan.evaluation_batch_size}, because" in str(plan)
    need = lambda size: jb.memory_profile(wide_task(), [100], optimizer=SGD, target="cpu", evaluation_batch_size=size)[100].evaluation
    assert need(plan.evaluation_batch_size) <= plan.limit < need(plan.evaluation_batch_size + 1)
    roomy = jb.memory_plan(wide_task(), budget="2GiB", **settings)
    assert roomy.evaluation_batch_size is None and "evaluation_batch_size" not in str(roomy) and "an evaluation" in str(roomy)
    asked = jb.memory_plan(wide_task(), budget="2GiB", evaluation_batch_size=600, **settings)
    assert asked.evaluation_batch_size == 600 and asked.chosen.memory.evaluation == need(600)
    assert str(asked).endswith("with evaluation_batch_size=600.")
    with pytest.raises(ValueError, match="evaluating one test example at a time needs"):
        jb.memory_plan(wide_task(), budget=roomy.chosen.memory.step + 1000, **settings)


@pytest.mark.parametrize("stream", [False, True])
def test_the_program_that_is_counted_evaluates_as_fit_does(stream):
    """Its function and shapes are those of the evaluation that runs."""
    task = jb.classification_task(jb.SimpleCNN(), jb.load_dataset("digits"))
    data = Stream() if stream else task.test_data
    laid = lay_out_evaluation((lambda w, x: {"a": x[:, 0]}) if stream else task.metrics_fn, state_shapes(task, SGD).params, data, 64)
    shapes = jax.eval_shape(laid.function, *laid.arguments.values())
    assert set(shapes) == ({"a"} if stream else {"loss", "accuracy"})
    assert list(laid.arguments) == (["params", "batch", "index"] if stream else ["params", "data"])


@given(st.one_of(st.none(), st.integers(1, 700)), st.one_of(st.none(), st.integers(1, 700)), st.integers(1, 600))
@settings(max_examples=100, deadline=None)
def test_no_evaluation_exceeds_a_bound(of_task, of_run, at_once):
    size = choose_evaluation_size(wide_task()._replace(microbatch_size=of_task), of_run, at_once=at_once)
    assert 1 <= size <= min(500, of_task or 500, of_run or 500) and (size - 1) * at_once < 500
