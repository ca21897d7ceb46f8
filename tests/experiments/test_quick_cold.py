"""--quick of every study with every network ends within a minute on two cores, without programs compiled before."""

import os
import subprocess
import sys
import typing

import pytest

from experiments.adabatch import __main__ as adabatch
from experiments.advise import __main__ as advise
from experiments.convergence import __main__ as convergence
from experiments.critical_batch_size import __main__ as critical_batch_size
from experiments.gradient_smoothness import __main__ as gradient_smoothness
from experiments.iteration_speed import __main__ as iteration_speed
from experiments.large_batch import __main__ as large_batch
from experiments.learning_rate_grid import __main__ as learning_rate_grid
from experiments.memory import __main__ as memory
from experiments.sharpness import __main__ as sharpness
from experiments.split_backward import __main__ as split_backward
from jaxbatch.machine.cross_compiling import missing_compiler
from jaxbatch.machine.targets import find_target
from tests.conftest import ROOT
from tests.experiments.test_user_task import write

SECONDS, CORES, SLOWER = 60, 2, 1.5  # another machine, or a loaded one
STUDIES = (adabatch, advise, convergence, critical_batch_size, gradient_smoothness, iteration_speed, large_batch, learning_rate_grid, memory)
STUDIES += (sharpness, split_backward)
ALONE = ("batch_shape", "contrastive", "cross_check", "faces", "language_model", "nose_game")
NETWORKS = [
    (name_of.__name__.split(".")[-2], network) for name_of in STUDIES for network in typing.get_args(typing.get_type_hints(name_of.Config)["model"])
]
# A task whose updates take long, with many examples: with the sizes of a whole study it took three minutes.
RECURRENT = """
import jax, jax.numpy as jnp
import jaxbatch as jb

def make_task():
    x = jax.random.normal(jax.random.key(0), (5000, 20, 8))
    y = jnp.tanh(x.sum(1) @ jnp.arange(8.0) / 8)

    def init(key):
        keys = jax.random.split(key, 3)
        return [0.2 * jax.random.normal(key, shape) for key, shape in zip(keys, ((8, 32), (32, 32), (32,)))]

    def loss_fn(params, batch):
        x, y = batch
        step = lambda h, now: (jnp.tanh(now @ params[0] + h @ params[1]), None)
        return (jax.lax.scan(step, jnp.zeros((x.shape[0], 32)), x.swapaxes(0, 1))[0] @ params[2] - y) ** 2

    return jb.Task(init, loss_fn, lambda params, batch: {"loss": loss_fn(params, batch)}, (x, y), (x[:500], y[:500]))
"""
TARGETED = ("convergence", "learning_rate_grid", "split_backward", "advise", "critical_batch_size", "sharpness")


def seconds_on_two_cores(folder, study, *flags):
    """The processor time of a study as a process with empty caches, shared by two cores."""
    caches = {"XDG_CACHE_HOME": f"{folder}/cache", "JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled", "HOME": f"{folder}/home"}
    settings = {name: value for name, value in os.environ.items() if name not in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")}
    command = [sys.executable, "-m", f"experiments.{study}", "--quick", *flags, "--output-dir", f"{folder}/results"]
    with open(folder / "out", "w+") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=settings | caches | {"PYTHONPATH": str(ROOT)}, stdout=out, stderr=out)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # else the process counts as running when it is forgotten
        out.seek(0)
        assert process.returncode == 0, out.read()[-2000:]
    return (usage.ru_utime + usage.ru_stime) / CORES


@pytest.mark.slow
@pytest.mark.parametrize(("study", "network"), NETWORKS)
def test_a_network(study, network, tmp_path):
    data = ["--dataset", "generated"] if network == "transformer" else []
    assert seconds_on_two_cores(tmp_path, study, "--model", network, *data) < SECONDS * SLOWER


@pytest.mark.slow
@pytest.mark.parametrize("study", ALONE)
def test_a_study_with_one_network(study, tmp_path):
    assert seconds_on_two_cores(tmp_path, study) < SECONDS * SLOWER


@pytest.mark.slow
@pytest.mark.skipif(missing_compiler(find_target("t4")) is not None, reason="needs the extra cuda-compiler")
def test_the_bound_of_adabatch(tmp_path):
    assert seconds_on_two_cores(tmp_path, "adabatch_bound") < SECONDS * SLOWER


@pytest.mark.slow
@pytest.mark.parametrize("study", [name.__name__.split(".")[-2] for name in STUDIES if name is not memory])
def test_a_task_of_ones_own(study, tmp_path):
    flags = ["--task", write(tmp_path, RECURRENT, "recurrent.py"), *(["--target", "loss<0.2"] if study in TARGETED else [])]
    flags += ["--train-loss", "0.5"] if study == "sharpness" else []
    assert seconds_on_two_cores(tmp_path, study, *flags) < SECONDS * SLOWER
