"""Does a batch that grows while the rate decays train as well as a small one, and how much faster?

Four arms see the same epochs. Every so many epochs

    (a) small      keeps its batch and multiplies its rate by decay / growth
    (b) adaptive   multiplies its batch by growth and its rate by decay: the same effective rate as (a)
    (c) large      has the largest batch of (b) from the start, and the rates of (a)
    (d) tuned      is (a) from the best of several starting rates: the baseline that a protocol's fixed rate may hide

    python -m experiments.adabatch                                                  about 1 minute
    python -m experiments.adabatch --dataset cifar10 --model resnet20 --small       the protocol in small, on CPU
    python -m experiments.adabatch --devices 1,2,4                                  (b) on several devices as well
    python -m experiments.adabatch_figures --dataset cifar10                        all networks side by side, from their files

The rate of (d) is chosen on a sixth of the training set that is held out meanwhile; then all arms train on the whole of it,
and the test error is recorded and chooses nothing. Forward and backward are timed apart for every batch size, side by side,
loading, loss and optimizer left out.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from typing import Literal

from rich.console import Console

import jaxbatch as jb
from experiments import adabatch_report
from experiments.adabatch_arms import make_fit_config, make_model, make_schedule
from experiments.adabatch_cost import measure_cost
from experiments.study import (
    StudyConfig,
    check_momentum,
    check_positive,
    open_study,
    run_study,
    show_results,
)
from experiments.training import train_into
from jaxbatch.augment import crop_and_flip
from jaxbatch.data import pad_images
from jaxbatch.results.records import RunFolder
from jaxbatch.results.report import progress_bar
from jaxbatch.schedules.batch_sizes import count_steps
from jaxbatch.training.devices import provide_devices

SMALLEST = {"alexnet": 32, "vgg19_bn": 32}  # pixels each way: the last pool of these networks leaves none of 28
OTHER_SEED = 1000  # of the runs that choose the rate of (d)


@dataclasses.dataclass(frozen=True)
class Config(StudyConfig):
    """Flags of the study."""

    model: Literal["simple_cnn", "mlp", "alexnet", "resnet20", "vgg19_bn"] = "simple_cnn"
    """The network; mlp has one hidden layer of 128 units. alexnet and vgg19_bn see smaller images padded to 32 x 32."""
    epochs: int | None = None
    """Passes over the training set. Default: 100 for CIFAR, 25 for the others."""
    every: int | None = None
    """Epochs between changes. Default: a fifth of them all."""
    batch_size: int | None = None
    """Of (a), and of (b) at the start. Default: 16 for digits, 256 for alexnet, else 128."""
    max_batch_size: int | None = None
    """Of (c), and of (b) at the end. Default: 16 times the first, as far as the data set allows."""
    growth: float = 2.0
    """Factor of the batch of (b) at each change."""
    decay: float = 0.75
    """Factor of the rate of (b) at each change; that of the others is decay / growth."""
    learning_rate: float = 0.01
    """Rate at the start of (a), (b) and (c)."""
    tuned_rates: tuple[float, ...] = (0.00316, 0.01, 0.0316, 0.1)
    """Rates that (d) chooses from, on the validation part."""
    validation_seed: int = 0
    """Seed by which a sixth of the training set is held out while the rate of (d) is chosen."""
    momentum: float = 0.9
    """Momentum of SGD, at least 0 and below 1."""
    weight_decay: float = 5e-4
    """L2 term added to the gradient, of all parameters."""
    num_examples: int | None = None
    """Only the first so many training examples, and two fifths as many for the test."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the network computes in; parameters are float32."""
    augment: bool | None = None
    """Crop with padding 4 and flip. Default: for CIFAR."""
    warmup_epochs: float = 0.0
    """Above 0: the rate of (c) rises over so many epochs to max-batch-size / batch-size times the others'."""
    devices: tuple[int, ...] = (1,)
    """Numbers of devices that (b) runs on, as 1,2,4. On CPU they are virtual; the other arms have one."""
    parallel: Literal["jit", "pmap"] = "jit"
    """How several devices share a step."""
    batch_norm: Literal["local", "synchronised"] = "local"
    """Moments of batch normalisation: of a device's share, or over all devices."""
    small: bool = False
    """The protocol in small: 2,500 examples, batches an eighth of their size, 10 epochs."""
    seeds: int = 3
    """Number of seeds; each has its own initial weights and its own order of examples."""
    rounds: int = 10
    """Rounds in which forward and backward are timed."""


def load(config: Config) -> jb.Dataset:
    """The data set, cut to ``num_examples``, its images padded where the network takes none so small."""
    dataset = pad_images(jb.load_dataset(config.dataset, data_dir=config.data_dir), SMALLEST.get(config.model, 1))
    if config.num_examples is None:
        return dataset
    if not 10 <= config.num_examples <= len(dataset.train_labels):
        raise ValueError(f"--num-examples {config.num_examples} must be from 10 to {len(dataset.train_labels)}.")
    test = 2 * config.num_examples // 5
    return dataset._replace(
        train_images=dataset.train_images[: config.num_examples],
        train_labels=dataset.train_labels[: config.num_examples],
        test_images=dataset.test_images[:test],
        test_labels=dataset.test_labels[:test],
    )


def shrink(config: Config) -> Config:
    """What --small stands for, as far as other flags do not say otherwise."""
    if not config.small:
        return config
    if config.dataset == "digits":
        raise ValueError("--small is for the larger data sets; digits are small already.")
    start = 32 if config.model == "alexnet" else 16
    wanted = {"num_examples": 2500, "epochs": 10, "batch_size": start}
    return dataclasses.replace(config, **{name: value for name, value in wanted.items() if getattr(config, name) is None})


def resolve(config: Config, num_examples: int) -> Config:
    """Fills in what depends on the data set and the network, shrinks for --quick, and checks."""
    is_cifar = config.dataset.startswith("cifar")
    if config.quick:
        config = dataclasses.replace(
            config, epochs=min(config.epochs or 5, 5), seeds=min(config.seeds, 2), rounds=2, tuned_rates=config.tuned_rates[1:3] or config.tuned_rates
        )
    check_positive(config, "epochs", "every", "batch_size", "max_batch_size", "learning_rate", "tuned_rates", "seeds", "rounds", "decay")
    check_momentum(config.momentum)
    for name in ("weight_decay", "warmup_epochs"):
        if not getattr(config, name) >= 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)} must be at least 0.")
    epochs = config.epochs or (100 if is_cifar else 25)
    if config.warmup_epochs > epochs:
        raise ValueError(f"--warmup-epochs {config.warmup_epochs:g} is more than the {epochs} epochs of the run.")
    start = config.batch_size or (16 if config.dataset == "digits" else 256 if config.model == "alexnet" else 128)
    config = dataclasses.replace(
        config,
        epochs=epochs,
        every=config.every or max(1, epochs // 5),
        batch_size=start,
        max_batch_size=config.max_batch_size or max(start, min(16 * start, num_examples // 2)),
        augment=is_cifar if config.augment is None else config.augment,
        devices=tuple(sorted({1, *config.devices})),
    )
    for arm in ("adaptive", "large"):
        count_steps(make_schedule(config, arm), num_examples, config.epochs)  # a batch larger than the data ends here
    count_steps(make_schedule(config, "small"), num_examples - num_examples // 6, config.epochs)  # where (d) is chosen
    return config


def measure_costs(dataset: jb.Dataset, config: Config, run: RunFolder) -> None:
    """Times the network's passes at every batch size that an arm has, on its number of devices."""
    sizes = {arm: {make_schedule(config, arm)(epoch) for epoch in range(config.epochs)} for arm in ("adaptive", "large")}
    sizes = {count: sorted(sizes["adaptive"] | (sizes["large"] if count == 1 else set())) for count in config.devices}
    known = {(record["round"], record["devices"], record["batch_size"]) for record in run.find(kind="cost")}
    if len(known) < config.rounds * sum(map(len, sizes.values())):
        models = {count: make_model(config, dataset.num_classes, count) for count in sizes}
        for record in measure_cost(models, dataset, sizes, config.parallel, config.rounds):
            if (record["round"], record["devices"], record["batch_size"]) not in known:
                run.append(record)


def measure(config: Config, dataset: jb.Dataset, run: RunFolder, console: Console) -> None:
    """Makes the measurements that are not in the run folder yet."""
    measure_costs(dataset, config, run)
    augment = crop_and_flip if config.augment else None
    task = jb.classification_task(make_model(config, dataset.num_classes), dataset, augment=augment)
    shared = task
    if make_model(config, 1, 2) != make_model(config, 1):  # the same network, which names the axis of the devices
        model = make_model(config, dataset.num_classes, 2)
        shared = task._replace(loss_fn=jb.classification_task(model, dataset, augment=augment).loss_fn)
    choosing = jb.classification_task(make_model(config, dataset.num_classes), jb.hold_out(dataset, seed=config.validation_seed), augment=augment)
    arms = adabatch_report.arms(config)
    with progress_bar(console) as progress:
        total = (len(config.tuned_rates) + len(arms) * config.seeds) * config.epochs
        bar = progress.add_task("epochs", total=total, rate="")

        def train(arm, rate, seed):
            def show(epochs, examples_per_second=0.0):
                progress.update(bar, advance=epochs, description=f"{arm}, seed {seed}", rate=f"{examples_per_second:,.0f} examples/s")

            if arm == "tuned" and rate == config.learning_rate:  # (a) is that run already, bit for bit
                known = {record["epoch"] for record in run.find(kind="epoch", arm=arm, seed=seed)}
                for record in run.find(kind="epoch", arm="small", seed=seed):
                    if record["epoch"] not in known:
                        run.append(record | {"arm": arm})
                return show(config.epochs)
            used = choosing if arm == "tune" else shared if adabatch_report.devices_of(arm) > 1 else task
            fit_config = make_fit_config(config, arm, rate, seed, used.num_examples)
            place = {"arm": arm, "learning_rate": rate, "seed": seed}
            train_into(run, used, fit_config, place, show, judged_on="validation" if arm == "tune" else "test")

        for rate in config.tuned_rates:
            train("tune", rate, OTHER_SEED)
        best = adabatch_report.best_rate(run.records)
        for seed in range(config.seeds):
            for arm in arms:
                train(arm, best if arm == "tuned" else config.learning_rate, seed)
    shutil.rmtree(run.path / "in_flight", ignore_errors=True)
    adabatch_report.save_arrays(config, run)


def study(config: Config, console: Console) -> None:
    """Measures what is missing, then shows what the files hold."""
    check_positive(config, "devices")
    provide_devices(max(config.devices, default=1))
    config = shrink(config)
    dataset = load(config)
    config = resolve(config, len(dataset.train_labels))
    run = open_study("adabatch", config, console)
    measure(config, dataset, run, console)
    show_results(console, config, run, adabatch_report)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    run_study(Config, __doc__, study, args)


if __name__ == "__main__":
    main()
