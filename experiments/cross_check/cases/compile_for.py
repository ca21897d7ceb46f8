"""Compiles every step of the library for accelerators that are not here, and reads the compiled programs for surprises."""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbatch as jb
from experiments.harness.shape_task import NETWORKS
from jaxbatch.machine.cross_compiling import CompilationError, CompiledProgram, compile_for
from jaxbatch.machine.platform import compiling_for
from jaxbatch.machine.targets import Target, find_target
from jaxbatch.results.records import Record
from jaxbatch.training.classification import task_of_model
from jaxbatch.training.step_programs import step_programs
from jaxbatch.training.train_state import state_shapes

BATCH, PARTS, DEVICES = 16, 4, 4
NUM_EXAMPLES = 4096  # of the data set on the device; its shape is found in a program if it is copied
IMAGES = {"simple_cnn": (28, 28, 1), "mlp": (28, 28, 1), "resnet50": (64, 64, 3)}  # the others: 32 × 32
KINDS = ("plain", "split", "accumulated", "per example", "noise statistics", "plain, 2 × 2", "split, 2 × 2")
QUICK = ("simple_cnn", "resnet20")
DTYPES = ("float32", "bfloat16")
_LEAST = {"exec_time_optimization_effort": -1.0}
_COUPLED = "batch normalisation couples the examples of a batch, so it has no gradients per example"


class Job(NamedTuple):
    """A program to compile, or the reason why there is none."""

    model: str
    kind: str
    dtype: str
    make: Callable[[Target], CompiledProgram]
    data_shape: tuple[int, ...]
    reason: str = ""


def all_jobs(quick: bool, only: str = "") -> list[Job]:
    """Each network × each kind of step × each type, those whose name contains ``only``."""
    jobs = []
    for model in QUICK if quick else NETWORKS:
        for dtype in DTYPES[:1] if quick else DTYPES:
            task = _task(model, dtype)
            for kind in KINDS:
                if only in f"{model}, {kind}, {dtype}":
                    reason = _COUPLED if kind in ("per example", "noise statistics") and task.update_model_state is not None else ""
                    make = lambda target, task=task, kind=kind: _compile(target, task, kind)
                    jobs.append(Job(model, kind, dtype, make, task.train_data[0].shape, reason))
    return jobs


def _task(model: str, dtype: str) -> jb.Task:
    shape = IMAGES.get(model, (32, 32, 3))
    blank = jb.Dataset("shapes", None, None, None, None, 10, (0.5,) * shape[2], (0.5,) * shape[2])
    data = (jax.ShapeDtypeStruct((NUM_EXAMPLES, *shape), np.uint8), jax.ShapeDtypeStruct((NUM_EXAMPLES,), np.int32))
    return task_of_model(NETWORKS[model](dtype=jnp.dtype(dtype)), shape, blank, data, None, None)


def _compile(target: Target, task: jb.Task, kind: str) -> CompiledProgram:
    optimizer = optax.sgd(0.1, 0.9)
    settings: dict[str, Any] = {"with_text": True, "options": _LEAST if target.platform == "tpu" else {}}
    # At the highest precision, so that a product in a lower one stands out.
    with jax.default_matmul_precision("highest"):
        if kind in ("per example", "noise statistics"):
            call = jb.per_example_gradients if kind == "per example" else jb.gradient_statistics
            batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((BATCH, *leaf.shape[1:]), leaf.dtype), task.train_data)
            params = state_shapes(task, optimizer).params
            return compile_for(target, lambda params, batch: call(task.loss_fn, params, batch), params, batch, **settings)
        devices = DEVICES if "2 × 2" in kind else 1
        with compiling_for(target.platform):
            (program,) = step_programs(
                task,
                optimizer,
                BATCH,
                num_groups=PARTS if kind.startswith("split") else None,
                microbatch_size=BATCH // PARTS if kind == "accumulated" else None,
                num_devices=devices,
            )
        layout = program.layout
        settings |= {"donate": layout.donated, "split": layout.is_split}
        return compile_for(target, layout.function, *layout.arguments.values(), num_devices=devices, **settings)


def run_jobs(jobs: list[Job], target: Target) -> Iterator[Record]:
    """A record for each program: whether it compiles, the seconds, the memory, and what is suspicious in it."""
    for job in jobs:
        record: Record = {"target": target.name, "model": job.model, "step": job.kind, "dtype": job.dtype, "reason": job.reason, "failure": ""}
        compiled: Record = {"seconds": None, "bytes": None, "suspicious": []}
        if not job.reason:
            try:
                program = job.make(target)
                compiled = {"seconds": program.seconds, "bytes": program.total, "suspicious": find_suspicious(program.text, job)}
            except (CompilationError, ValueError) as error:
                record["failure"] = " ".join(str(error).split())[:300]
        yield record | compiled


def find_suspicious(text: str, job: Job) -> list[str]:
    """What a reader of the compiled program would stop at."""
    lines, suspicious = text.splitlines(), []
    grouped = [line for line in lines if re.search(r"(feature|batch)_group_count=([2-9]|\d\d)", line)]
    if grouped:
        suspicious.append(f"{len(grouped)} grouped convolutions")
    gathers = [line for line in lines if re.search(r"\ball-gather(-start)?\(", line)]
    if gathers:
        suspicious.append(f"{len(gathers)} all-gathers across devices")
    if any(" f64[" in line for line in lines):
        suspicious.append("float64")
    if job.dtype == "float32" and (low := [line for line in lines if _is_low_product(line)]):
        suspicious.append(f"{len(low)} products below float32")
    shape = ",".join(map(str, job.data_shape))
    if any(re.search(rf"= u8\[{shape}\]\S* (copy|convert|transpose)\(", line) for line in lines):
        suspicious.append("a copy of the data set")
    return suspicious


def _is_low_product(line: str) -> bool:
    """Whether a line is a product of floating-point numbers that is not computed in the highest precision, which was asked for."""
    product = re.search(r" (convolution|dot)\(|custom_call_target=\"__(cudnn\$conv|cublas\$)", line)
    # A fused convolution has further operands, a bias or what is added, after the two that are multiplied.
    asked = "operand_precision={highest,highest" in line or '"operand_precision":["HIGHEST","HIGHEST"]' in line
    return bool(product) and not asked and "s32[" not in line and "u32[" not in line


_GROUPED = "gradients computed side by side, of examples or groups, have a kernel each, and XLA writes them as one grouped convolution"
_COPIED = (
    "a TPU keeps the examples of a data set as the innermost axis, and taking a batch needs them as the outermost; the program of an epoch copies "
    "the data set once, before its loop over steps, and this memory is counted"
)


def explain(record: Record) -> dict[str, str]:
    """Why what looks suspicious is right, as far as that is known: by what was found.

    Example:
        >>> explain({"target": "h100", "step": "plain", "suspicious": ["2 grouped convolutions"]})
        {}
    """
    known = {}
    for finding in record["suspicious"]:
        kind = re.sub(r"^\d+ ", "", finding)
        if kind == "grouped convolutions" and record["step"].startswith(("per example", "noise", "split")):
            known[kind] = _GROUPED
        if kind == "a copy of the data set" and find_target(record["target"]).platform == "tpu":
            known[kind] = _COPIED
    return known


def is_explained(record: Record) -> bool:
    """Whether nothing in the program is suspicious without a reason."""
    return len(explain(record)) == len(record["suspicious"])
