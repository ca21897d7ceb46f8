"""Every argument of the functions that tell memory × wrong kinds: one line that names it."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbatch as jb
from tests.conftest import shapes_unchecked

SGD = optax.sgd(0.1)
DATA = jax.ShapeDtypeStruct((2000, 8), jnp.float32)
TASK = jb.Task(lambda key: jnp.zeros(8), lambda w, x: ((x - w[None]) ** 2).sum(-1), None, DATA, None)
COUNTS = st.one_of(st.integers(-3, 0), st.floats(), st.booleans(), st.text(max_size=3), st.none(), st.just([8]), st.just((8,)))
NUMBERS = {"batch_size": False, "num_devices": False, "num_groups": True, "microbatch_size": True, "evaluation_batch_size": True}


@given(st.sampled_from(list(NUMBERS)), COUNTS)
@settings(max_examples=50, deadline=None)
def test_every_wrong_count_is_one_line_that_names_it(name, value):
    if value is None and NUMBERS[name]:
        return
    task = TASK
    own = {} if name == "batch_size" else {name: value}
    calls = [lambda: jb.memory_profile(task, [value if name == "batch_size" else 8], optimizer=SGD, target="cpu", **own)]
    if name in ("batch_size", "num_devices"):
        calls.append(lambda: jb.memory_plan(task, optimizer=SGD, target="cpu", **({"batch_size": 8} | {name: value})))
    if name != "batch_size":
        calls.append(lambda: jb.max_batch_size(task, optimizer=SGD, target="cpu", **own))
    for call in calls:
        with shapes_unchecked(), pytest.raises(ValueError, match=rf"^{name}=.* must be a whole number of at least 1") as caught:
            call()
        assert "\n" not in str(caught.value)


STEP = (lambda w, x: w + x.sum(), lambda size: (jnp.zeros(()), jnp.ones(size)))
WRONG = {
    "margin": [2, 1.0, -0.1, float("nan"), "0.1", None, True, [0.1]],
    "budget": ["lots", 0, -1, float("nan"), float("inf"), "1e999", [], True, ""],
    "target": ["h1000", 3, None, ""],
    "optimizer": [None, 0.1, "adam", lambda rate: SGD],
    "monitor": [3, "yes", jb.NoiseMonitor(parts=1)],
    "effort": ["most", 1],
    "arguments": [3, lambda size: (1,)],
    "donate": [[0], (-2,), 0],
    "task": [None, 3, "task", [TASK]],
    "num_device": [2],
}


@pytest.mark.parametrize(
    "call", [jb.max_batch_size, functools.partial(jb.memory_plan, batch_size=8), lambda task, **own: jb.memory_profile(task, [8], **own)]
)
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_every_wrong_argument_is_one_line_that_names_it(call, name, value):
    if name in ("margin", "budget") and getattr(call, "__name__", "") == "<lambda>":
        return
    given = {"task": TASK, "optimizer": SGD, "target": "cpu"} | {name: value}
    with shapes_unchecked(), pytest.raises((ValueError, TypeError), match=name) as caught:
        call(given.pop("task"), **given)
    if not isinstance(caught.value, ValueError):
        assert "unexpected keyword" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("donate", [(-2,), [2], "0", 0, [0.0], [True], [None]])
def test_a_donated_argument_that_is_not_there_is_named(donate):
    step, arguments = STEP
    with shapes_unchecked(), pytest.raises(ValueError, match=r"^donate=.* must "):
        jb.memory_profile(step, [8], arguments=arguments, donate=donate, target="cpu")
    assert jb.memory_profile(step, [8], arguments=arguments, donate=[0], target="cpu")[8].total > 0


def test_the_memory_that_advise_was_given_is_blamed_by_its_name():
    loss_fn, data = lambda w, x: (x - w) ** 2, jnp.arange(1200.0) / 1200
    task = jb.Task(lambda key: jnp.zeros(()), loss_fn, lambda w, x: {"loss": loss_fn(w, x)}, data, data)
    with pytest.raises(ValueError, match="^memory='lots' is not an amount of memory"):
        jb.advise(task, "loss<0.01", optimizer=optax.sgd, memory="lots")
