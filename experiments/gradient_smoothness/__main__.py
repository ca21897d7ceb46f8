"""The study: its flags, what it measures and in which order. Its question stands in the docstring of the package."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from rich.console import Console

import jaxbatch as jb
from experiments.gradient_smoothness import __doc__ as question
from experiments.gradient_smoothness import report
from experiments.harness.command_line import for_quick
from experiments.harness.optimizers import kind_of, make_optimizer
from experiments.harness.resuming import append_missing, is_whole
from experiments.harness.study import SizesConfig, check_positive, open_study, resolve_sizes, run_study, show_results
from experiments.harness.task import load_task, prepared_once, refuse_model_state
from jaxbatch.batches import steps_per_epoch
from jaxbatch.gradients.updates import update
from jaxbatch.results.records import Record, RunFolder
from jaxbatch.results.report import progress_bar
from jaxbatch.sums import loss_of_batch, mean_loss, something_counts
from jaxbatch.training.divergence import batch_means, judge, make_is_finite, skips_nonfinite
from jaxbatch.training.tasks import Task
from jaxbatch.training.train_state import TrainState, init_state

STRETCH = 50  # iterations in one compiled program; a kill loses at most these, and the progress bar moves by them
STAGES = ("start", "trained")  # of training, where batches are compared with the full gradient
TRAINING_BATCH = 60  # for all sizes, "after training" means the parameters after training with this batch size


@dataclasses.dataclass(frozen=True)
class Config(SizesConfig):
    """Flags of the study."""

    learning_rate: float | None = None
    """Learning rate, the same for all sizes. Default: 0.02 for SGD, 0.001 for Adam, 0.01 for an optimizer of your own."""
    iterations: int = 1000
    """Iterations of each run."""
    seeds: int = 3
    """Number of seeds; each has its own initial weights and its own order of examples."""
    batches_compared: int = 64
    """Number of batches of each size that are compared with the full gradient, at the start and after training."""


def resolve(config: Config, num_examples: int) -> Config:
    """Fills in what depends on the data set, shrinks for --quick, and checks."""
    config = resolve_sizes(for_quick(config, seeds=1, iterations=100, batches_compared=8), num_examples)
    config = dataclasses.replace(config, learning_rate=kind_of(config).rate if config.learning_rate is None else config.learning_rate)
    check_positive(config, "learning_rate", "iterations", "batches_compared")
    return config


class Watched(NamedTuple):
    """A training state and the gradient of the previous batch."""

    state: TrainState
    gradient: Any


def make_watched_step(task: Task, optimizer: optax.GradientTransformation):
    """``(watched, batch) -> (watched, (loss, cosine between the gradient and the previous one, its norm))``."""

    def step(watched, batch):
        state, before = watched
        losses, gradient = jb.losses_and_mean_gradient(task.loss_fn, state.params, batch, microbatch_size=task.examples_at_a_time)
        params, opt_state = update(optimizer, gradient, state.opt_state, state.params, mean_loss(losses), something_counts(losses))
        state = TrainState(params, opt_state, state.step + 1)
        seen = loss_of_batch(losses), jb.cosine_similarity(gradient, before), optax.tree.norm(gradient)
        return Watched(state, gradient), seen

    return step


class Programs(NamedTuple):
    """The programs that are compiled once for all seeds and places; they take the data as an argument."""

    stretch: Any  # (watched, indices, data) -> (watched, measured values)
    full_gradient: Any  # (params, data) -> gradient
    compare: Any  # (params, full gradient, index, data) -> (relative squared error, cosine)


def make_programs(task: Task, config: Config) -> Programs:
    """The study's programs."""
    step = make_watched_step(task, make_optimizer(config)(config.learning_rate))
    part = task.examples_at_a_time or task.num_examples

    def take(data, index):
        return jax.tree.map(lambda leaf: leaf[index], data)

    def compare(params, full, index, data):
        _, gradient = jb.losses_and_mean_gradient(task.loss_fn, params, take(data, index), microbatch_size=task.examples_at_a_time)
        return jb.relative_squared_error(gradient, full), jb.cosine_similarity(gradient, full)

    return Programs(
        jax.jit(lambda watched, indices, data: lax.scan(lambda w, index: step(w, take(data, index)), watched, indices)),
        jax.jit(lambda params, data: jb.accumulated_gradient(task.loss_fn, params, data, part)),
        jax.jit(compare),
    )


def measure_curve(task: Task, config: Config, batch_size: int, seed: int, programs: Programs) -> Record:
    """The first iterations of one run: loss, cosine of successive gradients and gradient norm at each."""
    optimizer = make_optimizer(config)(config.learning_rate)
    state = init_state(task, optimizer, seed)
    watched = Watched(state, jax.tree.map(jnp.zeros_like, state.params))
    per_epoch = steps_per_epoch(task.num_examples, batch_size)
    epochs = range(-(-config.iterations // per_epoch))
    indices = np.concatenate([jb.epoch_batches(seed, epoch, task.num_examples, batch_size).indices for epoch in epochs])
    indices, seen = indices[: config.iterations], []
    for start in range(0, config.iterations, STRETCH):
        watched, measurements = programs.stretch(watched, indices[start : start + STRETCH], task.train_data)
        seen.append(jax.tree.map(np.asarray, measurements))
    loss, cosine, norm = jax.tree.map(lambda *parts: np.concatenate(parts), *seen)
    finite = bool(make_is_finite(state)(watched.state))
    _, bad = judge(loss, finite, functools.partial(skips_nonfinite, optimizer, state.params))
    return {
        "kind": "curve",
        "batch_size": batch_size,
        "seed": seed,
        "diverged_at_iteration": -1 if bad is None else bad,
        **({} if config.task else {"guess_loss": guess_loss(task)}),
        "loss": rounded(batch_means(loss)),
        "cosine": rounded(cosine),
        "norm": rounded(norm),
    }


def guess_loss(task: Task) -> float:
    """The loss if all classes are equally likely, on a named data set; its labels are its last leaf, and the tokens of a text its only one."""
    return float(np.log(1 + int(jax.tree.leaves(task.train_data)[-1].max())))


def rounded(values: np.ndarray) -> list[float | None]:
    """Each value with six digits; None for a value that is not finite."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values]


def compared_params(task: Task, config: Config, seed: int) -> Iterator[tuple[str, Any]]:
    """The parameters at which batches are compared with the full gradient: at the start, and after some training."""
    optimizer = make_optimizer(config)(config.learning_rate)
    state = init_state(task, optimizer, seed)
    yield STAGES[0], state.params
    size = min(TRAINING_BATCH, task.num_examples)
    duration = jb.steps(config.iterations)
    *_, last = jb.fit(task, jb.FitConfig(optimizer, size, duration, seed=seed), state=state)
    yield STAGES[1], last["state"].params


def measure_errors(task: Task, config: Config, seed: int, programs: Programs) -> Iterator[Record]:
    """How far batches' gradients are from the full gradient. Batches are drawn with replacement, as the theory assumes."""
    for stage, params in compared_params(task, config, seed):
        full = programs.full_gradient(params, task.train_data)
        for number, batch_size in enumerate(config.batch_sizes):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), stage == STAGES[1])
            draws = jax.random.randint(key, (config.batches_compared, batch_size), 0, task.num_examples)
            comparisons = [programs.compare(params, full, index, task.train_data) for index in draws]
            error, cosine = (rounded(np.array(part)) for part in zip(*comparisons, strict=True))
            yield {"kind": "error", "place": stage, "batch_size": batch_size, "seed": seed, "error": error, "cosine": cosine}


def measure(config: Config, task: Task, run: RunFolder, console: Console) -> None:
    """Makes the measurements that are not in the run folder yet."""
    programs = make_programs(task, config)
    with progress_bar(console) as progress:
        bar = progress.add_task("curves and errors", total=config.seeds * (len(config.batch_sizes) + 1), rate="")
        for seed in range(config.seeds):
            for batch_size in config.batch_sizes:
                if not run.find(kind="curve", batch_size=batch_size, seed=seed):
                    run.append(measure_curve(task, config, batch_size, seed, programs))
                progress.update(bar, advance=1)
            if not is_whole(run.find(kind="error", seed=seed), place=STAGES, batch_size=config.batch_sizes):
                append_missing(run, measure_errors(task, config, seed, programs), ("kind", "place", "batch_size", "seed"))
            progress.update(bar, advance=1)


def study(config: Config, console: Console) -> None:
    """Measures what is missing, then shows what the files hold."""
    task = load_task(config)
    reason = "each batch's gradient belongs to another state, so there is no full gradient of one state to compare it with"
    refuse_model_state(config, task, reason)
    config = resolve(config, task.num_examples)
    run = open_study("gradient_smoothness", config, console, task)
    task = prepared_once(task)
    measure(config, task, run, console)
    show_results(console, config, run, report)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    run_study(Config, question, study, args)


if __name__ == "__main__":
    main()
