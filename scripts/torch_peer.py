"""The peer: a network in PyTorch, in a process of its own, with which jaxbatch is compared.

It has a process of its own, because its users run it in this way: PyTorch's threads and memory allocator are separate from
JAX's. ``Peer`` starts the process and sends it work over a pipe. If this file is started as a script, it is that process.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile

import numpy as np


class Peer:
    """A running PyTorch process. ``run(kind)`` returns when the work is done."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def set_up(self, model: str, params: dict, images: np.ndarray, labels: np.ndarray, **settings) -> np.ndarray:
        """Sends a model with jaxbatch's weights, and data; returns the losses of the first examples."""
        flat = {}
        _flatten("", params, flat)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "data.npz")
            np.savez(path, images=images, labels=labels, **flat)
            return np.array(self._ask({"path": path, "model": model, **settings}))

    def run(self, kind: str, **arguments) -> None:
        """Runs ``train``, ``retain_graph``, ``func`` or ``opacus`` with the model, or ``conv`` with given shapes."""
        self._ask({"run": kind, **arguments})

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()

    def _ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise OSError("the PyTorch process ended; its message is above.")
        return json.loads(answer)


def _flatten(prefix, tree, flat):
    for name, value in tree.items():
        _flatten(f"{prefix}{name}/", value, flat) if isinstance(value, dict) else flat.update({f"{prefix}{name}": value})


def is_installed(package: str = "torch") -> bool:
    """Whether the package of a peer is installed."""
    return importlib.util.find_spec(package) is not None


def serve() -> None:
    """Reads requests from standard input, one JSON object a line, and answers each when it is done."""
    from torch_work import Work

    work = Work()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(work.run(**request) if "run" in request else work.set_up(**request)), flush=True)


if __name__ == "__main__":
    serve()
