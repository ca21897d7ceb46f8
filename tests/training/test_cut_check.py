"""A loss that couples the examples of a batch is refused where its parts would change it; a sum in aux is one sum on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.layers import BatchNorm
from jaxbatch.training import cut_check
from jaxbatch.training.classification import running_average
from jaxbatch.training.cut import choose_cut
from tests.conftest import on_four_devices
from tests.training.test_monitor_unseen import CONFIG, COUPLED, ONE_BY_ONE, X, Y

REFUSED = "^loss_fn: the loss of an example changes with the others in its batch, as a contrastive loss does, and "
LOSSES = [name for name in COUPLED if "prepared" not in name and name not in ("batch norm", "one key for all", "experts with a place missing")]


@pytest.mark.parametrize("name", LOSSES)
def test_a_coupled_loss_in_microbatches_is_refused(name):
    task = COUPLED[name]()
    with pytest.raises(ValueError, match=REFUSED + "a batch of 12 is worked on in microbatches of 6, .*task._replace.coupled=True"):
        next(jb.fit(task, CONFIG._replace(microbatch_size=6)))


def test_it_is_taken_whole_and_where_parts_are_meant():
    task = COUPLED["contrastive"]()
    for bound in ({"microbatch_size": 3}, {"cpu_microbatch_size": 3}):
        with pytest.raises(ValueError, match=REFUSED + "a group of 6 is worked on in microbatches of 3"):
            next(jb.fit(task._replace(**bound), CONFIG._replace(num_groups=2)))
    assert np.isfinite(next(jb.fit(task, CONFIG._replace(num_groups=2)))["loss"])
    assert np.isfinite(next(jb.fit(task._replace(coupled=True), CONFIG._replace(microbatch_size=4)))["loss"])


@pytest.mark.parametrize("name", ["weighted", "dropout", "experts with places for all"])
def test_losses_of_their_own_are_taken(name):
    for _ in jb.fit(ONE_BY_ONE[name](), CONFIG._replace(microbatch_size=4)):
        pass


def test_in_sweeps_and_branches_too():
    task = COUPLED["contrastive"]()._replace(microbatch_size=6, metrics_fn=lambda p, b: {"loss": b[1]}, test_data=(X, Y))
    with pytest.raises(ValueError, match=REFUSED):
        next(jb.sweep(task, optax.sgd, jnp.array([0.1]), [0], batch_size=12, duration=jb.steps(1)))
    with pytest.raises(ValueError, match=REFUSED):
        jb.branch(task, optax.sgd, jb.init_state(task, optax.sgd(0.1), 0), learning_rate=0.1, batch_size=12, factors=(1, 2), examples=24)


def contrastive_with_batch_norm(norm, coupled):
    variables = norm.init(jax.random.key(0), jnp.ones((2, 1, 1, 5)), train=True)

    def loss_fn(params, batch):
        z, moments = norm.apply({"params": params}, batch[0][:, None, None], train=True, mutable=["batch_stats"])
        z = z[:, 0, 0]
        return -jnp.diag(jax.nn.log_softmax(z @ z.T)) if coupled else (z**2).sum(1), moments["batch_stats"]

    init = lambda key: (variables["params"], variables["batch_stats"])
    return jb.Task(init, loss_fn, None, (X, Y), None, update_model_state=running_average)


def test_batch_normalisation_is_taken_and_hides_nothing():
    config = CONFIG._replace(microbatch_size=6)
    next(jb.fit(contrastive_with_batch_norm(BatchNorm(), False), config))
    with pytest.raises(ValueError, match=REFUSED):
        next(jb.fit(contrastive_with_batch_norm(BatchNorm(), True), config))


def test_a_loss_that_cannot_be_looked_at_is_taken():
    def loss_fn(params, batch):
        assert batch[1].shape[0] in (1, 6, 12)
        return (batch[0] @ params["w"]) ** 2

    next(jb.fit(COUPLED["contrastive"]()._replace(loss_fn=loss_fn), CONFIG._replace(microbatch_size=6)))


def test_a_loss_whose_programs_fail_as_they_run_is_taken():
    def loud(losses):
        if len(losses) not in (6, 12):
            raise RuntimeError("of this many examples there is none")
        return losses

    def loss_fn(w, batch):
        losses = (batch[0] @ w["w"]) ** 2
        losses = losses if losses.ndim == 1 else losses.sum(-1)
        return losses + jax.lax.stop_gradient(jax.pure_callback(loud, losses, jax.lax.stop_gradient(losses), vmap_method="sequential"))

    task, start = COUPLED["contrastive"]()._replace(loss_fn=loss_fn), COUPLED["contrastive"]().init(jax.random.key(0))
    cut_check.check_parts(task, start, choose_cut(task, start, 12, microbatch_size=6))


def test_a_task_that_has_passed_is_not_looked_at_again(monkeypatch):
    looks, compare = [], cut_check.whole_and_in_parts
    monkeypatch.setattr(cut_check, "whole_and_in_parts", lambda *given: looks.append(0) or compare(*given))
    parts = lambda factor: lambda w, x: (x @ w - factor) ** 2 if factor else (x @ w - (x @ w).mean()) ** 2
    x, start = np.arange(24.0, dtype=np.float32).reshape(12, 2), jnp.ones(2)
    task = jb.Task(lambda key: start, parts(1.0), None, x, None)
    check = lambda task, params=start, size=6: cut_check.check_parts(task, params, choose_cut(task, params, 12, microbatch_size=size))
    for _ in range(3):
        check(task), check(task, start + 1, 3), check(task._replace(cpu_microbatch_size=3, test_data=x))
    assert len(looks) == 1
    others = [task._replace(loss_fn=parts(1.0)), task._replace(prepare=lambda keys, x: x), task._replace(train_data=x + 1)]
    for count, other in enumerate(others, 2):
        check(other), check(other)
        assert len(looks) == count
    x[0] += 1  # an example that is compared
    check(task)
    check(task, jnp.ones((2, 1)))
    assert len(looks) == 6
    monkeypatch.undo()
    for _ in range(2):  # nothing that was refused passes later
        with pytest.raises(ValueError, match=REFUSED):
            check(task._replace(loss_fn=parts(0.0)))


def test_a_plan_does_not_cut_what_fit_refuses_in_parts():
    def contrastive(w, x):
        z = jnp.tanh(jnp.tanh(jnp.tanh(x @ w) @ w) @ w)
        return -jnp.diag(jax.nn.log_softmax(z @ z.T))

    shapes = jax.ShapeDtypeStruct((2048, 64), jnp.float32)
    task = jb.Task(lambda key: jax.random.normal(key, (64, 64)), contrastive, None, shapes, None)
    plan = lambda task, budget="24MiB": jb.memory_plan(task, optimizer=optax.sgd(0.1), batch_size=2048, target="cpu", budget=budget)
    with pytest.raises(
        ValueError, match=REFUSED + "a batch of 2048 is worked on in microbatches of 1024, .* Or take a smaller batch_size: whole, this one"
    ):
        plan(task)
    assert plan(task, "1GiB").chosen.accumulation_steps == 1
    with pytest.raises(ValueError, match=REFUSED + "a batch of 2048 is worked on in microbatches of 64, "):
        plan(task._replace(microbatch_size=64), "1GiB")
    with pytest.raises(ValueError, match=REFUSED + "a batch is shared by 2 devices"):
        cut_check.check_parts_elsewhere(task, 2048, "gpu", num_devices=2)
    assert cut_check.check_parts_elsewhere(task._replace(cpu_microbatch_size=64), 2048, "gpu")
    huge = task._replace(init=lambda key: (jnp.zeros((64, 64)), jnp.zeros(2**30)), loss_fn=lambda p, x: contrastive(p[0], x))
    assert not cut_check.check_parts_elsewhere(huge, 2048, "cpu", microbatch_size=64)


ON_DEVICES = """
import json
import jax, jax.numpy as jnp, numpy as np, optax
import jaxbatch as jb
from jaxbatch.training.devices import AXIS

found, calls, x = {}, [], jnp.arange(22.0).reshape(11, 2) / 11
start = lambda key: jnp.array([0.5, 0.2])


def contrastive(w, x):
    z = x * w[None]
    return -jnp.diag(jax.nn.log_softmax(z @ z.T))


def over_devices(w, x):
    z = x * w[None]
    try:
        everything, own = jax.lax.all_gather(z, AXIS, tiled=True), jax.lax.axis_index(AXIS) * len(z) + jnp.arange(len(z))
    except NameError:  # on one device there is no axis
        everything, own = z, jnp.arange(len(z))
    return -jax.nn.log_softmax(z @ everything.T)[jnp.arange(len(z)), own]


def run(task, size, count, **settings):
    try:
        *_, record = jb.fit(task, jb.FitConfig(optax.sgd(0.1), size, jb.steps(1), num_devices=count, **settings))
    except ValueError as error:
        return str(error)
    state = record["state"].model_state
    return [record["loss"], *(float(leaf) for leaf in jax.tree.leaves(state))]


plain = jb.Task(start, contrastive, None, x, None)
found["contrastive"] = [run(plain, 8, count) for count in (1, 2)] + [run(plain._replace(coupled=True), 8, 2)]
gathered = plain._replace(loss_fn=over_devices)
found["gathered"] = [run(gathered, 8, count) for count in (1, 2)] + [run(gathered, 8, 2, microbatch_size=2)]

square = lambda w, x: (x @ w) ** 2
stateful = lambda aux, update, zero: jb.Task(lambda key: (start(key), zero), lambda w, x: (square(w, x), aux(x)), None, x, None, None, update)
added = lambda old, new: old + new
found["summed by itself"] = [run(stateful(lambda x: x.sum(), added, jnp.zeros(())), 8, count) for count in (1, 2)]
found["count"] = [run(stateful(lambda x: len(x), added, jnp.zeros((), int)), 8, count) for count in (1, 2)]
found["mean"] = [run(stateful(lambda x: x.mean(), lambda old, new: new, jnp.zeros(())), 8, count) for count in (1, 2)]
totals = lambda old, new: (old[0] + new["seen"].total, old[1] + new["seen"].weight, new["last"])
task = stateful(lambda x: {"seen": jb.Weighted(x[:, 0], jnp.ones(len(x))), "last": jnp.ones(())}, totals, (jnp.zeros(()),) * 3)
stream = task._replace(train_data=jb.ArrayStream(x))
for size in (8, 11):
    indices = np.asarray(jb.epoch_order(0, 0, 11))[:size]
    found[f"sums {size}"] = [[float(x[indices, 0].sum()), size, 1.0]]
    found[f"sums {size}"] += [run(task, size, count)[1:] for count in (1, 2, 4)]
    found[f"sums {size}"] += [run(kind, size, 4, microbatch_size=2)[1:] for kind in (task, stream)]
found["sums 8"] += [run(task, 8, 2, num_groups=2)[1:]]

from jaxbatch.layers import BatchNorm
from jaxbatch.training import cut_check
from jaxbatch.training.classification import running_average
norm, values = BatchNorm(), jnp.asarray(np.random.default_rng(0).normal(size=(1040, 1, 1, 1)), jnp.float32)
variables = norm.init(jax.random.key(0), values, train=True)


def normalised(params, x):
    out, moments = norm.apply({"params": params}, x, train=True, mutable=["batch_stats"])
    return out[:, 0, 0, 0] ** 2, moments["batch_stats"]


task = jb.Task(lambda key: (variables["params"], variables["batch_stats"]), normalised, None, values, None, 64, running_average)
found["variance"] = []
for kind in (task, task._replace(train_data=jb.ArrayStream(values))):
    *_, record = jb.fit(kind, jb.FitConfig(optax.sgd(0.0), 260, jb.epochs(2), num_devices=4))
    found["variance"].append(float(record["state"].model_state["var"].item() / values.var()))
found["traces"] = (run(plain._replace(loss_fn=lambda w, x: (calls.append(x.shape), square(w, x))[1]), 8, 2), len(calls))[1]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    return on_four_devices(ON_DEVICES)


def test_devices_that_change_a_loss_are_refused(found):
    one, two, meant = found["contrastive"]
    assert two.startswith(REFUSED[1:] + "a batch is shared by 2 devices") and meant[0] < one[0]
    *same, cut = found["gathered"]
    np.testing.assert_allclose(same, [one] * 2, rtol=1e-5)
    assert "worked on in microbatches of 2" in cut and found["traces"] == 3  # traces: whole and in parts, to compare them; in the step


def test_a_sum_in_aux_is_refused_on_devices_where_their_mean_is_taken(found):
    for name in ("summed by itself", "count"):
        alone, refused = found[name]
        assert len(alone) == 2 and refused.startswith("aux is a sum over the examples of a device, and on 2 devices the mean of their aux is taken.")
    np.testing.assert_allclose(found["mean"], [found["mean"][0]] * 2, rtol=1e-6)


@pytest.mark.parametrize(("size", "count"), [(8, 7), (11, 6)])
def test_what_is_added_up_is_the_same_on_any_number_of_devices(found, size, count):
    assert len(found[f"sums {size}"]) == count
    np.testing.assert_allclose(found[f"sums {size}"], [found[f"sums {size}"][0]] * count, rtol=1e-6)


def test_running_moments_on_devices_are_not_those_of_a_last_example_alone(found):
    np.testing.assert_allclose(found["variance"], [1, 1], rtol=0.2)  # 0.47 of it with parts of 64 and 1


@pytest.mark.parametrize("counts", [jnp.array(1.0), jnp.ones(2)])  # of which the second would be spread over two totals each
def test_a_sum_of_sums_is_refused(counts):
    aux = lambda w, x: (w * x, jb.Weighted(x.sum() if counts.ndim == 0 else jnp.stack([x, x], 1), counts))
    task = jb.Task(lambda key: (jnp.zeros(()), jnp.zeros(())), aux, None, jnp.ones(4), None, update_model_state=lambda old, new: old + new.total)
    with pytest.raises(ValueError, match="aux must have one total and one weight per example in a Weighted, of one shape"):
        next(jb.fit(task, jb.FitConfig(optax.sgd(0.1), 2)))
