"""Runs a step of the largest batch that is predicted for a budget, times a factor, under a limit of that budget; or a whole fit.

It is no test module: tests/experiments/memory/test_study.py starts it, because a control group holds for a whole process. A limit of the
address space would not do: XLA:CPU reserves up to a gigabyte that it never touches.
"""

import os
import pathlib
import sys

import jax
import optax

import jaxbatch as jb
from experiments.harness.shape_task import shape_task
from jaxbatch.training.steps import make_task_step
from jaxbatch.training.train_state import init_state

BUDGET = 3 * 2**30


def limit_memory(count: int) -> None:
    """Allows this process ``count`` further bytes; exit code 77 where control groups cannot be made."""
    root = pathlib.Path("/sys/fs/cgroup")
    parent, limit = (root / "memory", "memory.limit_in_bytes") if (root / "memory").is_dir() else (root, "memory.max")
    group = parent / f"jaxbatch-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(count))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        raise SystemExit(77) from None


WIDTH = 2**17  # numbers that the evaluation of an example holds, half a MiB
EXAMPLES = 1000  # evaluated at a time, for which the limit is set
COMPILING = 2**28  # bytes that are allowed for what compiling takes in the same process


def fit_within(evaluation_batch_size: int) -> None:
    """Trains two records, with evaluations of so many examples at a time, under a limit for ``EXAMPLES`` of them."""
    loss_fn = lambda w, x: ((x - w) ** 2).sum(-1)
    wide = lambda x: jax.numpy.abs(x @ jax.numpy.sin(jax.numpy.arange(8.0 * WIDTH).reshape(8, WIDTH))).max(1)
    data, test = jax.numpy.ones((100, 8)), jax.numpy.ones((4000, 8))
    task = jb.Task(lambda key: jax.numpy.zeros(8), loss_fn, lambda w, x: {"loss": loss_fn(w, x), "wide": wide(x)}, data, test)
    optimizer = optax.sgd(0.1)
    memory = jb.memory_profile(task, [10], optimizer=optimizer, target="cpu", evaluation_batch_size=EXAMPLES)[10]
    list(jb.fit(task, jb.FitConfig(optimizer, 10, jb.steps(1), evaluation_batch_size=10)))  # the threads are there from now on
    limit_memory(memory.total + COMPILING)
    for record in jb.fit(task, jb.FitConfig(optimizer, 10, jb.epochs(2), evaluation_batch_size=evaluation_batch_size)):
        print("ran", record["batches"])


def main() -> None:
    """Predicts, compiles, sets the limit, runs."""
    if sys.argv[1] == "fit":
        return fit_within(int(sys.argv[2]))
    task, optimizer = shape_task("resnet20", "cifar10", "float32"), optax.sgd(0.1, 0.9)
    data = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), task.train_data)
    size = jb.max_batch_size(task, optimizer=optimizer, target="cpu", budget=BUDGET)
    size = int(float(sys.argv[1]) * size)
    step, state = make_task_step(task, optimizer, size), init_state(task, optimizer, 0)
    take = lambda state, data, index: step(state, jax.tree.map(lambda leaf: leaf[index], data))
    index = jax.numpy.arange(size) % task.num_examples
    program = jax.jit(take, donate_argnums=0).lower(state, data, index).compile()
    first = make_task_step(task, optimizer, 16)
    jax.block_until_ready((data, index, first(state, jax.tree.map(lambda leaf: leaf[:16], data))))  # the threads are there from now on
    here = sum(leaf.nbytes for leaf in jax.tree.leaves((state, data, index)))
    limit_memory(BUDGET - here)
    jax.block_until_ready(program(state, data, index))
    print("ran", size)


if __name__ == "__main__":
    main()
