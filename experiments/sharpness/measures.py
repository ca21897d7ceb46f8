"""What the sharpness study measures at parameters: curvature, gradient, lines, further training."""

import math

import jax
import jax.numpy as jnp
import numpy as np

import jaxbatch as jb
from experiments.sharpness.training import Setup
from jaxbatch.augment import prepared_for_metrics
from jaxbatch.results.records import Record
from jaxbatch.sums import squared_norm
from jaxbatch.training.fitting import fit_with
from jaxbatch.training.tasks import count_examples
from jaxbatch.training.train_state import key_of_start

COUNT = 3  # eigenvalues at each end of a solution's spectrum
FURTHER = 2000  # added to a seed, for the order of examples in further training


def way_point(setup: Setup, identity: Record, read) -> list[Record]:
    """The largest and the smallest eigenvalue somewhere on the way."""
    params, at = read
    eigenvalues = _eigenvalues(setup, params, identity["seed"], 1)
    return [identity | at | _first(eigenvalues)]


def solution(setup: Setup, identity: Record, read) -> list[Record]:
    """Curvature, gradient, an exact gradient step of 1 / the largest eigenvalue, and all metrics; the test set is looked at here."""
    (params, at), seed = read, identity["seed"]
    eigenvalues = _eigenvalues(setup, params, seed, COUNT)
    trace = setup.curvature.trace(params, setup.config.trace_samples, key=jax.random.key(seed))
    size = setup.microbatch_size or len(jax.tree.leaves(setup.train_data)[0])
    gradient = jb.accumulated_gradient(setup.task.loss_fn, params, setup.train_data, size)
    rate = 1 / max(float(eigenvalues.largest[0]), 1e-12)
    loss, after = setup.losses(params, jax.tree.map(lambda p, g: p - rate * g, params, gradient), [0.0, 1.0])
    start, _ = setup.start(key_of_start(seed))  # where the run of this seed began
    more = {f"largest_{number}": float(value) for number, value in enumerate(eigenvalues.largest[1:], 2)}
    measured = {
        "trace": trace.value,
        "trace_low": trace.low,
        "trace_high": trace.high,
        "gradient_norm": math.sqrt(float(squared_norm(gradient))),
        "loss_after_step": after,
        "distance": math.sqrt(float(squared_norm(jax.tree.map(jnp.subtract, params, start)))),
    }
    metrics = setup.metrics("validation", params) | setup.metrics("test", params)
    return [identity | at | {"loss": loss} | _first(eigenvalues) | more | measured | metrics]


def line(setup: Setup, identity: Record, read) -> list[Record]:
    """Training and validation loss from the small batch's solution, at 0, to the large batch's, at 1."""
    (small, _), (large, _) = read
    points = np.linspace(-0.25, 1.25, setup.config.points)
    train = setup.losses(small, large, points)
    metric = lambda params, batch: _as_losses(setup.task.metrics_fn(params, batch)[setup.metric])
    test_data = prepared_for_metrics(setup.task.prepare_test, setup.task.test_data, jnp.arange(count_examples(setup.task.test_data, "test_data")))
    held_out = jb.loss_along_line(metric, small, large, test_data, points, microbatch_size=setup.microbatch_size)
    rows = [identity | {"point": round(float(t), 6), "loss": a, f"validation_{setup.metric}": float(b)} for t, a, b in zip(points, train, held_out)]
    rows[-1]["last"] = True
    return rows


def continued(setup: Setup, identity: Record, read) -> list[Record]:
    """Training loss while training goes on with the small or the large batch, at its rate, without what the optimizer has gathered.

    With the large batch it goes on for as many epochs as the first comparison takes, because it makes few updates in one.
    """
    (params, _), config, size = read, setup.config, identity["with_batch_size"]
    programs, seed = setup.programs[size], identity["seed"] + FURTHER
    state = programs.begin(seed, None)._replace(params=params)
    small = size == config.small_batch_size
    epochs, per_epoch = (config.continue_epochs, 2) if small else (config.epochs, 1)
    rows = [identity | {"epoch": 0.0, "loss": setup.loss(params), **setup.metrics("validation", params)}]
    settings = jb.FitConfig(None, size, jb.epochs(epochs), seed=seed, evaluations_per_epoch=per_epoch)
    for record in fit_with(programs, settings, state):
        now = record["state"].params
        rows.append(identity | {"epoch": record["epoch"], "loss": setup.loss(now), **setup.metrics("validation", now)})
    rows[-1]["last"] = True
    return rows


def _eigenvalues(setup: Setup, params, seed: int, count: int) -> jb.HessianEigenvalues:
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    count = min(count, size, setup.config.lanczos_steps)
    return setup.curvature.eigenvalues(params, count, key=jax.random.key(seed), num_steps=setup.config.lanczos_steps)


def _first(eigenvalues: jb.HessianEigenvalues) -> Record:
    names = ("largest", "largest_residual", "smallest", "smallest_residual")
    return {name: float(values[0]) for name, values in zip(names, eigenvalues, strict=True)}


def _as_losses(values):
    return values if isinstance(values, jb.Weighted) else jnp.asarray(values, jnp.result_type(float))
