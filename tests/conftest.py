"""Test settings: shapes and types are checked at run time, silent rank promotion is an error."""

import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile

# Compiling is most of the tests' time; the studies that they start as processes compile the same programs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "jaxbatch-tests-compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")  # the smallest are compiled sooner than written
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA:CPU logs long false alarms when it reads that cache

import jaxtyping

import tests.typechecker  # noqa: F401 (the hook below finds it by name)

# Before anything imports jaxbatch: every jaxtyping annotation becomes a run-time check.
jaxtyping.install_import_hook("jaxbatch", "tests.typechecker.check")

import jax
import numpy as np
import PIL.Image
import pytest

from tests.long_tests import (  # noqa: F401
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_runtest_logreport,
    pytest_runtest_setup,
    pytest_runtest_teardown,
    pytest_sessionfinish,
)

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).resolve().parents[1]


QUICK_TO_COMPILE = "--xla_cpu_use_fusion_emitters=false"  # XLA:CPU's older code generator, twice as quick for small programs


def pytest_configure(config):
    """All but the slow tests compile without most optimizations, which is quicker; the slow ones compile as users do.

    ``JAX_DISABLE_MOST_OPTIMIZATIONS=0`` before the command makes the default tests do so too.
    """
    if config.option.markexpr in ("not slow and not long", "long", "not slow"):
        quick = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1").lower() in ("1", "true", "yes", "on")  # for processes, too
        jax.config.update("jax_disable_most_optimizations", quick)
        flags = os.environ.get("XLA_FLAGS", "")
        if quick and not hasattr(config, "workerinput") and "fusion_emitters" not in flags and knows(QUICK_TO_COMPILE):
            os.environ["XLA_FLAGS"] = f"{flags} {QUICK_TO_COMPILE}".strip()  # workers and processes inherit it


def knows(flag: str) -> bool:
    """Whether this jaxlib has a flag; it ends a process that gives it another."""
    return not subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"], env={**os.environ, "XLA_FLAGS": flag}, capture_output=True
    ).returncode


@contextlib.contextmanager
def shapes_unchecked():
    """Within it, annotations of shapes are not checked, so that the library's own message is seen."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def optimized():
    """Within a test, programs compiled as users' are."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def on_four_devices(script: str):
    """What a script prints as JSON in its last line, in a process with four virtual devices, because their number is set once for all."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def x64():
    """Float64 within a test, for oracles."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def real_data_dir() -> pathlib.Path:
    """The folder of official files, or a skip that says so."""
    folder = os.environ.get("JAXBATCH_DATA_DIR")
    if not folder or not pathlib.Path(folder).is_dir():
        pytest.skip("needs official files: set JAXBATCH_DATA_DIR to a folder that holds them")
    return pathlib.Path(folder)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    """An empty cache folder and no data folder from outside."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("JAXBATCH_DATA_DIR", raising=False)
    return tmp_path / "cache" / "jaxbatch"


@pytest.fixture(scope="session")
def problem():
    """A two-layer network on random data as plain functions: ``(loss_fn, params, batch)`` of 24 examples."""
    return make_problem(24)


def make_problem(batch_size: int, dtype=np.float32, seed: int = 0):
    """A model that is a bare function of a dict of arrays; one loss per example."""
    random = np.random.default_rng(seed)
    params = {
        "hidden": {"w": random.normal(size=(5, 7)).astype(dtype), "b": random.normal(size=7).astype(dtype)},
        "out": random.normal(size=(7, 3)).astype(dtype),
    }
    batch = {
        "x": random.normal(size=(batch_size, 5)).astype(dtype),
        "y": random.normal(size=(batch_size, 3)).astype(dtype),
    }

    def loss_fn(params, batch):
        hidden = jax.numpy.tanh(batch["x"] @ params["hidden"]["w"] + params["hidden"]["b"][None])
        return ((hidden @ params["out"] - batch["y"]) ** 2).sum(-1)

    as_jax = lambda tree: jax.tree.map(jax.numpy.asarray, tree)
    return loss_fn, as_jax(params), as_jax(batch)


def make_weighted(batch_size: int, dtype=np.float64, seed: int = 0, tokens: int = 6):
    """Sequences of tokens, some of which count: ``(loss_fn, token_loss, params, batch)``; every fourth and fifth has none that does."""
    random, (_, params, _) = np.random.default_rng(seed), make_problem(1, dtype, seed)
    lengths = np.where(np.arange(batch_size) % 5 < 3, random.integers(1, tokens + 1, batch_size), 0)
    batch = {
        "x": random.normal(size=(batch_size, tokens, 5)).astype(dtype),
        "y": random.normal(size=(batch_size, tokens, 3)).astype(dtype),
        "counts": np.arange(tokens)[None] < lengths[:, None],
    }

    def token_loss(params, batch):
        hidden = jax.numpy.tanh(batch["x"] @ params["hidden"]["w"] + jax.numpy.expand_dims(params["hidden"]["b"], range(batch["x"].ndim - 1)))
        return ((hidden @ params["out"] - batch["y"]) ** 2).sum(-1)

    def loss_fn(params, batch):
        import jaxbatch as jb  # not before the hook

        return jb.Weighted(jax.numpy.where(batch["counts"], token_loss(params, batch), 0).sum(1), batch["counts"].sum(1))

    return loss_fn, token_loss, params, jax.tree.map(jax.numpy.asarray, batch)


def photograph(random, label, size=None):
    """A noisy image of one colour, as JPEG bytes."""
    height, width = size or random.integers(20, 60, 2)
    pixels = random.integers(0, 60, (height, width, 3))
    pixels[..., label] += 190
    file = io.BytesIO()
    PIL.Image.fromarray(pixels.astype(np.uint8)).save(file, "jpeg", quality=90)
    return file.getvalue()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """``colours``: 36 training and 9 validation images of 3 classes in class folders."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3)):
        for label in range(3):
            folder = root / "colours" / split / f"class_{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number:02d}.JPEG").write_bytes(photograph(random, label))
    return root


@pytest.fixture(scope="session")
def prepared_images(tmp_path_factory):
    """The same form as ``imagenet2012`` in small, prepared by TFDS as array_record without TensorFlow."""
    pytest.importorskip("array_record")
    import tensorflow_datasets as tfds

    root, random = tmp_path_factory.mktemp("prepared"), np.random.default_rng(1)
    with tfds.core.registered.skip_registration():

        class Imagenet2012(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("5.1.0")

            def _info(self):
                features = {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(num_classes=3),
                    "file_name": tfds.features.Text(),
                }
                return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

            def _split_generators(self, manager):
                return {"train": self._generate_examples(36), "validation": self._generate_examples(9)}

            def _generate_examples(self, count):
                for number in range(count):
                    blob = io.BytesIO(photograph(random, number % 3))
                    yield number, {"image": blob, "label": number % 3, "file_name": f"{number}.JPEG"}

        Imagenet2012(data_dir=str(root), file_format="array_record").download_and_prepare()
    return root
