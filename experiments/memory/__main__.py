"""The study: its flags, what it measures and in which order. Its question stands in the docstring of the package."""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from rich.console import Console

import jaxbatch as jb
from experiments.harness.optimizers import OptimizerFlags, fill_optimizer, make_optimizer
from experiments.harness.resuming import append_missing
from experiments.harness.shape_task import SHAPES, USUAL, DataName, Network, shape_task
from experiments.harness.study import TaskConfig, open_study, run_study, show_results
from experiments.harness.user_task import load_user_task
from experiments.memory import __doc__ as question
from experiments.memory import report
from jaxbatch.advice.largest_batch import MARGIN, find_largest_batch
from jaxbatch.advice.memory import Effort, caveats, memory_profile
from jaxbatch.advice.memory_parts import Memory
from jaxbatch.advice.time_bound import compute_takes_over, make_step_bound, work_by_batch_size
from jaxbatch.machine.cores import num_cores
from jaxbatch.machine.cross_compiling import missing_compiler
from jaxbatch.machine.roofline import Work
from jaxbatch.machine.targets import as_bytes
from jaxbatch.results.records import Record, RunFolder

RATE = 0.1  # no rate changes memory or work
LADDER = (64, 256, 1024)  # sizes of the figure besides those of the search, where a compilation takes seconds


@dataclasses.dataclass(frozen=True)
class Config(OptimizerFlags, TaskConfig):
    """Flags of the study."""

    model: Network = "simple_cnn"
    """Network: simple_cnn, mlp, alexnet, resnet20, vgg19_bn, resnet50."""
    dataset: DataName | None = None
    """Data set, whose shapes are used: digits, mnist, fashion_mnist, kmnist, cifar10, cifar100, imagenet (224 pixels, streamed).
    Default: mnist for simple_cnn and mlp, imagenet for resnet50, cifar10 for the others."""
    optimizer: str = "momentum"
    """Optimizer: sgd, momentum, nesterov, rmsprop, adam, adamw, lion, lars, lamb, muon; or a function of your own, learning rate ->
    optimizer, as my_optimizer.py:make_optimizer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the network computes in; parameters are float32."""
    targets: tuple[str, ...] | None = None
    """Accelerators, such as h100 t4 v5e; here is the device that JAX computes on. Default: here, and h100 if its compiler is installed."""
    budget: str | None = None
    """Memory that a step may need on each device, such as 8GiB. Default: what JAX's programs can use on the target."""
    margin: float = MARGIN
    """Share of the budget that is left free."""
    batch_size: int | None = None
    """Also say how to run this batch, which may be too large: microbatches, and activations that are computed again."""
    split: int | None = None
    """Number of updates from one batch, each from a group of its examples, see split_backward."""
    num_devices: int = 1
    """Number of devices that share every batch; batch sizes are those of all devices."""
    evaluation_batch_size: int | None = None
    """Test examples that are evaluated at a time. Default: as fit takes by itself, 500 at most."""
    effort: Effort = "least"
    """Effort of the TPU compiler. With least, it is 4 times as fast, and the memory is larger, by up to 5% with large batches."""
    seeds: int = 1
    """Not used by this study: nothing in it is random."""

    trains = False


def resolve(config: Config) -> Config:
    """Fills in the default targets and the data set, and checks."""
    config = fill_optimizer(config)
    targets = config.targets
    if targets is None:
        targets = ("here", "h100") if missing_compiler(jb.find_target("h100")) is None and not config.quick else ("here",)
    if not targets:
        raise ValueError("--targets needs at least one name.")
    for name in targets:
        missing = missing_compiler(jb.find_target(name))
        if missing:
            raise ValueError(f"--targets {missing}")
    sizes = {"batch-size": config.batch_size, "split": config.split, "num-devices": config.num_devices}
    for flag, value in (sizes | {"evaluation-batch-size": config.evaluation_batch_size}).items():
        if value is not None and value < 1:
            raise ValueError(f"--{flag} {value} must be at least 1.")
    if not 0 <= config.margin < 1:
        raise ValueError(f"--margin {config.margin} must be at least 0 and below 1.")
    if config.budget is not None:
        as_bytes(config.budget)
    if config.task is not None:
        if config.dtype != "float32":
            raise ValueError("--task and --dtype exclude each other: the task alone says in which types it computes.")
        return dataclasses.replace(config, targets=targets)
    dataset = config.dataset or USUAL.get(config.model, "cifar10")
    if config.model in ("alexnet", "resnet20", "vgg19_bn", "resnet50") and min(SHAPES[dataset][1][:2]) < 32:
        raise ValueError(f"--model {config.model} needs images of 32 pixels or more; --dataset {dataset} has {SHAPES[dataset][1][0]}.")
    return dataclasses.replace(config, targets=targets, dataset=dataset)


def measure_target(config: Config, task: jb.Task, name: str, work: Callable[[int], Work]) -> Iterator[Record]:
    """Finds the largest batch of one target: a record for each compiled size, one for the answer, and one for the plan."""
    target, optimizer = jb.find_target(name), make_optimizer(config)(RATE)
    settings = {"num_groups": config.split, "num_devices": config.num_devices, "effort": config.effort}
    settings |= {"evaluation_batch_size": config.evaluation_batch_size}
    target_fields = {"target": name, "title": target.title}
    largest = find_largest_batch(task, optimizer=optimizer, target=target, budget=config.budget, margin=config.margin, **settings)
    unit = (config.split or 1) * config.num_devices
    ladder = [size // unit * unit for size in LADDER if unit <= size < largest.batch_size]
    quickly = max(memory.compile_seconds for memory in largest.profile.values()) < 5
    missing = [size for size in ladder if size not in largest.profile and quickly and not config.quick]
    profile = largest.profile | memory_profile(task, missing, optimizer=optimizer, target=target, **settings)
    bound = make_step_bound(task, target, work) if target.peak and target.bandwidth else None
    bounds = {}
    for size, memory in sorted(profile.items()):
        record = {"kind": "size", **target_fields, **memory._asdict(), "total": memory.total, "compiled_in_search": size in largest.profile}
        if bound and not memory.refused:
            bounds[size] = bound(_on_one_device(memory, config.num_devices))
            record |= {"bound_ms": 1e3 * bounds[size].seconds, "compute_ms": 1e3 * bounds[size].bound.compute}
        yield record
    ends = [bounds[size] for size in (min(bounds), max(bounds))] if len(bounds) > 1 else []
    takes_over = compute_takes_over(*ends) if ends else None
    yield {
        "kind": "largest",
        **target_fields,
        "batch_size": largest.batch_size,
        "verified": largest.next_memory is not None,
        "limit": largest.limit,
        "bytes_per_example": largest.bytes_per_example,
        "fixed_bytes": largest.fixed_bytes,
        "compilations": len(largest.profile),
        "compile_seconds": sum(memory.compile_seconds for memory in largest.profile.values()),
        "compute_from": takes_over and takes_over * config.num_devices,
        "caveats": caveats(target),
    }
    if config.batch_size is not None:
        yield {"kind": "plan", **target_fields, **_plan(config, task, optimizer, target)}


def _plan(config: Config, task: jb.Task, optimizer, target) -> Record:
    plan = jb.memory_plan(
        task,
        optimizer=optimizer,
        batch_size=config.batch_size,
        target=target,
        num_devices=config.num_devices,
        budget=config.budget,
        margin=config.margin,
        evaluation_batch_size=config.evaluation_batch_size,
        frontier=not config.quick,
    )
    options = [{**option._asdict(), "memory": option.memory.total} for option in plan.options]
    return {"batch_size": config.batch_size, "sentence": plan.sentence, "options": options}


def _rows_of(config: Config, task: jb.Task, name: str, work: Callable[[int], Work]) -> tuple[list[Record], ValueError | None]:
    """What was worked out for a target, and what stopped it, if anything did."""
    rows: list[Record] = []
    try:
        for row in measure_target(config, task, name, work):
            rows.append(row)
    except ValueError as failure:
        return rows, failure
    return rows, None


def _on_one_device(memory: Memory, num_devices: int) -> Memory:
    return memory._replace(batch_size=-(-memory.batch_size // num_devices))


def measure(config: Config, task: jb.Task, run: RunFolder) -> Iterator[Record]:
    """Works out the targets that are missing, on as many cores as there are."""
    known = {record["target"] for record in run.find(kind="plan" if config.batch_size else "largest")}
    wanted = [name for name in config.targets if name not in known]
    work = work_by_batch_size(task, make_optimizer(config)(RATE)) if wanted else None
    with concurrent.futures.ThreadPoolExecutor(num_cores()) as pool:
        futures = [pool.submit(_rows_of, config, task, name, work) for name in wanted]
        failures = []
        for done in concurrent.futures.as_completed(futures):
            rows, failure = done.result()  # of one target; what it found before, and what the others find, is written all the same
            yield from rows
            failures += [failure] if failure is not None else []
    if failures:
        raise ValueError("; ".join(dict.fromkeys(map(str, failures))))


def study(config: Config, console: Console) -> None:
    """Measures what is missing, then shows what the files hold."""
    config = resolve(config)
    task = load_user_task(config.task) if config.task else shape_task(config.model, config.dataset, config.dtype)
    run = open_study("memory", config, console, task)
    try:
        append_missing(run, measure(config, task, run), ("kind", "target", "batch_size"))
    except ValueError:
        if run.records:  # of the targets that fit
            show_results(console, config, run, report)
        raise
    show_results(console, config, run, report)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    run_study(Config, question, study, args)


if __name__ == "__main__":
    main()
