"""What a split step costs, and how exactly it equals one step at K times the rate when there is no momentum."""

from collections.abc import Collection, Iterator

import jax
import numpy as np
import optax

import jaxbatch as jb
from experiments.split_backward.steps import make_masked_step, make_optimizer, make_step, relative_distance
from jaxbatch.machine.timing import timed_rounds
from jaxbatch.results.records import Record
from jaxbatch.training.tasks import Task
from jaxbatch.training.train_state import init_state


def measure_exactness(task: Task, config, known: Collection[int] = ()) -> Iterator[Record]:
    """How far a split step is from one step at K times the rate under plain SGD, for the divisors K of B not in ``known``.

    ``rounding`` is the smallest distance that float32 parameters allow: the spacing of the parameters ÷ the distance moved.
    """
    batch = jax.tree.map(lambda leaf: leaf[: config.batch_size], task.train_data)
    divisors = [k for k in range(1, config.batch_size + 1) if config.batch_size % k == 0]
    spread = [] if config.quick else np.linspace(0, len(divisors) - 1, 6).round().astype(int)
    params = init_state(task, optax.sgd(0.0), 0).params

    @jax.jit
    def one_step(params, batch, rate):
        _, gradient = jb.losses_and_mean_gradient(task.loss_fn, params, batch, microbatch_size=task.examples_at_a_time)
        return optax.apply_updates(params, optax.tree.scale(-rate, gradient))

    optimizer = optax.sgd(config.learning_rate)
    for groups in sorted(({divisors[i] for i in spread} | {config.num_groups}) - set(known)):
        split = jb.split_backward(task.loss_fn, optimizer, groups, microbatch_size=task.examples_at_a_time)
        mine, theirs = split(params, optimizer.init(params), batch)[0], one_step(params, batch, groups * config.learning_rate)
        moved = optax.tree.norm(optax.tree.sub(mine, params))
        yield {
            "kind": "exactness",
            "num_groups": groups,
            "relative_error": float(relative_distance(mine, theirs, params)),
            "rounding": float(np.finfo(np.float32).eps * optax.tree.norm(params) / moved),
        }


def measure_cost(task: Task, config, first_round: int) -> Iterator[Record]:
    """Times of one ordinary step, a split step, K small steps, and the naive way, side by side."""
    batch = jax.tree.map(lambda leaf: leaf[: config.batch_size], task.train_data)
    optimizer = make_optimizer(config, config.learning_rate)
    state = init_state(task, optimizer, 0)
    steps = {arm: make_step(task, config, arm, config.learning_rate) for arm in ("one", "split", "small")}
    contenders = {arm: lambda step=step: step(state, batch) for arm, step in steps.items()}
    masked = make_masked_step(task.loss_fn, optimizer, config.num_groups)
    contenders["naive"] = lambda: masked(state.params, state.opt_state, batch)
    if first_round < config.cost_rounds:
        rounds = timed_rounds(contenders, config.cost_rounds - first_round, seed=first_round)
        for number, times in enumerate(rounds, first_round):
            yield {"kind": "cost", "round": number} | {f"{name}_ms": value for name, value in times.items()}
