"""One loss per example, on every path; the loss that is called is the one that was given."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.gradients.cut import Cut
from jaxbatch.training.epochs import compile_task_epoch
from jaxbatch.training.loops import compile_epoch_in_pieces
from tests import reference

LOSS = lambda w, x: 0.5 * (x - w) ** 2
X = jnp.arange(8.0)
CONFIG = jb.FitConfig(optax.sgd(0.1), 4)


CONV = lambda w, x: jax.lax.conv(x[:, None, None, None], w, (1, 1), "VALID").reshape(-1)
WRONG = {
    "mean": lambda losses: losses.mean(),
    "sum": lambda losses: losses.sum(),
    "column": lambda losses: losses[:, None],
    "table": lambda losses: losses[:, None] * losses[None],
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("path", ["plain", "groups", "microbatches", "convolution", "devices", "stream", "sweep", "statistics"])
def test_losses_of_another_shape_are_refused_on_every_path(path, wrong):
    data, start = X, jnp.array(0.0)
    loss_fn = lambda w, x: WRONG[wrong](LOSS(w, x))
    if path == "convolution":
        loss_fn, start = lambda w, x: WRONG[wrong](CONV(w, x)), jnp.ones((1, 1, 1, 1))
    task = jb.Task(lambda key: start, loss_fn, None, jb.ArrayStream(X) if path == "stream" else data, None)
    config = CONFIG._replace(
        **{"groups": {"num_groups": 2}, "microbatches": {"microbatch_size": 2}, "convolution": {"microbatch_size": 2}}.get(path, {})
    )
    with pytest.raises(ValueError, match="loss_fn must return one loss per example"):
        if path == "devices":
            shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), jb.init_state(task, CONFIG.optimizer, 0))
            compile_task_epoch(task, CONFIG.optimizer, shapes, 2, 4, devices=jax.devices() * 2)
        elif path == "statistics":
            jb.gradient_statistics(loss_fn, start, X)
        elif path == "sweep":
            next(jb.sweep(task, optax.sgd, jnp.full(2, 0.1), [0, 1], batch_size=4, duration=jb.epochs(1)))
        else:
            next(jb.fit(task, config))


def test_streams_convolutions_and_devices_give_the_number_of_one_device():
    ramp = lambda w, x: w * x
    config = jb.FitConfig(optax.sgd(1.0), 8)
    for task in (jb.Task(lambda key: jnp.array(0.0), ramp, None, data, None) for data in (X, jb.ArrayStream(X))):
        (record,) = jb.fit(task, config._replace(microbatch_size=3))
        assert float(record["state"].params) == -3.5


class Scaled:
    """A loss with a scale of its own, on a convolution, so that accumulation is a Python loop over a compiled program."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, w, x):
        return jnp.sum(self.scale) * CONV(w, x)


def test_accumulation_takes_no_function_for_another():
    loss, w, x = Scaled(1.0), jnp.ones((1, 1, 1, 1)), jnp.full(4, 4.0)
    assert jb.accumulated_gradient(loss, w, x, 2).item() == 4.0
    loss.scale = 3.0
    assert jb.accumulated_gradient(loss, w, x, 2).item() == 12.0
    loss.scale = jnp.arange(5.0)  # an array in the closure
    assert jb.accumulated_gradient(loss, w, x, 2).item() == 40.0
    loss.scale = jnp.arange(1000.0) % 2
    assert jb.accumulated_gradient(loss, w, x, 2).item() == 2000.0
    loss.scale = (1 + jnp.arange(1000.0)) % 3
    assert jb.accumulated_gradient(loss, w, x, 2).item() == 4000.0
    gone = weakref.ref(loss)
    del loss
    gc.collect()
    assert gone() is None


def test_a_program_is_compiled_once_for_its_text(monkeypatch):
    count, w, x = [], jnp.ones((1, 1, 1, 1)), jnp.full(6, 4.0)
    compile = jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self, *args: count.append(1) or compile(self, *args))
    for _ in range(3):
        jb.accumulated_gradient(Scaled(7.0), w, x, 3)
    assert len(count) == 1


def test_labels_that_are_no_class_are_named_or_not_a_number():
    logits = jnp.zeros((2, 2, 4))
    for label, where in ((-1, r"labels\[1\]\[0\]=-1"), (4, r"labels\[1\]\[0\]=4")):
        labels = jnp.array([[0, 3], [label, 1]])
        with pytest.raises(ValueError, match=f"{where} is no class: 4 classes have the labels 0 to 3"):
            jb.cross_entropy(logits, labels)
        found = jax.jit(jb.cross_entropy)(logits, labels)
        assert jnp.isnan(found).tolist() == [[False, False], [True, False]]
        task = jb.Task(
            lambda key: jnp.ones(4), lambda w, b: jb.cross_entropy(w[None] * b[0], b[1]), None, (jnp.ones((4, 4)), jnp.array([0, 1, label, 2])), None
        )
        (record,) = jb.fit(task, jb.FitConfig(optax.sgd(0.1), 4))
        assert record["diverged"]  # and not a run on the wrong class


def test_minus_one_does_not_count_where_the_loss_says_so():
    logits, labels = jnp.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.0]]), jnp.array([1, -1, 0])
    loss_fn = lambda w, b: jb.Weighted(jb.cross_entropy(w * b[0], jnp.maximum(b[1], 0)), b[1] >= 0)
    kept = jnp.array([0, 2])
    found = jb.losses_and_mean_gradient(loss_fn, jnp.array(2.0), (logits, labels))[1]
    expected = jax.grad(lambda w: jb.cross_entropy(w * logits[kept], labels[kept]).mean())(2.0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_against_the_target_written_out(x64, smoothing):
    random = np.random.default_rng(0)
    logits, labels = jnp.asarray(10 * random.normal(size=(6, 5))), jnp.asarray(random.integers(0, 5, 6))
    loss = lambda logits: jb.cross_entropy(logits, labels, label_smoothing=smoothing)
    np.testing.assert_allclose(loss(logits), reference.smoothed_cross_entropy(logits, labels, smoothing), rtol=1e-12)
    target = (1 - smoothing) * jax.nn.one_hot(labels, 5) + smoothing / 5
    np.testing.assert_allclose(jax.grad(lambda z: loss(z).sum())(logits), jax.nn.softmax(logits) - target, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, float("nan")])
def test_smoothing_outside_of_its_range(smoothing):
    with pytest.raises(ValueError, match=f"label_smoothing={smoothing} must be from 0 to 1"):
        jb.cross_entropy(jnp.zeros((1, 2)), jnp.array([0]), label_smoothing=smoothing)
    with pytest.raises(ValueError, match=f"label_smoothing={smoothing} must be from 0 to 1"):
        jb.chunked_cross_entropy(jnp.ones((1, 2)), jnp.ones((2, 3)), jnp.array([0]), chunk_size=2, label_smoothing=smoothing)


@pytest.mark.parametrize("index", [-1, 8])
@pytest.mark.parametrize("path", ["make_epoch", "compile_epoch", "compile_epoch_in_pieces"])
def test_an_order_of_examples_that_are_not_there_is_refused(path, index):
    task = jb.Task(lambda key: jnp.array(0.0), LOSS, None, X, None, microbatch_size=2)
    state, indices = jb.init_state(task, CONFIG.optimizer, 0), jnp.array([[0, 1, 2, index]])
    step = jb.make_train_step(LOSS, CONFIG.optimizer, 4)
    if path == "make_epoch":
        run = jb.make_epoch(step)
    elif path == "compile_epoch":
        run = jb.compile_epoch(step, state, X, 1, 4)
    else:
        run = compile_epoch_in_pieces(task, CONFIG.optimizer, state, Cut(4))
    with pytest.raises(ValueError, match=f"indices hold {index}, and the data have the examples 0 to 7"):
        run(state, X, indices)


def test_a_token_below_zero_is_not_the_last_one():
    model = jb.TransformerLM(9, width=8, num_layers=1, num_heads=2)
    tokens = jnp.array([[1, 2, 3]])
    params = model.init(jax.random.key(0), tokens)
    assert jnp.isfinite(model.apply(params, tokens)).all()
    for wrong in (-1, 9):
        assert jnp.isnan(model.apply(params, tokens.at[0, 1].set(wrong))[0, 1:]).all()
