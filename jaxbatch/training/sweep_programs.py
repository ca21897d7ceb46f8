"""The programs of many runs at once, and the ways to compute them: side by side, in threads, one after another.

Axes: R runs.
"""

import concurrent.futures
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from jaxbatch.gradients.groups import has_weights
from jaxbatch.gradients.updates import Optimizer
from jaxbatch.machine.compiling import compile_ahead
from jaxbatch.machine.cores import num_cores
from jaxbatch.machine.platform import compiled_platform
from jaxbatch.sums import Losses, Weighted
from jaxbatch.training.cut import Cut
from jaxbatch.training.loops import compile_epoch, make_epoch
from jaxbatch.training.steps import start_shapes, step_of_cut
from jaxbatch.training.tasks import Task

Runs = Literal["map", "vmap", "threads"]
MakeOptimizer = Callable[[Any], Optimizer]


def choose_runs(platform: str | None = None) -> Runs:
    """The way to train several runs at once on a platform.

    Example:
        >>> choose_runs("gpu"), choose_runs("cpu")
        ('vmap', 'threads')
    """
    return "threads" if (platform or compiled_platform()) == "cpu" else "vmap"


def over_runs(function: Callable[..., Any], runs: Runs) -> Callable[..., Any]:
    """Applies ``function(data, *trees)`` to each run and stacks the results. Runs share the data; the trees have an axis R.

    The data are an argument, because arrays that a program closes over become constants in it, which are compiled too.
    """
    if runs == "vmap":
        return jax.jit(lambda data, *trees: jax.vmap(lambda *args: function(data, *args))(*trees))
    if runs == "map":
        return jax.jit(lambda data, *trees: lax.map(lambda args: function(data, *args), trees))
    if runs != "threads":
        raise ValueError(f"runs={runs!r} must be 'vmap', 'threads', 'map' or None.")
    x64 = jax.config.jax_enable_x64  # type: ignore[attr-defined]  # the calling thread's setting; other threads have their own

    def one(args):
        with jax.enable_x64(x64):
            return jax.block_until_ready(function(*args))

    def in_threads(data, *trees):
        count = len(jax.tree.leaves(trees)[0])
        with concurrent.futures.ThreadPoolExecutor(num_cores()) as pool:
            results = list(pool.map(one, [(data, *of_run(trees, index)) for index in range(count)]))
        return stack_runs(results)

    return in_threads


def make_compiler(task: Task, make_optimizer: MakeOptimizer, settings: PyTree, states: PyTree, cut: Cut, runs: Runs):
    """Makes ``num_batches -> program``; a program is ``(states, indices, seed_epochs, alive) -> (states, losses)``.

    One program serves all settings, which it gets as traced numbers.
    """

    def one_step(setting):
        return step_of_cut(task, make_optimizer(setting), cut)

    batch_size, by_part, nothing = cut.batch_size, cut.by_part, _no_losses(task, cut)

    def compile(num_batches):
        if runs == "threads":

            def with_setting(pair, *batch):
                setting, state = pair
                state, losses = one_step(setting)(state, *batch)
                return (setting, state), losses

            start = of_run((settings, states), 0)
            one = compile_epoch(with_setting, start, task.train_data, num_batches, batch_size, prepare=task.prepare, by_part=by_part)

            def train(data, setting, state, indices, seed_epoch, alive):
                if not alive:
                    return state, nothing(num_batches)
                (_, state), losses = one((setting, state), data, indices, seed_epoch)
                return state, losses

            over = over_runs(train, runs)
            return lambda states, indices, seed_epochs, alive: over(task.train_data, settings, states, indices, seed_epochs, alive)

        def train(data, setting, state, indices, seed_epoch):
            return make_epoch(one_step(setting), task.prepare, by_part=by_part)(state, data, indices, seed_epoch)

        count = len(jax.tree.leaves(states)[0])
        shapes = [jax.ShapeDtypeStruct((count, num_batches, batch_size), jnp.int32), jax.ShapeDtypeStruct((count, 2), jnp.uint32)]
        program = compile_ahead(over_runs(train, runs), task.train_data, settings, states, *shapes)
        return lambda states, indices, seed_epochs, alive: program(task.train_data, settings, states, indices, seed_epochs)

    return compile


def _no_losses(task: Task, cut: Cut) -> Callable[[int], Losses]:
    """``num_batches -> losses`` of a run that has diverged and is not computed any further."""
    part = max(cut.piece_lengths)  # a loss may need several examples

    @functools.cache
    def weighted():
        return has_weights(task.loss_fn, start_shapes(task), task.shapes_of_batch(part), task.update_model_state is not None)

    def losses(num_batches):
        none = jnp.full(num_batches, jnp.nan)
        return Weighted(none, none) if weighted() else none

    return losses


def of_run(tree: PyTree, index: int) -> PyTree:
    """The leaves of one run."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def make_compiler_by_setting(task: Task, make_optimizer: MakeOptimizer, settings: PyTree, states: PyTree, cut: Cut):
    """:func:`make_compiler` where optimizers need the values of their settings: each setting has a program of its own."""
    values = known_settings(settings)
    keys = setting_indices(values)
    batch_size, by_part, nothing = cut.batch_size, cut.by_part, _no_losses(task, cut)
    x64 = jax.config.jax_enable_x64  # type: ignore[attr-defined]  # the calling thread's setting; other threads have their own

    def compile(num_batches):
        programs: dict[int, Any] = {}
        for index, key in enumerate(keys):
            if key not in programs:
                step = step_of_cut(task, make_optimizer(values[index]), cut)
                start = of_run(states, index)
                programs[key] = compile_epoch(step, start, task.train_data, num_batches, batch_size, prepare=task.prepare, by_part=by_part)

        def train(index, state, indices, seed_epoch, alive):
            if not alive:
                return state, nothing(num_batches)
            with jax.enable_x64(x64):
                return jax.block_until_ready(programs[keys[index]](state, task.train_data, indices, seed_epoch))

        def run(states, indices, seed_epochs, alive):
            with concurrent.futures.ThreadPoolExecutor(num_cores() if choose_runs() == "threads" else 1) as pool:
                return stack_runs(
                    list(pool.map(lambda index: train(index, *of_run((states, indices, seed_epochs, alive), index)), range(len(values))))
                )

        return run

    return compile


def known_settings(settings: PyTree) -> list[Any]:
    """The settings of R runs, numbers as Python's, which any function can look at.

    Example:
        >>> known_settings({"rate": jnp.array([0.5, 0.25])})
        [{'rate': 0.5}, {'rate': 0.25}]
    """
    count = len(jax.tree.leaves(settings)[0])
    return [jax.tree.map(lambda leaf: leaf.item() if leaf.ndim == 0 else leaf, of_run(settings, index)) for index in range(count)]


def setting_indices(settings: list[Any]) -> list[int]:
    """For each run, the index of the first run with the same setting.

    Example:
        >>> setting_indices([0.5, 0.25, 0.5])
        [0, 1, 0]
    """
    keys = [tuple(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(setting)) for setting in settings]
    return [keys.index(key) for key in keys]


def stack_runs(trees: list[PyTree]) -> PyTree:
    """Leaves with an axis of runs, from those of each run."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
