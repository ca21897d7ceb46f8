"""Programs compiled for an H100 and a TPU v5e that are not here. Skipped where their compilers are not installed."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import jaxbatch as jb
from experiments.cross_check import compiled as cross_check_compiled
from experiments.cross_check.cases.compile_for import Job, find_suspicious, is_explained
from jaxbatch.advice.largest_batch import find_largest_batch
from jaxbatch.machine.cross_compiling import CompilationError, compile_for, missing_compiler, target_mesh
from jaxbatch.machine.platform import compiling_for
from jaxbatch.training.classification import task_of_model
from jaxbatch.training.devices import over_devices
from jaxbatch.training.step_programs import step_programs
from jaxbatch.training.steps import make_task_step
from jaxbatch.training.train_state import state_shapes

H100, V5E = jb.find_target("h100"), jb.find_target("v5e")
needs_cuda = pytest.mark.skipif(missing_compiler(H100) is not None, reason="needs the extra cuda-compiler")
needs_tpu = pytest.mark.skipif(missing_compiler(V5E) is not None, reason="needs the extra tpu-compiler")
both = pytest.mark.parametrize("target", [pytest.param(H100, marks=needs_cuda), pytest.param(V5E, marks=needs_tpu)], ids=lambda one: one.name)
MOMENTUM = optax.sgd(0.01, 0.9)


def shapes_task(model, shape, count):
    blank = jb.Dataset("shapes", None, None, None, None, 10, (0.5,) * shape[2], (0.5,) * shape[2])
    data = (jax.ShapeDtypeStruct((count, *shape), np.uint8), jax.ShapeDtypeStruct((count,), np.int32))
    return task_of_model(model, shape, blank, data, None, None)


def step_profile(model, shape, sizes, target):
    """Steps on a batch that is an argument, as in the table of figures that they are compared with."""
    profile = {}
    for size in sizes:
        task = shapes_task(model, shape, size)
        with compiling_for(target.platform):
            step = make_task_step(task, MOMENTUM, size)
            arguments = lambda size, task=task: (state_shapes(task, MOMENTUM), task.train_data)
            profile |= jb.memory_profile(step, [size], target=target, arguments=arguments, donate=[0])
    return {size: memory.total for size, memory in profile.items()}


@both
def test_a_program_compiles_and_the_backend_stays(target):
    before = jax.default_backend(), jax.devices()
    program = compile_for(target, lambda w, x: jnp.tanh(x @ w).sum(), jnp.ones((64, 64)), jnp.ones((1024, 64)), with_text=True)
    assert 64 * 64 * 4 + 1024 * 64 * 4 <= program.arguments < 2 * (64 * 64 + 1024 * 64) * 4
    assert program.total >= program.arguments and "HloModule" in program.text
    assert (jax.default_backend(), jax.devices()) == before
    assert float(jnp.ones(3).sum()) == 3.0


@both
def test_keys_constants_and_donated_arguments_pass(target):
    constant = jnp.arange(100_000.0)
    function = lambda key, x: x + constant + jax.random.normal(key, (100_000,))
    key, x = jax.random.key(0), jnp.ones(100_000)
    kept, donated = (compile_for(target, function, key, x, donate=donate) for donate in ((), (1,)))
    assert donated.aliased >= 400_000 > kept.aliased
    assert donated.total <= kept.total
    assert kept.arguments >= 800_000  # the constant is an argument too


@both
def test_float64_is_float64_there_too(target):
    with jax.enable_x64(True):
        wide = compile_for(target, lambda x: x * 2, jnp.ones(100_000, jnp.float64))
    narrow = compile_for(target, lambda x: x * 2, jnp.ones(100_000, jnp.float32))
    assert wide.arguments >= 1.9 * narrow.arguments


@needs_cuda
@pytest.mark.parametrize(
    "name", ["gtx1080ti", "p100", "v100", "t4", "l4", "a10g", "rtx3090", "rtx4090", "a6000", "a100-40", "a100-80", "h200", "b200"]
)
def test_every_gpu_compiles(name):
    convolve = lambda kernel, x: jax.lax.conv(x, kernel, (1, 1), "SAME")
    program = compile_for(jb.find_target(name), convolve, jnp.ones((8, 4, 3, 3)), jnp.ones((16, 4, 16, 16)))
    assert program.total > 0


@needs_tpu
@pytest.mark.parametrize("name", ["v4", "v5p", "v6e"])
def test_every_tpu_compiles(name):
    assert compile_for(jb.find_target(name), lambda x: x @ x, jnp.ones((256, 256))).total > 0


@pytest.mark.slow
@needs_cuda
def test_figures_for_h100():
    """The same step's figures as compiled elsewhere with the same compiler (MiB, at the sizes given)."""
    known = {128: 196, 1000: 1503, 2048: 3075, 16384: 24583}
    found = step_profile(jb.ResNet20(), (32, 32, 3), known, H100)
    assert {size: total / 2**20 for size, total in found.items()} == pytest.approx(known, rel=0.02)
    slope = (found[2048] - found[128]) / (2048 - 128)
    assert found[1000] == pytest.approx(found[128] + slope * (1000 - 128), rel=0.01)
    assert found[16384] == pytest.approx(found[128] + slope * (16384 - 128), rel=0.01)


@pytest.mark.slow
@needs_cuda
def test_the_largest_batch_is_that_of_bisection_in_few_compilations():
    task = shapes_task(jb.SimpleCNN(), (28, 28, 1), 1000)
    found = find_largest_batch(task, optimizer=MOMENTUM, target="h100", budget="300MiB", margin=0)
    assert len(found.profile) <= 6
    low, high = 1, 2**14
    while high - low > 1:
        middle = (low + high) // 2
        fits = jb.memory_profile(task, [middle], optimizer=MOMENTUM, target="h100")[middle].total <= found.limit
        low, high = (middle, high) if fits else (low, middle)
    assert found.batch_size == low


@needs_tpu
def test_the_tpu_compiler_says_what_a_program_too_large_would_need():
    size = 5 * 2**30 // 4
    program = compile_for(V5E, lambda x, y: (x + y, x - y), *[jax.ShapeDtypeStruct((size,), jnp.float32)] * 2)
    assert program.refused
    assert program.total >= 19 * 2**30


@both
def test_data_parallel_steps_compile_for_four_devices(target):
    task = shapes_task(jb.MLP((32,)), (28, 28, 1), 100)
    with compiling_for(target.platform):
        (program,) = step_programs(task, MOMENTUM, 64, num_devices=4)
    layout = program.layout
    compiled = compile_for(target, layout.function, *layout.arguments.values(), split=layout.is_split, num_devices=4, with_text=True)
    assert "all-reduce" in compiled.text
    assert "all-gather" not in compiled.text


@needs_tpu
def test_devices_that_no_slice_has():
    function, _ = over_devices(lambda x: x, target_mesh(6), "jit", [True])
    with pytest.raises(ValueError, match="num_devices=6"):
        compile_for(V5E, function, jnp.ones((6, 3)), split=[True], num_devices=6)


@needs_cuda
def test_what_a_compiler_cannot_is_an_error_that_names_it():
    function = lambda x: jax.lax.linalg.schur(x)[0]  # JAX has it for CPU only
    with pytest.raises(CompilationError, match="(?i)schur"):
        compile_for(H100, function, jnp.ones((4, 4)))


@pytest.mark.slow
@needs_cuda
def test_nothing_that_the_compilers_say_reaches_the_user(tmp_path):
    environ = {key: value for key, value in os.environ.items() if key not in ("JAX_PLATFORMS", "TF_CPP_MIN_LOG_LEVEL")}
    command = [sys.executable, "-m", "experiments.memory", "--model", "mlp", "--targets", "h100", "--quick", "--output-dir", str(tmp_path)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the largest batch that fits is" in done.stdout
    assert "not compared with a real NVIDIA H100" in done.stdout


@pytest.mark.slow
@needs_cuda
def test_cross_check_compiles_for_targets(tmp_path):
    flags = ["--compile-for", "h100", "--quick", "--only", "simple_cnn", "--output-dir", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "experiments.cross_check", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 of 7 programs compile, 0 with something unexplained" in done.stdout


def test_cross_check_names_a_target_that_is_none(tmp_path):
    command = [sys.executable, "-m", "experiments.cross_check", "--compile-for", "h1000", "--output-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "h1000" in done.stderr and "h100" in done.stderr


@needs_cuda
@pytest.mark.parametrize(
    ("function", "shapes", "dtype", "found"),
    [
        (lambda x, y: x @ y, ((512, 512), (512, 512)), "float32", "products below float32"),
        (
            lambda x, y: jax.vmap(lambda x, y: jax.lax.conv(x[None], y, (1, 1), "SAME"))(x, y),
            ((8, 4, 16, 16), (8, 8, 4, 3, 3)),
            "float32",
            "grouped convolutions",
        ),
        (lambda x, y: x.astype("float64") @ y.astype("float64"), ((64, 64), (64, 64)), "float32", "float64"),
        (lambda x, y: jax.lax.dot(x, y, precision="highest"), ((512, 512), (512, 512)), "float32", ""),
    ],
)
def test_what_is_suspicious_is_found(function, shapes, dtype, found):
    with jax.enable_x64(found == "float64"):
        program = compile_for(H100, function, *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes), with_text=True)
    told = find_suspicious(program.text, Job("", "plain", dtype, None, (4096, 28, 28, 1)))
    assert found in " ".join(told) if found else not told
    assert is_explained({"target": "h100", "step": "plain", "suspicious": told}) == (not found)


@needs_cuda
def test_a_batch_that_is_gathered_across_devices_is_found():
    function, _ = over_devices(lambda x: jax.lax.all_gather(x, "devices").sum((0, 1)), target_mesh(4), "jit", [True])
    program = compile_for(H100, function, jax.ShapeDtypeStruct((4, 256, 1024), jnp.float32), split=[True], num_devices=4, with_text=True)
    assert "all-gather" in " ".join(find_suspicious(program.text, Job("", "plain, 2 × 2", "float32", None, (1,))))


def test_a_step_that_does_not_compile_is_a_red_line_and_exit_code_1(tmp_path, monkeypatch, capsys):
    def refuse(target):
        raise CompilationError("no such operation")

    monkeypatch.setattr(cross_check_compiled, "all_jobs", lambda quick, only: [Job("mlp", "plain", "float32", refuse, (1,))])
    config = SimpleNamespace(quick=True, only="", compile_for=("h100",), output_dir=str(tmp_path))
    assert not cross_check_compiled.compile_all(config, Console(width=200))
    text = capsys.readouterr().out
    assert "does not compile: h100: mlp, plain, float32: no such operation" in text
    assert "0 of 1 programs compile" in text
