"""Steps on huge batches, in microbatches, against plain steps on one microbatch: time per example and peak memory.

If this file is started as a script, it measures the memory of one step in this process, whose highest mark nothing else moved.
"""

import json
import pathlib
import subprocess
import sys

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parent), str(pathlib.Path(__file__).resolve().parents[1])]

import jax
import numpy as np
import optax
from device_memory import highest_mark, start_mark
from side_by_side import MOMENTUM, RATE, make_rows, random_task, time_contenders

import jaxbatch as jb
from jaxbatch.machine.targets import as_bytes
from jaxbatch.training.epochs import compile_task_epoch
from jaxbatch.training.train_state import init_state

NETWORKS = {"simple_cnn": jb.SimpleCNN, "mlp": jb.MLP}
PLAIN_STEPS = 50  # a round of plain steps; their time per example is compared


def huge(rounds: int, batch_sizes: tuple[int, ...], microbatch_size: int, models: tuple[str, ...], budget: str | None = None) -> list[dict]:
    """Compares milliseconds per 1,000 examples of one huge step ("ours") with those of plain steps on a microbatch.

    With a budget of memory, the huge step takes the microbatch that :func:`jaxbatch.memory_plan` chooses; the plain steps stay the same.
    """
    rows = []
    for model in models:
        for batch_size in batch_sizes:
            task = random_task(NETWORKS[model](), batch_size)
            plain_size = chosen = min(microbatch_size, batch_size)
            if budget is not None:
                plan = jb.memory_plan(task, optimizer=optax.sgd(RATE, MOMENTUM), batch_size=batch_size, budget=budget)
                chosen = plan.chosen.microbatch_size
            own, plain = (measure_apart(model, size, cut, batch_size) for size, cut in ((batch_size, chosen), (plain_size, plain_size)))
            steps = max(1, min(PLAIN_STEPS, batch_size // plain_size))
            contenders = {"ours": _steps(task, 1, batch_size, chosen), "plain step": _steps(task, steps, plain_size, None)}
            thousands = {"ours": batch_size / 1000, "plain step": steps * plain_size / 1000}
            times = [{name: time / thousands[name] for name, time in seconds.items()} for seconds in time_contenders(contenders, rounds)]
            memory = own | {"plain_peak_bytes": plain["peak_bytes"], "microbatch_size": chosen, "per_examples": 1000}
            memory |= {} if budget is None else {"budget_bytes": as_bytes(budget)}
            rows += [row | memory for row in make_rows("huge", model, batch_size, 1, times)]
            del task, contenders
    return rows


def _steps(task, num_steps: int, batch_size: int, microbatch_size: int | None):
    """Steps that go on training at each call."""
    optimizer = optax.sgd(RATE, MOMENTUM)
    indices = np.random.default_rng(0).permutation(task.num_examples)[: num_steps * batch_size].astype(np.int32).reshape(num_steps, batch_size)
    states = [init_state(task, optimizer, 0)]
    run = compile_task_epoch(task, optimizer, states[0], num_steps, batch_size, microbatch_size=microbatch_size)

    def train():
        states[0], losses = run(states[0], task.train_data, indices)
        return losses

    return train


def measure_apart(model: str, batch_size: int, microbatch_size: int, num_examples: int) -> dict[str, int]:
    """The bytes of one step, measured in a process of its own."""
    command = [sys.executable, __file__, model, str(batch_size), str(microbatch_size), str(num_examples)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"a step of {batch_size} examples ended with code {done.returncode}: {done.stderr[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(model: str, batch_size: int, microbatch_size: int, num_examples: int) -> dict[str, int]:
    """What lies on the device, the highest mark beside it while a step runs (Linux only), and the prediction of the latter."""
    task, optimizer = random_task(NETWORKS[model](), num_examples), optax.sgd(RATE, MOMENTUM)
    predicted = jb.memory_profile(task, [batch_size], optimizer=optimizer, microbatch_size=microbatch_size)[batch_size]
    of_step = predicted.step - predicted.test_data - predicted.last_state  # neither is here
    state = init_state(task, optimizer, 0)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves((task.train_data, state)))
    run = compile_task_epoch(task, optimizer, state, 1, batch_size, microbatch_size=microbatch_size)
    indices = np.arange(batch_size, dtype=np.int32)[None]
    before = start_mark()
    jax.block_until_ready(run(state, task.train_data, indices))
    return {"kept_bytes": kept, "peak_bytes": highest_mark() - before, "predicted_bytes": of_step - kept}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:]))))
