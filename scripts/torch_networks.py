"""The studies' networks in PyTorch, as its users write them, and jaxbatch's weights under PyTorch's names.

A network here lists its convolutions in the order in which jaxbatch creates them, so that weights are matched by position.
"""

import numpy as np
import torch
from torch import nn


class SimpleCNN(nn.Module):
    """The MNIST study's network; returns logits."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(1, 10, 5), nn.Conv2d(10, 20, 5), nn.Conv2d(20, 40, 3)])
        self.dense = nn.Linear(40, 10)

    def forward(self, x):
        for conv in self.convs:
            x = torch.relu(torch.max_pool2d(conv(x), 2))
        return self.dense(x.flatten(1))


class AlexNet(nn.Module):
    """AlexNet for 32 × 32 images."""

    def __init__(self):
        super().__init__()
        sizes = [(3, 64, 11, 4, 5), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1)]
        self.convs = nn.ModuleList([nn.Conv2d(*size) for size in sizes])
        self.dense = nn.Linear(256, 10)

    def forward(self, x):
        for index, conv in enumerate(self.convs):
            x = torch.relu_(conv(x))
            if index in (0, 1, 4):
                x = torch.max_pool2d(x, 2)
        return self.dense(x.flatten(1))


class Unit(nn.Module):
    """Convolution and batch normalisation."""

    def __init__(self, inputs, outputs, size, stride=1, bias=False):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=bias)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.norm(self.conv(x))


class ResNet20(nn.Module):
    """ResNet-20 for 32 × 32 images."""

    def __init__(self):
        super().__init__()
        units, inputs = [Unit(3, 16, 3)], 16
        for outputs, first in ((16, 1), (32, 2), (64, 2)):
            for stride in (first, 1, 1):
                units += [Unit(inputs, outputs, 3, stride), Unit(outputs, outputs, 3)]
                if inputs != outputs:
                    units.append(Unit(inputs, outputs, 1, stride))
                inputs = outputs
        self.units = nn.ModuleList(units)
        self.dense = nn.Linear(64, 10)

    def forward(self, x):
        units = iter(self.units)
        x = torch.relu_(next(units)(x))
        for block in range(9):
            inner = torch.relu_(next(units)(x))
            inner = next(units)(inner)
            shortcut = next(units)(x) if block in (3, 6) else x
            x = torch.relu_(inner + shortcut)
        return self.dense(x.mean((2, 3)))


class ResNet50(nn.Module):
    """ResNet-50 for ImageNet, the stride on the 3 × 3 convolutions; 10 classes."""

    def __init__(self):
        super().__init__()
        units, inputs, self.blocks = [Unit(3, 64, 7, 2)], 64, []
        for features, blocks, first in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for stride in (first, *[1] * (blocks - 1)):
                units += [Unit(inputs, features, 1), Unit(features, features, 3, stride), Unit(features, 4 * features, 1)]
                self.blocks.append(inputs != 4 * features)
                if self.blocks[-1]:
                    units.append(Unit(inputs, 4 * features, 1, stride))
                inputs = 4 * features
        self.units = nn.ModuleList(units)
        self.dense = nn.Linear(2048, 10)

    def forward(self, x):
        units = iter(self.units)
        x = torch.max_pool2d(torch.relu_(next(units)(x)), 3, 2, 1)
        for projects in self.blocks:
            inner = torch.relu_(next(units)(x))
            inner = torch.relu_(next(units)(inner))
            inner = next(units)(inner)
            x = torch.relu_(inner + (next(units)(x) if projects else x))
        return self.dense(x.mean((2, 3)))


class VGG19BN(nn.Module):
    """VGG-19 with batch normalisation for 32 × 32 images."""

    def __init__(self):
        super().__init__()
        sizes = [3] + [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8
        self.units = nn.ModuleList([Unit(*pair, 3, bias=True) for pair in zip(sizes[:-1], sizes[1:], strict=True)])
        self.dense = nn.Linear(512, 10)

    def forward(self, x):
        for index, unit in enumerate(self.units):
            x = torch.relu_(unit(x))
            if index in (1, 3, 7, 11, 15):
                x = torch.max_pool2d(x, 2)
        return self.dense(x.flatten(1))


class TransformerLayer(nn.Module):
    """Attention with rotary positions and a two-layer network, each after a norm and added to its input."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.network_norm = nn.RMSNorm(width, 1e-6), nn.RMSNorm(width, 1e-6)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x, turns):
        query, key, value = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if turns is not None:
            query, key = (torch.view_as_real(torch.complex(*one.chunk(2, -1)) * turns).movedim(-1, -2).flatten(-2) for one in (query, key))
        y = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(y.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.network_norm(x)), approximate="tanh"))


class TransformerLM(nn.Module):
    """The transformer, with rotary positions and a tied head, or with learned positions and a head of its own."""

    def __init__(self, vocab_size=256, width=128, layers=4, heads=4, rotary=True, tied=True, max_length=1024):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.positions = None if rotary else nn.Embedding(max_length, width)
        self.layers = nn.ModuleList([TransformerLayer(width, heads) for _ in range(layers)])
        self.norm = nn.RMSNorm(width, 1e-6)
        self.head = None if tied else nn.Linear(width, vocab_size, bias=False)

    def forward(self, tokens):
        x, turns, positions = self.embed(tokens), None, torch.arange(tokens.shape[1])
        if self.positions is not None:
            x = x + self.positions(positions)
        else:
            channels = x.shape[-1] // self.layers[0].heads
            speeds = 10_000.0 ** (-torch.arange(0, channels, 2, dtype=x.dtype) / channels)
            turns = torch.polar(torch.ones_like(speeds), positions[:, None] * speeds)
        for layer in self.layers:
            x = layer(x, turns)
        x = self.norm(x)
        return x @ self.embed.weight.T if self.head is None else self.head(x)


def build(name: str) -> nn.Module:
    """A network by the name of its class."""
    return {network.__name__: network for network in (SimpleCNN, AlexNet, ResNet20, ResNet50, VGG19BN, TransformerLM)}[name]()


def as_torch_transformer(params: dict) -> dict[str, np.ndarray]:
    """The transformer's parameters (or gradients) under PyTorch's names and in its axes."""
    weights = {}
    for name, layer in params.items():
        for part, own in ({"": layer} if len(layer) == 1 else layer).items():
            ((kind, value),) = own.items()
            prefix = ".".join(filter(None, (name.replace("layer_", "layers."), part)))
            weights[f"{prefix}.weight"] = np.array(value.T if kind == "kernel" else value, order="C")
    return weights


OURS = {  # the order in which jaxbatch creates layers, for networks where position is not enough
    "SimpleCNN": [f"ConvMaxPool_{index}" for index in range(3)],
    "AlexNet": ["ConvMaxPool_0", "ConvMaxPool_1", "Conv_0", "Conv_1", "ConvMaxPool_2"],
}


def as_torch_weights(params: dict, network: nn.Module) -> dict[str, np.ndarray]:
    """Our parameters (or gradients) under PyTorch's names and in its axes."""
    name, weights = type(network).__name__, {}

    def put(prefix, layer):
        kernel = np.asarray(layer["kernel"])
        weights[f"{prefix}.weight"] = np.array(kernel.transpose(0, 3, 1, 2) if kernel.ndim == 4 else kernel.T, order="C")
        if "bias" in layer:
            weights[f"{prefix}.bias"] = np.array(layer["bias"])

    if name in OURS:
        for index, ours in enumerate(OURS[name]):
            put(f"convs.{index}", params[ours])
    else:
        for index in range(len(network.units)):
            unit = params[f"ConvBatchNorm_{index}"]
            bias = {"bias": unit["bias"]} if "bias" in unit else {}
            put(f"units.{index}.conv", unit["Conv_0"] | bias)
            weights[f"units.{index}.norm.weight"] = np.array(unit["BatchNorm_0"]["scale"])
            weights[f"units.{index}.norm.bias"] = np.array(unit["BatchNorm_0"]["bias"])
    put("dense", params["Dense_0"])
    return weights
