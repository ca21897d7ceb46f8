"""The study: its flags, what it measures and in which order. Its question stands in the docstring of the package."""

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import jax
import tyro
from rich.console import Console

import jaxbatch
from experiments.cross_check import __doc__ as question
from experiments.cross_check import compiled, report
from experiments.cross_check.cases.all import all_cases
from experiments.cross_check.cases.case import ROUNDING
from experiments.cross_check.cases.files import check_save, compare, load, load_others, save
from experiments.cross_check.cases.run import Output, run_cases
from experiments.harness.command_line import for_quick, one_line_errors, parse
from jaxbatch.machine.cross_compiling import missing_compiler
from jaxbatch.paths import local_path
from jaxbatch.results.records import describe_provenance, make_run_folder, open_run
from jaxbatch.results.report import progress_bar

CPU_DEVICES = 4  # virtual devices, for the rows on several devices


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags."""

    precision: tuple[str, ...] = tuple(ROUNDING)
    """Any of float64, float32, bfloat16 and default (float32 arrays, multiplied as the platform does by default)."""
    seed: int = 0
    """Seed of the inputs."""
    quick: bool = False
    """Check only the rows and sizes that matter most, and only in float32 unless --precision says otherwise."""
    only: str = ""
    """Check only computations whose name contains this text."""
    save: str | None = None
    """File to write outputs, digests, versions and device to."""
    against: str | None = None
    """File that another machine has saved; results are compared as bit-equal, within the bounds, or not."""
    output_dir: str = "results"
    """Folder for the table's records and the figure."""
    backend: str | None = None
    """Check only this backend: cpu, gpu or tpu. Default: all that JAX finds."""
    compile_for: tuple[str, ...] = ()
    """Compute nothing; compile every step for these targets, such as h100 v5e, and list what is suspicious in the programs."""
    given: tyro.conf.Suppress[tyro.conf.Fixed[tuple[str, ...]]] = ()
    """The fields whose flags are given, which --quick does not change; no flag itself."""


def resolve(config: Config) -> Config:
    """Checks the flags."""
    config = for_quick(config, precision=("float32",))
    for name in config.precision:
        if name not in ROUNDING:
            raise ValueError(f"--precision {name} must be one of {', '.join(ROUNDING)}.")
    if not config.precision:
        raise ValueError(f"--precision needs at least one of {', '.join(ROUNDING)}.")
    if config.backend not in (None, "cpu", "gpu", "tpu"):
        raise ValueError(f"--backend {config.backend} must be cpu, gpu or tpu.")
    if config.seed < 0:
        raise ValueError(f"--seed {config.seed} must be at least 0.")
    for name in config.compile_for:
        missing = missing_compiler(jaxbatch.find_target(name))
        if missing:
            raise ValueError(f"--compile-for {missing}")
    if config.backend not in (None, jax.default_backend()) and config.backend not in find_backends():
        raise ValueError(f"--backend {config.backend}: JAX finds only {', '.join(find_backends())} here.")
    return config


def find_backends() -> list[str]:
    """The platforms that JAX computes on here, the default one first."""
    backends = [jax.default_backend()]
    for platform in ("tpu", "gpu", "cpu"):
        try:
            jax.devices(platform)
        except RuntimeError:
            continue
        if platform not in backends:
            backends.append(platform)
    return backends


def check_here(config: Config, console: Console) -> list[Output]:
    """Runs the cases on this process's default backend."""
    cases = [case for case in all_cases() if config.only in case.name and (case.quick or not config.quick)]
    if not cases:
        raise ValueError(f"--only {config.only}: no computation has this in its name.")
    precisions = [name for name in config.precision if name != "default" or jax.default_backend() != "cpu"]  # float32 there
    outputs = []
    with progress_bar(console) as progress:
        bar = progress.add_task("computations", total=len(cases), rate="")
        for case in cases:
            progress.update(bar, description=case.name, rate="")
            outputs += run_cases([case], precisions or ["default"], config.seed)
            progress.update(bar, advance=1)
    return outputs


def check_elsewhere(config: Config, backend: str) -> tuple[list[Output], dict]:
    """Runs the cases on another backend, in a process of its own, because the library depends on the default backend."""
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "outputs.npz")
        flags = ["--precision", *config.precision, "--seed", str(config.seed), "--only", config.only, "--backend", backend]
        flags += ["--save", file, "--output-dir", folder] + (["--quick"] if config.quick else [])
        command = [sys.executable, "-m", "experiments.cross_check", *flags]
        done = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": backend}, capture_output=True, text=True)
        if not os.path.exists(file):
            raise ValueError(f"--backend {backend}: its process ended with code {done.returncode}: {done.stderr.strip()[-200:]}")
        outputs, machines = load(file)
        return outputs, machines


def cross_check(config: Config, console: Console) -> bool:
    """Runs everything, shows it, and returns whether all agree."""
    config = resolve(config)
    if config.compile_for:
        return compiled.compile_all(config, console)
    # A wrong path must stop the program now, before minutes of computing and before anything is removed.
    others = load_others(local_path(config.against, "--against"), config.seed) if config.against else []
    if config.save:
        check_save(local_path(config.save, "--save"))
    make_run_folder(config.output_dir, "cross_check", _fields(config))
    wanted = [config.backend] if config.backend else find_backends()
    outputs, machines = [], {}
    for backend in wanted:
        if backend == jax.default_backend():
            backend_outputs, backend_machines = check_here(config, console), {backend: describe_provenance()}
        else:
            backend_outputs, backend_machines = check_elsewhere(config, backend)
        outputs, machines = outputs + backend_outputs, machines | backend_machines
    run = open_run(config.output_dir, "cross_check", _fields(config), overwrite=True)
    for output in outputs:
        run.append(output.record)
    records = [output.record for output in outputs]
    report.print_table_of(console, records, machines)
    agree = report.print_failures(console, records, machines)
    figure = report.draw_figure(records, run.path)
    if config.save:
        save(local_path(config.save, "--save"), outputs, machines)
        console.print(f"Saved: {config.save}", soft_wrap=True)
    if config.against:
        pairs = compare(outputs, others)
        if not pairs:
            raise ValueError(f"--against {config.against}: it has no computation of this run. Use the same --quick, --only and --precision.")
        agree &= report.print_comparison(console, pairs)
    console.print(report.closing(records, machines), style="bold", soft_wrap=True)
    console.print(f"Figure: {figure}", soft_wrap=True)
    return agree


def _fields(config: Config) -> dict:
    names = ("precision", "seed", "quick", "only", "backend")
    return {name: getattr(config, name) for name in names} | {"jaxbatch": jaxbatch.__version__}


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    config = parse(Config, question, args)
    with one_line_errors():
        with contextlib.suppress(RuntimeError):  # if JAX has already started, the devices cannot be changed
            jax.config.update("jax_num_cpu_devices", CPU_DEVICES)
        agree = cross_check(config, Console(highlight=False))
    if not agree:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
