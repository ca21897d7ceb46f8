"""Times the same steps in this checkout and in an earlier one, side by side, each in a process of its own.

If this file is started as a script, it is such a process. It imports jaxbatch from ``PYTHONPATH`` and uses only functions that
have existed since the first benchmark.
"""

import json
import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve()


class Checkout:
    """A process that uses the jaxbatch of one checkout."""

    def __init__(self, folder: pathlib.Path, work: dict):
        environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{folder / 'scripts'}"}
        command = [sys.executable, "-P", str(HERE), json.dumps(work)]  # -P: the checkout's own scripts, not those beside this file
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder)
        imported_from = pathlib.Path(self._answer()).resolve()
        if folder.resolve() not in imported_from.parents:
            raise ValueError(f"--checkout {folder}: jaxbatch was imported from {imported_from}. Name the folder that holds jaxbatch/.")

    def run(self) -> None:
        """Does the work once and waits for it."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self._answer()

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise OSError("a process of the comparison ended; its message is above.")
        return line.strip()


def before(rounds: int, checkout: str, batch_sizes: tuple[int, ...], models: tuple[str, ...]) -> list[dict]:
    """Training steps by batch size, the AdaBatch networks at B = 128, the split step and per-example gradients at B = 640."""
    from side_by_side import make_rows, time_contenders

    folder = pathlib.Path(checkout).expanduser()
    if not (folder / "jaxbatch").is_dir():
        raise ValueError(f"--checkout {checkout}: no folder with jaxbatch/ in it. git worktree add makes one of an earlier commit.")
    works = [{"kind": "train", "model": "SimpleCNN", "batch_size": size, "steps": max(2, min(300, 6000 // size))} for size in batch_sizes]
    works += [
        {"kind": "train", "model": name, "batch_size": 128, "steps": steps}
        for name, steps in (("AlexNet", 20), ("ResNet20", 6), ("VGG19BN", 3))
        if name in models
    ]
    works += [{"kind": kind, "model": "SimpleCNN", "batch_size": 640, "steps": 5} for kind in ("split", "gradients")]
    rows = []
    for work in works:
        sides = {"ours": Checkout(HERE.parents[1], work), "before": Checkout(folder, work)}
        try:
            times = time_contenders({name: side.run for name, side in sides.items()}, rounds)
        finally:
            for side in sides.values():
                side.close()
        groups = {"train": 1, "split": 10, "gradients": 640}[work["kind"]]
        rows += make_rows(work["kind"], work["model"], work["batch_size"], groups, times, per=work["steps"])
    return rows


def make_work(kind: str, model: str, batch_size: int, steps: int):
    """A function without arguments that does the work once and waits for it."""
    import jax
    import numpy as np
    import optax
    from side_by_side import random_task

    import jaxbatch as jb

    try:
        from jaxbatch.training.steps import make_task_step
    except ImportError:  # a checkout from before modules were in folders
        from jaxbatch.train import make_task_step

    task = random_task(
        getattr(jb, model)(), steps * batch_size if kind == "train" else batch_size, (28, 28, 1) if model == "SimpleCNN" else (32, 32, 3)
    )
    optimizer = optax.sgd(0.01, 0.9)
    state = jb.init_state(task, optimizer, 0)
    if kind == "train":
        try:
            from jaxbatch.training.epochs import compile_task_epoch

            run = compile_task_epoch(task, optimizer, state, steps, batch_size)  # as fit trains
        except ImportError:  # a checkout from before one function composed every epoch
            run = jb.compile_epoch(make_task_step(task, optimizer, batch_size), state, task.train_data, steps, batch_size)
        indices, states = np.arange(steps * batch_size, dtype=np.int32).reshape(steps, batch_size), [state]

        def work():
            states[0], losses = run(states[0], task.train_data, indices)
            jax.block_until_ready(losses)

        return work
    if kind == "split":
        step = jb.split_backward(task.loss_fn, optimizer, 10, microbatch_size=getattr(task, "examples_at_a_time", task.microbatch_size))
        once = lambda: step(state.params, state.opt_state, task.train_data)
    else:
        gradients = jax.jit(lambda params, batch: jb.per_example_gradients(task.loss_fn, params, batch))
        once = lambda: gradients(state.params, task.train_data)
    return lambda: [jax.block_until_ready(once()) for _ in range(steps)]


def serve() -> None:
    """Does the work once for every line of standard input."""
    import jaxbatch

    print(jaxbatch.__file__, flush=True)
    work = make_work(**json.loads(sys.argv[1]))
    for _ in sys.stdin:
        work()
        print("done", flush=True)


if __name__ == "__main__":
    serve()
