"""What it costs to measure the noise of gradients while training, for SimpleCNN's step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from side_by_side import MOMENTUM, RATE, make_rows, random_task, time_contenders

import jaxbatch as jb
from jaxbatch.batches import cut_batches
from jaxbatch.training.epochs import compile_task_epoch
from jaxbatch.training.train_state import init_state


def noise(rounds: int, batch_sizes: tuple[int, ...]) -> list[dict]:
    """Compares steps without a monitor ("ours") with monitored ones; ``ratio`` is their time over that without.

    A batch that the step cuts into microbatches anyway is called *microbatch norms*, one that the monitor cuts *cut in 2*.
    """
    rows = []
    for batch_size in batch_sizes:
        num_steps = max(2, min(60, 6000 // batch_size))
        task = random_task(jb.SimpleCNN(), num_steps * batch_size)
        at_a_time = task.examples_at_a_time
        how = "microbatch norms" if at_a_time is not None and at_a_time < batch_size else "cut in 2"
        monitors = {"ours": None, "off again": None, how: jb.NoiseMonitor(), f"{how}, every=10": jb.NoiseMonitor(every=10)}
        contenders = {name: _epoch(task, batch_size, num_steps, monitor) for name, monitor in monitors.items()}
        rows += make_rows("noise", "simple_cnn", batch_size, 1, time_contenders(contenders, rounds), per=num_steps)
    return rows


def _epoch(task, batch_size: int, num_steps: int, monitor: jb.NoiseMonitor | None):
    """An epoch of a few steps that goes on training at each call."""
    optimizer = optax.sgd(RATE, MOMENTUM)
    indices = np.asarray(cut_batches(jnp.arange(task.num_examples), batch_size).indices)
    states = [init_state(task, optimizer, 0)]
    run = compile_task_epoch(task, optimizer, states[0], num_steps, batch_size, monitor=monitor)

    def train():
        states[0], outputs = run(states[0], task.train_data, indices)
        return jax.tree.leaves(outputs)

    return train
