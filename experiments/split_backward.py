"""One forward, several backward: is anything gained by K updates from one big batch?

A batch of B examples goes forward once. Then K optimizer updates are made from the gradients of its K
groups, all taken at the weights the batch started with. Four arms see the same examples in the same order:

    (a) one     one update per batch
    (b) split   one forward, K updates from the K groups' gradients
    (c) scaled  one update per batch at K times the learning rate
    (d) small   K ordinary batches of B / K, each with its own forward at the current weights

    python -m experiments.split_backward                                                      about 2 minutes
    python -m experiments.split_backward --dataset mnist --batch-size 600 --num-groups 10     about 12 minutes

The measured answer stands in the README.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from rich.console import Console

import jaxbatch as jb
from experiments import split_backward_report
from experiments.study import (
    PROTOCOLS,
    Network,
    StudyConfig,
    check_momentum,
    check_positive,
    load_task,
    open_study,
    run_study,
    show_results,
)
from jaxbatch.batches import cut_batches, epoch_order, steps_per_epoch
from jaxbatch.fitting import first_nonfinite
from jaxbatch.groups import check_num_groups, split_groups
from jaxbatch.loops import make_epoch, make_evaluate
from jaxbatch.records import RunFolder
from jaxbatch.report import progress_bar
from jaxbatch.timing import timed_rounds
from jaxbatch.tasks import Task
from jaxbatch.train import TrainState, init_state, make_task_step

ARMS = ("one", "split", "scaled", "small")

@dataclasses.dataclass(frozen=True)
class Config(StudyConfig):
    """Flags of the study."""

    model: Network = "simple_cnn"
    """The network: the study's convolutions, or one hidden layer of 128 units."""
    batch_size: int = 64
    """B: examples in a large batch."""
    num_groups: int = 4
    """K: groups of a batch, a divisor of B."""
    learning_rate: float = 0.02
    """Rate of arms (a), (b) and (d); (c) has K times as much."""
    momentum: float = 0.5
    """Momentum of SGD; no part in Adam."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """The optimizer of all arms."""
    epochs: int | None = None
    """Passes over the training set. Default: 30 for digits, 15 for the others."""
    target_accuracy: float | None = None
    """Test accuracy to be reached, in (0, 1). Default: 0.95 for digits, 0.98 for mnist."""
    evaluations_per_epoch: int = 1
    """How often the arms are compared within an epoch."""
    cost_rounds: int = 40
    """Rounds of the cost measurement; each runs every kind of step once."""


def resolve(config: Config) -> Config:
    """Fills in what depends on the data set, shrinks for --quick, and checks."""
    epochs, target = PROTOCOLS[config.dataset]
    config = dataclasses.replace(
        config,
        epochs=epochs if config.epochs is None else config.epochs,
        target_accuracy=target if config.target_accuracy is None else config.target_accuracy,
    )
    if config.quick:
        config = dataclasses.replace(config, seeds=min(config.seeds, 2), epochs=min(config.epochs, 3), cost_rounds=5)
    check_positive(
        config, "batch_size", "num_groups", "learning_rate", "epochs", "seeds", "evaluations_per_epoch", "cost_rounds"
    )
    check_num_groups(config.num_groups, config.batch_size)
    check_momentum(config.momentum)
    if not 0 < config.target_accuracy < 1:
        raise ValueError(f"--target-accuracy {config.target_accuracy} must be between 0 and 1, as 0.98.")
    return config


def make_optimizer(config: Config, rate: float) -> optax.GradientTransformation:
    """The study's optimizer at a learning rate."""
    return optax.sgd(rate, config.momentum) if config.optimizer == "sgd" else optax.adam(rate)


def make_steps(task: Task, config: Config) -> dict[str, Any]:
    """For each arm ``step(state, large_batch) -> (state, losses)``."""
    rate, size, groups = config.learning_rate, config.batch_size, config.num_groups
    optimizer = make_optimizer(config, rate)
    small = make_task_step(task, optimizer, size // groups)

    @jax.jit
    def several_small(state, batch):
        state, losses = lax.scan(small, state, split_groups(batch, groups, size))
        return state, losses.reshape(-1)

    return {
        "one": make_task_step(task, optimizer, size),
        "split": make_task_step(task, optimizer, size, num_groups=groups),
        "scaled": make_task_step(task, make_optimizer(config, groups * rate), size),
        "small": several_small,
    }


def make_masked_step(loss_fn, optimizer: optax.GradientTransformation, num_groups: int):
    """The split step done the naive way, for comparison: one forward over the batch, K backward passes over *all* of it.

    Each backward pass starts from a cotangent that is zero outside its group. This is what calling
    ``loss[group].mean().backward(retain_graph=True)`` K times does in PyTorch: right, and K times the work.
    """

    @jax.jit
    def step(params, opt_state, batch):
        losses, backward = jax.vjp(lambda p: loss_fn(p, batch), params)
        members = split_groups(jnp.arange(losses.shape[0]), num_groups, losses.shape[0])
        for group in members:
            (gradient,) = backward(jnp.zeros_like(losses).at[group].set(1 / group.size))
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            params = optax.apply_updates(params, updates)
        return params, opt_state, losses

    return step


def exactness_groups(config: Config) -> list[int]:
    """The divisors K of B at which exactness is measured: the study's own, and unless --quick some over all of them."""
    divisors = [k for k in range(1, config.batch_size + 1) if config.batch_size % k == 0]
    spread = [] if config.quick else np.linspace(0, len(divisors) - 1, 6).round().astype(int)
    return sorted({divisors[i] for i in spread} | {config.num_groups})


def measure_exactness(task: Task, config: Config, num_groups: Sequence[int]) -> Iterator[dict]:
    """Plain SGD: how far a split step is from one step at K times the rate, for each K of ``num_groups``.

    ``rounding`` is what float32 parameters allow at best: the spacing of the parameters ÷ the distance moved.
    """
    batch = jax.tree.map(lambda leaf: leaf[: config.batch_size], task.train_data)
    params = init_state(task, optax.sgd(0.0), 0).params

    @jax.jit
    def one_step(rate):
        _, gradient = jb.losses_and_mean_gradient(task.loss_fn, params, batch, microbatch_size=task.microbatch_size)
        return optax.apply_updates(params, optax.tree.scale(-rate, gradient))

    optimizer = optax.sgd(config.learning_rate)
    for groups in num_groups:
        split = jb.split_backward(task.loss_fn, optimizer, groups, microbatch_size=task.microbatch_size)
        mine, theirs = split(params, optimizer.init(params), batch)[0], one_step(groups * config.learning_rate)
        moved = optax.tree.norm(optax.tree.sub(mine, params))
        yield {
            "kind": "exactness",
            "num_groups": groups,
            "relative_error": float(relative_distance(mine, theirs, params)),
            "rounding": float(np.finfo(np.float32).eps * optax.tree.norm(params) / moved),
        }


def measure_cost(task: Task, config: Config, steps, first_round: int) -> Iterator[dict]:
    """Times of one ordinary step, a split step, K small steps, and the naive way, side by side."""
    batch = jax.tree.map(lambda leaf: leaf[: config.batch_size], task.train_data)
    optimizer = make_optimizer(config, config.learning_rate)
    state = init_state(task, optimizer, 0)
    contenders = {arm: lambda step=steps[arm]: step(state, batch) for arm in ("one", "split", "small")}
    masked = make_masked_step(task.loss_fn, optimizer, config.num_groups)
    contenders["naive"] = lambda: masked(state.params, state.opt_state, batch)
    if first_round < config.cost_rounds:
        rounds = timed_rounds(contenders, config.cost_rounds - first_round, seed=first_round)
        for number, times in enumerate(rounds, first_round):
            yield {"kind": "cost", "round": number} | {f"{name}_ms": value for name, value in times.items()}


@jax.jit
def relative_distance(a, b, start):
    """|a − b| / |a − start|, over all parameters; 0 where nothing has moved."""
    apart = optax.tree.norm(optax.tree.sub(a, b))
    moved = optax.tree.norm(optax.tree.sub(a, start))
    return jnp.where(apart == 0, 0.0, apart / moved)


def measure_training(task: Task, config: Config, steps, run: RunFolder, progress) -> Iterator[dict]:
    """Trains the four arms in lockstep, seed after seed, and compares them at every evaluation.

    After each evaluation the four states are kept in the run folder, so that an interrupted study goes on
    from there and ends in the same numbers.
    """
    per_epoch = steps_per_epoch(task.num_examples, config.batch_size)
    parts = np.array_split(np.arange(per_epoch), min(config.evaluations_per_epoch, per_epoch))
    plan = [(epoch, part[0], part[-1] + 1) for epoch in range(config.epochs) for part in parts]
    programs = {arm: compile_ahead(make_epoch(step)) for arm, step in steps.items()}
    evaluate = make_evaluate(task.metrics_fn, jax.tree.leaves(task.test_data)[0].shape[0])
    rates = {arm: config.learning_rate * (config.num_groups if arm == "scaled" else 1) for arm in ARMS}

    def fresh(seed):
        return {arm: init_state(task, make_optimizer(config, rates[arm]), seed) for arm in ARMS}

    seed, segment, states, seconds = load_progress(run, fresh(0))
    bar = progress.add_task("training", total=config.seeds * len(plan), completed=seed * len(plan) + segment, rate="")
    while seed < config.seeds:
        if segment == 0:
            states, seconds = fresh(seed), dict.fromkeys(ARMS, 0.0)
        start = fresh(seed)["one"].params
        while segment < len(plan):
            epoch, first, last = plan[segment]
            began = time.perf_counter()
            indices = cut_batches(epoch_order(seed, epoch, task.num_examples), config.batch_size).indices[first:last]
            examples = int(epoch * per_epoch + last) * config.batch_size
            place = {"seed": seed, "segment": segment, "examples": examples}
            for arm in ARMS:
                if not is_finite(states[arm]):
                    continue
                program = programs[arm](states[arm], task.train_data, indices)
                started = time.perf_counter()
                states[arm], losses = jax.block_until_ready(program(states[arm], task.train_data, indices))
                seconds[arm] += time.perf_counter() - started
                test = evaluate(states[arm].params, task.test_data)
                yield place | {
                    "kind": "curve",
                    "arm": arm,
                    "updates": int(states[arm].step),
                    "loss": float(losses.mean()),
                    "test_loss": float(test["loss"]),
                    "test_accuracy": float(test["accuracy"]),
                    "seconds": seconds[arm],
                    "diverged": first_nonfinite(losses) is not None or not is_finite(states[arm]),
                }
            if all(is_finite(states[arm]) for arm in ("split", "scaled", "small")):
                batch = jax.tree.map(lambda leaf: leaf[indices[0]], task.train_data)
                yield place | {"kind": "distance"} | compare(steps, states, start, batch)
            segment += 1
            save_progress(run, seed, segment, states, seconds)
            rate = 4 * indices.size / (time.perf_counter() - began)
            progress.update(bar, advance=1, rate=f"{rate:,.0f} examples/s")
        seed, segment = seed + 1, 0


def compile_ahead(program):
    """``program(*arguments) -> compiled program`` for the arguments' shapes, so that no timing holds a compilation."""
    compiled = {}

    def find(state, data, indices):
        if indices.shape not in compiled:
            compiled[indices.shape] = program.lower(state, data, indices).compile()
        return compiled[indices.shape]

    return find


def compare(steps, states: dict[str, TrainState], start, batch) -> dict[str, float]:
    """How far (b) is from (c) and (d): over the run so far, and after one batch from (b)'s own state."""
    ends = {arm: steps[arm](states["split"], batch)[0].params for arm in ("split", "scaled", "small")}
    here = states["split"].params
    distances = {}
    for other in ("scaled", "small"):
        distances[f"run_split_{other}"] = float(relative_distance(here, states[other].params, start))
        distances[f"batch_split_{other}"] = float(relative_distance(ends["split"], ends[other], here))
    return distances


@jax.jit
def _all_finite(tree):
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def is_finite(state: TrainState) -> bool:
    """Whether every parameter is finite: an arm whose are not has diverged and stays so."""
    return bool(_all_finite(state.params))


def save_progress(run: RunFolder, seed: int, segment: int, states, seconds) -> None:
    """Keeps what the next segment starts from."""
    run.write("in_flight.msgpack", flax.serialization.to_bytes((seed, segment, states, seconds)))


def load_progress(run: RunFolder, like) -> tuple[int, int, dict[str, TrainState], dict[str, float]]:
    """What :func:`save_progress` kept, or the very beginning."""
    template = (0, 0, like, dict.fromkeys(ARMS, 0.0))
    path = run.path / "in_flight.msgpack"
    if not path.exists():
        return template
    seed, segment, states, seconds = flax.serialization.from_bytes(template, path.read_bytes())
    return int(seed), int(segment), jax.tree.map(jnp.asarray, states), seconds


def measure(config: Config, run: RunFolder, console: Console) -> None:
    """Makes the measurements that are not in the run folder yet."""
    task = load_task(config)
    steps_per_epoch(task.num_examples, config.batch_size)  # a batch larger than the data ends here

    def identity(record):
        return tuple(record.get(key) for key in ("kind", "round", "num_groups", "arm", "seed", "segment"))

    known = {identity(record) for record in run.records}

    def keep(records):
        for record in records:
            if identity(record) not in known:
                known.add(identity(record))
                run.append(record)

    missing = [groups for groups in exactness_groups(config) if not run.find(kind="exactness", num_groups=groups)]
    keep(measure_exactness(task, config, missing))
    steps = make_steps(task, config)
    keep(measure_cost(task, config, steps, sum(record["kind"] == "cost" for record in run.records)))
    with progress_bar(console) as progress:
        keep(measure_training(task, config, steps, run, progress))


def study(config: Config, console: Console) -> None:
    """Measures what is missing, then shows what the files hold."""
    config = resolve(config)
    run = open_study("split_backward", config, console)
    measure(config, run, console)
    show_results(console, config, run, split_backward_report)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    run_study(Config, __doc__, study, args)


if __name__ == "__main__":
    main()
