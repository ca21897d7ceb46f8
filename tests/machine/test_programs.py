"""Programs compiled ahead, in the background, once for their text, and kept on disk."""

import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxbatch.machine.compiling import Programs, compile_ahead
from tests.conftest import ROOT


def test_programs_are_compiled_once_and_ahead():
    seen, go = [], threading.Event()

    def compile(key):
        if key != "now":
            go.wait(10)
        seen.append((key, threading.current_thread() is threading.main_thread()))
        return key

    with Programs(compile) as programs:
        programs.ahead(["a", "b", "a"])
        assert programs["now"].run == "now"  # not behind the others
        go.set()
        assert programs["b"].run == "b"
        assert programs["a"].run == "a"
        assert programs["a"].compile_seconds >= 0
    assert sorted(key for key, _ in seen) == ["a", "b", "now"]
    assert dict(seen)["now"] and not dict(seen)["a"]


def test_an_error_in_compiling_reaches_who_asks():
    def compile(key):
        raise ValueError(f"no {key}")

    with Programs(compile) as programs:
        programs.ahead([1])
        for key in (1, 2):
            with pytest.raises(ValueError, match=f"no {key}"):
                programs[key]


def test_programs_compiled_in_the_background_keep_float64(x64):
    with Programs(lambda key: jax.jit(lambda x: x + 1).lower(1.0).compile()) as programs:
        programs.ahead([0])
        assert programs[0].run(1.0).dtype == jnp.float64


KEEP = """
import pathlib, sys, jax, jax.numpy as jnp, jaxbatch as jb
folder = jb.keep_compiled_programs()
jax.jit(lambda x: sum(jnp.tanh(x * i) @ x for i in range(60)))(jnp.ones((50, 50))).block_until_ready()
print(folder, len(list(pathlib.Path(folder).iterdir())))
"""


def test_compiled_programs_are_kept_in_the_user_s_cache(tmp_path):
    environ = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    environ |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KEEP]
    counts = []
    for _ in range(2):
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
        folder, count = done.stdout.split()
        assert folder == str(tmp_path / "jaxbatch" / "compiled")
        counts.append(int(count))
    assert counts[0] > 0 and counts[1] == counts[0]
    given = {**environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "theirs")}
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == str(tmp_path / "theirs")


def test_programs_of_the_same_text_that_take_other_arguments_are_two():
    plain, momentum = optax.sgd(0.1), optax.sgd(0.1, 0.9)
    count = jax.jit(lambda state: jax.tree.map(lambda leaf: 2 * leaf, state[0]))  # the optimizer's state has no part in it
    for optimizer in (plain, momentum, plain):
        state = jnp.ones(2), optimizer.init(jnp.ones(2))
        np.testing.assert_array_equal(compile_ahead(count, state)(state), [2.0, 2.0])
