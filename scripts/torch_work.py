"""What the PyTorch process of :mod:`torch_peer` does: it trains a network, takes gradients of its groups, and times convolutions."""

import copy
import os
import warnings

import numpy as np
import torch
from torch import nn
from torch_networks import as_torch_transformer, as_torch_weights, build


class Work:
    """A network with its data and optimizer, and the kinds of work on them."""

    def __init__(self):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cuda.matmul.allow_tf32 = True  # as JAX multiplies float32 on such a device; for convolutions it is set
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # from opacus, since inputs need no gradient
        self._convolutions, self._sampled = {}, None

    def set_up(self, path: str, model: str, batch_size: int, num_groups: int, bfloat16: bool, momentum: float, **rates: float) -> list[float]:
        """Makes the network, with the weights and data that a file holds; returns the losses of the first examples."""
        with np.load(path) as data:
            images, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"]).long()
            params = nested({name: data[name] for name in data.files if name not in ("images", "labels")})
        is_text = images.ndim == 2
        images = images.long() if is_text else images.permute(0, 3, 1, 2).float().contiguous()
        self.images, self.labels = images.to(self.device) if is_text else images.to(self.device) / 255, labels.to(self.device)
        self.model = build(model)
        weights = as_torch_transformer(params) if is_text else as_torch_weights(params, self.model)
        self.model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}, strict=False)
        self.model.to(self.device).train()
        self.batch_size, self.num_groups, self.bfloat16, self._sampled = batch_size, num_groups, bfloat16, None
        common = {"lr": rates["rate"], "weight_decay": rates["weight_decay"]}
        parameters = self.model.parameters()
        self.optimizer = torch.optim.AdamW(parameters, **common) if is_text else torch.optim.SGD(parameters, momentum=momentum, **common)
        with torch.no_grad():
            return [mean_loss(self.model(self.images[n : n + 1]), self.labels[n : n + 1]).item() for n in range(min(8, batch_size))]

    def run(self, run: str, **arguments) -> str:
        """Does one kind of work and waits for it."""
        kinds = {"train": self.train, "retain_graph": self.retain_graph, "func": self.func, "opacus": self.opacus, "conv": self.conv}
        kinds[run](**arguments)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return "done"

    def train(self):
        """Trains through all examples once."""
        for first in range(0, len(self.labels), self.batch_size):
            self.optimizer.zero_grad()
            batch = slice(first, first + self.batch_size)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                loss = mean_loss(self.model(self.images[batch]), self.labels[batch])
            loss.backward()
            self.optimizer.step()

    def retain_graph(self):
        """The gradient of each group, by going back through the graph of the whole batch once for each."""
        losses = nn.functional.cross_entropy(self.model(self.images), self.labels, reduction="none").chunk(self.num_groups)
        return [torch.autograd.grad(group.mean(), list(self.model.parameters()), retain_graph=True) for group in losses]

    def func(self):
        """The gradient of each group, by torch.func."""
        params = {name: value.detach() for name, value in self.model.named_parameters()}

        def group_loss(params, images, labels):
            return mean_loss(torch.func.functional_call(self.model, params, (images,)), labels)

        groups = (part.reshape(self.num_groups, -1, *part.shape[1:]) for part in (self.images, self.labels))
        return torch.func.vmap(torch.func.grad(group_loss), in_dims=(None, 0, 0))(params, *groups)

    def opacus(self):
        """The gradient of each example, by opacus."""
        from opacus import GradSampleModule

        if self._sampled is None:  # a copy, because the hooks would slow the model down
            self._sampled = GradSampleModule(copy.deepcopy(self.model), loss_reduction="sum")
        nn.functional.cross_entropy(self._sampled(self.images), self.labels, reduction="sum").backward()
        for parameter in self._sampled.parameters():
            parameter.grad = parameter.grad_sample = None

    def conv(self, shape, strides, padding, kernel, part):
        """One convolution, or a gradient of one."""
        key = str((shape, strides, padding, kernel))
        if key not in self._convolutions:
            x, weight = torch.randn(shape, device=self.device), torch.randn(kernel, device=self.device)
            self._convolutions[key] = x, weight, nn.functional.conv2d(x, weight, None, strides, padding)
        x, weight, out = self._convolutions[key]
        if part == "forward":
            return nn.functional.conv2d(x, weight, None, strides, padding)
        wanted = [part == "input gradient", part == "kernel gradient", False]
        pairs = [[strides] * 2, [padding] * 2, [1, 1]]
        return torch.ops.aten.convolution_backward(out, x, weight, None, *pairs, False, [0, 0], 1, wanted)


def mean_loss(logits, labels):
    """The mean cross-entropy, over the tokens too if examples are sequences."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def nested(flat: dict[str, np.ndarray]) -> dict:
    """Arrays by paths such as ``params/Dense_0/kernel`` as a tree."""
    tree: dict = {}
    for path, array in flat.items():
        *folders, leaf = path.split("/")
        here = tree
        for folder in folders:
            here = here.setdefault(folder, {})
        here[leaf] = array
    return tree
