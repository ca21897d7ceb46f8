"""Slips that users made, one by one: each is a line that names the argument; what was allowed stays allowed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import jaxbatch as jb
from jaxbatch.kinds import check_kind
from tests.conftest import shapes_unchecked
from tests.test_kinds import CONFIG, LOSS, SGD, TASK, X


def ended(optimizer=SGD, **changes):
    """The last state of a run."""
    *_, last = jb.fit(TASK._replace(**changes), jb.FitConfig(optimizer, 4, jb.steps(1)))
    return last["state"]


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(28)(nn.Dropout(0.5, deterministic=False)(nn.Embed(28, 4)(tokens)))


def language(model, **changes):
    return jb.language_task(model, jb.load_text("generated")._replace(**changes), sequence_length=32)


WITH_STATE = {
    "init": lambda key: (jnp.array(0.0), jnp.array(0.0)),
    "loss_fn": lambda w, x: (LOSS(w, x), x.mean()),
    "metrics_fn": lambda pair, x: {"loss": LOSS(pair[0], x)},
}
going_on = lambda state, **changes: next(jb.fit(TASK._replace(**changes), jb.FitConfig(SGD, 4, jb.steps(2)), state=state))
with_state = lambda **changes: next(jb.fit(TASK._replace(**(WITH_STATE | changes)), CONFIG))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: going_on(ended(optax.adam(0.1))), r"state.opt_state is not of this optimizer \(has \[0\].count too\): give that of the state"),
        (lambda: going_on(ended(optax.chain(optax.clip(1.0), SGD))), r"state.opt_state is not of this optimizer \(is made of other containers\)"),
        (lambda: going_on(ended(), init=lambda key: jnp.zeros(3)), r"state.params is not of this task \(has shape \(\) in place of \(3,\)\)"),
        (lambda: going_on(ended(), init=lambda key: {"w": jnp.array(0.0)}), r"state.params is not of this task \(lacks \['w'\]\)"),
        (lambda: going_on({"state": ended()}), "state={'state': TrainState.* must be a jaxbatch.TrainState, as record"),
        (lambda: next(jb.fit(TASK._replace(metrics_fn=LOSS), CONFIG)), "metrics_fn must return a dict .* returned an array of shape"),
        (lambda: with_state(update_model_state=lambda old, new: new, init=lambda key: jnp.array(0.0)), r"init must return \(params, model_state\)"),
        (lambda: with_state(update_model_state=lambda old, new: new, loss_fn=LOSS), r"loss_fn must return a pair \(losses, aux\)"),
        (
            lambda: with_state(update_model_state=lambda old, new: (new, new)),
            "update_model_state must return a state of the form that it got",
        ),
        (lambda: with_state(update_model_state=lambda old: old), r"update_model_state takes \(old\)"),
        (lambda: next(jb.fit(TASK._replace(microbatch_size=2.5), CONFIG)), "microbatch_size=2.5 must be a whole number of at least 1"),
        (lambda: next(jb.fit(TASK._replace(train_data=np.array(["a", "b"] * 4)), CONFIG)), "train_data is <U1, and JAX knows numbers only"),
        (lambda: next(jb.fit(TASK._replace(train_data={"x": np.array([None] * 8)}), CONFIG)), r"train_data\['x'\] is object, and JAX"),
        (lambda: jb.per_example_gradients(LOSS, jnp.array(0.0), np.array(["a", "b"])), "batch is <U1, and JAX"),
        (lambda: jb.group_gradients(LOSS, jnp.array(0.0), X, 2.0), "num_groups=2.0 must be a whole number"),
        (lambda: language(Dropping()), "model=Dropping needs random numbers, as for dropout, which language_task does not give"),
        (lambda: language(jb.TransformerLM(28, 16, 1, 2), train_tokens=[1, 2] * 99), "dataset.train_tokens is a list and must be an array of whole"),
        (lambda: jb.packed_language_task(jb.TransformerLM(9, 8, 1, 2), None, None, 9), "train=None must be a jaxbatch.PackedText"),
    ],
)
def test_slips(use, message):
    with shapes_unchecked(), pytest.raises(ValueError, match=message) as caught:
        use()
    assert "\n" not in str(caught.value)


def test_a_state_of_another_type_of_number_is_taken():
    state = ended()
    changed = state._replace(params=state.params.astype(jnp.bfloat16), opt_state=SGD.init(state.params.astype(jnp.bfloat16)))
    assert going_on(changed)["state"].params.dtype == jnp.bfloat16
    assert going_on(jax.tree.map(np.asarray, state))["batches"] == 2  # from the host, as a file gives it


def test_what_was_allowed_is_allowed():
    for value, kind in ((np.int64(3), int), (jnp.array(3), int), (np.float32(0.1), float), (3, float), (None, int | None), ((1, 2), list[int])):
        check_kind("it", value, kind)
    jax.jit(lambda rate: jb.scale_learning_rate("sqrt", rate, 8, 32))(0.1)


@pytest.mark.parametrize("init", [None, lambda key: jnp.asarray(float(np.asarray(jax.random.key_data(key))[0]))], ids=["none", "not traced"])
def test_who_has_a_state_needs_no_init(init):
    state = jb.init_state(TASK, SGD, 0)
    (*_, wanted) = jb.fit(TASK, jb.FitConfig(SGD, 4, jb.steps(2)))
    (*_, found) = jb.fit(TASK._replace(init=init), jb.FitConfig(SGD, 4, jb.steps(2)), state=state)
    assert found["state"].params == wanted["state"].params
