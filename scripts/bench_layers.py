"""Benchmark of single convolutions: the way that jaxbatch chooses, XLA's own and PyTorch's. It justifies the choice."""

import jax
import jax.numpy as jnp
import numpy as np
from side_by_side import IN_A_ROW, in_a_row, make_rows, time_contenders
from torch_peer import Peer, is_installed

from jaxbatch.layers import choose_conv, conv

# (channels, features, image, kernel, strides, padding): the layers of the AdaBatch networks
SHAPES = [
    (3, 16, 32, 3, 1, 1),
    (16, 16, 32, 3, 1, 1),
    (16, 32, 32, 3, 2, 1),
    (32, 32, 16, 3, 1, 1),
    (64, 64, 8, 3, 1, 1),
    (64, 64, 32, 3, 1, 1),
    (128, 128, 16, 3, 1, 1),
    (256, 256, 8, 3, 1, 1),
    (512, 512, 4, 3, 1, 1),
    (512, 512, 2, 3, 1, 1),
    (3, 64, 32, 11, 4, 5),
    (64, 192, 4, 5, 1, 2),
]


def layers(rounds: int, batch_size: int, shapes: list[tuple[int, ...]] = SHAPES) -> list[dict]:
    """Times forward, gradient of the kernel and gradient of the input for each shape."""
    peer = Peer() if is_installed() else None
    try:
        return [row for shape in shapes for row in one_layer(rounds, batch_size, shape, peer)]
    finally:
        if peer:
            peer.close()


def one_layer(rounds: int, batch_size: int, shape: tuple[int, ...], peer: Peer | None) -> list[dict]:
    """The rows of one shape."""
    channels, features, image, size, strides, padding = shape
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(batch_size, image, image, channels)), jnp.float32)
    kernel = jnp.asarray(random.normal(size=(features, size, size, channels)), jnp.float32)
    chosen = choose_conv((image, image), size, batch_size=batch_size, padding=padding)
    algorithms = {"ours": chosen} | ({} if chosen == "platform" else {"XLA's own": "platform"})
    theirs = {"shape": [batch_size, channels, image, image], "kernel": [features, channels, size, size]}
    theirs |= {"strides": strides, "padding": padding}
    cotangent = one_part("forward", chosen, strides, padding)(x, kernel, None)
    label = f"{channels}→{features} {image}² k{size}" + (f" s{strides}" if strides > 1 else "")
    rows = []
    for part in ("forward", "kernel gradient", "input gradient"):
        if part == "input gradient" and channels == 3:
            continue  # images need no gradient
        compiled = {name: one_part(part, algorithm, strides, padding) for name, algorithm in algorithms.items()}
        contenders = {name: lambda run=run: run(x, kernel, cotangent) for name, run in compiled.items()}
        if peer:
            contenders["torch"] = lambda part=part: peer.run("conv", part=part, **theirs)
        times = time_contenders(in_a_row(contenders), rounds)
        rows += make_rows("layers", f"{label} {part}, {chosen}", batch_size, 1, times, per=IN_A_ROW)
    return rows


def one_part(part: str, algorithm: str, strides: int, padding: int):
    """``(x, kernel, cotangent) -> result`` of one part of a convolution, compiled."""

    def forward(x, kernel):
        return conv(x, kernel, layout="native", strides=strides, padding=padding, algorithm=algorithm)

    def run(x, kernel, cotangent):
        if part == "forward":
            return forward(x, kernel)
        if part == "kernel gradient":
            return jax.vjp(lambda kernel: forward(x, kernel), kernel)[1](cotangent)
        return jax.vjp(lambda x: forward(x, kernel), x)[1](cotangent)

    return jax.jit(run)
