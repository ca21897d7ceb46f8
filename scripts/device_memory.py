"""Memory of training steps on this machine's device: what the compiler predicts, and what a run uses.

    python scripts/device_memory.py --output memory.jsonl        every network at five batch sizes (on a CPU four, with two optimizers)
    python scripts/device_memory.py --output memory.jsonl --quick
    python scripts/device_memory.py --table memory.jsonl         the errors of a file
    python scripts/device_memory.py --table memory.jsonl --target h200     the errors of a prediction that is made without the device

Every size gets two processes of its own. The first compiles into a cache folder, because the compiler tries kernels and this
takes memory too. The second reads the program from there and runs it. On a GPU or TPU, the highest mark of the allocator is
what was used. On a CPU it is the highest mark of the process's resident memory while the step runs, less the memory before,
plus the arguments, which were there before.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
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
CPU_SIZES = {
    "mlp": (128, 1000, 8192, 32768),
    "simple_cnn": (128, 1000, 8192, 32768),
    "alexnet": (128, 500, 1000, 2048),
    "resnet20": (32, 64, 128, 512),
    "vgg19_bn": (16, 32, 64, 128),
    "resnet50": (1, 2, 4, 8),
}
OPTIMIZERS = ("momentum", "adam")
IN_BFLOAT16 = (1, 3)  # indices of the sizes that are also measured in bfloat16


def make_case(model: str, batch_size: int, dtype: str, optimizer_name: str):
    """The task, whose data are one batch, and the optimizer."""
    sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
    import jax.numpy as jnp
    import optax
    from side_by_side import random_task

    import jaxbatch as jb

    networks = {"mlp": jb.MLP, "simple_cnn": jb.SimpleCNN, "alexnet": jb.AlexNet}
    networks |= {"resnet20": jb.ResNet20, "vgg19_bn": jb.VGG19BN, "resnet50": jb.ResNet50}
    shapes = {"mlp": (28, 28, 1), "simple_cnn": (28, 28, 1), "resnet50": (224, 224, 3)}
    task = random_task(networks[model](dtype=jnp.dtype(dtype)), batch_size, shapes.get(model, (32, 32, 3)))
    optimizer = {"momentum": optax.sgd(0.01, 0.9), "adam": optax.adam(1e-3)}[optimizer_name]
    return task, optimizer


def predict(record: dict, target: str, effort: str) -> dict:
    """The record with the bytes that the target's compiler, on this machine, says for the same step."""

    import jaxbatch as jb
    from jaxbatch.machine.platform import compiling_for
    from jaxbatch.training.steps import make_task_step
    from jaxbatch.training.train_state import state_shapes

    task, optimizer = make_case(record["model"], record["batch_size"], record["dtype"], record.get("optimizer", "momentum"))
    with compiling_for(jb.find_target(target).platform):
        step = make_task_step(task, optimizer, record["batch_size"])
        arguments = lambda size: (state_shapes(task, optimizer), task.train_data)
        memory = jb.memory_profile(step, [record["batch_size"]], target=target, arguments=arguments, donate=[0], effort=effort)[record["batch_size"]]
    return {**record, "program_bytes": memory.total, "peak_bytes": 0, "compile_seconds": memory.compile_seconds}


def measure(model: str, batch_size: int, dtype: str, optimizer_name: str) -> dict:
    """Measures one step of one network in this process."""
    sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
    import jax

    import jaxbatch as jb
    from jaxbatch.results.records import describe_provenance
    from jaxbatch.training.steps import make_task_step
    from jaxbatch.training.train_state import init_state

    task, optimizer = make_case(model, batch_size, dtype, optimizer_name)
    state, batch = init_state(task, optimizer, 0), task.train_data
    step = jax.jit(make_task_step(task, optimizer, batch_size), donate_argnums=0)
    program = step.lower(state, batch).compile()
    analysis = program.memory_analysis()
    parts = ("temp", "argument", "output", "alias")
    record = {"model": model, "batch_size": batch_size, "dtype": dtype, "optimizer": optimizer_name}
    record |= {f"{part}_bytes": getattr(analysis, f"{part}_size_in_bytes") for part in parts}
    record |= {"peak_bytes": analysis.peak_memory_in_bytes, "program_bytes": jb.program_memory(program)}
    device = jax.devices()[0]
    jax.block_until_ready((state, batch))
    before, resident = device.memory_stats() or {}, start_mark()
    state, losses = program(state, batch)
    jax.block_until_ready((state, losses))
    after = device.memory_stats() or {}
    if device.platform == "cpu":
        record["used_bytes"] = highest_mark() - resident + record["argument_bytes"]
    record |= {f"before_{name}": before.get(name) for name in ("bytes_in_use", "peak_bytes_in_use")}
    record |= {f"after_{name}": after.get(name) for name in ("bytes_in_use", "peak_bytes_in_use", "pool_bytes", "bytes_limit")}
    return record | {key: describe_provenance()[key] for key in ("device", "jax")}


def start_mark() -> int:
    """Bytes of resident memory now; the highest mark starts from here (Linux only).

    What the first product and convolution of a process keep for good, such as the threads' buffers, is there before.
    """
    import jax

    images, kernel = jax.numpy.ones((4, 64, 64, 16)), jax.numpy.ones((3, 3, 16, 16))
    rows = images.reshape(512, 512)
    jax.block_until_ready((rows @ rows, jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))))
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return _status("VmRSS")


def highest_mark() -> int:
    """The most bytes of resident memory since ``start_mark``."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def print_errors(records: list[dict]) -> None:
    """Prints predicted and used bytes, and the relative errors; below 8 MiB of difference an error does not count."""
    sys.path.insert(0, str(ROOT))
    from jaxbatch.advice.memory_parts import CPU_SCRATCH
    from jaxbatch.machine.cores import num_cores

    errors = []
    for record in records:
        used = record.get("used_bytes") or record["after_peak_bytes_in_use"]
        predicted = max(record["program_bytes"], record.get("peak_bytes", 0))
        if "used_bytes" in record:  # as jaxbatch.memory_profile adds on a CPU; found on the mlp and simple_cnn, which are not scored
            predicted += CPU_SCRATCH * num_cores()
        small = abs(predicted - used) < 8 * 2**20
        scored = "used_bytes" not in record or record["model"] not in ("mlp", "simple_cnn")
        errors += [0.0 if small else abs(predicted / used - 1)] if scored else []
        name = f"{record['model']}, {record['batch_size']:,}, {record.get('optimizer', 'momentum')}, {record['dtype']}"
        print(f"{name:45} {predicted / 2**20:10,.1f} MiB predicted {used / 2**20:10,.1f} MiB used {predicted / used - 1:+8.1%}{' (< 8 MiB)' * small}")
    errors.sort()
    print(f"{len(errors)} cases: median error {errors[len(errors) // 2]:.1%}, worst {errors[-1]:.1%}")


def run_one(model: str, batch_size: int, dtype: str, optimizer: str, cache: str) -> dict | None:
    """Runs two processes: one that compiles and one that measures."""
    environ = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    command = [sys.executable, __file__, "--one", model, str(batch_size), dtype, optimizer]
    for _ in range(2):
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
        if done.returncode:
            print(f"{model} {batch_size} {dtype}: {done.stderr.strip()[-300:]}", file=sys.stderr, flush=True)
            return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="file to which each case is written as a line of JSON; cases that it has are not measured again")
    parser.add_argument("--quick", action="store_true", help="two networks, one size")
    parser.add_argument("--one", nargs=4, metavar=("MODEL", "SIZE", "DTYPE", "OPTIMIZER"), help="measure one case in this process")
    parser.add_argument("--table", help="print the errors of this file")
    parser.add_argument("--target", help="with --table: take what this target's compiler predicts, not what the device's compiler did")
    parser.add_argument("--effort", choices=("full", "least"), default="full", help="with --target: effort of the TPU compiler")
    parser.add_argument("--only", help="with --table: only this network")
    flags = parser.parse_args()
    if flags.one:
        model, size, dtype, optimizer = flags.one
        print(json.dumps(measure(model, int(size), dtype, optimizer)))
        return
    if flags.table:
        records = [json.loads(line) for line in pathlib.Path(flags.table).read_text().splitlines()]
        records = [record for record in records if flags.only in (None, record["model"])]
        print_errors([predict(record, flags.target, flags.effort) for record in records] if flags.target else records)
        return
    if not flags.output:
        parser.error("--output FILE is needed.")
    import jax

    on_cpu = jax.default_backend() == "cpu"
    sizes = CPU_SIZES if on_cpu else SIZES
    wanted = {model: sizes[model][:1] for model in ("mlp", "simple_cnn")} if flags.quick else sizes
    output = pathlib.Path(flags.output)
    known = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    known = {(record["model"], record["batch_size"], record["dtype"], record["optimizer"]) for record in known}

    def all_sizes(model):
        cases = [(size, "float32", optimizer) for optimizer in OPTIMIZERS[: 2 if on_cpu else 1] for size in wanted[model]]
        cases += [] if flags.quick or on_cpu else [(wanted[model][n], "bfloat16", "momentum") for n in IN_BFLOAT16]
        with tempfile.TemporaryDirectory() as cache:
            for case in cases:
                record = None if (model, *case) in known else run_one(model, *case, cache)
                if record:
                    with output.open("a") as file:
                        file.write(json.dumps(record) + "\n")

    # One thread per network. Their processes share the device, but each has an allocator with its own count.
    with concurrent.futures.ThreadPoolExecutor(1 if flags.quick or on_cpu else len(wanted)) as pool:
        list(pool.map(all_sizes, wanted))


if __name__ == "__main__":
    main()
