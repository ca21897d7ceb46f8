"""Many runs in one compiled program: learning rates × seeds.

On an accelerator a small network leaves most of the device idle, so the runs go side by side (``vmap``). A CPU is busy
with one, so there they follow each other inside the program (``lax.map``); a network built on XLA's convolutions, which
are slow in loops there, takes one program and a Python loop over the runs.

Axes: R runs, S steps, B examples in a batch.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxbatch.batches import Duration, epoch_order
from jaxbatch.compiling import Programs
from jaxbatch.fitting import FitConfig, plan_segments
from jaxbatch.loops import choose_loop, compile_epoch, make_epoch, make_evaluate
from jaxbatch.tasks import Task
from jaxbatch.train import evaluated, init_state, make_task_step

Runs = str  # "vmap", "map" or "python"


def sweep(
    task: Task,
    make_optimizer: Callable[[Any], optax.GradientTransformation],
    settings: Any,
    seeds: Sequence[int],
    *,
    batch_size: int,
    duration: Duration,
    runs: Runs | None = None,
) -> Iterator[dict[str, Any]]:
    """Trains R runs at once and yields one record an epoch.

    Each run is what :func:`jaxbatch.fit` makes of ``make_optimizer(setting)`` and its seed: the same start, the same
    order of examples, the same updates up to rounding.

    Args:
        task: see :func:`jaxbatch.classification_task`.
        make_optimizer: ``setting -> optimizer``; the setting is a traced number (or pytree of them), so it may be a
            learning rate but must not decide the program, as in an ``if``.
        settings: pytree with leading axis R, as an array of learning rates.
        seeds: R integers.
        batch_size: B, the same for all runs: another size is another program.
        duration: see :class:`jaxbatch.FitConfig`.
        runs: ``"vmap"``, ``"map"``, ``"python"``, or ``None``: the fastest on the platform.

    Yields:
        ``batches``, ``total_batches``, ``examples``, ``epoch``, ``train_seconds`` and ``compile_seconds`` of all runs
        together; arrays ``(R,)`` ``loss``, ``test_loss``, ``test_accuracy`` and ``diverged_at_batch`` (-1 where the
        loss was finite; a run that diverged goes on computing what is not a number); and ``state``, leaves ``(R, ...)``.

    Raises:
        ValueError: as many settings as seeds are wanted; a batch larger than the data set; another ``runs``.

    Example:
        >>> loss_fn = lambda w, x: 0.5 * (x - w) ** 2
        >>> metrics_fn = lambda w, x: {"loss": loss_fn(w, x), "accuracy": jnp.zeros(x.shape[0])}
        >>> task = Task(lambda key: jnp.array(0.0), loss_fn, metrics_fn, jnp.ones(4), jnp.ones(4))
        >>> from jaxbatch import steps
        >>> (record,) = sweep(task, optax.sgd, jnp.array([0.0, 0.5]), [0, 0], batch_size=4, duration=steps(1))
        >>> record["test_loss"].tolist()
        [0.5, 0.125]
    """
    count = len(seeds)
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(settings)}
    if count == 0 or sizes != {(count,)}:
        raise ValueError(f"settings must have the leading axis of seeds, {count}, and at least 1; found {sorted(sizes)}.")
    settings = jax.tree.map(jnp.asarray, settings)

    def one_step(setting):
        return make_task_step(task, make_optimizer(setting), batch_size)

    def start(setting, seed):
        return init_state(task, make_optimizer(setting), seed)

    states = jax.jit(jax.vmap(start))(settings, jnp.asarray(seeds))
    runs = runs or choose_runs(one_step(_run(settings, 0)), _run(states, 0), task.train_data, batch_size)
    segments = plan_segments(FitConfig(None, batch_size, duration), task.num_examples)
    evaluate = make_evaluate(task.metrics_fn, jax.tree.leaves(task.test_data)[0].shape[0])
    test = _over_runs(lambda state: evaluate(evaluated(task, state), task.test_data), runs)
    train = _compiler(task, one_step, settings, states, batch_size, runs)
    batches, failed, used = 0, np.full(count, -1), set()
    with Programs(train) as programs:
        for segment in segments:
            orders = [np.asarray(epoch_order(seed, segment.epoch, task.num_examples)) for seed in seeds]
            indices = np.stack([order[: segment.num_batches * batch_size] for order in orders])
            indices = indices.reshape(count, segment.num_batches, batch_size)
            program = programs[segment.num_batches]
            programs.ahead(later.num_batches for later in segments)
            states, losses, seconds = program.run(states, indices)
            bad = ~np.isfinite(losses)
            failed = np.where((failed < 0) & bad.any(1), batches + bad.argmax(1), failed)
            batches += segment.num_batches
            metrics = jax.tree.map(np.asarray, test(states))
            yield {
                "batches": batches,
                "total_batches": sum(segment.num_batches for segment in segments),
                "examples": batches * batch_size,
                "epoch": segment.end,
                "loss": losses.mean(1),
                "test_loss": metrics["loss"],
                "test_accuracy": metrics["accuracy"],
                "diverged_at_batch": failed,
                "train_seconds": seconds,
                "compile_seconds": 0.0 if segment.num_batches in used else program.compile_seconds,
                "state": states,
            }
            used.add(segment.num_batches)


def choose_runs(step: Callable, state: Any, data: Any, batch_size: int, platform: str | None = None) -> Runs:
    """How many runs go through one program on a platform.

    Example:
        >>> choose_runs(lambda state, batch: (state, batch), 0.0, jnp.ones((4, 1)), 2, platform="gpu")
        'vmap'
    """
    if (platform or jax.default_backend()) != "cpu":
        return "vmap"
    return "map" if choose_loop(step, state, data, batch_size) == "scan" else "python"


def _over_runs(function, runs: Runs):
    """``function`` of each run, results stacked."""
    if runs == "vmap":
        return jax.jit(jax.vmap(function))
    if runs == "map":
        return jax.jit(lambda *trees: lax.map(lambda args: function(*args), trees))
    if runs != "python":
        raise ValueError(f"runs={runs!r} must be 'vmap', 'map', 'python' or None.")

    def one_after_another(*trees):
        results = [function(*_run(trees, index)) for index in range(len(jax.tree.leaves(trees)[0]))]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

    return one_after_another


def _compiler(task: Task, one_step, settings, states, batch_size: int, runs: Runs):
    """``num_batches -> program``, a program being ``(states, indices) -> (states, losses, seconds)``."""

    def compile(num_batches):
        if runs == "python":

            def with_setting(pair, batch):
                setting, state = pair
                state, losses = one_step(setting)(state, batch)
                return (setting, state), losses

            one = compile_epoch(with_setting, _run((settings, states), 0), task.train_data, num_batches, batch_size)
            epoch = _over_runs(lambda setting, state, indices: one((setting, state), task.train_data, indices), runs)
            compiled = lambda states, indices: _without_setting(epoch(settings, states, indices))
        else:

            def train(setting, state, indices):
                return make_epoch(one_step(setting))(state, task.train_data, indices)

            shape = jax.ShapeDtypeStruct((len(jax.tree.leaves(states)[0]), num_batches, batch_size), jnp.int32)
            program = _over_runs(train, runs).lower(settings, states, shape).compile()
            compiled = lambda states, indices: program(settings, states, indices)

        def timed(states, indices):
            started = time.perf_counter()
            states, losses = jax.block_until_ready(compiled(states, indices))
            return states, np.asarray(losses), time.perf_counter() - started

        return timed

    return compile


def _without_setting(result):
    (_, states), losses = result
    return states, losses


def _run(tree, index: int):
    return jax.tree.map(lambda leaf: leaf[index], tree)
