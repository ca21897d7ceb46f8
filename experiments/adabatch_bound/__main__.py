"""The study: its flags, what it measures and in which order. Its question stands in the docstring of the package."""

import dataclasses
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import optax
from rich.console import Console

import jaxbatch as jb
from experiments.adabatch_bound import __doc__ as question
from experiments.adabatch_bound.report import speed_up
from experiments.harness.resuming import append_missing, is_whole
from experiments.harness.shape_task import shape_task
from experiments.harness.study import StudyConfig, describe_setting, open_study, run_study
from jaxbatch.advice.memory import make_measure
from jaxbatch.advice.time_bound import make_step_bound, work_by_batch_size
from jaxbatch.machine.cross_compiling import missing_compiler
from jaxbatch.results.records import Record, RunFolder
from jaxbatch.results.report import print_table

SIZES = {"vgg19_bn": 128, "resnet20": 128, "alexnet": 256}  # of the fixed arm, and of the adaptive one at the start
GROWTHS = (1, 2, 4, 8, 16)  # one for each fifth of the epochs
MACHINES = {"1 × t4": ("t4", 1), "3 × t4": ("t4", 3), "4 × p100": ("p100", 4)}
PUBLISHED = {
    ("vgg19_bn", "1 × t4"): "1.03, 1.06",
    ("resnet20", "1 × t4"): "1.03, 1.06",
    ("alexnet", "1 × t4"): "1.39, 1.31",
    ("vgg19_bn", "3 × t4"): "3.28, 1.52",
    ("resnet20", "3 × t4"): "2.29, 2.50",
}


@dataclasses.dataclass(frozen=True)
class Config(StudyConfig):
    """Flags of the study."""

    seeds: int = 1
    """Not used by this study: nothing in it is random."""


def measure(config: Config, run: RunFolder) -> Iterator[Record]:
    """A record for each network, machine and batch size: the bound on a step, and what it consists of."""
    optimizer = optax.sgd(0.01, 0.9)
    for model in ("alexnet",) if config.quick else SIZES:
        task = shape_task(model, "cifar100", "float32")
        work = work_by_batch_size(task, optimizer)
        for machine, (name, count) in list(MACHINES.items())[: 1 if config.quick else None]:
            if is_whole(run.find(model=model, machine=machine), batch_size=[SIZES[model] * growth for growth in GROWTHS]):
                continue
            target = jb.find_target(name)
            bound = make_step_bound(task, target, work)
            shares = {SIZES[model] * growth: -(-SIZES[model] * growth // count) for growth in GROWTHS}
            memory = make_measure(task, optimizer=optimizer, target=target, step_alone=True)
            profile = {share: memory(share) for share in sorted(set(shares.values()))}
            for size, share in shares.items():
                step = bound(profile[share])
                # A ring sends the gradient twice, less one share; a link carries half of its rate in each direction.
                sent = 2 * (count - 1) / count * profile[share].parameters / (target.interconnect / 2)
                seconds = max(step.seconds, sent)
                yield {
                    "model": model,
                    "machine": machine,
                    "batch_size": size,
                    "step_ms": 1e3 * seconds,
                    "compute_ms": 1e3 * step.bound.compute,
                    "transfer_ms": 1e3 * step.bound.transfer,
                    "network_ms": 1e3 * sent,
                }


def study(config: Config, console: Console) -> None:
    """Works out what is missing, then shows the table."""
    missing = missing_compiler(jb.find_target("t4"))
    if missing:
        raise ValueError(missing)
    run = open_study("adabatch_bound", config, console)
    append_missing(run, measure(config, run), ("model", "machine", "batch_size"))
    describe_setting(console, SimpleNamespace(dataset="cifar100", seeds=1), run.provenance, "float32", "momentum")
    rows = []
    for model, machine in dict.fromkeys((record["model"], record["machine"]) for record in run.records):
        mine = [record for record in run.records if (record["model"], record["machine"]) == (model, machine)]
        ends = [f"{record['step_ms']:.3g} ({_decides(record)})" for record in (mine[0], mine[-1])]
        rows.append([f"{model}, {machine}", *ends, f"{speed_up(run.records, model, machine):.2f}", PUBLISHED.get((model, machine), "–")])
    columns = ["network, machine", "first step, ms", "last step, ms", "bound's speed-up", "published: forward, backward"]
    print_table(console, "Speed-up of adaptive over fixed, by lower bounds on the time of a step", columns, rows)
    console.print("Times are bounds from data sheets, not measurements; the published ones were measured.", style="bold", soft_wrap=True)


def _decides(record: Record) -> str:
    names = {"compute_ms": "compute", "transfer_ms": "memory", "network_ms": "network"}
    return names[max(names, key=lambda name: record[name])]


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    run_study(Config, question, study, args)


if __name__ == "__main__":
    main()
