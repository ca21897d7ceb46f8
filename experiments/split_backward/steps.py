"""The four ways to use a batch, and the distance between their parameters."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from experiments.harness import optimizers
from jaxbatch.gradients.groups import losses_and_aux
from jaxbatch.gradients.updates import update
from jaxbatch.sums import divisor, totals
from jaxbatch.training.steps import make_task_step
from jaxbatch.training.tasks import Task
from jaxbatch.training.train_state import TrainState

ARMS = ("one", "split", "scaled", "small")
RULES = {"one": "one", "split": "split", "scaled": "one", "small": "small"}  # (c) is (a) with another rate
OWN_RULES = tuple(arm for arm in ARMS if RULES[arm] == arm)


def make_optimizer(config, rate) -> optax.GradientTransformation:
    """The study's optimizer at a learning rate."""
    return optimizers.make_optimizer(config)(rate)


def make_step(task: Task, config, arm: str, rate):
    """``step(state, large_batch) -> (state, losses)`` of an arm; ``rate`` is the rate of its updates and may be traced."""
    optimizer, size, groups = make_optimizer(config, rate), config.batch_size, config.num_groups
    if arm == "split":
        return make_task_step(task, optimizer, size, num_groups=groups)
    if arm != "small":
        return make_task_step(task, optimizer, size)
    small = make_task_step(task, optimizer, size // groups)

    @jax.jit
    def several_small(state, batch):
        parts = jax.tree.map(lambda leaf: leaf.reshape(groups, size // groups, *leaf.shape[1:]), batch)
        state, losses = lax.scan(small, state, parts)
        return state, jax.tree.map(lambda leaf: leaf.reshape(-1), losses)

    return several_small


def make_masked_step(loss_fn, optimizer: optax.GradientTransformation, num_groups: int):
    """The split step done the naive way, for comparison: one forward over the batch, K backward passes over *all* of it.

    Each backward pass starts from a cotangent that is zero outside its group. This is what calling
    ``loss[group].mean().backward(retain_graph=True)`` K times does in PyTorch: it is right, but takes K times the work.
    """

    @jax.jit
    def step(params, opt_state, batch):
        def summed(params):
            losses = losses_and_aux(loss_fn, params, batch)[0]
            return totals(losses), losses

        values, backward, losses = jax.vjp(summed, params, has_aux=True)
        for group in jnp.arange(values.shape[0]).reshape(num_groups, -1):
            count = divisor(jax.tree.map(lambda leaf: leaf[group], losses), group.size)
            (gradient,) = backward(jnp.zeros_like(values).at[group].set(1 / count))
            params, opt_state = update(optimizer, gradient, opt_state, params, values.sum() / divisor(losses, values.size))
        return params, opt_state, losses

    return step


@jax.jit
def relative_distance(a, b, start):
    """|a − b| / |a − start|, over all parameters; 0 if no parameter has moved."""
    distance = optax.tree.norm(optax.tree.sub(a, b))
    moved = optax.tree.norm(optax.tree.sub(a, start))
    return jnp.where(distance == 0, 0.0, distance / moved)


def compare(steps, states: dict[str, TrainState], start, batch) -> dict[str, float]:
    """The distances of (b) from (c) and (d): over the run so far, and after one batch from (b)'s own state."""
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
    """Whether every parameter is finite. If not, the arm has diverged and does not recover."""
    return bool(_all_finite(state.params))
