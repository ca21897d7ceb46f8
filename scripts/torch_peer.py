"""The peer: a network in PyTorch, in a process of its own, with which jaxbatch is compared.

It has a process of its own, because its users run it in this way: PyTorch's threads and memory allocator are separate from
JAX's. ``Peer`` starts the process and sends it work over a pipe. If this file is started as a script, it is that process.
"""

import copy
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
            return np.array(self._ask({"setup": path, "model": model, **settings}))

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
            raise OSError("the PyTorch process ended; its message stands above.")
        return json.loads(answer)


def _flatten(prefix, tree, flat):
    for name, value in tree.items():
        _flatten(f"{prefix}{name}/", value, flat) if isinstance(value, dict) else flat.update({f"{prefix}{name}": value})


def is_installed(package: str = "torch") -> bool:
    """Whether the package of a peer is installed."""
    return importlib.util.find_spec(package) is not None


def serve() -> None:
    """Reads requests from standard input, one JSON object a line, and answers each when it is done."""
    import warnings

    import torch
    from torch import nn
    from torch_networks import as_torch_transformer, as_torch_weights, build

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True  # as JAX multiplies float32 on such a device; for convolutions it is set

    def mean_loss(logits, labels):  # over the tokens too, if examples are sequences
        return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())

    def train():
        for first in range(0, len(labels), size):
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                loss = mean_loss(model(images[first : first + size]), labels[first : first + size])
            loss.backward()
            optimizer.step()

    def retain_graph():
        losses = nn.functional.cross_entropy(model(images), labels, reduction="none").chunk(num_groups)
        return [torch.autograd.grad(group.mean(), list(model.parameters()), retain_graph=True) for group in losses]

    def func():
        params = {name: value.detach() for name, value in model.named_parameters()}

        def group_loss(params, images, labels):
            return mean_loss(torch.func.functional_call(model, params, (images,)), labels)

        groups = (part.reshape(num_groups, -1, *part.shape[1:]) for part in (images, labels))
        return torch.func.vmap(torch.func.grad(group_loss), in_dims=(None, 0, 0))(params, *groups)

    def opacus():
        from opacus import GradSampleModule

        if "sampled" not in tensors:  # a copy, because the hooks would slow the model down
            tensors["sampled"] = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
        sampled = tensors["sampled"]
        nn.functional.cross_entropy(sampled(images), labels, reduction="sum").backward()
        for parameter in sampled.parameters():
            parameter.grad = parameter.grad_sample = None

    def conv(shape, strides, padding, kernel, part):
        key = str((shape, strides, padding, kernel))
        if key not in tensors:
            x, weight = torch.randn(shape, device=device), torch.randn(kernel, device=device)
            tensors[key] = x, weight, torch.nn.functional.conv2d(x, weight, None, strides, padding)
        x, weight, out = tensors[key]
        if part == "forward":
            return torch.nn.functional.conv2d(x, weight, None, strides, padding)
        wanted = [part == "input gradient", part == "kernel gradient", False]
        pairs = [[strides] * 2, [padding] * 2, [1, 1]]
        return torch.ops.aten.convolution_backward(out, x, weight, None, *pairs, False, [0, 0], 1, wanted)

    warnings.filterwarnings("ignore", "Full backward hook is firing")  # from opacus, since inputs need no gradient
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    kinds, tensors = {"train": train, "retain_graph": retain_graph, "func": func, "opacus": opacus, "conv": conv}, {}
    for line in sys.stdin:
        request = json.loads(line)
        if "run" in request:
            kinds[request.pop("run")](**request)
            if device.type == "cuda":
                torch.cuda.synchronize()
            answer = "done"
        else:
            with np.load(request["setup"]) as data:
                images, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"]).long().to(device)
                is_text = images.ndim == 2
                images = images.long().to(device) if is_text else images.permute(0, 3, 1, 2).float().contiguous().to(device) / 255
                params = {}
                for name in set(data.files) - {"images", "labels"}:
                    *folders, leaf = name.split("/")
                    here = params
                    for folder in folders:
                        here = here.setdefault(folder, {})
                    here[leaf] = data[name]
            model = build(request["model"])
            weights = as_torch_transformer(params) if is_text else as_torch_weights(params, model)
            model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}, strict=False)
            model.to(device).train()
            size, num_groups, bfloat16 = request["batch_size"], request["num_groups"], request["bfloat16"]
            common = {"lr": request["rate"], "weight_decay": request["weight_decay"]}
            if is_text:
                optimizer = torch.optim.AdamW(model.parameters(), **common)
            else:
                optimizer = torch.optim.SGD(model.parameters(), momentum=request["momentum"], **common)
            with torch.no_grad():
                answer = [mean_loss(model(images[n : n + 1]), labels[n : n + 1]).item() for n in range(min(8, size))]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
