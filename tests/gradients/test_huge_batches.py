"""Batches that no memory holds: examples are taken part by part, with the same bits, in the memory of a part."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.advice.memory_plan import memory_plan
from jaxbatch.augment import crop_and_flip
from jaxbatch.gradients.part_norms import NoiseMonitor
from jaxbatch.sums import Weighted
from jaxbatch.training import monitor, sweeps
from jaxbatch.training.cut import choose_cut
from jaxbatch.training.epochs import compile_task_epoch
from jaxbatch.training.step_programs import step_programs
from jaxbatch.training.train_state import start_shapes
from tests.gradients.test_moments import batch_norm_task

EXAMPLES, SIDE = 48, 8
OPTIMIZER = optax.sgd(0.1, 0.9)


def image_task(num_examples=EXAMPLES, **changes):
    """A small MLP on random images, no part of which is chosen for the cache."""
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (num_examples, SIDE, SIDE, 1), dtype=np.uint8), random.integers(0, 3, num_examples).astype(np.int32)
    dataset = jb.Dataset("random", images, labels, images[:9], labels[:9], 3, (0.5,), (0.25,))
    return jb.classification_task(jb.MLP(features=(16,)), dataset)._replace(**{"cpu_microbatch_size": None, **changes})


def weighted(task):
    """The losses with weights from the images."""
    loss_fn = lambda params, batch: Weighted(task.loss_fn(params, batch) * batch[0][:, 0, 0, 0], batch[0][:, 0, 0, 0].astype(jnp.float32))
    return task._replace(loss_fn=loss_fn, metrics_fn=None, test_data=None)


augmented = lambda task: task._replace(prepare=lambda keys, batch: (crop_and_flip(keys, batch[0], padding=2), batch[1]))
coupled = lambda task: task._replace(prepare=lambda keys, batch: (batch[0] - batch[0].mean(0, keepdims=True), batch[1]))
CASES = {
    "equal parts": (image_task, {"microbatch_size": 4}),
    "a last part that is not full": (image_task, {"microbatch_size": 7, "batch_size": 17}),
    "groups": (image_task, {"num_groups": 3}),
    "groups in parts": (image_task, {"num_groups": 3, "microbatch_size": 3}),
    "augmented": (lambda: augmented(image_task()), {"microbatch_size": 4}),
    "augmented groups": (lambda: augmented(image_task()), {"num_groups": 2}),
    "weighted": (lambda: weighted(image_task()), {"microbatch_size": 5}),
    "noise": (image_task, {"microbatch_size": 4, "monitor": NoiseMonitor()}),
    "noise now and then": (image_task, {"monitor": NoiseMonitor(every=2, parts=4)}),
    "moments of parts": (lambda: batch_norm_task()._replace(microbatch_size=4), {"batch_size": 12}),
    "moments of groups in parts": (batch_norm_task, {"num_groups": 3, "microbatch_size": 2, "batch_size": 12}),
}
in_a_loop = lambda *arguments, **settings: choose_cut(*arguments, **settings | {"may_piece": False})  # also where loops are slow here
whole = lambda *arguments, **settings: in_a_loop(*arguments, **settings)._replace(by_part=False)
QUICK = ("a last part that is not full", "groups", "weighted")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_examples_by_part_are_the_bits_of_the_whole_batch(name, monkeypatch):
    make, changes = CASES[name]
    config = jb.FitConfig(OPTIMIZER, 24, jb.epochs(2), seed=3)._replace(**changes)
    asked = []

    def by_part(*arguments, **settings):
        cut = in_a_loop(*arguments, **settings)
        asked.append(cut.by_part)
        return cut

    found = []
    for choice in (by_part, whole):
        monkeypatch.setattr(monitor, "choose_cut", choice)
        records = list(jb.fit(make(), config))
        found.append([{key: value for key, value in record.items() if not key.endswith("seconds")} for record in records])
    assert all(asked)
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize("runs", ["threads", pytest.param("vmap", marks=pytest.mark.slow)])
def test_a_sweep_takes_its_examples_by_part(runs, monkeypatch):
    task, found = augmented(image_task(microbatch_size=4)), []
    for choice in (choose_cut, whole):
        monkeypatch.setattr(sweeps, "choose_cut", choice)
        settings = {"batch_size": 24, "duration": jb.steps(2), "runs": runs}
        (record,) = jb.sweep(task, optax.sgd, jnp.array([0.1, 0.2]), [0, 1], **settings)
        found.append((record["state"].params, record["loss"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), *found)


def test_a_batch_larger_than_the_data_against_a_loop_over_parts():
    """Indices may repeat, so a batch may hold the data set many times; the sum over all of them, in float64."""
    task = image_task(microbatch_size=10)
    indices = np.random.default_rng(1).integers(0, EXAMPLES, (1, 5 * EXAMPLES + 3)).astype(np.int32)
    start = jb.init_state(task, OPTIMIZER, 0)
    run = compile_task_epoch(task, OPTIMIZER, start, 1, indices.size)
    state, (loss,) = run(jax.tree.map(jnp.copy, start), task.train_data, indices)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), start.params)
        one = jax.value_and_grad(lambda p, n: task.loss_fn(p, jax.tree.map(lambda leaf: leaf[n][None], task.train_data))[0])
        parts = jax.vmap(one, (None, 0))(params, jnp.asarray(indices[0]))
        expected, gradient = jax.tree.map(lambda leaf: leaf.mean(0), parts)
        after = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, after)


def test_a_prepare_that_couples_examples_sees_its_batch_whole():
    task = image_task(microbatch_size=4)
    ask = lambda task, size, **settings: choose_cut(task, start_shapes(task), size, may_piece=False, **settings).by_part
    assert ask(task, 24) and ask(augmented(task), 24) and not ask(coupled(task), 24)
    assert not ask(task, 4) and ask(task, 4, num_groups=2) and not ask(task, 8, num_devices=2) and ask(task, 4, monitor=NoiseMonitor(every=2))
    assert ask(batch_norm_task()._replace(microbatch_size=2), 12, num_groups=3) and not ask(batch_norm_task(), 12, num_groups=3)  # unrolled groups
    assert not ask(task, 24, num_groups=24)  # examples side by side
    *_, cut = jb.fit(coupled(task), jb.FitConfig(OPTIMIZER, 24, jb.epochs(2)))
    *_, whole = jb.fit(coupled(image_task()), jb.FitConfig(OPTIMIZER, 24, jb.epochs(2)))
    np.testing.assert_allclose(cut["loss"], whole["loss"], rtol=1e-5)


def only_shapes(task, num_examples):
    """The task with shapes of so many examples in place of data."""
    shape = lambda leaf: jax.ShapeDtypeStruct((num_examples, *leaf.shape[1:]), leaf.dtype)
    return task._replace(train_data=jax.tree.map(shape, task.train_data))


def temporary_bytes(task, batch_size, **settings):
    """The compiler's temporaries of a step, which are on one device or on none."""
    (program,) = step_programs(only_shapes(task, 2**17), OPTIMIZER, batch_size, **settings)
    compiled = jax.jit(program.layout.function, donate_argnums=0).lower(*program.layout.arguments.values()).compile()
    return compiled.memory_analysis().temp_size_in_bytes


INDICES = 16  # bytes an example: its index, its loss, and a copy of it where parts are joined


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (image_task, {"microbatch_size": 64}),
        pytest.param(image_task, {"microbatch_size": 256}, marks=pytest.mark.slow),
        (image_task, {"num_groups": 1024}),
        pytest.param(lambda: weighted(image_task()), {"microbatch_size": 64}, marks=pytest.mark.slow),
        pytest.param(lambda: augmented(image_task()), {"microbatch_size": 64}, marks=pytest.mark.slow),
    ],
)
def test_memory_does_not_grow_with_the_batch(make, settings, optimized):
    task = make()
    small, large = (temporary_bytes(task, size, **settings) for size in (2**12, 2**16))
    per_example = INDICES + 8 * (task.metrics_fn is None)  # with weights, two numbers for each loss
    assert large - small <= per_example * (2**16 - 2**12)
    assert per_example < SIDE * SIDE // 2  # an image that stayed would be seen


def test_what_needs_the_whole_batch_grows_with_it(optimized):
    """The test above can fail: with a coupled ``prepare`` the images stay, and as float32."""
    task = coupled(image_task())
    small, large = (temporary_bytes(task, size, microbatch_size=64) for size in (2**12, 2**16))
    assert large - small >= SIDE * SIDE * (2**16 - 2**12)


def test_the_moments_of_parts_are_not_kept(optimized):
    """Each part's moments change the running ones at once; kept, those of 4,096 parts would be many times these bytes."""
    task = image_task(microbatch_size=4, update_model_state=lambda state, aux: 0.9 * state + aux)
    start = task.init
    task = task._replace(loss_fn=wide_aux(task.loss_fn), init=lambda key: (start(key), jnp.zeros(WIDE)))
    few, many = (temporary_bytes(task, size) for size in (64, 2**14))
    assert many - few <= INDICES * 2**14
    assert 4 * WIDE * 2**12 > 8 * INDICES * 2**14


WIDE = 1024


def wide_aux(loss_fn):
    def with_aux(params, batch):
        losses = loss_fn(params, batch)
        return losses, losses.sum() * jnp.ones(WIDE)

    return with_aux


def test_a_plan_for_a_million_images_in_a_budget():
    """The data set's million images are 784 MB of its budget of 900 MB; a batch of all of them fits beside it."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (4, 28, 28, 1), dtype=np.uint8)
    dataset = jb.Dataset("random", images, np.arange(4, dtype=np.int32), images, np.arange(4, dtype=np.int32), 10, (0.5,), (0.25,))
    task = only_shapes(jb.classification_task(jb.MLP(), dataset), 10**6)._replace(cpu_microbatch_size=None)
    plan = memory_plan(task, optimizer=OPTIMIZER, batch_size=10**6, target="cpu", budget=9e8, margin=0)
    assert plan.chosen.keep == "everything" and plan.chosen.microbatch_size >= 500
    again = jb.memory_profile(task, [10**6], optimizer=OPTIMIZER, target="cpu", microbatch_size=plan.chosen.microbatch_size)[10**6]
    assert again.total == plan.chosen.memory.total <= plan.limit
    assert again.data > 788 * 10**6
