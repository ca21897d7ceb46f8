"""What a gradient with very many classes costs in time and memory, in chunks and by all logits.

As a program of its own, ``faces_cost.py UPDATES``, it makes updates with 65,536 examples of 100,000 identities and prints the peak of its memory.
"""

import json
import resource
import sys
import time
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.faces.identities import keys_of, sources_of
from experiments.faces.training import Order, gradient_on, init_params, make_arm_run, make_order
from experiments.harness.resuming import is_whole
from jaxbatch.data import load_dataset
from jaxbatch.machine.memory import program_memory
from jaxbatch.machine.timing import timed_rounds
from jaxbatch.results.records import RunFolder

HUGE = SimpleNamespace(batch_size=65_536, identities=100_000, chunk_size=512, microbatch_size=4096, scale=16.0, margin=0.2, optimizer="adam")
QUICK_HUGE = SimpleNamespace(**vars(HUGE) | {"batch_size": 8192, "identities": 10_000})


def lowered(config: Any, sources, batch_size: int, identities: int, *, chunked: bool):
    """The gradient of a batch, lowered from shapes alone, so that nothing is allocated."""
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), identities))
    batch = jax.eval_shape(lambda: (jnp.zeros(batch_size, jnp.int32), jax.random.split(jax.random.key(0), batch_size)))
    gradient = lambda sources, params, batch: gradient_on(config, sources, "cosface", batch_size, chunked=chunked)(params, batch)
    return jax.jit(gradient).lower(jax.ShapeDtypeStruct(sources.shape, sources.dtype), params, batch)


def measure_memory(config: Any, sources, run: RunFolder) -> None:
    """Compiled memory of the gradient at each batch size, and of the huge case; nothing is run here."""
    huge = QUICK_HUGE if config.quick else HUGE
    for size, identities in [*((size, config.identities) for size in config.batch_sizes), (huge.batch_size, huge.identities)]:
        for variant, chunked in (("chunks", True), ("all logits", False)):
            key_fields = {"kind": "memory", "batch_size": size, "identities": identities, "way": variant}
            if not run.find(**key_fields):
                run.append({**key_fields, "bytes": program_memory(lowered(config, sources, size, identities, chunked=chunked).compile())})


def measure_times(config: Any, sources, run: RunFolder) -> None:
    """The gradient of a batch in chunks and by all logits, in rounds."""
    params = init_params(jax.random.key(0), config.identities)
    for size in config.batch_sizes:
        if is_whole(run.find(kind="time", batch_size=size), round=range(config.cost_rounds)):
            continue
        identities = jnp.arange(size) % config.identities
        batch = (identities, keys_of(0, jnp.arange(size) // config.identities, identities))
        programs = {}
        for variant, chunked in (("chunks", True), ("all logits", False)):
            program = lowered(config, sources, size, config.identities, chunked=chunked).compile()
            programs[variant] = lambda program=program, batch=batch: program(sources, params, batch)
        for number, times in enumerate(timed_rounds(programs, config.cost_rounds)):
            if not run.find(kind="time", batch_size=size, round=number):
                run.append({"kind": "time", "batch_size": size, "round": number, "milliseconds": times})


def peak_bytes() -> int:
    """The peak of this process's memory; Linux counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_updates(config: Any, updates: int) -> dict[str, Any]:
    """Makes some updates, and tells the losses, the seconds of all, and the peak of memory before and at the end."""
    sources = sources_of(load_dataset("digits").train_images)
    run = make_arm_run(config, "cosface", config.batch_size, updates)
    order: Order = make_order(0, config.identities, config.batch_size, updates * config.batch_size)
    params = jax.block_until_ready(init_params(jax.random.key(0), config.identities))
    arguments = (sources, params, np.float32(0.003), np.uint32(0), order)
    program = run.lower(*arguments).compile()
    before, started = peak_bytes(), time.perf_counter()
    _, losses = jax.block_until_ready(program(*arguments))
    record = {"updates": updates, "batch_size": config.batch_size, "identities": config.identities, "seconds": time.perf_counter() - started}
    return record | {"losses": losses.tolist(), "program_bytes": program_memory(program), "peak_before": before, "peak": peak_bytes()}


if __name__ == "__main__":
    print(json.dumps(measure_updates(QUICK_HUGE if "--quick" in sys.argv else HUGE, int(sys.argv[1]))))
