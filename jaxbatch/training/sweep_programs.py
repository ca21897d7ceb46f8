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

from jaxbatch.gradients.cut import Cut
from jaxbatch.gradients.updates import Optimizer
from jaxbatch.machine.compiling import compile_ahead
from jaxbatch.machine.cores import num_cores
from jaxbatch.machine.platform import compiled_platform
from jaxbatch.sums import Losses, Weighted
from jaxbatch.training.loops import compile_epoch, make_epoch
from jaxbatch.training.steps import step_of_cut
from jaxbatch.training.tasks import Task
from jaxbatch.training.train_state import start_shapes

Runs = Literal["map", "vmap", "threads"]
MakeOptimizer = Callable[[Any], Optimizer]


def choose_runs(platform: str | None = None) -> Runs:
    """The way to train several runs at once on a platform.

    Example:
        >>> choose_runs("gpu"), choose_runs("cpu")
        ('vmap', 'threads')
    """
    return "threads" if (platform or compiled_platform()) == "cpu" else "vmap"


def over_runs(function: Callable[..., Any], runs: Runs, num_threads: int | None = None) -> Callable[..., Any]:
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
        with concurrent.futures.ThreadPoolExecutor(num_threads or num_cores()) as pool:
            results = list(pool.map(one, [(data, *of_run(trees, index)) for index in range(count)]))
        return stack_runs(results)

    return in_threads


def make_compiler(task: Task, make_optimizer: MakeOptimizer, settings: PyTree, states: PyTree, cut: Cut, runs: Runs, traced: bool = True):
    """Makes ``num_batches -> program``; a program is ``(states, indices, seed_epochs, alive) -> (states, losses)``.

    One program serves all settings, which it gets as traced numbers; or, unless ``traced``, because optimizers need their values, each setting
    has a program of its own, which threads run.
    """
    count, nothing, data = len(jax.tree.leaves(states)[0]), _no_losses(task, cut), task.train_data
    taking: dict[str, Any] = {"prepare": task.prepare, "by_part": cut.by_part}
    one_step = lambda setting: step_of_cut(task, make_optimizer(setting), cut)

    def in_one_program(num_batches):
        def train(data, setting, state, indices, seed_epoch):
            return make_epoch(one_step(setting), **taking)(state, data, indices, seed_epoch)

        shapes = [jax.ShapeDtypeStruct((count, num_batches, cut.batch_size), jnp.int32), jax.ShapeDtypeStruct((count, 2), jnp.uint32)]
        program = compile_ahead(over_runs(train, runs), data, settings, states, *shapes)
        return lambda states, indices, seed_epochs, alive: program(data, settings, states, indices, seed_epochs)

    values = [] if traced else known_settings(settings)
    firsts = [0] * count if traced else setting_indices(values)

    def in_threads(num_batches):
        def of_setting(first):
            step = None if traced else one_step(values[first])

            def with_setting(pair, *batch):
                state, losses = (step or one_step(pair[0]))(pair[1], *batch)
                return (pair[0], state), losses

            return compile_epoch(with_setting, of_run((settings, states), first), data, num_batches, cut.batch_size, **taking)

        programs = {first: of_setting(first) for first in dict.fromkeys(firsts)}

        def train(data, first, setting, state, indices, seed_epoch, alive):
            if not alive:
                return state, nothing(num_batches)
            (_, state), losses = programs[int(first)]((setting, state), data, indices, seed_epoch)
            return state, losses

        over = over_runs(train, "threads", num_cores() if traced or choose_runs() == "threads" else 1)
        return lambda *arguments: over(data, np.array(firsts), settings, *arguments)

    return in_one_program if traced and runs != "threads" else in_threads


def _no_losses(task: Task, cut: Cut) -> Callable[[int], Losses]:
    """``num_batches -> losses`` of a run that has diverged and is not computed any further."""
    part = max(cut.piece_lengths)  # a loss may need several examples

    @functools.cache
    def weighted():
        return task.loss.is_weighted(start_shapes(task), task.shapes_of_batch(part))

    def losses(num_batches):
        none = jnp.full(num_batches, jnp.nan)
        return Weighted(none, none) if weighted() else none

    return losses


def of_run(tree: PyTree, index: int) -> PyTree:
    """The leaves of one run."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


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
