"""--quick makes every study short, but a flag that is given wins; the optimizers of every study."""

import dataclasses
import importlib
import inspect
import re
import typing
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from experiments.cross_check import __main__ as cross_check
from experiments.harness.command_line import parse
from experiments.harness.optimizers import KINDS, OptimizerFlags, code, fill_optimizer, follow, make_optimizer
from experiments.harness.study import quick_to_compile
from experiments.harness.task import few_for_quick
from jaxbatch.results.records import RunFolder
from tests.conftest import ROOT
from tests.experiments.test_command_line import ended
from tests.experiments.test_user_task import write

NAMES = sorted(path.parent.name for path in (ROOT / "experiments").glob("*/__main__.py") if re.search(r"^def resolve\(", path.read_text(), re.M))
STUDIES = {name: importlib.import_module(f"experiments.{name}.__main__") for name in NAMES}
NEEDED = {("sharpness", "epochs"): ["--max-epochs", "1000"]}  # flags without which other flags' full values are refused


def resolved(name, *flags):
    """A configuration as the study runs it."""
    study = STUDIES[name]
    config = parse(study.Config, "", flags)
    if name in ("split_backward", "learning_rate_grid", "convergence", "advise", "critical_batch_size", "sharpness", "large_batch"):
        return study.resolve(config, task())
    if name == "language_model":
        return study.resolve(config, SimpleNamespace(name="generated"))
    return study.resolve(config, 1202) if len(inspect.signature(study.resolve).parameters) > 1 else study.resolve(config)


def task():
    """The shapes of the digits without their validation part; nothing is trained."""
    data = (np.zeros((1202, 2, 2, 1), np.uint8), np.zeros(1202, np.int32))
    metrics_fn = lambda params, batch: dict.fromkeys(("accuracy", "loss"), jnp.zeros(len(batch[1])))
    return jb.Task(lambda key: jnp.zeros(2), lambda params, batch: batch[1] * params.sum(), metrics_fn, data, data)


def as_flag(name, value):
    values = value if isinstance(value, tuple) else (value,)
    return [f"--{name.replace('_', '-')}", *map(str, values)]


def shrunk(name):
    """The flags that --quick changes, with the values that they have without it."""
    full, quick = resolved(name), resolved(name, "--quick")
    fields = [field.name for field in dataclasses.fields(full) if field.name not in ("quick", "given")]
    return {field: getattr(full, field) for field in fields if getattr(full, field) != getattr(quick, field)}


@pytest.mark.parametrize("name", NAMES)
def test_a_flag_that_is_given_wins_over_quick(name):
    flags = shrunk(name)
    assert len(flags) >= (0 if name == "memory" else 1)
    for flag, value in flags.items():
        if value is None:  # a flag without a value of its own, such as one that bounds the examples
            continue
        config = resolved(name, "--quick", *as_flag(flag, value), *NEEDED.get((name, flag), []))
        assert getattr(config, flag) == value, f"--quick {flag}"


def test_a_flag_that_is_given_with_its_default_wins_too():
    assert resolved("convergence", "--quick", "--seeds", "3").seeds == 3 and resolved("convergence", "--quick").seeds == 2
    assert resolved("advise", "--quick", "--evaluations-per-epoch", "12").evaluations_per_epoch == 12
    assert parse(cross_check.Config, "", ["--quick", "--precision", "float64"]).given == ("precision", "quick")
    assert resolved("adabatch", "--quick", "--model", "vgg19_bn", "--num-examples", "200").num_examples == 200


def test_the_grid_of_a_convergence_takes_its_flags_over_quick(tmp_path, monkeypatch):
    from experiments.convergence import __main__ as convergence

    seen = []
    monkeypatch.setattr(convergence, "open_study", lambda name, grid, *_: seen.append(grid) or RunFolder(tmp_path, [], {}))
    monkeypatch.setattr(convergence, "measure_grid", lambda *_: None)
    for flags in ((), ("--grid-seeds", "3", "--epochs", "9", "--max-updates", "500")):
        convergence.find_tuned_rates(resolved("convergence", "--quick", *flags), task(), None)
    assert [(grid.seeds, grid.epochs, grid.max_updates) for grid in seen] == [(2, 3, 200), (3, 9, 500)]
    grid = resolved("learning_rate_grid", "--quick")
    assert dataclasses.asdict(seen[0]) | {"given": ()} == dataclasses.asdict(grid) | {"given": ()}  # its own run folder


def test_examples_suffice_for_the_batches_that_are_given():
    def left(name, *flags):
        return few_for_quick(parse(STUDIES[name].Config, "", ["--quick", *flags]), task(), 240).num_examples

    assert left("large_batch", "--model", "simple_cnn") == 240 and left("large_batch", "--model", "mlp") == 1202
    assert left("large_batch", "--model", "simple_cnn", "--batch-size", "600") == 1200
    assert left("advise", "--batch-sizes", "8", "256") == 512 and left("sharpness", "--large-batch-size", "1024") == 1202
    assert left("critical_batch_size", "--factors", "2", "32") == 512 and left("critical_batch_size", "--examples", "600") == 1202


def test_no_study_asks_for_quick_in_another_way():
    """A value that --quick changes goes through for_quick, which knows the flags that are given."""
    for name in NAMES:
        assert "min(config." not in inspect.getsource(STUDIES[name].resolve).replace("min(config.batch_sizes", ""), name


@pytest.mark.parametrize(
    ("name", "flags", "compiled_quickly"),
    [
        ("sharpness", ["--quick"], True),
        ("sharpness", [], False),
        ("sharpness", ["--quick", "--model", "mlp"], False),
        ("convergence", ["--quick"], True),
        ("learning_rate_grid", ["--quick"], False),
        ("adabatch", ["--quick", "--model", "resnet20"], True),
    ],
)
def test_quick_compiles_without_most_optimizations_what_takes_long_to_compile(name, flags, compiled_quickly):
    read, before = lambda: jax.config.read("jax_disable_most_optimizations"), jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        with quick_to_compile(parse(STUDIES[name].Config, "", flags)):
            assert read() is compiled_quickly
        assert read() is False
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


TRAINING = [name for name in NAMES if issubclass(STUDIES[name].Config, OptimizerFlags)]


def test_every_study_that_trains_takes_an_optimizer():
    assert set(NAMES) - set(TRAINING) == {"cross_check"}
    for name in TRAINING:
        hints = typing.get_type_hints(STUDIES[name].Config)
        assert {"optimizer", "momentum", "weight_decay", "clip_norm"} <= set(hints)


@pytest.mark.parametrize("name", TRAINING)
def test_every_study_resolves_every_optimizer(name, tmp_path):
    file = write(tmp_path, "import optax\n\ndef make(rate):\n    return optax.adam(rate)\n", "mine.py").replace("make_task", "make")
    for optimizer in (*KINDS, file):
        config = resolved(name, "--optimizer", optimizer)
        assert config.optimizer == optimizer and optimizer.split("/")[-1] in (optimizer, "mine.py:make")
        rates = getattr(config, "learning_rates", None)
        if rates is not None and len(rates) > 1 and name not in ("advise", "contrastive", "faces"):
            assert set(rates) <= set(KINDS[optimizer].rates if optimizer in KINDS else rates)
        optimizer = make_optimizer(config)(0.1)
        params = {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(updates))
    with pytest.raises(ValueError, match="--optimizer adma must be one of sgd, momentum, .* or a function of your own"):
        resolved(name, "--optimizer", "adma")
    with pytest.raises(ValueError, match="--momentum 0.9 is for sgd, momentum, nesterov, lars; --optimizer adam does not take it"):
        resolved(name, "--optimizer", "adam", "--momentum", "0.9")


@pytest.mark.parametrize("optimizer", KINDS)
def test_an_optimizer_at_a_traced_rate_with_decay_and_clipping_is_its_chain(optimizer):
    config = fill_optimizer(OptimizerFlags(optimizer, weight_decay=0.1, clip_norm=0.5))
    params = {"w": jnp.arange(6.0).reshape(3, 2) - 2, "b": jnp.ones(3)}
    gradient = jax.tree.map(lambda leaf: 0.3 * leaf + 1, params)

    def change(optimizer):
        return optimizer.update(gradient, optimizer.init(params), params)[0]

    traced = jax.jit(lambda rate: change(make_optimizer(config)(rate)))(0.05)
    written = eval(code(config), {"optax": optax, "functools": __import__("functools")})(0.05)
    for mine, theirs in zip(jax.tree.leaves(traced), jax.tree.leaves(change(written)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=1e-8)
    clipped = jax.tree.leaves(change(make_optimizer(fill_optimizer(OptimizerFlags(optimizer, weight_decay=0.1)))(0.05)))
    decayed = jax.tree.leaves(change(make_optimizer(fill_optimizer(OptimizerFlags(optimizer, clip_norm=0.5)))(0.05)))
    assert any(not np.allclose(mine, other, rtol=1e-4) for mine, other in zip(jax.tree.leaves(traced), decayed, strict=True))
    if optimizer in ("sgd", "momentum", "nesterov"):  # the others scale the gradient
        assert any(not np.allclose(mine, other, rtol=1e-4) for mine, other in zip(jax.tree.leaves(traced), clipped, strict=True))


def test_momentum_of_zero_is_zero():
    """An optimizer that has momentum of its own does without it if the flag says so."""
    for name in ("lars", "sgd", "momentum", "nesterov"):
        optimizer = make_optimizer(OptimizerFlags(name, momentum=0.0))(0.1)
        state, params = optimizer.init(jnp.ones(3)), jnp.ones(3)
        first, state = optimizer.update(jnp.ones(3), state, params)
        second, _ = optimizer.update(jnp.ones(3), state, params)
        np.testing.assert_allclose(first, second, err_msg=name)


def test_defaults_are_what_the_studies_had():
    params, gradient = jnp.array([1.0, 2.0]), jnp.array([0.3, -0.1])
    expected = {
        "convergence": optax.sgd(0.02, 0.5),
        "gradient_smoothness": optax.sgd(0.02, 0.5),
        "split_backward": optax.sgd(0.02, 0.5),
        "advise": optax.sgd(0.02, momentum=0.9),
        "large_batch": optax.sgd(0.02, 0.9),
        "adabatch": optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.02, 0.9)),
        "imagenet": optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.02, 0.9)),
        "nose_game": optax.sgd(0.02, 0.0),
        "contrastive": optax.adam(0.02),
    }
    for name, theirs in expected.items():
        mine = make_optimizer(resolved(name))(0.02)
        ends = []
        for optimizer in (mine, theirs):
            p, state = params, optimizer.init(params)
            for _ in range(3):
                step, state = optimizer.update(gradient * p, state, p)
                p = optax.apply_updates(p, step)
            ends.append(np.asarray(p))
        assert (ends[0] == ends[1]).all(), name


def test_an_optimizer_from_a_file_follows_a_schedule(tmp_path):
    text = "import optax\n\ndef make(rate):\n    return optax.adam(float(rate))\n"  # a number, and no schedule
    config = OptimizerFlags(write(tmp_path, text, "mine.py").replace("make_task", "make"))
    schedule = optax.cosine_decay_schedule(0.1, 10)
    ends = []
    for optimizer in (follow(config, schedule, 0.1), optax.adam(schedule)):
        params, state = jnp.array(1.0), optimizer.init(jnp.array(1.0))
        for _ in range(5):
            step, state = optimizer.update(params, state, params)
            params = optax.apply_updates(params, step)
        ends.append(float(params))
    assert ends[0] == pytest.approx(ends[1], rel=1e-5) and ends[0] < 0.7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def make(rate):\n    return {}\n", "make returns a dict, but must return an optimizer of optax."),
        ("def make(rate):\n    return rate.x\n", "make raises AttributeError in line 2"),
        ("def mark(rate):\n    return rate\n", "mine.py has no function make; its functions are mark."),
        ("def make(:\n", "mine.py raises SyntaxError in line 1"),
    ],
)
def test_a_slip_in_an_optimizer_of_ones_own_is_one_line(text, message, tmp_path, capsys):
    file = write(tmp_path, text, "mine.py").replace("make_task", "make")
    study = STUDIES["nose_game"]
    assert message in ended(study.main, ["--optimizer", file, "--output-dir", str(tmp_path)], capsys)
    assert "there is no file" in ended(study.main, ["--optimizer", "nowhere.py:make"], capsys)


def test_an_edited_optimizer_is_another_run(tmp_path, capsys):
    study, text = STUDIES["nose_game"], "import optax\n\ndef make(rate):\n    return optax.sgd(rate)\n"
    flags = ["--quick", "--batch-sizes", "1", "12", "--seeds", "2", "--num-steps", "3", "--output-dir", str(tmp_path)]
    for content in (text, text, text.replace("sgd(rate)", "sgd(rate / 2)")):
        study.main(["--optimizer", write(tmp_path, content, "mine.py").replace("make_task", "make"), *flags])
    assert len(list(tmp_path.glob("nose_game/*"))) == 2
