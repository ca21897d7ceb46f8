"""The memory of a step by batch size, and the largest batch: against the compiled programs themselves, and by brute force."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbatch as jb
from jaxbatch.advice.largest_batch import LargestBatch, find_largest_batch, search_largest
from jaxbatch.advice.memory import caveats
from jaxbatch.advice.memory_parts import CPU_SCRATCH, Memory
from jaxbatch.machine.cores import num_cores
from jaxbatch.training.steps import make_task_step
from jaxbatch.training.train_state import init_state

MOMENTUM = optax.sgd(0.1, 0.9)


@pytest.fixture(scope="module")
def task():
    return jb.classification_task(jb.MLP((64,)), jb.load_dataset("digits"), microbatch_size=10**6)


def bytes_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_parts_are_those_of_the_arrays(task):
    for optimizer in (optax.sgd(0.1), MOMENTUM, optax.adam(1e-3)):
        state = init_state(task, optimizer, 0)
        memory = jb.memory_profile(task, [48], optimizer=optimizer, target="cpu")[48]
        assert memory.parameters == bytes_of(state.params)
        assert memory.optimizer_state == bytes_of(state.opt_state)
        assert memory.data == bytes_of(task.train_data) + 4 * task.num_examples  # an epoch's indices are int32
        assert (memory.test_data, memory.last_state) == (bytes_of(task.test_data), bytes_of(state))
        assert memory.step == sum(memory[1:7]) + memory.test_data + memory.last_state
        assert memory.total == max(memory.step, memory.evaluation, memory.ordering)
        assert memory.temporaries > 48 * 64 * 4  # at least the activations


def test_total_is_that_of_the_program_that_fit_runs(task):
    state, size = init_state(task, MOMENTUM, 0), 48
    step = make_task_step(task, MOMENTUM, size)

    def one(state, data, index):
        state, losses = step(state, jax.tree.map(lambda leaf: leaf[index], data))
        return state, losses.mean()

    program = jax.jit(one, donate_argnums=0).lower(state, task.train_data, jax.ShapeDtypeStruct((size,), jnp.int32)).compile()
    memory = jb.memory_profile(task, [size], optimizer=MOMENTUM, target="cpu")[size]
    own = memory.step - memory.test_data - memory.last_state - 4 * (task.num_examples - size)
    assert own - CPU_SCRATCH * num_cores() == pytest.approx(jb.program_memory(program), rel=0.01)


def test_microbatches_need_less(task):
    whole, cut = (jb.memory_profile(task, [4096], optimizer=MOMENTUM, target="cpu", microbatch_size=size)[4096].temporaries for size in (None, 64))
    scratch = CPU_SCRATCH * num_cores()
    assert cut - scratch < (whole - scratch) / 1.5


def test_groups_and_streams_are_told_too(task):
    assert jb.memory_profile(task, [40], optimizer=MOMENTUM, target="cpu", num_groups=10)[40].total > 0

    class Stream:
        num_examples, example = 100, (jax.ShapeDtypeStruct((28, 28, 1), np.uint8), jax.ShapeDtypeStruct((), np.int32))

        def parts(self, indices, seed_epoch):
            raise AssertionError("nothing is read")

    streamed = task._replace(train_data=Stream())
    large, small = (jb.memory_profile(streamed, [4096], optimizer=optax.adam(0.1), target="cpu", microbatch_size=size)[4096] for size in (None, 64))
    assert small.total < large.total
    assert small.data == 3 * 64 * (784 + 4) + 64 * 4 + 64 + 8  # parts in work and ahead, indices, mask, seed and epoch
    assert small.optimizer_state == large.optimizer_state > small.parameters
    split = jb.memory_profile(streamed, [4096], optimizer=optax.adam(0.1), target="cpu", microbatch_size=64, num_groups=4)[4096]
    assert split.total >= small.total + small.parameters  # those before the batch, and those after the first updates


def equinox_task():
    model = eqx.nn.MLP(8, 3, 16, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    loss_fn = lambda params, batch: ((jax.vmap(eqx.combine(params, static))(batch[0]) - batch[1]) ** 2).sum(-1)
    return jb.Task(lambda key: params, loss_fn, None, (jnp.ones((100, 8)), jnp.ones((100, 3))), None)


def nnx_task():
    graph, params = nnx.split(nnx.Linear(8, 3, rngs=nnx.Rngs(0)))
    loss_fn = lambda params, batch: ((nnx.merge(graph, params)(batch[0]) - batch[1]) ** 2).sum(-1)
    return jb.Task(lambda key: params, loss_fn, None, (jnp.ones((100, 8)), jnp.ones((100, 3))), None)


def bare_task():
    loss_fn = lambda w, batch: ((batch[0] @ w - batch[1]) ** 2).sum(-1)
    return jb.Task(lambda key: jnp.ones((8, 3)), loss_fn, None, (jnp.ones((100, 8)), jnp.ones((100, 3))), None)


@pytest.mark.parametrize("make", [equinox_task, nnx_task, bare_task])
def test_models_of_any_library_work_unchanged(make):
    profile = jb.memory_profile(make(), [10, 1000], optimizer=optax.adam(1e-3), target="cpu")
    assert profile[1000].total > profile[10].total
    assert profile[10].optimizer_state > 2 * profile[10].parameters - 1


def test_a_step_of_ones_own():
    step = lambda w, x: (w - 0.1 * (x.T @ (x @ w)), (x @ w).sum())
    arguments = lambda size: (jnp.ones((64, 64)), jax.ShapeDtypeStruct((size, 64), jnp.float32))
    profile = jb.memory_profile(step, [100, 10_000], arguments=arguments, donate=[0], target="cpu")
    for size, memory in profile.items():
        assert memory.data == 4 * (64 * 64 + 64 * size)
        assert memory.total >= memory.data
    largest = jb.max_batch_size(step, arguments=arguments, target="cpu", budget="128MiB", margin=0)
    both = jb.memory_profile(step, [largest, largest + 1], arguments=arguments, target="cpu")
    assert both[largest].total <= 2**27 < both[largest + 1].total


@pytest.mark.parametrize("budget", [2**27, pytest.param(2**30, marks=pytest.mark.slow)])
def test_the_largest_batch_is_that_of_bisection(task, budget):
    need = lambda size: jb.memory_profile(task, [size], optimizer=MOMENTUM, target="cpu")[size].total
    found = find_largest_batch(task, optimizer=MOMENTUM, target="cpu", budget=budget, margin=0)
    low, high = 1, 2**22
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if need(middle) <= budget else (low, middle)
    assert found.batch_size == low
    assert found.next_memory.total > budget >= found.memory.total
    assert len(found.profile) <= 6
    assert found.fixed_bytes + found.bytes_per_example * low == pytest.approx(found.memory.step, rel=0.02)


def test_no_fixed_memory_is_below_zero():
    """Memory that grows faster than the batch: a line through its ends begins below 0."""
    profile = {size: Memory(size, 0, 0, 0, 0, size**2, 0, 0.0) for size in (10, 100)}
    found = LargestBatch(100, profile[100], None, 2**20, profile)
    assert (found.fixed_bytes, found.bytes_per_example) == (0, 100)
    profile = {size: Memory(size, 500, 0, 0, 0, 7 * size, 0, 0.0) for size in (10, 100)}
    found = LargestBatch(100, profile[100], None, 2**20, profile)
    assert (found.fixed_bytes, found.bytes_per_example) == (500, 7)


def test_groups_keep_the_largest_batch_divisible(task):
    assert jb.max_batch_size(task, optimizer=MOMENTUM, target="cpu", budget="256MiB", num_groups=7) % 7 == 0


def test_what_does_not_fit_says_by_how_much(task):
    with pytest.raises(ValueError, match=r"batch_size=1 already needs .* are missing. Parameters and optimizer state are"):
        jb.max_batch_size(task, optimizer=MOMENTUM, target="cpu", budget="50KiB")
    with pytest.raises(ValueError, match=r"does not fit .*, even with one example at a time .* more than"):
        jb.memory_plan(task, optimizer=MOMENTUM, target="cpu", budget="50KiB", batch_size=100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": None}, "optimizer=None"),
        ({"target": "h1000"}, "target='h1000'"),
        ({"budget": "much"}, "budget='much'"),
        ({"margin": 1.0}, "margin=1.0"),
        ({"num_groups": 0}, "num_groups=0"),
        ({"microbatch_size": 0}, "microbatch_size=0"),
        ({"num_devices": 2}, "num_devices=2"),
    ],
)
def test_wrong_settings_are_named(task, change, message):
    with pytest.raises(ValueError, match=message):
        jb.max_batch_size(task, **{"optimizer": MOMENTUM, "target": "cpu", **change})
    if set(change) == {"optimizer"} and change["optimizer"] is None:
        with pytest.raises(ValueError, match="arguments=None"):
            jb.memory_profile(lambda x: x, [1])


@given(st.integers(0, 10**9), st.integers(1, 10**6), st.integers(10**3, 10**12), st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_the_search_is_right_and_short_on_lines(fixed, slope, limit, wobble):
    looks = []

    def need(n):
        looks.append(n)
        return fixed + slope * n + (wobble * slope if n > 100 else 0)

    found = search_largest(need, limit, range(1, 2**24 + 1), 64)
    assert found == 0 if need(1) > limit else (need(found) <= limit and (found == 2**24 or need(found + 1) > limit))
    assert len(looks) - 3 <= 7


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=300), st.integers(0, 10**5), st.integers(1, 400))
@settings(max_examples=300, deadline=None)
def test_the_search_is_right_on_any_increasing_function(steps, limit, first):
    total = np.cumsum(steps)
    need = lambda n: int(total[n - 1])
    found = search_largest(need, limit, range(1, len(total) + 1), first)
    assert found == int((total <= limit).sum())


def test_a_compiler_that_refuses_without_a_number_ends_the_search_too():
    need = lambda n: 2**62 if n > 1000 else 10 * n
    assert search_largest(need, 2**40, range(1, 2**20), 64) == 1000
    assert search_largest(lambda n: 2**62, 2**40, range(1, 2**20), 64) == 0


def test_what_was_not_compared_with_a_device_says_so():
    said = lambda name: " ".join(caveats(jb.find_target(name)))
    assert said("v5e") == "This is what the compiler says; it was not compared with a real TPU v5e."
    assert "H200" in said("h200") and "not compared" not in said("h200")
    assert "H200" in said("h100") and "not compared" in said("h100")
    assert said("cpu") == ""


def coupled(task):
    """The task with images that are shifted by the mean of their batch."""
    return task._replace(prepare=lambda keys, batch: (batch[0] - batch[0].mean(0, keepdims=True), batch[1]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda task: jb.memory_profile(task, [0], optimizer=MOMENTUM, target="cpu"), "0 must be a whole number"),
        (lambda task: jb.max_batch_size(task, optimizer=MOMENTUM, target="cpu", num_device=2), "num_device is not a setting"),
        (lambda task: jb.memory_profile(lambda x: x, [1], arguments=lambda size: jnp.ones(size), target="cpu"), "must return a tuple"),
        (lambda task: jb.memory_profile(lambda x: x, [1], target="cpu"), "needs a function, batch_size ->"),
        (lambda task: jb.memory_profile(lambda x: x, [1], optimizer=MOMENTUM, arguments=lambda n: (1.0,), target="cpu"), "optimizer: this is for"),
        (lambda task: jb.max_batch_size(lambda x: x, arguments=lambda n: (jnp.ones(3),), target="cpu"), "does not depend on the batch size"),
        (lambda task: jb.memory_plan(coupled(task), optimizer=MOMENTUM, batch_size=2**20, target="cpu", budget="64MiB"), "take a smaller batch_size"),
        pytest.param(
            lambda task: jb.memory_plan(task, optimizer=MOMENTUM, batch_size=2**27, target="cpu", budget="1GiB"),
            "indices and losses alone",
            marks=pytest.mark.slow,
        ),
        (lambda task: jb.memory_plan(task, optimizer=MOMENTUM, batch_size=8, target="cpu", budget="500KiB"), "whatever the batch"),
    ],
)
def test_mistakes_are_named(task, call, message):
    with pytest.raises(ValueError, match=message):
        call(task)


def test_a_search_that_ends_at_its_cap_says_so(monkeypatch):
    monkeypatch.setattr("jaxbatch.advice.largest_batch.CAP", 5000)
    task = jb.classification_task(jb.MLP((4,)), jb.load_dataset("digits"))
    found = find_largest_batch(task, optimizer=optax.sgd(0.1), target="cpu")
    assert (found.batch_size, found.next_memory) == (5000, None)
