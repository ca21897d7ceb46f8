"""The study: its flags, what it measures and in which order. Its question stands in the docstring of the package."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

from experiments.contrastive import __doc__ as question
from experiments.contrastive import report
from experiments.contrastive.report import chosen_rate
from experiments.contrastive.representations import nearest_accuracy, probe_accuracy
from experiments.contrastive.training import gradient_on, halve, init_params, losses_within, make_arm_run, make_encode, make_order, represent
from experiments.harness.command_line import for_quick
from experiments.harness.optimizers import OptimizerFlags, fill_optimizer, kind_of
from experiments.harness.resuming import is_whole
from experiments.harness.study import StudyConfig, check_positive, open_study, run_study, show_results
from experiments.harness.tuned_runs import measure_arm
from jaxbatch.augment import example_keys
from jaxbatch.data import load_dataset
from jaxbatch.data.held_out import hold_out
from jaxbatch.machine.memory import program_memory
from jaxbatch.machine.timing import timed_rounds
from jaxbatch.results.records import RunFolder
from jaxbatch.results.report import progress_bar

RATES = (0.003, 0.01, 0.03, 0.1)  # of Adam
USUAL = {"digits": (64, 256, 1024), "mnist": (64, 256, 1024, 4096, 16384)}


@dataclasses.dataclass(frozen=True)
class Config(OptimizerFlags, StudyConfig):
    """Flags of the study."""

    batch_sizes: tuple[int, ...] | None = None
    """Batch sizes; each divides the largest one. Default: 64, 256, 1024; for MNIST also 4096, 16384."""
    group: int = 64
    """Number of examples in a group. The control takes its negatives from within a group. It must divide all batch sizes."""
    passes: float = 80
    """Examples that a run sees, as passes over the training set; rounded up to whole batches of the largest size."""
    optimizer: str = "adam"
    """Optimizer: sgd, momentum, nesterov, rmsprop, adam, adamw, lion, lars, lamb, muon; or a function of your own, learning rate ->
    optimizer, as my_optimizer.py:make_optimizer."""
    learning_rates: tuple[float, ...] | None = None
    """Learning rates that are tried for every batch size, with and without groups. Default: 0.003, 0.01, 0.03 and 0.1 for Adam; else two in each
    power of ten, over the powers that suit the optimizer."""
    temperature: float = 0.5
    """Temperature of NT-Xent."""
    microbatch_size: int = 256
    """Largest number of examples that are encoded at a time."""
    choosing_seeds: int = 5
    """Number of seeds with which rates are chosen. They differ from the seeds of the reported runs."""
    seeds: int = 5
    """Number of seeds of the reported runs; each has its own initial weights, order and views."""
    cost_sizes: tuple[int, ...] = (1024, 4096, 16384)
    """Batch sizes at which time and memory of a gradient are measured, in microbatches (cached) and in one piece."""
    cost_rounds: int = 5
    """Rounds of timing."""
    plain_limit: float = 1.5
    """A batch size whose gradient in one piece needs more than this many GB is compiled, but not timed."""


class Data(NamedTuple):
    """Images of half the resolution with their labels, of one part of the data set."""

    images: jax.Array
    labels: jax.Array


def load(config: Config) -> dict[str, Data]:
    """The parts: training, and held out; and the test set, for the reported runs alone."""
    whole = load_dataset(config.dataset, data_dir=config.data_dir)
    choosing = hold_out(whole)
    arrays = {
        "train": (choosing.train_images, choosing.train_labels),
        "held_out": (choosing.test_images, choosing.test_labels),
        "test": (whole.test_images, whole.test_labels),
    }
    return {part: Data(halve(images), jnp.asarray(labels)) for part, (images, labels) in arrays.items()}


def resolve(config: Config, num_examples: int) -> Config:
    """Fills in the sizes, shrinks for --quick, and checks."""
    usual, rates = USUAL.get(config.dataset, USUAL["mnist"]), RATES if config.optimizer == "adam" else kind_of(config).rates
    short: dict[str, Any] = {"passes": 2, "seeds": 2, "choosing_seeds": 1, "cost_rounds": 2, "cost_sizes": (1024,)}
    config = fill_optimizer(for_quick(config, **short, batch_sizes=usual[:3:2], learning_rates=rates[::2]))
    sizes, rates = config.batch_sizes or usual, config.learning_rates or rates
    config = dataclasses.replace(config, batch_sizes=tuple(sorted(set(sizes))), learning_rates=tuple(sorted(set(rates))))
    check_positive(config, "batch_sizes", "group", "passes", "learning_rates", "temperature", "microbatch_size", "choosing_seeds", "seeds")
    check_positive(config, "cost_rounds", "plain_limit")
    largest = max(sizes)
    if largest > num_examples:
        raise ValueError(f"--batch-sizes {largest} is larger than the training set without its held-out part ({num_examples} examples).")
    for size in sizes:
        if largest % size:
            raise ValueError(f"--batch-sizes {size} must divide the largest size, {largest}, so that all see equally many examples.")
        if size % config.group:
            raise ValueError(f"--batch-sizes {size} must be a multiple of --group {config.group}.")
    return config


def examples_of(config: Config, num_examples: int) -> int:
    """The examples that every run sees."""
    largest = max(config.batch_sizes or ())
    return int(-(-config.passes * num_examples // largest)) * largest


def arms_of(config: Config) -> list[tuple[int, int]]:
    """(batch size, group) of every way to train, with negatives from the whole batch and from groups."""
    return [(size, group) for size in config.batch_sizes or () for group in sorted({size, config.group})]


@functools.partial(jax.jit, static_argnames=("group", "temperature", "num_classes"))
def judge(params, train: Data, part: Data, *, group: int, temperature: float, num_classes: int) -> dict[str, jax.Array]:
    """Accuracies on a part, and its contrastive loss in groups, which is the same question for all sizes; NaN without a whole group."""
    arguments = (represent(params, train.images), train.labels, represent(params, part.images), part.labels)
    indices = jnp.arange(len(part.labels) // group * group)
    views = make_encode(part.images)(params, (indices, example_keys(0, 0, indices)))
    loss = losses_within(*views, group, temperature).mean() if len(indices) else jnp.nan
    accuracies = {"knn": nearest_accuracy, "probe": probe_accuracy}
    return {**{name: f(*arguments, num_classes=num_classes) for name, f in accuracies.items()}, "loss_in_groups": loss}


def judged(config: Config, params, data: dict[str, Data], part: str, num_classes: int) -> dict[str, float]:
    """The same as numbers of a record."""
    measures = judge(params, data["train"], data[part], group=config.group, temperature=config.temperature, num_classes=num_classes)
    return {name: float(value) for name, value in measures.items()}


def measure_baselines(config: Config, data: dict[str, Data], num_classes: int, run: RunFolder) -> None:
    """What pixels and an encoder that is not trained reach on the test set."""
    flat = {part: Data(of.images.reshape(len(of.images), -1), of.labels) for part, of in data.items()}
    arguments = (*flat["train"], *flat["test"])
    functions = {"knn": nearest_accuracy, "probe": probe_accuracy}
    if not run.find(kind="baseline", name="pixels"):
        run.append({"kind": "baseline", "name": "pixels", **{name: float(f(*arguments, num_classes=num_classes)) for name, f in functions.items()}})
    for seed in range(config.seeds):
        if not run.find(kind="baseline", name="untrained", seed=seed):
            params = init_params(jax.random.key(seed), flat["train"].images.shape[1])
            run.append({"kind": "baseline", "name": "untrained", "seed": seed, **judged(config, params, data, "test", num_classes)})


def measure_size(config: Config, data: dict[str, Data], arm: tuple[int, int], num_classes: int, run: RunFolder, progress, bar) -> None:
    """Chooses the rate of a size and a way, and trains the reported seeds."""
    (batch_size, group), images = arm, data["train"].images
    total = examples_of(config, len(images))

    def start(seed):
        return images, init_params(jax.random.key(seed), images[0].size), make_order(seed, len(images), batch_size, total)

    def show(seconds=None):
        progress.update(bar, advance=1, **({} if seconds is None else {"rate": f"{total / seconds:,.0f} examples/s"}))

    measure_arm(
        config,
        run,
        {"batch_size": batch_size, "group": group},
        make_arm_run(config, batch_size, group, total // batch_size),
        start,
        lambda params, part: judged(config, params, data, part, num_classes),
        lambda records: chosen_rate(records, batch_size, group),
        show,
    )


def measure_cost(config: Config, images: jax.Array, run: RunFolder) -> None:
    """Time and memory of the gradient of one batch, cached and in one piece. Which images are in it does not matter."""
    params = init_params(jax.random.key(0), images[0].size)
    for size in config.cost_sizes:
        known = run.find(kind="cost", batch_size=size)
        if size <= config.microbatch_size or is_whole(known, round=range(config.cost_rounds)) or (known and "plain_ms" not in known[0]):
            continue
        indices = jnp.arange(size) % len(images)
        batch = (indices, example_keys(0, 0, jnp.arange(size)))
        programs = {}
        for variant, cached in (("cached", True), ("plain", False)):
            gradient = lambda images, params, batch, cached=cached: gradient_on(
                images, config.microbatch_size, size, config.temperature, size, cached=cached
            )(params, batch)
            programs[variant] = jax.jit(gradient).lower(images, params, batch).compile()
        memory = {f"{variant}_bytes": program_memory(program) for variant, program in programs.items()}
        times: Any = [{}]  # only compiled
        if memory["plain_bytes"] <= config.plain_limit * 1e9:
            calls = {f"{variant}_ms": functools.partial(program, images, params, batch) for variant, program in programs.items()}
            times = timed_rounds(calls, config.cost_rounds)
        for number, row in enumerate(times):
            if not run.find(kind="cost", batch_size=size, round=number):
                run.append({"kind": "cost", "batch_size": size, "round": number, **memory, **row})


def study(config: Config, console: Console) -> None:
    """Measures what is missing, then shows what the files hold."""
    data = load(config)
    config = resolve(config, len(data["train"].images))
    num_classes = int(data["train"].labels.max()) + 1
    run = open_study("contrastive", config, console)
    measure_baselines(config, data, num_classes, run)
    with progress_bar(console) as progress:
        arms = arms_of(config)
        total = len(arms) * (len(config.learning_rates) * config.choosing_seeds + config.seeds)
        bar = progress.add_task("runs", total=total, rate="")
        for arm in arms:
            measure_size(config, data, arm, num_classes, run, progress, bar)
    measure_cost(config, data["train"].images, run)
    show_results(console, config, run, report)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    run_study(Config, question, study, args)


if __name__ == "__main__":
    main()
