"""The part of the cross-check that computes nothing: does every step compile for a device that is not here?"""

import concurrent.futures
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

import jaxbatch
from experiments.cross_check.cases.compile_for import all_jobs, explain, is_explained, run_jobs
from jaxbatch.advice.memory import caveats
from jaxbatch.machine.cores import num_cores
from jaxbatch.machine.targets import find_target, format_bytes
from jaxbatch.results.records import Record, open_run
from jaxbatch.results.report import print_table, progress_bar


def compile_all(config, console: Console) -> bool:
    """Compiles every step for every target of ``config.compile_for``; returns whether all compile and nothing is unexplained."""
    jobs = all_jobs(config.quick, config.only)
    if not jobs:
        raise ValueError(f"--only {config.only}: no step has this in its name, such as 'resnet20, split, float32'.")
    fields = {"compile_for": config.compile_for, "quick": config.quick, "only": config.only, "jaxbatch": jaxbatch.__version__}
    run = open_run(config.output_dir, "cross_check_compiled", fields, resume=True)
    name = lambda record: (record["target"], record["model"], record["step"], record["dtype"])
    known = {name(record) for record in run.records}
    wanted = [(job, find_target(target_name)) for target_name in config.compile_for for job in jobs]
    wanted = [(job, target) for job, target in wanted if (target.name, job.model, job.kind, job.dtype) not in known]
    with progress_bar(console) as progress, concurrent.futures.ThreadPoolExecutor(num_cores()) as pool:
        bar = progress.add_task("compiling", total=len(wanted), rate="")
        futures = [pool.submit(lambda job, target: list(run_jobs([job], target)), *one) for one in wanted]
        for done in concurrent.futures.as_completed(futures):
            for record in done.result():
                run.append(record)
            progress.update(bar, advance=1)
    target_order = {find_target(target_name).name: number for number, target_name in enumerate(config.compile_for)}
    order = {(job.model, job.kind, job.dtype): number for number, job in enumerate(jobs)}
    records = [record for record in run.records if record["target"] in target_order and name(record)[1:] in order]
    records.sort(key=lambda record: (target_order[record["target"]], order[name(record)[1:]]))
    print_records(console, records)
    for sentence in closing(records):
        console.print(sentence, style="bold", soft_wrap=True)
    return all(not record["failure"] and is_explained(record) for record in records)


def print_records(console: Console, records: Sequence[Record]) -> None:
    """A table of the programs, then a red line for each that does not compile, and the reasons of the rest."""
    rows = []
    for record in records:
        compiled = record["bytes"] is not None
        state = ", ".join(record["suspicious"]) or "–" if compiled else "not defined" if record["reason"] else "DOES NOT COMPILE"
        numbers = [f"{record['seconds']:.1f}", format_bytes(record["bytes"])] if compiled else ["–", "–"]
        rows.append([f"{record['target']}: {record['model']}, {record['step']}, {record['dtype']}", *numbers, state])
    print_table(console, "Programs compiled for devices that are not here", ["program", "s", "memory", "suspicious"], rows)
    for record in records:
        if record["failure"]:
            program = f"{record['target']}: {record['model']}, {record['step']}, {record['dtype']}"
            console.print(Text(f"does not compile: {program}: {record['failure']}", style="bold red"), soft_wrap=True)
    for reason in dict.fromkeys(record["reason"] for record in records if record["reason"]):
        console.print(f"not defined: {reason}.", soft_wrap=True)
    reasons = {kind: reason for record in records for kind, reason in explain(record).items()}
    for kind, reason in reasons.items():
        console.print(f"{kind}: {reason}.", soft_wrap=True)


def closing(records: Sequence[Record]) -> list[str]:
    """What the table says, and what it cannot say."""
    sentences = []
    for target_name in dict.fromkeys(record["target"] for record in records):
        mine = [record for record in records if record["target"] == target_name and not record["reason"]]
        failed = sum(bool(record["failure"]) for record in mine)
        odd = sum(not is_explained(record) for record in mine)
        target = find_target(target_name)
        unsaid = " ".join(caveats(target)) or "Nothing was run."
        sentences.append(f"{target.title}: {len(mine) - failed} of {len(mine)} programs compile, {odd} with something unexplained. {unsaid}")
    return sentences
