"""Memory of training steps on this machine's device: the compiler's number before, and the allocator's count after.

    python scripts/device_memory.py --output memory.jsonl        every network at five batch sizes
    python scripts/device_memory.py --output memory.jsonl --quick

A step is one update by SGD with momentum. Every size gets two processes of its own. The first compiles into a cache folder,
because the compiler tries kernels and this takes memory too. The second reads the program from there, runs it, and reads the
highest mark of the allocator. On a CPU, whose allocator keeps no count, only the compiler's numbers are written.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIZES = {
    "mlp": (128, 1000, 2048, 8192, 16384),
    "simple_cnn": (128, 1000, 2048, 8192, 16384),
    "alexnet": (128, 1000, 2048, 8192, 16384),
    "resnet20": (128, 512, 1000, 2048, 8192),
    "vgg19_bn": (128, 512, 1000, 2048, 4096),
    "resnet50": (8, 32, 64, 100, 128),
}
IN_BFLOAT16 = (1, 3)  # indices of the sizes that are also measured in bfloat16


def measure(model: str, batch_size: int, dtype: str) -> dict:
    """Measures one step of one network in this process."""
    sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
    import jax
    import jax.numpy as jnp
    import optax
    from side_by_side import random_task

    import jaxbatch as jb
    from jaxbatch.results.records import describe_provenance
    from jaxbatch.training.steps import init_state, make_task_step

    networks = {"mlp": jb.MLP, "simple_cnn": jb.SimpleCNN, "alexnet": jb.AlexNet}
    networks |= {"resnet20": jb.ResNet20, "vgg19_bn": jb.VGG19BN, "resnet50": jb.ResNet50}
    shapes = {"mlp": (28, 28, 1), "simple_cnn": (28, 28, 1), "resnet50": (224, 224, 3)}
    task = random_task(networks[model](dtype=jnp.dtype(dtype)), batch_size, shapes.get(model, (32, 32, 3)))
    optimizer = optax.sgd(0.01, 0.9)
    state, batch = init_state(task, optimizer, 0), task.train_data
    step = jax.jit(make_task_step(task, optimizer, batch_size), donate_argnums=0)
    program = step.lower(state, batch).compile()
    analysis = program.memory_analysis()
    parts = ("temp", "argument", "output", "alias")
    record = {"model": model, "batch_size": batch_size, "dtype": dtype, "optimizer": "sgd(0.01, 0.9)"}
    record |= {f"{part}_bytes": getattr(analysis, f"{part}_size_in_bytes") for part in parts}
    record |= {"peak_bytes": analysis.peak_memory_in_bytes, "program_bytes": jb.program_memory(program)}
    device = jax.devices()[0]
    jax.block_until_ready((state, batch))
    before = device.memory_stats() or {}
    state, losses = program(state, batch)
    jax.block_until_ready((state, losses))
    after = device.memory_stats() or {}
    record |= {f"before_{name}": before.get(name) for name in ("bytes_in_use", "peak_bytes_in_use")}
    record |= {f"after_{name}": after.get(name) for name in ("bytes_in_use", "peak_bytes_in_use", "pool_bytes", "bytes_limit")}
    return record | {key: describe_provenance()[key] for key in ("device", "jax")}


def run_one(model: str, batch_size: int, dtype: str, cache: str) -> dict | None:
    """Runs two processes: one that compiles and one that measures."""
    environ = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    command = [sys.executable, __file__, "--one", model, str(batch_size), dtype]
    for _ in range(2):
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
        if done.returncode:
            print(f"{model} {batch_size} {dtype}: {done.stderr.strip()[-300:]}", file=sys.stderr, flush=True)
            return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="file that gets a JSON line a case; what is there is not measured again")
    parser.add_argument("--quick", action="store_true", help="two networks, one size")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "SIZE", "DTYPE"), help="one case in this process")
    flags = parser.parse_args()
    if flags.one:
        model, size, dtype = flags.one
        print(json.dumps(measure(model, int(size), dtype)))
        return
    if not flags.output:
        parser.error("--output FILE is needed.")
    wanted = {model: SIZES[model][:1] for model in ("mlp", "simple_cnn")} if flags.quick else SIZES
    output = pathlib.Path(flags.output)
    known = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    known = {(record["model"], record["batch_size"], record["dtype"]) for record in known}

    def all_sizes(model):
        cases = [(size, "float32") for size in wanted[model]]
        cases += [] if flags.quick else [(wanted[model][n], "bfloat16") for n in IN_BFLOAT16]
        with tempfile.TemporaryDirectory() as cache:
            for size, dtype in cases:
                record = None if (model, size, dtype) in known else run_one(model, size, dtype, cache)
                if record:
                    with output.open("a") as file:
                        file.write(json.dumps(record) + "\n")

    # One thread per network. Their processes share the device, but each has an allocator with its own count.
    with concurrent.futures.ThreadPoolExecutor(1 if flags.quick else len(wanted)) as pool:
        list(pool.map(all_sizes, wanted))


if __name__ == "__main__":
    main()
