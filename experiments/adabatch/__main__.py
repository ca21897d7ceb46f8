"""The study: its flags, what it measures and in which order. Its question stands in the docstring of the package."""

import dataclasses
import math
import shutil
from collections.abc import Sequence
from typing import Literal

from rich.console import Console

from experiments.adabatch import __doc__ as question
from experiments.adabatch import report
from experiments.adabatch.arms import make_fit_config, sizes_of
from experiments.adabatch.periods import read_period
from experiments.adabatch.tasks import Tasks, load, network_tasks, text_tasks, user_tasks
from experiments.harness.command_line import for_quick
from experiments.harness.optimizers import OptimizerFlags, fill_optimizer, kind_of
from experiments.harness.study import TaskConfig, check_positive, open_study, run_study, show_results
from experiments.harness.task import DEEP, has_text
from experiments.harness.training import train_into
from jaxbatch.results.records import RunFolder
from jaxbatch.results.report import progress_bar
from jaxbatch.training.devices import provide_devices
from jaxbatch.training.run_programs import RunPrograms
from jaxbatch.training.tasks import Task

OTHER_SEED = 1000  # for the runs that choose the rate of (d)


@dataclasses.dataclass(frozen=True)
class Config(OptimizerFlags, TaskConfig):
    """Flags of the study."""

    model: Literal["simple_cnn", "mlp", "transformer", "alexnet", "resnet20", "vgg19_bn"] = "simple_cnn"
    """The network; mlp has one hidden layer of 128 units; transformer is a small one, for texts. alexnet and vgg19_bn see smaller
    images padded to 32 x 32."""
    optimizer: str | None = None  # type: ignore[assignment]
    """Optimizer: sgd, momentum, nesterov, rmsprop, adam, adamw, lion, lars, lamb, muon; or a function of your own, learning rate ->
    optimizer, as my_optimizer.py:make_optimizer. Default: adamw for texts, momentum for the others."""
    epochs: int | None = None
    """Passes over the training set. Default: 100 for CIFAR, 25 for the others."""
    every: str | None = None
    """Duration between changes of batch and rate: a number of epochs, or as "1e6 examples" or "1e9 tokens". Default: a fifth of all epochs."""
    batch_size: int | None = None
    """Batch size of (a), and of (b) at the start. Default: 16 for digits, 256 for alexnet, else 128."""
    max_batch_size: int | None = None
    """Batch size of (c), and of (b) at the end. Default: 16 times batch-size, with --quick twice, as far as the data set allows."""
    growth: float = 2.0
    """Factor by which (b) multiplies its batch at each change."""
    decay: float = 0.75
    """Factor by which (b) multiplies its rate at each change; the others use decay / growth, with Adam and its kin decay / √growth."""
    learning_rate: float | None = None
    """Learning rate of (a), (b) and (c) at the start. Default: 0.01 for SGD, 0.00316 for AdamW, 0.001 for Adam."""
    tuned_rates: tuple[float, ...] | None = None
    """Starting rates from which the one of (d) is chosen, on the validation part. Default: four, two in each power of ten; from 0.00316 to
    0.1 for SGD and AdamW."""
    validation_seed: int = 0
    """Seed by which a sixth of the training set is held out while the rate of (d) is chosen."""
    weight_decay: float | None = 5e-4
    """Factor of the L2 term that is added to the gradient of all parameters. With AdamW and others that have one: factor of their weight
    decay, which is not part of the gradient."""
    num_examples: int | None = None
    """Use only this many training examples (the first ones), and two fifths as many test examples."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the network computes in; parameters are float32."""
    augment: bool | None = None
    """Crop with padding 4 and flip the images. Default: only for CIFAR."""
    warmup_epochs: float = 0.0
    """If above 0, the rate of (c) rises over this many epochs to max-batch-size / batch-size times the rate of the other arms."""
    devices: tuple[int, ...] = (1,)
    """Numbers of devices that (b) runs on, such as 1,2,4. On CPU they are virtual. The other arms use one device."""
    parallel: Literal["jit", "pmap"] = "jit"
    """How several devices share a step."""
    batch_norm: Literal["local", "synchronised"] = "local"
    """Mean and variance of batch normalisation: over a device's share of the batch, or over all devices."""
    small: bool = False
    """A small version of the protocol: 2,500 examples, batches an eighth of their size, 10 epochs."""
    seeds: int = 3
    """Number of seeds; each has its own initial weights and its own order of examples."""
    rounds: int = 10
    """Rounds in which forward and backward are timed."""


def shorten(config: Config) -> Config:
    """What --quick sets. There are two batch sizes, because each is compiled several times; the deep networks see few examples, too."""
    deep = config.task is None and config.model in DEEP
    rates = usual_rates(config)[1][1:3]
    few = {"num_examples": 32, "batch_size": 8, "max_batch_size": 16, "seeds": 1, "tuned_rates": rates[:1]} if deep else {"seeds": 2}
    return for_quick(config, **{"epochs": 2, "rounds": 2, "tuned_rates": rates} | few)


def usual_rates(config: Config) -> tuple[float, tuple[float, ...]]:
    """The rate of (a), (b) and (c), and those from which the one of (d) is chosen."""
    name = config.optimizer or ("adamw" if has_text(config) else "momentum")
    rates = {"momentum": 0.01, "adamw": 0.00316}
    if name in rates:
        return rates[name], (0.00316, 0.01, 0.0316, 0.1)
    kind = kind_of(dataclasses.replace(config, optimizer=name))
    middle = min(range(len(kind.rates)), key=lambda index: abs(math.log(kind.rates[index] / kind.rate)))
    return kind.rates[middle], kind.rates[middle - 1 : middle + 3]


def shrink(config: Config) -> Config:
    """Sets the values that --small stands for, except where other flags set them."""
    if not config.small:
        return config
    if config.dataset == "digits":
        raise ValueError("--small is for the larger data sets; digits are small already.")
    start = 32 if config.model == "alexnet" else 16
    wanted = {"num_examples": 2500, "epochs": 10, "batch_size": start}
    return dataclasses.replace(config, **{name: value for name, value in wanted.items() if getattr(config, name) is None})


def resolve(config: Config, num_examples: int, tokens_per_example: int | None = None) -> Config:
    """Fills in what depends on the data set and the network, shrinks for --quick, and checks."""
    is_cifar, is_text = config.dataset.startswith("cifar"), has_text(config)
    config, (rate, rates) = shorten(config), usual_rates(config)
    config = fill_optimizer(dataclasses.replace(config, optimizer=config.optimizer or ("adamw" if is_text else "momentum")))
    rate = rate if config.learning_rate is None else config.learning_rate
    config = dataclasses.replace(config, learning_rate=rate, tuned_rates=config.tuned_rates or rates)
    check_positive(config, "epochs", "batch_size", "max_batch_size", "learning_rate", "tuned_rates", "seeds", "rounds", "decay")
    if not config.warmup_epochs >= 0:
        raise ValueError(f"--warmup-epochs {config.warmup_epochs} must be at least 0.")
    epochs = config.epochs or (100 if is_cifar else 25)
    if config.warmup_epochs > epochs:
        raise ValueError(f"--warmup-epochs {config.warmup_epochs:g} is more than the {epochs} epochs of the run.")
    usual = 16 if config.dataset == "digits" or is_text else 256 if config.model == "alexnet" else 128
    start = config.batch_size or (max(1, min(16, num_examples // 6)) if config.task else usual)
    config = dataclasses.replace(
        config,
        epochs=epochs,
        every=read_period(max(1, epochs // 5) if config.every is None else config.every),
        batch_size=start,
        max_batch_size=config.max_batch_size or max(start, min((2 if config.quick else 16) * start, num_examples // 2)),
        augment=is_cifar if config.augment is None else config.augment,
        devices=tuple(sorted({1, *config.devices})),
    )
    for arm in ("adaptive", "large"):
        sizes_of(config, arm, num_examples, tokens_per_example)  # raises if a batch is too large
    sizes_of(config, "small", num_examples - num_examples // 6, tokens_per_example)  # the runs that choose for (d)
    return config


def measure_costs(tasks: Tasks, config: Config, run: RunFolder) -> None:
    """Times forward and backward passes at every batch size that an arm has, on its number of devices."""
    of_arm = lambda arm: set(sizes_of(config, arm, tasks.whole.num_examples, tasks.whole.tokens_per_example))
    sizes = {count: sorted(of_arm("adaptive") | (of_arm("large") if count == 1 else set())) for count in config.devices}
    known = {(record["round"], record["devices"], record["batch_size"]) for record in run.find(kind="cost")}
    if len(known) < config.rounds * sum(map(len, sizes.values())):
        for record in tasks.cost(sizes, config.rounds):
            if (record["round"], record["devices"], record["batch_size"]) not in known:
                run.append(record)


def measure(config: Config, tasks: Tasks, run: RunFolder, console: Console) -> None:
    """Makes the measurements that are not in the run folder yet."""
    measure_costs(tasks, config, run)
    arms = report.arms(config)
    of_task: dict[str, RunPrograms] = {}
    programs: dict[tuple[str, float], RunPrograms] = {}  # of an arm at a rate, for all seeds
    with progress_bar(console) as progress:
        total = (len(config.tuned_rates) + len(arms) * config.seeds) * config.epochs
        bar = progress.add_task("epochs", total=total, rate="")

        def train(arm, rate, seed):
            def show(epochs, examples_per_second=0.0):
                progress.update(bar, advance=epochs, description=f"{arm}, seed {seed}", rate=f"{examples_per_second:,.0f} examples/s")

            if arm == "tuned" and rate == config.learning_rate:  # the run of (a) is the same, bit for bit
                known = {record["epoch"] for record in run.find(kind="epoch", arm=arm, seed=seed)}
                for record in run.find(kind="epoch", arm="small", seed=seed):
                    if record["epoch"] not in known:
                        run.append(record | {"arm": arm})
                return show(config.epochs)
            name = "choosing" if arm == "tune" else "over_devices" if report.devices_of(arm) > 1 else "whole"
            used: Task = getattr(tasks, name)
            fit_config = make_fit_config(config, arm, rate, seed, used.num_examples, used.tokens_per_example)
            of_task.setdefault(name, RunPrograms(used, fit_config.optimizer))
            shared = programs.setdefault((arm, rate), of_task[name].with_optimizer(fit_config.optimizer))
            key_fields = {"arm": arm, "learning_rate": rate, "seed": seed}
            train_into(run, shared, fit_config, key_fields, show, judged_on="validation" if arm == "tune" else "test")

        for rate in config.tuned_rates:
            train("tune", rate, OTHER_SEED)
        best = report.best_rate(run.records)
        for seed in range(config.seeds):
            for arm in arms:
                train(arm, best if arm == "tuned" else config.learning_rate, seed)
    shutil.rmtree(run.path / "in_flight", ignore_errors=True)
    report.save_arrays(config, run)


def study(config: Config, console: Console) -> None:
    """Measures what is missing, then shows what the files hold."""
    check_positive(config, "devices")
    provide_devices(max(config.devices, default=1))
    if config.task or has_text(config):
        tasks = user_tasks(config) if config.task else text_tasks(config)
        config = resolve(config, tasks.whole.num_examples, tasks.whole.tokens_per_example)
    else:
        config = shrink(shorten(config))
        dataset = load(config)
        config = resolve(config, len(dataset.train_labels))
        tasks = network_tasks(config, dataset)
    run = open_study("adabatch", config, console, tasks.whole)
    measure(config, tasks, run, console)
    show_results(console, config, run, report)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    run_study(Config, question, study, args)


if __name__ == "__main__":
    main()
