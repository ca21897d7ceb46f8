"""Runs of a study whose rates are chosen on a held-out part, and reported with other seeds; a run is one compiled program.

An *arm* is a way to train, told by fields of its records, such as ``{"batch_size": 64, "group": 64}``.

Axes: S updates, B examples.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key, PyTree

import jaxbatch as jb
from experiments.harness.optimizers import is_named, make_optimizer
from jaxbatch.gradients.updates import update as take_step
from jaxbatch.intervals import Interval, interval
from jaxbatch.machine.compiling import compile_ahead
from jaxbatch.results.records import Record, RunFolder, as_number
from jaxbatch.training.divergence import judge as judge_losses
from jaxbatch.training.divergence import make_is_finite, skips_nonfinite

FIRST_CHOOSING_SEED = 1000


def init_layers(keys: Key[Array, "layers"], widths: Sequence[int]) -> list[dict[str, Array]]:
    """Dense layers from each width to the next, with He's initialisation, a key for each."""
    normal = lambda key, d_in, d_out: jax.random.normal(key, (d_in, d_out)) * jnp.sqrt(2 / d_in)
    return [{"w": normal(*each), "b": jnp.zeros(each[2])} for each in zip(keys, widths[:-1], widths[1:], strict=True)]


def make_gradient(loss_fn: Callable, encode: Callable, microbatch_size: int | None) -> Callable:
    """``gradient(params, batch) -> (losses, gradient)`` of a loss of all representations: in microbatches, or in one piece (None)."""
    if microbatch_size is not None:
        return lambda params, batch: tuple(jb.coupled_gradient(loss_fn, encode, params, batch, microbatch_size))

    def in_one_piece(params, batch):
        def mean(params):
            losses = loss_fn(params, encode(params, batch))
            return losses.mean(), losses

        (_, losses), gradient = jax.value_and_grad(mean, has_aux=True)(params)
        return losses, gradient

    return in_one_piece


def make_run(config: Any, gradient_on: Callable[[PyTree], Callable], make_keys: Callable, updates: int) -> Callable:
    """``run(data, params, learning_rate, seed, order) -> (params, loss of each update)``, compiled.

    The rate falls to 0 as half a cosine. The memory of ``params`` is reused.

    Args:
        config: with the flags of the optimizer.
        gradient_on: ``data -> gradient``, see :func:`make_gradient`. The data are an argument of the program.
        make_keys: ``(seed, epochs, indices) -> a key for each example``.
        updates: S; ``order`` has the indices of the examples of each, and the passes over the data that they belong to.
    """
    make, falling = make_optimizer(config), optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, updates))

    @functools.partial(jax.jit, donate_argnums=1)
    def run(data, params, learning_rate, seed, order):
        gradient_of = gradient_on(data)
        if is_named(config):  # the rate is a factor of the update
            optimizer = optax.chain(make(1.0), falling, optax.scale(learning_rate))
        else:
            optimizer = optax.chain(make(learning_rate), falling)

        def update(state, batch):
            params, opt_state = state
            indices, epochs = batch
            losses, gradient = gradient_of(params, (indices, make_keys(seed, epochs, indices)))
            return take_step(optimizer, gradient, opt_state, params, losses.mean()), losses.mean()

        (params, _), losses = jax.lax.scan(update, (params, optimizer.init(params)), order)
        return params, losses

    return run


def measure_arm(
    config: Any,
    run: RunFolder,
    arm: Record,
    train: Callable,
    start: Callable[[int], tuple],
    judge: Callable[[PyTree, str], Record],
    choose: Callable[[Sequence[Record]], float | None],
    show: Callable[..., None],
) -> None:
    """Chooses the arm's rate on the held-out part, then trains the reported seeds; what is in the run folder is not trained again.

    Args:
        config: with ``learning_rates``, ``choosing_seeds`` and ``seeds``.
        run: where the records go.
        arm: the fields that tell it from others.
        train: from :func:`make_run`; it is compiled when the first run is missing.
        start: ``seed -> (data, params, order)``.
        judge: ``(params, part) -> metrics``, where the part is ``"held_out"`` or ``"test"``.
        choose: ``records -> rate``; None: no rate will do, and nothing is reported.
        show: called after each run, with ``seconds`` if it was trained.
    """
    program = is_finite = None

    def measure(part, rate, seed):
        nonlocal program, is_finite
        identity = {"kind": "run", "part": part, **arm, "learning_rate": rate, "seed": seed}
        if run.find(**identity):
            return show()
        data, params, order = start(seed)
        arguments = (data, params, np.float32(rate), np.uint32(seed), order)
        program, is_finite = program or compile_ahead(train, *arguments), is_finite or make_is_finite(params)
        started = time.perf_counter()
        params, losses = jax.block_until_ready(program(*arguments))
        seconds = time.perf_counter() - started
        skips = functools.cache(lambda: skips_nonfinite(make_optimizer(config)(rate), params))
        finite = judge_losses(losses, bool(is_finite(params)), skips)[1] is None
        metrics = judge(params, part) if finite else {}
        last = judge_losses(losses[-max(1, len(losses) // 10) :], finite, skips)[0] if finite else None
        run.append({**identity, "updates": len(losses), "loss": last, "diverged": not finite, "seconds": seconds, **metrics})
        return show(seconds=seconds)

    for rate in config.learning_rates:
        for seed in range(FIRST_CHOOSING_SEED, FIRST_CHOOSING_SEED + config.choosing_seeds):
            measure("held_out", rate, seed)
    if (rate := choose(run.records)) is not None:
        for seed in range(config.seeds):
            measure("test", rate, seed)


def _runs(records: Sequence[Record], **fields: Any) -> list[Record]:
    wanted = {"kind": "run", **fields}.items()
    return [record for record in records if all(record.get(key) == value for key, value in wanted)]


def best_rate(records: Sequence[Record], arm: Record, measure: str) -> float | None:
    """The rate whose runs have the highest mean of ``measure`` on the held-out part; of equal ones that whose loss ends lowest.

    A few hundred held-out examples give equal accuracies often. Were the lowest rate of them taken, arms would differ by their rates alone.

    A rate at which a run diverged, or has no number, is not taken. None if there is no other.
    """
    by_rate: dict[float, list[Record]] = {}
    for record in _runs(records, part="held_out", **arm):
        by_rate.setdefault(record["learning_rate"], []).append(record)
    trained = {rate: rows for rate, rows in sorted(by_rate.items()) if not any(row["diverged"] for row in rows)}
    means = {rate: np.mean([as_number(row[measure]) for row in rows]) for rate, rows in trained.items()}
    known = [rate for rate, mean in means.items() if not math.isnan(mean)]
    loss = lambda rate: np.mean([as_number(row["loss"]) for row in trained[rate]])
    return max(known, key=lambda rate: (means[rate], -loss(rate))) if known else None


def reported_runs(records: Sequence[Record], arm: Record, rate: float | None) -> dict[int, Record]:
    """The reported runs of an arm at a rate, by seed; what was measured is NaN where a run diverged, and where it was not finite."""
    rows = _runs(records, part="test", learning_rate=rate, **arm)
    is_lost = lambda row, name: row[name] is None or (row["diverged"] and name != "learning_rate" and isinstance(row[name], float))
    return {row["seed"]: row | {name: math.nan for name in row if is_lost(row, name)} for row in rows}


def student(values: Sequence[float]) -> Interval:
    """A mean with its 95% interval by Student's t, which holds for few values, too.

    Example:
        >>> print(f"{student([1.0, 2.0, 3.0]):.2f}")
        2.00 [-0.48, 4.48]
    """
    return interval(values, scale="linear")


def points_between(one: dict[int, Record], other: dict[int, Record], measure: str) -> Interval:
    """How many points of ``measure`` the first runs are above the others, in pairs of a seed, which have the same initial weights."""
    return student([100 * (as_number(one[seed][measure]) - as_number(other[seed][measure])) for seed in sorted(one.keys() & other.keys())])


def points_in_words(points: Interval, decimals: int) -> str:
    """A difference with its interval, and whether one shows.

    Example:
        >>> points_in_words(Interval(0.5, -0.2, 1.2, 10), 1)
        '+0.5 [-0.2, +1.2] points, no difference shows'
    """
    if not points.n:
        return "no pair of runs to compare"
    if points.n < 3:
        return f"{points.value:+.{decimals}f} points, too few seeds to tell"
    return f"{points:+.{decimals}f} points, {'a difference shows' if points.excludes(0) else 'no difference shows'}"
