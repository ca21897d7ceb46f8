"""The flags of studies that train until a target, and the target of each data set."""

import dataclasses
from typing import TypeVar

import jaxbatch as jb
from experiments.harness.command_line import for_quick, is_given
from experiments.harness.lengths import WithinFlag, check_within, length_words, longest_run
from experiments.harness.optimizers import OptimizerFlags, fill_optimizer
from experiments.harness.study import SizesConfig, TaskConfig, check_positive, resolve_sizes
from experiments.harness.task import Network
from jaxbatch.training.goals import metric_names
from jaxbatch.training.tasks import updates_of

Config = TypeVar("Config", bound="TargetConfig")
# data set: (epochs, target), chosen so that a good batch size reaches the target well before the end
PROTOCOLS = {
    "digits": (30, "accuracy>0.95"),
    "mnist": (15, "accuracy>0.98"),
    "fashion_mnist": (15, "accuracy>0.85"),
    "kmnist": (15, "accuracy>0.85"),
    "cifar10": (15, "accuracy>0.5"),
    "cifar100": (15, "accuracy>0.15"),
    "generated": (15, "bits_per_token<1.5"),  # the best possible is 1.04
    "tiny_shakespeare": (15, "bits_per_token<3.2"),
}
EPOCHS = 15  # of a task of the user's own
UNBOUNDED = 2**31 - 1  # updates, that an optimizer counts to


@dataclasses.dataclass(frozen=True)
class TargetConfig(WithinFlag, SizesConfig):
    """The flags of studies that train at several batch sizes until a target."""

    epochs: int | None = None
    """Largest number of passes over the training set. Default: 30 for digits, 15 for the others."""
    max_updates: int = 180_000
    """Largest number of updates. On MNIST, batch size 1 reaches it after 3 epochs. Default: with --within, none."""
    target: str | None = None
    """Metric to reach on the validation part, with its direction, such as "accuracy>0.98" or "loss<0.4" (quoted, because of the
    shell). Default: accuracy>0.95 for digits, accuracy>0.98 for mnist. Needed with --task."""
    evaluations_per_epoch: int = 4
    """Number of evaluations on the validation part in an epoch."""
    validation_seed: int = 0
    """Seed by which a sixth of the training set is held out for validation."""


@dataclasses.dataclass(frozen=True)
class GoalConfig(OptimizerFlags, TaskConfig):
    """The flags of studies that choose batch sizes and rates themselves to reach a target, with any optimizer."""

    model: Network = "simple_cnn"
    """The network: the study's convolutions, one hidden layer of 128 units, or a small transformer for texts."""
    optimizer: str = "momentum"
    """Optimizer: sgd, momentum, nesterov, rmsprop, adam, adamw, lion, lars, lamb, muon; or a function of your own, learning rate ->
    optimizer, as my_optimizer.py:make_optimizer."""
    target: str | None = None
    """Metric to reach on the held-out part, with its direction, such as "accuracy>0.98" or "loss<0.4" (quoted, because of the
    shell). Default: accuracy>0.95 for digits, accuracy>0.98 for mnist. Needed with --task."""
    epochs: int | None = None
    """The longest run, in passes over the training set. Default: 30 for digits, 15 for the others."""
    validation_seed: int = 0
    """Seed by which a sixth of the training set is held out for validation."""


def resolve_target(config: Config, task: jb.Task) -> Config:
    """:func:`resolve_sizes`; fills in epochs and target of the data set, shrinks the epochs for --quick, and checks.

    Raises:
        ValueError: also for a target that the task does not have.
    """
    check_within(config, task)
    short = {"epochs": 3, "evaluations_per_epoch": 2} | ({"max_updates": 200} if config.within is None else {})  # a length that is given holds
    if config.within is not None and not is_given(config, "max_updates"):
        config = dataclasses.replace(config, max_updates=UNBOUNDED)
    config = for_quick(config, **short)
    config = fill_target(resolve_sizes(config, task.num_examples), task)
    check_positive(config, "epochs", "max_updates", "evaluations_per_epoch")
    return config


def fill_target(config: Config, task: jb.Task) -> Config:
    """Fills in epochs, target and optimizer, and checks target and optimizer; any configuration with these fields will do.

    Raises:
        ValueError: no target for a task of the user's own; a text of another form; a metric that the task does not have; or an
            accuracy that no training reaches.
    """
    config = fill_optimizer(config)
    epochs, usual = (EPOCHS, None) if config.task else PROTOCOLS[config.dataset]
    names = metric_names(task)
    if config.target is None and usual is None:
        form = f"give a metric ({', '.join(names)}), a direction and a value, as --target '{names[0]}<0.4'"
        raise ValueError(f"--target is needed with --task: {form}.")
    try:
        goal = jb.as_goal(config.target or usual)
    except ValueError:
        raise ValueError(f"--target {config.target} must name a metric, a direction and a number, as 'accuracy>0.98' or 'loss<0.4'.") from None
    if goal.metric not in names:
        raise ValueError(f"--target {config.target}: the metrics are {', '.join(names)}.")
    if not config.task and goal.metric == "accuracy" and not (goal.above and 0 < goal.value < 1):
        raise ValueError(f"--target {config.target}: for an accuracy, write > and a number between 0 and 1, as accuracy>0.98.")
    text = f"{goal.metric}{'>' if goal.above else '<'}{goal.value}"
    return dataclasses.replace(config, epochs=epochs if config.epochs is None else config.epochs, target=text)


def num_updates(config: TargetConfig, task: jb.Task, batch_size: int) -> int:
    """The longest run in updates, or ``max_updates`` if those are fewer."""
    return min(updates_of(task, longest_run(config), batch_size), config.max_updates)


def bound_words(config: TargetConfig) -> str:
    """The bounds of a run in words.

    Example:
        >>> from types import SimpleNamespace
        >>> bound_words(SimpleNamespace(within=None, epochs=3, max_updates=200))
        'up to 3 epochs or 200 updates'
    """
    return f"up to {length_words(config)}" + (f" or {config.max_updates:,} updates" if config.max_updates < UNBOUNDED else "")
