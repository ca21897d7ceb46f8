"""A dependence of examples on each other is found where the first two examples, or parameters of zeros, hide it; and within shard_map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbatch as jb
from jaxbatch.gradients.independence import has_independent_prepare
from tests.conftest import on_four_devices
from tests.gradients.test_independence import CALLS, REFUSED, model_loss

MEAN_TAKEN_OFF = lambda w, x: (w * x - (w * x).mean()) ** 2
HIDING = {
    "two equal first": jnp.array([1.0, 1.0, 5.0, 2.0, 1.0, 1.0]),
    "one other among very many": jnp.ones(10_002).at[7_777].set(3.0),
    "all equal": jnp.ones(6),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("hiding", HIDING)
def test_a_dependence_that_the_first_two_examples_hide(name, hiding):
    if HIDING[hiding].size > 6 and "of one" in name:
        pytest.skip("groups of one of 6 examples")
    with pytest.raises(ValueError, match=REFUSED):
        CALLS[name](MEAN_TAKEN_OFF, jnp.array(1.0), HIDING[hiding])
    CALLS[name](lambda w, x: (w * x) ** 2, jnp.array(1.0), HIDING[hiding])


def test_arrays_that_differ_in_different_examples():
    batch = {"same": jnp.ones(5), "x": jnp.array([1.0, 1.0, 2.0, 1.0, 1.0]), "y": np.array([0, 0, 0, 0, 1])}
    for leaf in ("x", "y"):
        with pytest.raises(ValueError, match=REFUSED):
            jb.per_example_gradients(lambda w, b, leaf=leaf: w * (b[leaf] - b[leaf].mean()), jnp.array(1.0), batch)
    jb.per_example_gradients(lambda w, b: w * b["x"] * b["y"], jnp.array(1.0), batch)


def test_a_last_layer_of_zeros_hides_nothing():
    loss_fn, params, batch = model_loss("ours")
    zeros = {**params, "Dense_1": jax.tree.map(jnp.zeros_like, params["Dense_1"])}
    with pytest.raises(ValueError, match=REFUSED):
        jb.per_example_gradients(loss_fn, zeros, batch)
    loss_fn, _, _ = model_loss("ours", train=False)
    jb.per_example_gradients(loss_fn, zeros, batch)


def test_prepare_is_looked_at_beyond_the_first_two_examples():
    task = jb.Task(lambda key: jnp.array(0.0), lambda w, x: w * x, None, HIDING["two equal first"], None, prepare=lambda keys, x: x - x.mean())
    assert not has_independent_prepare(task)
    assert has_independent_prepare(task._replace(prepare=lambda keys, x: x + 1))


IN_SHARD_MAP = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
import jaxbatch as jb

plain, weighted = (lambda w, x: (w * x) ** 2), (lambda w, x: jb.Weighted((w * x) ** 2, jnp.ones_like(x)))
calls = {
    "examples": lambda w, x: jb.per_example_gradients(plain, w, x),
    "groups": lambda w, x: jb.group_gradients(plain, w, x, 4, microbatch_size=7, method="map"),
    "statistics": lambda w, x: jb.gradient_statistics(plain, w, x).trace[None],
    "statistics of groups": lambda w, x: jb.gradient_statistics(weighted, w, x, num_groups=4, method="map").trace[None],
    "clipped": lambda w, x: jb.clipped_gradient_sum(plain, w, x, 1.0).total[None],
    "sum": lambda w, x: jb.sum_of_gradients(plain, w, x, lambda g: {"a": g > 1, "b": g})["a"][None],
    "coupled": lambda w, x: jb.coupled_gradient(lambda w, z: z**2, lambda w, x: w * x, w, x, 30, axis="devices").losses,
}
x, found = jnp.arange(400.0) / 100, {}
mesh = jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,))
for name, call in calls.items():
    expected = x**2 if name == "coupled" else np.concatenate([call(jnp.float32(1), part) for part in x.reshape(4, -1)])
    for check in (True, False):
        for compiled in (True, False):
            over = jax.shard_map(call, mesh=mesh, in_specs=(P(), P("devices")), out_specs=P("devices"), check_vma=check)
            result = (jax.jit(over) if compiled else over)(jnp.float32(1), x)
            found[f"{name} {check} {compiled}"] = float(np.abs(result - expected).max())
coupled = lambda w, x: jb.per_example_gradients(lambda w, x: w * (x - x.mean()), w, x)
for compiled in (True, False):
    over = jax.shard_map(coupled, mesh=mesh, in_specs=(P(), P("devices")), out_specs=P("devices"))
    try:
        (jax.jit(over) if compiled else over)(jnp.float32(1), x)
        found[f"refused {compiled}"] = 1.0
    except ValueError:
        found[f"refused {compiled}"] = 0.0
print(json.dumps(found))
"""


def test_gradients_of_a_devices_own_examples_in_shard_map():
    """Also without jit; and, where JAX checks what differs between devices, not summed over them."""
    found = on_four_devices(IN_SHARD_MAP)
    assert len(found) == 30
    assert {name: error for name, error in found.items() if error > 1e-4} == {}
