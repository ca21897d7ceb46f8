"""The cross-check: it passes here, every injected fault is caught and named, saved files compare, studies refuse a bad machine."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbatch as jb
from experiments import cross_check, study
from experiments.checks import layers as layer_cases
from experiments.checks import library, networks, run
from experiments.checks.cases import all_cases
from experiments.checks.run import run_cases
from experiments.checks.truth import Rounding, Tape
from experiments.cross_check_report import closing, word
from jaxbatch import layers
from tests import reference
from tests.conftest import ROOT


def forget():
    """Functions and programs are kept between runs; a fault must meet neither."""
    for module in (layer_cases, library, networks, run):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
    jax.clear_caches()


@pytest.fixture
def fresh():
    """Nothing kept, before and after."""
    forget()
    yield
    forget()


def records_of(*names, precisions=("float32",), seed=0, quick=True):
    cases = [case for case in all_cases() if (not names or case.name in names) and (case.quick or not quick)]
    return [output.record for output in run_cases(cases, precisions, seed)]


def wrong(records):
    return {record["computation"] for record in records if not record["passed"]}


def flipped(monkeypatch):
    real = layers.conv
    monkeypatch.setattr(layers, "conv", lambda x, kernel, **settings: real(x, kernel[:, ::-1, ::-1], **settings))


def a_thousandth_off(monkeypatch):
    real = jb.accumulated_gradient
    monkeypatch.setattr(jb, "accumulated_gradient", lambda *a: jax.tree.map(lambda leaf: leaf * (1 + 1e-3), real(*a)))


def without_the_last(monkeypatch):
    monkeypatch.setattr(layer_cases, "total", lambda x: jnp.sum(x[:-1]) if x.size == 32_769 else jnp.sum(x))


def groups_swapped(monkeypatch):
    real = jb.group_gradients
    monkeypatch.setattr(jb, "group_gradients", lambda *a: jax.tree.map(lambda leaf: leaf[jnp.array([1, 0, 2, 3])], real(*a)))


def gradient_beside_the_largest(monkeypatch):
    real = layers.max_pool

    def shifted(x, window, *, layout):
        @jax.custom_vjp
        def pool(x):
            return real(x, window, layout=layout)

        pool.defvjp(lambda x: (pool(x), x), lambda x, dy: (jnp.roll(jax.vjp(lambda x: real(x, window, layout=layout), x)[1](dy)[0], 1, 2),))
        return pool(x)

    monkeypatch.setattr(layers, "max_pool", shifted)


def rounded_to_bfloat16(monkeypatch):
    rough = lambda x, kernel: (x.astype(jnp.bfloat16) @ kernel.astype(jnp.bfloat16)).astype(x.dtype)
    monkeypatch.setattr(layer_cases, "_dense", lambda precision: layer_cases._with_gradients(rough))


def of_another_type(monkeypatch):
    rough = lambda x, kernel: (x @ kernel).astype(jnp.bfloat16)
    monkeypatch.setattr(layer_cases, "_dense", lambda precision: layer_cases._with_gradients(rough))


def not_a_number(monkeypatch):
    monkeypatch.setattr(layer_cases, "total", lambda x: jnp.sum(x) * jnp.where(x.size == 7, jnp.nan, 1))


@pytest.mark.parametrize(
    ("inject", "names"),
    [
        (flipped, {"convolution"}),
        (a_thousandth_off, {"accumulated gradient"}),
        (without_the_last, {"sum", "sum of whole numbers"}),
        (groups_swapped, {"group gradients"}),
        (gradient_beside_the_largest, {"max-pool"}),
        (rounded_to_bfloat16, {"dense"}),
        (of_another_type, {"dense"}),
        (not_a_number, {"sum"}),
    ],
)
def test_faults_are_caught_and_named(inject, names, fresh, monkeypatch):
    rows = sorted(names | {"random bits"})
    assert wrong(records_of(*rows)) == set()
    forget()
    inject(monkeypatch)
    found = [record for record in records_of(*rows) if not record["passed"]]
    assert {record["computation"] for record in found} == names
    assert all(record["where"] or record["failure"] for record in found)


def test_the_dropped_element_is_told_with_its_size(fresh, monkeypatch):
    without_the_last(monkeypatch)
    bad = [record for record in records_of("sum") if not record["passed"]]
    assert {record["size"] for record in bad} == {"32,769"} and bad[0]["where"].startswith("output[0]: ")


SEVERAL = """
import jax
from experiments.checks import library, run
from experiments.checks.cases import all_cases
from jaxbatch.gradients import accumulation

def bad():
    cases = [case for case in all_cases() if "several devices" in case.name]
    assert len(cases) == 8
    return {out.record["computation"] for out in run.run_cases(cases, ("float32", "float64"), 0) if not out.record["passed"]}

before = bad()
library._shared_train.cache_clear()
real = accumulation.mean_of_sum
accumulation.mean_of_sum = lambda total, count, like: real(total, count + 1, like)
print(len(before), sorted(bad()))
"""


def test_a_mean_over_the_wrong_count_on_several_devices_is_caught():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SEVERAL], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    names = [f"steps on several devices, {method}" for method in ("jit", "pmap")]
    assert done.stdout.strip() == f"0 {names}"


def test_the_twin_s_convolution_is_that_of_the_definition():
    random = np.random.default_rng(0)
    for strides, padding in ((1, 0), (2, 1), (3, 2)):
        x, kernel = random.normal(size=(2, 7, 7, 3)), random.normal(size=(5, 3, 3, 3))
        tape = Tape()
        out = tape.conv(tape.constant(x), tape.constant(kernel), strides, padding)
        np.testing.assert_allclose(out.value, reference.conv(x, kernel, strides, padding), rtol=1e-12)


def test_the_twin_s_gradients_are_differences_of_its_losses():
    random = np.random.default_rng(0)
    x, kernel, scale, bias = random.normal(size=(3, 6, 6, 2)), random.normal(size=(4, 3, 3, 2)), random.normal(size=4), random.normal(size=4)
    labels = np.array([0, 3, 1])

    def loss(x, kernel, scale, bias):
        tape = Tape()
        inputs = [tape.constant(one) for one in (x, kernel, scale, bias)]
        y = tape.max_pool(tape.relu(tape.batch_norm(tape.conv(inputs[0], inputs[1], 2, 1), *inputs[2:])), 2, 1)
        losses = tape.cross_entropy(tape.mean_pixels(y), labels)
        tape.backward(losses, np.ones(3))
        return losses.value.sum(), [one.gradient for one in inputs]

    given = (x, kernel, scale, bias)
    _, gradients = loss(*given)
    for place, gradient in enumerate(gradients):
        direction = random.normal(size=gradient.shape)
        ahead, behind = (loss(*(one + step * direction if n == place else one for n, one in enumerate(given)))[0] for step in (1e-6, -1e-6))
        np.testing.assert_allclose((ahead - behind) / 2e-6, (gradient * direction).sum(), rtol=1e-6)


def test_rounding_on_a_tape_is_of_the_size_of_the_sum():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(50, 400)), random.normal(size=(400, 60))
    tape = Tape(Rounding(1e-6, 0.0), random)
    noisy = tape.dense(tape.constant(a), tape.constant(b)).value
    relative = np.linalg.norm(noisy - a @ b) / np.linalg.norm(a @ b)
    assert 0.9 < relative / (20 * 1e-6) < 1.1  # the root of 400


def test_words_of_the_table():
    base = {"passed": True, "tf32": False, "error": 1.0, "bound": 4.0}
    fine = base | {"error": 1e-7, "bound": 4e-7}
    assert word([fine]) == "ok 0.25" and word([base]) == "bound > 1"
    assert word([fine, fine | {"passed": False, "tf32": True}]) == "tf32"
    assert word([fine, fine | {"passed": False, "error": float("nan")}]) == "WRONG"
    place = {"computation": "sum", "precision": "float32"}
    machines = {"cpu": {"device": "a CPU", "jax": "1", "jaxlib": "2"}}
    assert "All 1 computations on cpu (a CPU, jaxlib 2) agree" in closing([fine | place], machines)
    assert "1 of 1 computations" in closing([fine | place | {"passed": False}], machines)


def test_a_file_is_compared_with(tmp_path, capsys):
    arguments = ["--quick", "--only", "dense", "--output-dir", str(tmp_path)]
    file = tmp_path / "here.npz"
    cross_check.main([*arguments, "--save", str(file)])
    cross_check.main([*arguments, "--against", str(file)])
    assert "4 bit-equal, 0 within, 0 apart, of 4" in capsys.readouterr().out
    with np.load(file) as saved:
        arrays = {name: saved[name] for name in saved.files}
    about = json.loads(str(arrays.pop("about")))
    about["records"][0]["digest"] = about["records"][1]["digest"] = "another"
    arrays["output_0"] = arrays["output_0"] * (1 + 1e-8)
    arrays["output_1"] = arrays["output_1"] * (1 + 1e-3)
    np.savez(file, about=np.array(json.dumps(about)), **arrays)
    with pytest.raises(SystemExit) as stopped:
        cross_check.main([*arguments, "--against", str(file)])
    out = capsys.readouterr().out
    assert stopped.value.code == 1 and "2 bit-equal, 1 within, 1 apart, of 4" in out and "APART: dense" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "float16"], "--precision float16 must be of float64, float32, bfloat16, default."),
        (["--only", "nothing"], "--only nothing: no computation has this in its name."),
        (["--backend", "abacus"], "--backend abacus must be cpu, gpu or tpu."),
        (["--backend", "tpu"], "--backend tpu: JAX finds only cpu here."),
        (["--seed", "-1"], "--seed -1 must be at least 0."),
        (["--only", "random bits", "--against", "nowhere.npz"], "nowhere.npz"),
        (["--only", "random bits", "--against", "README.md"], "README.md is no file of --save"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        cross_check.main(["--quick", *arguments, "--output-dir", str(tmp_path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_wrong_path_ends_before_the_work_and_removes_nothing(tmp_path, capsys, monkeypatch):
    arguments = ["--quick", "--only", "random bits", "--output-dir", str(tmp_path)]
    cross_check.main(arguments)
    (figure,) = tmp_path.rglob("figure.png")
    figure.with_name("records.jsonl").write_text("damaged\n")  # written anew every time, so no reason to stop
    with pytest.raises(SystemExit) as stopped:
        cross_check.main([*arguments, "--save", str(tmp_path)])
    assert stopped.value.code == 2 and f"--save {tmp_path}: no file can be written there" in capsys.readouterr().err
    cross_check.main([*arguments, "--save", str(tmp_path / "random.npz")])
    with pytest.raises(SystemExit):  # known only in the end: the new figure is there
        cross_check.main(["--quick", "--only", "updates of sgd", "--output-dir", str(tmp_path), "--against", str(tmp_path / "random.npz")])
    assert "random.npz: it has no computation of this run" in capsys.readouterr().err and len(list(tmp_path.rglob("figure.png"))) == 2
    monkeypatch.setattr(cross_check, "check_here", lambda *a: pytest.fail("computed first"))
    for wrong_path in (["--against", str(tmp_path / "nothing.npz")], ["--save", str(tmp_path / "none" / "a.npz")]):
        with pytest.raises(SystemExit) as stopped:
            cross_check.main([*arguments, *wrong_path])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and wrong_path[1] in error
    assert figure.exists()


def test_other_inputs_are_not_compared(tmp_path, capsys):
    arguments = ["--quick", "--only", "random bits", "--output-dir", str(tmp_path)]
    cross_check.main([*arguments, "--save", str(tmp_path / "a.npz")])
    with pytest.raises(SystemExit) as stopped:
        cross_check.main([*arguments, "--seed", "3", "--against", str(tmp_path / "a.npz")])
    assert stopped.value.code == 2 and "its inputs are those of --seed 0, not 3" in capsys.readouterr().err


def test_a_study_stops_on_a_machine_that_fails_and_writes_down_what_it_found(tmp_path, monkeypatch):
    config = study.StudyConfig(output_dir=str(tmp_path))
    run = study.open_study("any", config, None)
    found = json.loads((run.path / "config.json").read_text())["provenance"]["backend_checks"]
    assert found["matrix product"]["passed"] and 0 < found["matrix product"]["error"] < found["matrix product"]["bound"]
    bad = (jb.BackendCheck("a sum", float("nan"), 1e-6), jb.BackendCheck("a product", 0.0, 1e-6))
    monkeypatch.setattr(jb, "check_backend", lambda: bad)
    with pytest.raises(ValueError, match=r"wrong numbers \(a sum: relative error nan.*--no-check-backend goes on"):
        study.open_study("any", config, None)
    run = study.open_study("other", dataclasses.replace(config, check_backend=False), None)
    found = json.loads((run.path / "config.json").read_text())["provenance"]["backend_checks"]
    assert found["a sum"] == {"error": None, "bound": 1e-6, "passed": False}


def test_the_library_s_own_check_notices(monkeypatch):
    real = jb.backend.group_gradients
    monkeypatch.setattr(jb.backend, "group_gradients", lambda *a: real(*a) * (1 + 1e-3))
    jb.check_backend.cache_clear()
    try:
        assert [check.name for check in jb.check_backend() if not check.passed] == ["gradients of groups"]
    finally:
        jb.check_backend.cache_clear()


@pytest.mark.slow
def test_no_false_alarm_with_fifty_other_seeds():
    for seed in range(1, 51):
        assert wrong(records_of(seed=seed, precisions=("float64", "float32", "bfloat16"))) == set(), seed
