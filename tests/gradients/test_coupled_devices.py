"""Losses that couple the batch, over several devices: the numbers of one device, however the gradient is taken."""

import pytest

from tests.conftest import on_four_devices

RUN = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
import jaxbatch as jb
from tests import reference
from tests.losses.test_chunked_losses import make_classes
from tests.gradients.test_coupled import make_pairs

jax.config.update("jax_enable_x64", True)
found = {}
error = lambda a, b: max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
split = lambda tree, n: jax.tree.map(lambda leaf: leaf.reshape(n, -1, *leaf.shape[1:]), tree)
mesh_of = lambda n: jax.make_mesh((n,), ("devices",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])

loss_fn, encode, params, batch = make_pairs(12)
expected = reference.coupled_gradient(loss_fn, encode, params, batch)
single = lambda params, views: loss_fn(params, views).mean()
for n in (1, 2, 4):
    run = lambda params, batch: tuple(jb.coupled_gradient(loss_fn, encode, params, batch, 2, axis="devices"))
    losses, gradient = jax.pmap(run, "devices", in_axes=(None, 0), devices=jax.devices()[:n])(params, split(batch, n))
    found[f"coupled pmap {n}"] = max(error((losses.reshape(-1), jax.tree.map(lambda leaf: leaf[k], gradient)), expected) for k in range(n))
    for check in (True, False):  # JAX checks, and then knows, which values are the same on all devices; or neither
        over = lambda f, out: jax.jit(jax.shard_map(f, mesh=mesh_of(n), in_specs=(P(), P("devices")), out_specs=out, check_vma=check))
        found[f"coupled shard_map {n} {check}"] = error(over(run, (P("devices"), P()))(params, batch), expected)
        number = lambda params, batch: tuple(jb.coupled_gradient(single, encode, params, batch, 2, axis="devices"))
        found[f"coupled number {n} {check}"] = error(over(number, (P(), P()))(params, batch), (expected[0].mean(), expected[1]))

# two encoders whose batches have other lengths: the losses are those of either, by their own length
queries, passages, w = jnp.arange(1.0, 9.0), jnp.arange(1.0, 17.0) / 16, (jnp.array(0.5), jnp.array(2.0))
encoders = (lambda w, x: w * x, lambda w, x: jnp.sin(w * x))
for name, by in {"queries": lambda w, z: (z[0] - z[1].mean()) ** 2, "passages": lambda w, z: (z[1] - z[0].mean()) ** 2}.items():
    expected = jb.coupled_gradient(by, encoders, w, (queries, passages), 3)
    for n in (2, 4):
        run = lambda w, batch: tuple(jb.coupled_gradient(by, encoders, w, batch, 3, axis="devices"))
        over = jax.jit(jax.shard_map(run, mesh=mesh_of(n), in_specs=(P(), P("devices")), out_specs=(P("devices"), P())))
        found[f"towers {name} {n}"] = error(over(w, (queries, passages)), tuple(expected))
odd = lambda w, z: jnp.concatenate([z[0], z[0][:1]])
try:
    run = lambda w, batch: jb.coupled_gradient(odd, encoders, w, batch, 3, axis="devices").losses
    jax.jit(jax.shard_map(run, mesh=mesh_of(2), in_specs=(P(), P("devices")), out_specs=P("devices")))(w, (queries, passages))
    found["towers odd"] = 1.0
except ValueError as problem:
    found["towers odd"] = 0.0 if "9 losses on 2 devices" in str(problem) else 2.0

x, kernel, bias, labels, weights = make_classes(8, 5, 20)
encoder, margin = jnp.eye(5) + 0.1, jb.additive_margin(0.3)
given = dict(chunk_size=3, scale=2.0)
def plain(encoder, x, kernel, bias):
    return (weights * jb.cross_entropy(2.0 * jnp.tanh(x @ encoder) @ kernel + bias[None], labels)).sum()
whole = jax.value_and_grad(plain, (0, 1, 2, 3))(encoder, x, kernel, bias)
for n in (1, 2, 4):
    def own(encoder, x, kernel, bias, labels, weights):
        losses = jb.chunked_cross_entropy(jnp.tanh(x @ encoder), kernel, labels, bias=bias, axis="devices", **given)
        return (weights * losses).sum()

    def inside(encoder, x, kernel, bias, labels, weights):  # the gradient is taken on each device
        loss, (of_encoder, *others) = jax.value_and_grad(own, (0, 1, 2, 3))(encoder, x, kernel, bias, labels, weights)
        return (jax.lax.psum(loss, "devices"), (jax.lax.psum(of_encoder, "devices"), *others))

    columns = P(None, "devices"), P("devices")
    specs = P(), P("devices"), *columns, P("devices"), P("devices")
    over = lambda f, out, check=False: jax.shard_map(f, mesh=mesh_of(n), in_specs=specs, out_specs=out, check_vma=check)
    out = P(), (P(), P("devices"), *columns)
    found[f"classes shard_map inside {n}"] = error(jax.jit(over(inside, out))(encoder, x, kernel, bias, labels, weights), whole)
    for check in (True, False):  # the gradient is taken of the whole, from outside
        total = lambda *four: over(lambda *a: own(*a)[None], P("devices"), check)(*four, labels, weights).sum()
        found[f"classes shard_map outside {n} {check}"] = error(jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)))(encoder, x, kernel, bias), whole)
    cut = split((x, bias, labels, weights), n)
    kernels = kernel.reshape(5, n, -1).transpose(1, 0, 2)
    mapped = jax.pmap(inside, "devices", in_axes=(None, 0, 0, 0, 0, 0), devices=jax.devices()[:n])
    loss, (of_encoder, of_x, of_kernel, of_bias) = mapped(encoder, cut[0], kernels, cut[1], cut[2], cut[3])
    got = loss[0], (of_encoder[-1], of_x.reshape(8, 5), of_kernel.transpose(1, 0, 2).reshape(5, -1), of_bias.reshape(-1))
    found[f"classes pmap {n}"] = error(got, whole)

    fewer = 18  # the last two columns only fill up
    def margins(x, kernel, labels):
        return jb.chunked_cross_entropy(x, kernel, labels, axis="devices", margin=margin, num_classes=fewer, **given)
    labelled = labels % fewer
    over = jax.shard_map(margins, mesh=mesh_of(n), in_specs=(P("devices"), P(None, "devices"), P("devices")), out_specs=P("devices"))
    ours = jax.jit(jax.value_and_grad(lambda x, k: (weights * over(x, k, labelled)).sum(), (0, 1)))(x, kernel)
    one = lambda x, k: (weights * jb.chunked_cross_entropy(x, k[:, :fewer], labelled, margin=margin, **given)).sum()
    found[f"classes with fillers and margin {n}"] = error(ours, jax.jit(jax.value_and_grad(one, (0, 1)))(x, kernel))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    return on_four_devices(RUN)


@pytest.mark.parametrize(("name", "count"), [("coupled", 15), ("classes", 15), ("towers", 5)])
def test_the_numbers_of_one_device(found, name, count):
    errors = {key: value for key, value in found.items() if key.startswith(name)}
    assert len(errors) == count and max(errors.values()) < 1e-10, errors
