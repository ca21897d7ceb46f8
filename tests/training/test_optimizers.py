"""Every optimizer of optax has a row in docs/optimizers.md and does what it says; what skips bad batches, and what is refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.advice.probes import with_rate_in_state
from jaxbatch.gradients.updates import check_optimizer
from scripts.optimizer_table import PAGE, factories, made_by, measure, read
from tests.conftest import shapes_unchecked

VERSION, ROWS = read()
NAMES = [row.name for row in ROWS]


def test_every_optimizer_of_the_installed_optax_is_in_the_table():
    here, table = factories(), set(NAMES)
    assert len(here) > 100
    assert set(here) <= table, f"python scripts/optimizer_table.py adds {sorted(set(here) - table)} of optax {optax.__version__}"
    number = lambda version: [int(part) for part in version.split(".")[:3]]
    if number(optax.__version__) >= number(VERSION):
        assert [name for name in here for _ in made_by(name)] == NAMES
        assert optax.__version__ == VERSION, "python scripts/optimizer_table.py runs them all with this version"


def test_each_of_them_works_everywhere_or_nowhere():
    for row in ROWS:
        assert (row.fit, row.checkpoints, row.advise) == ("yes",) * 3 or (row.fit, row.checkpoints, row.advise) == ("no",) * 3, row
        assert row.fit == "yes" or row.remark, row
    refused = {row.name for row in ROWS if row.fit == "no"}
    assert {"lbfgs", "lookahead", "contrib.sophia", "contrib.dpsgd"} <= refused < set(NAMES) and len(refused) < 15


@pytest.mark.parametrize("name", ["adam", "MultiSteps", "contrib.sam", "contrib.momo", "lookahead"])
def test_rows_of_some(name):
    assert measure(name) == [row for row in ROWS if row.name == name]


# All are run, those too that optax itself calls in a form that it has deprecated, or wants called in another one.
@pytest.mark.slow
@pytest.mark.filterwarnings(
    'ignore:"seed" is deprecated',
    "ignore:inject_stateful_hyperparams is deprecated",
    "ignore:Specifying a key will be required",
    "ignore:`optimistic_adam` is deprecated",
)
def test_the_table_is_what_runs():
    assert [row for name in factories() for row in measure(name)] == ROWS


# What is refused by name


PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(3)}


def changing():
    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), lambda g, state, params=None: (g, state + 0.5))


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (optax.lookahead(optax.sgd(0.1), 5, 0.5), "optimizer: optax.lookahead takes optax.LookaheadParams .* docs/recipes.md"),
        (optax.contrib.sophia(0.1), "optimizer: its update needs more than gradient, .*obj_fn"),
        (optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True), "optimizer: its update needs more than gradient, .*grad_fn"),
        (
            optax.contrib.differentially_private_aggregate(1.0, 0.1, key=0),
            r"optimizer: its update of params\['b'\] has shape \(\) and not \(3,\).*clipped_gradient_sum",
        ),
        (optax.partition({"a": optax.sgd(0.1)}, {"w": "a", "b": "c"}), "optimizer: its init fails for these parameters"),
        (changing(), "optimizer: after an update its state is float32 in place of int32"),
    ],
)
def test_what_cannot_work_is_one_line(optimizer, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_optimizer(optimizer, PARAMS)
    assert "\n" not in str(caught.value)


def test_lookahead_is_refused_with_its_own_parameters_too():
    with pytest.raises(ValueError, match=r"optax.lookahead takes"):
        check_optimizer(optax.lookahead(optax.sgd(0.1), 5, 0.5), optax.LookaheadParams.init_synced(PARAMS))


# The loss goes where it is wanted, and nowhere else


LOSS = lambda w, x: 0.5 * (x - w) ** 2
X = jnp.arange(16.0)
TASK = jb.Task(lambda key: jnp.array(1.0), LOSS, lambda w, x: {"loss": LOSS(w, x)}, X, X)


def test_multi_steps_passes_the_loss_on():
    check_optimizer(optax.MultiSteps(optax.polyak_sgd(), 2), PARAMS)
    check_optimizer(with_rate_in_state(lambda rate: optax.MultiSteps(optax.polyak_sgd(rate), 2)), PARAMS)


def test_sam_in_a_chain_and_in_every_rate():
    sam = lambda rate: optax.chain(optax.clip(1.0), optax.contrib.sam(optax.sgd(rate), optax.sgd(0.1)))
    check_optimizer(sam(0.1), PARAMS)
    check_optimizer(with_rate_in_state(sam), PARAMS)


@pytest.mark.parametrize("make", [optax.contrib.prodigy, lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1))])
def test_an_optimizer_that_keeps_the_first_parameters_keeps_its_own(make):
    optimizer = make()
    start, step = jb.init_state(TASK, optimizer, 0), jb.make_train_step(LOSS, optimizer, 4)
    state, losses = jb.make_epoch(step)(start, X, jnp.arange(8).reshape(2, 4))  # which reuses the memory of its state
    assert int(state.step) == 2 and losses[0] == LOSS(1.0, X[:4]).mean()


# Batches that are not finite


def with_bad(bad):
    """The task whose loss and gradient are NaN for these examples."""
    bad = jnp.asarray(bad)
    loss_fn = lambda w, x: LOSS(w, x) * jnp.where((x[:, None] == bad[None]).any(1), jnp.nan, 1)
    return TASK._replace(loss_fn=loss_fn)


ORDER = np.asarray(jb.epoch_order(0, 0, 16)).reshape(4, 4)
SKIPPING = {
    "apply_if_finite": lambda: optax.apply_if_finite(optax.sgd(0.1), 2),
    "in a chain": lambda: optax.chain(optax.clip(100.0), optax.apply_if_finite(optax.adam(0.1), 2)),
    "MultiSteps": lambda: optax.MultiSteps(optax.sgd(0.1), 1, should_skip_update_fn=optax.skip_not_finite),
}


@pytest.mark.parametrize("name", SKIPPING)
def test_an_optimizer_that_skips_bad_batches_goes_on(name):
    task = with_bad([float(ORDER[1, 2])])  # in the second of four batches
    (record,) = jb.fit(task, jb.FitConfig(SKIPPING[name](), 4))
    assert not record["diverged"] and record["diverged_at_batch"] is None and record["batches"] == 4
    w, losses = 1.0, []
    for index in np.delete(ORDER, 1, axis=0):
        losses.append(float(LOSS(w, np.asarray(X)[index]).mean()))
        w += 0.1 * float((np.asarray(X)[index] - w).mean())
    if name != "in a chain":  # where it is Adam
        assert float(record["state"].params) == pytest.approx(w, rel=1e-5) and record["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_it_diverges_where_it_gives_up():
    optimizer = optax.apply_if_finite(optax.sgd(0.1), 2)
    *_, last = jb.fit(with_bad(ORDER[1:].ravel().astype(float)), jb.FitConfig(optimizer, 4, jb.epochs(2), evaluations_per_epoch=4))
    assert last["diverged"] and last["batches"] == 4 and last["diverged_at_batch"] == 3
    first, second, *_ = jb.fit(with_bad(ORDER[1:].ravel().astype(float)), jb.FitConfig(optimizer, 4, evaluations_per_epoch=4))
    assert np.isfinite(first["loss"]) and np.isnan(second["loss"]) and not second["diverged"]


def test_others_diverge_as_before():
    *_, last = jb.fit(with_bad([float(ORDER[1, 2])]), jb.FitConfig(optax.sgd(0.1), 4, evaluations_per_epoch=4))
    assert last["diverged"] and last["diverged_at_batch"] == 1
    infinite = TASK._replace(loss_fn=lambda w, x: LOSS(w, x) + jnp.where(x == ORDER[1, 2], jnp.inf, 0))  # its gradient is finite
    *_, last = jb.fit(infinite, jb.FitConfig(optax.sgd(0.1), 4, evaluations_per_epoch=4))
    assert last["diverged"] and last["diverged_at_batch"] == 1


def test_sweeps_and_branches_go_on_too():
    task, make = with_bad([float(ORDER[1, 2])]), lambda rate: optax.apply_if_finite(optax.sgd(rate), 2)
    config = {"batch_size": 4, "duration": jb.epochs(1)}
    (swept,) = jb.sweep(task, make, jnp.array([0.1, 0.2]), [0, 0], **config)
    (alone,) = jb.fit(task, jb.FitConfig(make(0.1), 4))
    assert swept["diverged_at_batch"].tolist() == [-1, -1] and swept["loss"][0] == pytest.approx(alone["loss"], rel=1e-5)
    (plain,) = jb.sweep(task, optax.sgd, jnp.array([0.1, 0.2]), [0, 1], **config)
    assert plain["diverged_at_batch"].tolist()[0] == 1 and (plain["diverged_at_batch"] >= 0).all()
    grown = jb.branch(task, make, alone["state"], learning_rate=0.1, batch_size=4, examples=16, factors=(2,), seeds=(0, 1))
    assert all(np.isfinite(values).all() for values in grown.metrics.values())


def test_sam_is_judged_where_it_stands_and_not_where_it_looks():
    recipe = {}
    text = PAGE.with_name("recipes.md").read_text(encoding="utf-8")
    exec(text.split("## Sharpness-aware minimization", 1)[1].split("```python\n", 1)[1].split("```", 1)[0], recipe)
    task, config = recipe["task"], recipe["config"]._replace(duration=jb.steps(3), evaluations_per_epoch=8)
    first, second, third = jb.fit(task, config)
    moved, before = third["state"].params, second["state"].params  # the third call only moves them
    assert float(jnp.linalg.norm(moved - before)) == pytest.approx(0.05, rel=1e-4)
    assert third["test_loss"] == pytest.approx(second["test_loss"], rel=1e-6) and first["test_loss"] != second["test_loss"]
    with shapes_unchecked():
        assert third["test_loss"] != pytest.approx(float(task.metrics_fn(moved, task.test_data)["loss"].mean()), rel=1e-6)
    assert jax.tree.structure(third["state"]) == jax.tree.structure(first["state"])
