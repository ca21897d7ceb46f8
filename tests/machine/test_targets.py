"""Targets: their figures, names, and what is said when a compiler is missing."""

import sys

import jax
import pytest

import jaxbatch as jb
from jaxbatch.machine import cross_compiling, platform
from jaxbatch.machine.cross_compiling import CompiledProgram, compile_for, missing_compiler
from jaxbatch.machine.platform import compiled_platform, compiling_for
from jaxbatch.machine.targets import as_bytes, find_target, format_bytes, memory_of_machine


@pytest.mark.parametrize("name", jb.TARGETS)
def test_every_target_is_complete_and_has_sources(name):
    target = jb.TARGETS[name]
    assert target.name == name
    assert 0 < target.usable <= 1.01 * target.memory  # v5p's page rounds its 95.74 GiB down
    assert target.memory > 8 * 2**30
    assert 1e11 < target.bandwidth < 1e13
    assert target.peak["float32"] * 2 >= 1e13 and target.peak["bfloat16"] >= target.peak["float32"]
    assert target.interconnect > 1e10
    for figure in ("memory", "usable", "bandwidth", "peak", "interconnect", "topology"):
        assert target.sources[figure], figure


def test_the_machines_of_the_studies_are_there():
    wanted = "gtx1080ti p100 t4 l4 a100-40 a100-80 h100 h200 b200 v4 v5e v5p v6e"
    assert set(wanted.split()) <= set(jb.TARGETS)


@pytest.mark.parametrize(("text", "name"), [("H100", "h100"), ("A100 40", "a100-40"), ("a100_80", "a100-80"), ("V5E", "v5e")])
def test_names_are_found_however_they_are_written(text, name):
    assert find_target(text).name == name


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("a100", "a100-40"),
        ("h1000", "h100"),
        ("1080ti", "gtx1080ti"),
        ("v5", "v5e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("gpu", "p100"),
        ("tpu", "v5e"),
    ],
)
def test_unknown_names_get_near_misses(text, near):
    with pytest.raises(ValueError, match=rf"target='{text}' is unknown. Similar: .*{near}") as error:
        find_target(text)
    assert "v6e" in str(error.value)


def test_a_changed_target_is_used_as_it_is():
    mine = jb.TARGETS["h100"]._replace(name="mine", usable=1000)
    assert find_target(mine) is mine


def test_here_is_where_jax_computes():
    here = find_target("here")
    assert here.platform == jax.default_backend()
    assert here.is_here
    if here.platform == "cpu":
        assert here.usable == memory_of_machine()
        assert find_target("cpu").usable == here.usable


@pytest.mark.parametrize(
    ("text", "count"), [("8GiB", 2**33), ("8 gib", 2**33), ("500MB", 500_000_000), ("1.5k", 1500), (12, 12), ("2e9", 2_000_000_000)]
)
def test_budgets_are_read(text, count):
    assert as_bytes(text) == count


@pytest.mark.parametrize("text", ["", "8 apples", "-1GiB", "0", "GiB", "1.2.3GB"])
def test_budgets_that_are_none(text):
    with pytest.raises(ValueError, match="not an amount of memory"):
        as_bytes(text)


def test_bytes_are_written_for_people():
    assert [format_bytes(n) for n in (0, 1023, 1024, 2**20, 1.5 * 2**30, -(2**31))] == [
        "0 B",
        "1,023 B",
        "1.0 KiB",
        "1.0 MiB",
        "1.50 GiB",
        "-2.00 GiB",
    ]


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(cross_compiling, "is_installed", lambda name: False)
    for name, extra in (("h100", "cuda-compiler"), ("v5e", "tpu-compiler")):
        assert missing_compiler(find_target(name)) == (f"target='{name}' needs its compiler (but not the device): pip install 'jaxbatch[{extra}]'")
        with pytest.raises(ValueError, match=extra):
            compile_for(find_target(name), lambda x: x, jax.numpy.ones(3))
    assert missing_compiler(find_target("cpu")) is None


def test_total_is_the_larger_of_sum_and_peak():
    parts = {"arguments": 100, "results": 50, "aliased": 40, "temporaries": 1000, "seconds": 0.0}
    assert CompiledProgram(**parts, peak=10).total == 1110
    assert CompiledProgram(**parts, peak=2000).total == 2000


def test_functions_are_traced_anew_for_another_platform():
    seen = []

    @jax.jit
    def traced(x):
        seen.append(compiled_platform())
        return x

    for _ in range(2):
        traced.lower(1.0)
        with compiling_for("tpu"):
            traced.lower(1.0)
    assert seen == [jax.default_backend(), "tpu"]
    assert compiled_platform() == jax.default_backend()


def test_layers_and_tasks_choose_for_the_platform_that_is_compiled_for():
    task = jb.classification_task(jb.SimpleCNN(), jb.load_dataset("digits"))
    assert (task.microbatch_size, task.cpu_microbatch_size) == (None, 64)
    found = {}
    for name in ("cpu", "gpu", "tpu"):
        with compiling_for(name):
            batch = jax.tree.map(lambda leaf: leaf[:4], task.train_data)
            params = jax.eval_shape(task.init, jax.random.key(0))
            found[name] = task.examples_at_a_time, "conv_general_dilated" in str(jax.make_jaxpr(task.loss_fn)(params, batch))
    assert found == {"cpu": (64, False), "gpu": (None, True), "tpu": (None, True)}


def test_absent_accelerators_are_skipped_only_where_a_compiler_is_and_no_device(monkeypatch, tmp_path):
    installed = {"jax_plugins.xla_cuda12"}
    monkeypatch.setattr(platform, "is_installed", installed.__contains__)
    monkeypatch.setitem(sys.modules, "jax_plugins.xla_cuda12", object())  # is not replaced; and restored afterwards
    before = jax.config.jax_platforms
    try:
        assert platform.skip_absent_accelerators(tmp_path)
        (tmp_path / "dev").mkdir()
        (tmp_path / "dev" / "nvidia0").touch()
        assert not platform.skip_absent_accelerators(tmp_path)
        (tmp_path / "dev" / "nvidia0").unlink()
        installed.clear()
        assert not platform.skip_absent_accelerators(tmp_path)
    finally:
        jax.config.update("jax_platforms", before)
