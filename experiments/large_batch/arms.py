"""The arms of the huge-batch study: what each one changes, its batch sizes, its optimizer, and the task that it trains."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

import jaxbatch as jb
from experiments.harness import optimizers, schedules
from jaxbatch.augment import Prepare

WARMUP = 0.1  # of the run
CYCLES = 3  # triangles in a run
STEPS = (0.1, 3)  # the rate is multiplied by 0.1 at each third of the run
STAGES = 4  # sizes of a batch that grows
GHOST = "ghost batch norm"


class Arm(NamedTuple):
    """What an arm changes against plain training with the huge batch."""

    shape: str = "constant"  # of the rate along the run
    optimizer: str | None = None  # None: the study's
    small: bool = False  # the small batch
    grows: bool = False  # from the small batch to the huge one
    split: bool = False  # several updates from each batch
    noise: bool = False  # as much noise of the gradient as the small batch has
    ghost: bool = False  # batch statistics of groups as large as the small batch
    longer: bool = False  # as many updates as the small batch
    rule: str | None = None  # how the rate of the small batch is scaled; None: the rate is tuned


ARMS = {
    "small": Arm(small=True),
    "plain": Arm(),
    "linear rule": Arm(rule="linear"),
    "linear rule, warmup": Arm("warmup", rule="linear"),
    "square-root rule": Arm(rule="sqrt"),
    "warmup": Arm("warmup"),
    "cyclic": Arm("cyclic"),
    "step decay": Arm("step"),
    "cosine": Arm("cosine"),
    "lars": Arm(optimizer="lars"),
    "lamb": Arm(optimizer="lamb"),
    GHOST: Arm(ghost=True),
    "growth": Arm(grows=True),
    "split": Arm(split=True),
    "noise": Arm(noise=True),
    "longer": Arm(longer=True),
}
KINDS = (("warmup", "cyclic", "step decay", "cosine"), ("lars", "lamb"), ("growth",))  # the best of each kind go into pairs


def find_arm(name: str) -> Arm:
    """The arm of a name; the name of a pair holds both.

    Example:
        >>> find_arm("cosine + lamb"), find_arm("lars + growth").grows
        (Arm(shape='cosine', optimizer='lamb', ...), True)
    """
    changes = {}
    for part in name.split(" + "):
        default = Arm()._asdict()
        changes |= {field: value for field, value in ARMS[part]._asdict().items() if value != default[field]}
    return Arm(**changes)


def num_epochs(config, arm: Arm) -> int:
    """Passes over the training set: those of the budget, but for the arm that makes as many updates as the small batch.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(epochs=10, batch_size=600, small_batch_size=24, longest=8)
        >>> num_epochs(config, Arm()), num_epochs(config, Arm(longer=True))
        (10, 80)
    """
    return round(config.epochs * min(config.batch_size / config.small_batch_size, config.longest)) if arm.longer else config.epochs


def batch_sizes(config, arm: Arm) -> dict[int, int]:
    """Maps the epoch at which a size begins to the size.

    A batch that grows takes divisors of the huge batch near to a geometric row, for a quarter of the epochs each.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(epochs=8, batch_size=600, small_batch_size=24)
        >>> batch_sizes(config, Arm()), batch_sizes(config, Arm(grows=True))
        ({0: 600}, {0: 24, 2: 75, 4: 200, 6: 600})
    """
    if not arm.grows:
        return {0: config.small_batch_size if arm.small else config.batch_size}
    ratio = config.batch_size / config.small_batch_size
    row = [nearest_divisor(config.batch_size, config.small_batch_size * ratio ** (stage / (STAGES - 1))) for stage in range(STAGES)]
    return {config.epochs * stage // STAGES: size for stage, size in enumerate(row)}  # a run of few epochs leaves out the first


def nearest_divisor(number: int, wanted: float) -> int:
    """The divisor with the nearest logarithm.

    Example:
        >>> nearest_divisor(600, 70.2), nearest_divisor(6000, 60)
        (75, 60)
    """
    return min((n for n in range(1, number + 1) if number % n == 0), key=lambda n: abs(math.log(n / wanted)))


def num_updates(config, arm: Arm, num_examples: int) -> int:
    """Updates in a run of the arm."""
    sizes, end = batch_sizes(config, arm), num_epochs(config, arm)
    ends = [*list(sizes)[1:], end]
    batches = sum((stop - start) * (num_examples // size) for (start, size), stop in zip(sizes.items(), ends, strict=True))
    return batches * (config.num_groups if arm.split else 1)


def rate_by_update(config, arm: Arm, num_examples: int) -> Callable[[Any], Float[Array, ""]]:
    """The rate of every update as a part of the arm's rate, which is 1."""
    epochs = num_epochs(config, arm)
    shapes = {"cyclic": jb.cyclic(epochs / CYCLES), "step": jb.step_decay(STEPS[0], epochs / STEPS[1]), "cosine": jb.cosine(epochs)}
    warmup = {"warmup": jb.epochs(WARMUP * epochs), "warmup_init": config.small_batch_size / config.batch_size}
    return jb.coupled_learning_rate(
        jb.milestone_schedule(batch_sizes(config, arm)),
        init=1.0,
        num_examples=num_examples,
        num_epochs=epochs,
        shape=shapes.get(arm.shape),
        num_groups=config.num_groups if arm.split else None,
        **(warmup if arm.shape == "warmup" else {}),
    )


def make_optimizer(config, arm: Arm, num_examples: int) -> Callable[[Any], Any]:
    """``rate -> optimizer``; the rate may be traced.

    The update of LARS and LAMB is as long as the rate times the length of the parameters, array by array. (The paper on LARS multiplies
    by a trust coefficient of 0.001 besides, and takes rates a thousand times larger.)
    """
    by_update = rate_by_update(config, arm, num_examples)

    def make(rate):
        if arm.shape == "constant":
            return schedules.make_for_length(config, num_updates(config, arm, num_examples), arm.optimizer)(rate)
        return optimizers.follow(config, lambda count: rate * by_update(count), rate, arm.optimizer)

    return make


def why_undefined(task: jb.Task, name: str) -> str | None:
    """Why an arm has no meaning for the task; None if it has one."""
    if name != GHOST:
        return None
    if task.update_model_state is None:
        return "the model has no batch statistics"
    return None if task.examples_at_a_time is None else f"the task takes its statistics over {task.examples_at_a_time} examples already"


def task_of(config, arm: Arm, task: jb.Task) -> jb.Task:
    """The task that the arm trains."""
    if arm.ghost:
        return task._replace(microbatch_size=config.small_batch_size)  # the moments of batch normalisation are those of a microbatch
    return with_noise(task, config.batch_size, config.small_batch_size) if arm.noise else task


def with_noise(task: jb.Task, batch_size: int, small_batch_size: int) -> jb.Task:
    """The task with losses that are weighted at random, see :func:`random_weights`; only in training."""

    def prepare(keys, batch):
        keys, own = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        return _prepared(task.prepare, own, batch), random_weights(keys, batch_size, small_batch_size)

    def loss_fn(params, batch):
        batch, weights = batch
        output = task.loss_fn(params, batch)
        losses, aux = output if task.update_model_state is not None else (output, None)
        losses = losses._replace(total=losses.total * weights) if isinstance(losses, jb.Weighted) else losses * weights
        return losses if task.update_model_state is None else (losses, aux)

    return task._replace(loss_fn=loss_fn, prepare=prepare)


def _prepared(prepare: Prepare | None, keys, batch):
    return batch if prepare is None else prepare(keys, batch)


def random_weights(keys: Key[Array, "B"], batch_size: int, small_batch_size: int) -> Float[Array, "B"]:
    r"""Weights of the examples of a huge batch, under which its gradient is as noisy as that of a small batch.

    With :math:`w_i = 1 + \sigma (\xi_i - \bar\xi)`, :math:`\xi_i` independent and standard normal, the mean of :math:`w_i g_i` is on
    average the batch's mean gradient, and its covariance is :math:`\sigma^2 (B - 1) S / B^2`, with the sample covariance :math:`S` of the
    gradients :math:`g_i`. A batch of :math:`b` of these examples, drawn without replacement, has the covariance
    :math:`(1/b - 1/B)\,S`. The two are equal, in every direction, for :math:`\sigma^2 = (B/b - 1)\,B / (B - 1)`.

    Args:
        keys: one for each example.
        batch_size: B.
        small_batch_size: b.

    Returns:
        ``(B,)``; their sum is B, and some are below 0.

    References:
        Wu et al., `On the Noisy Gradient Descent that Generalizes as SGD <https://arxiv.org/abs/1906.07405>`_, 2020, section 3.
    """
    drawn = jax.vmap(jax.random.normal)(keys)
    sigma = math.sqrt((batch_size / small_batch_size - 1) * batch_size / max(batch_size - 1, 1))
    return 1 + sigma * (drawn - drawn.mean())
