"""The MNIST study's network and its gradients in PyTorch: what jaxbatch is timed against."""

import jax
import numpy as np
import torch
from torch import nn

VERSION = torch.__version__


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


def from_jax(params) -> SimpleModel:
    """The network with the weights of a :class:`jaxbatch.SimpleCNN`."""
    tree = jax.tree.map(lambda leaf: torch.from_numpy(np.array(leaf)), params["params"])
    model = SimpleModel()
    with torch.no_grad():
        for index, conv in enumerate(model.convs):
            conv.weight.copy_(tree[f"ConvMaxPool_{index}"]["kernel"].permute(0, 3, 1, 2))
            conv.bias.copy_(tree[f"ConvMaxPool_{index}"]["bias"])
        model.dense.weight.copy_(tree["Dense_0"]["kernel"].T)
        model.dense.bias.copy_(tree["Dense_0"]["bias"])
    return model


def to_torch(images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """``uint8`` images ``(N, H, W, C)`` to floats in [0, 1], ``(N, C, H, W)``."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous() / 255, torch.from_numpy(labels).long()


def sgd(model: nn.Module, rate: float, momentum: float) -> torch.optim.SGD:
    """PyTorch's SGD."""
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)


def train_steps(model, optimizer, images, labels, indices) -> None:
    """Ordinary eager training steps, one a row of ``indices``."""
    for index in indices:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[index]), labels[index])
        loss.backward()
        optimizer.step()


def retain_graph_gradients(model, images, labels, num_groups: int) -> list[list[torch.Tensor]]:
    """One forward, one backward pass with ``retain_graph`` for each group's mean loss."""
    losses = nn.functional.cross_entropy(model(images), labels, reduction="none").chunk(num_groups)
    parameters = list(model.parameters())
    return [torch.autograd.grad(group.mean(), parameters, retain_graph=True) for group in losses]


def func_gradients(model, images, labels, num_groups: int):
    """Gradients of the groups' mean losses by ``torch.func``: ``vmap`` over groups of ``grad``."""
    params = {name: value.detach() for name, value in model.named_parameters()}

    def mean_loss(params, images, labels):
        return nn.functional.cross_entropy(torch.func.functional_call(model, params, (images,)), labels)

    images = images.reshape(num_groups, -1, *images.shape[1:])
    return torch.func.vmap(torch.func.grad(mean_loss), in_dims=(None, 0, 0))(
        params, images, labels.reshape(num_groups, -1)
    )
