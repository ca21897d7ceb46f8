"""The MNIST study's network in PyTorch, as a process of its own: what jaxbatch is timed against.

A process of its own, because that is how its users run it: PyTorch's threads and memory allocator do not meet
JAX's. ``Peer`` starts it and sends it work over a pipe; started as a script this file is that process.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile

import numpy as np


class Peer:
    """A running PyTorch process with a model's weights and data. ``run(kind)`` returns when the work is done."""

    def __init__(self, weights: dict[str, np.ndarray], images: np.ndarray, labels: np.ndarray, **settings):
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "data.npz")
            np.savez(path, images=images, labels=labels, **weights)
            self.losses = np.array(self._ask({"setup": path, **settings}))

    def run(self, kind: str) -> None:
        """``train``, ``retain_graph`` or ``func``."""
        self._ask({"run": kind})

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()

    def _ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise OSError("the PyTorch process ended; its message stands above.")
        return json.loads(answer)


def is_installed() -> bool:
    """Whether PyTorch is there to be timed."""
    return importlib.util.find_spec("torch") is not None


def serve() -> None:
    """Reads requests from standard input, one JSON object a line, and answers each when it is done."""
    import torch
    from torch import nn

    class SimpleModel(nn.Module):
        """The study's network, as :class:`jaxbatch.SimpleCNN`; returns logits."""

        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(1, 10, 5), nn.Conv2d(10, 20, 5), nn.Conv2d(20, 40, 3)])
            self.dense = nn.Linear(40, 10)

        def forward(self, x):
            for conv in self.convs:
                x = torch.relu(torch.max_pool2d(conv(x), 2))
            return self.dense(x.flatten(1))

    def train():
        for first in range(0, len(labels), size):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[first : first + size]), labels[first : first + size])
            loss.backward()
            optimizer.step()

    def retain_graph():
        losses = nn.functional.cross_entropy(model(images), labels, reduction="none").chunk(num_groups)
        return [torch.autograd.grad(group.mean(), list(model.parameters()), retain_graph=True) for group in losses]

    def func():
        params = {name: value.detach() for name, value in model.named_parameters()}

        def mean_loss(params, images, labels):
            return nn.functional.cross_entropy(torch.func.functional_call(model, params, (images,)), labels)

        groups = images.reshape(num_groups, -1, *images.shape[1:]), labels.reshape(num_groups, -1)
        return torch.func.vmap(torch.func.grad(mean_loss), in_dims=(None, 0, 0))(params, *groups)

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    kinds = {"train": train, "retain_graph": retain_graph, "func": func}
    for line in sys.stdin:
        request = json.loads(line)
        if "run" in request:
            kinds[request["run"]]()
            answer = "done"
        else:
            with np.load(request["setup"]) as data:
                images = torch.from_numpy(data["images"]).permute(0, 3, 1, 2).float().contiguous() / 255
                labels = torch.from_numpy(data["labels"]).long()
                model = SimpleModel()
                model.load_state_dict({name: torch.from_numpy(data[name]) for name in model.state_dict()})
            size, num_groups = request["batch_size"], request["num_groups"]
            optimizer = torch.optim.SGD(model.parameters(), lr=request["rate"], momentum=request["momentum"])
            with torch.no_grad():
                answer = nn.functional.cross_entropy(model(images[:8]), labels[:8], reduction="none").tolist()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
