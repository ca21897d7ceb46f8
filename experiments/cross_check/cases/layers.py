"""Sums and single layers of the cross-check, forward and gradient, at the networks' shapes and at unusual ones."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

import jaxbatch as jb
from experiments.cross_check.cases.case import Case, length_bound
from experiments.cross_check.cases.truth import Tape
from jaxbatch import layers


def total(x):
    """A sum as the platform computes it."""
    return jnp.sum(x)


def squares_after_product(rows):
    """A sum of which jaxlib 0.10.2 on CPU computes the last row wrong (jax issue 39103)."""
    return jax.vmap(lambda row: jnp.sum((jnp.eye(3, dtype=rows.dtype) @ row) ** 2))(rows)


def reductions() -> Iterator[Case]:
    """Sums: at unusual sizes, the one that is known to fail, and over many axes."""
    for size in (1, 7, 1023, 1025, 32_768, 32_769, 1_000_003):
        draw = lambda random, size=size: (random.normal(size=size),)
        yield Case("sum", f"{size:,}", size, lambda _: total, draw, np.sum, _sum_bound, quick=size in (7, 1025, 32_769))
    whole = lambda random: (np.sign(random.normal(size=32_769)) * random.integers(1, 8, 32_769),)
    exact = lambda rounding, inputs, truth: 0.0 if rounding.stored < 1e-4 else length_bound(rounding, 1)
    yield Case("sum of whole numbers", "32,769", 32_769, lambda _: total, whole, np.sum, exact, quick=True)
    for size, precision in ((32_769, "float32"), (16_385, "float64"), (1000, "float32")):
        rows = lambda random, size=size: (np.stack([np.arange(size, dtype=float), np.zeros(size), np.zeros(size)], 1),)
        truth = lambda rows: (rows**2).sum(1)
        yield Case("sum of squares after a product", f"{size:,}", 3, lambda _: squares_after_product, rows, truth,
                   forms=("eager", "jit"), precisions=(precision,), quick=True)  # fmt: skip
    rank = lambda random: (random.normal(size=(2,) * 8),)
    yield Case("sum over 4 of 8 axes", "2⁸", 16, lambda _: lambda x: x.sum((0, 2, 4, 6)), rank,
               lambda x: x.sum((0, 2, 4, 6)), quick=True)  # fmt: skip


def _sum_bound(rounding, inputs, truth):
    # The sum may be small by chance, so errors are relative to the size of the partial sums.
    expected = np.sqrt((inputs[0] ** 2).sum())
    return length_bound(rounding, inputs[0].size) * expected / max(abs(float(truth)), 1e-300)


def _with_gradients(function):
    """``(inputs..., cotangent) -> (output, gradients...)``"""

    def run(*inputs):
        out, back = jax.vjp(function, *inputs[:-1])
        return out, *back(inputs[-1].astype(out.dtype))

    return run


@functools.cache
def _dense(precision):
    return _with_gradients(lambda x, kernel: x @ kernel)


@functools.cache
def _conv(strides, padding, layout):
    return _with_gradients(lambda x, kernel: layers.conv(x, kernel, layout=layout, strides=strides, padding=padding))


@functools.cache
def _pool(layout):
    return _with_gradients(lambda x: layers.max_pool(x, 2, layout=layout))


@functools.cache
def _norm(precision):
    return _with_gradients(lambda x, scale, bias: layers.batch_norm(x, scale, bias))


@functools.cache
def _entropy(precision):
    def run(logits, cotangent, labels):
        losses, back = jax.vjp(lambda z: jb.cross_entropy(z, labels), logits)
        return losses, *back(cotangent.astype(losses.dtype))

    return run


def _taped(layer, *values, cotangent):
    tape = Tape()
    inputs = [tape.constant(value) for value in values]
    out = layer(tape, *inputs)
    tape.backward(out, cotangent)
    return out.value, *(one.gradient for one in inputs)


def _conv_truth(strides, padding, turned, x, kernel, cotangent):
    if turned:  # (C, H, W, B)
        x, cotangent = x.transpose(3, 1, 2, 0), cotangent.transpose(3, 1, 2, 0)
    out, x_gradient, kernel_gradient = _taped(lambda tape, *pair: tape.conv(*pair, strides, padding), x, kernel, cotangent=cotangent)
    if turned:
        out, x_gradient = out.transpose(3, 1, 2, 0), x_gradient.transpose(3, 1, 2, 0)
    return out, x_gradient, kernel_gradient


CONVS = (  # layout, B, side, C, O, k, strides, padding; the comments name the network
    ("batch_minor", 16, 28, 1, 10, 5, 1, 0),  # SimpleCNN
    ("batch_minor", 16, 12, 10, 20, 5, 1, 0),
    ("batch_minor", 1, 4, 20, 40, 3, 1, 0),
    ("native", 3, 32, 3, 64, 11, 4, 5),  # AlexNet
    ("native", 4, 4, 64, 96, 5, 1, 2),  # kernel larger than the image
    ("native", 17, 2, 33, 65, 3, 1, 1),  # the same, with 16 examples or more
    ("native", 4, 32, 16, 16, 3, 1, 1),  # ResNet-20
    ("native", 1, 32, 16, 32, 3, 2, 1),
    ("native", 5, 16, 16, 32, 1, 2, 0),
    ("native", 2, 32, 3, 64, 7, 2, 3),  # ResNet-50
    ("native", 2, 2, 512, 512, 3, 1, 1),  # VGG19_BN
    ("native", 3, 17, 31, 33, 3, 1, 1),  # powers of two, plus or minus one
    ("native", 129, 5, 7, 9, 3, 1, 1),
)


def single_layers() -> Iterator[Case]:
    """Dense, convolution, pooling, batch normalisation and loss, forward and gradient."""
    for batch, inputs, outputs in ((1, 40, 10), (64, 40, 10), (63, 65, 33), (17, 513, 100), (128, 1024, 257)):
        draw = lambda random, a=batch, b=inputs, c=outputs: tuple(random.normal(size=shape) for shape in ((a, b), (b, c), (a, c)))
        truth = lambda x, w, dy: (x @ w, dy @ w.T, x.T @ dy)
        yield Case("dense", f"{batch}×{inputs}→{outputs}", max(batch, inputs, outputs), _dense, draw, truth, quick=batch == 63)
    for layout, batch, side, channels, outputs, size, strides, padding in CONVS:
        turned = layout == "batch_minor"
        after = (side + 2 * padding - size) // strides + 1

        def draw(random, b=batch, n=side, c=channels, o=outputs, k=size, m=after, turned=turned):
            shapes = ((b, n, n, c), (o, k, k, c), (b, m, m, o))
            x, kernel, cotangent = (random.normal(size=shape) for shape in shapes)
            return (x.transpose(3, 1, 2, 0), kernel, cotangent.transpose(3, 1, 2, 0)) if turned else (x, kernel, cotangent)

        length = max(size**2 * max(channels, outputs), batch * after**2)
        name, text = "convolution", f"{batch}×{side}²×{channels}→{outputs}, {size}×{size}/{strides}"
        truth = functools.partial(_conv_truth, strides, padding, turned)
        quick = (batch, side) in ((16, 12), (17, 2), (3, 17))
        yield Case(name, text, length, lambda _, a=(strides, padding, layout): _conv(*a), draw, truth, quick=quick)
    for layout, shape in (("native", (3, 8, 8, 5)), ("native", (1, 7, 7, 33)), ("batch_minor", (10, 24, 24, 4))):

        def draw(random, shape=shape):
            # All values of a window differ and are exact in bfloat16, so the largest is the same in every precision.
            offsets = (np.arange(shape[1])[:, None] % 2 * 2 + np.arange(shape[2])[None] % 2)[None, :, :, None]
            x = 4.0 * random.integers(-32, 32, shape) + offsets
            return x, random.integers(-64, 64, (shape[0], shape[1] // 2, shape[2] // 2, shape[3])).astype(float)

        truth = lambda x, dy: _taped(_pool_whole_windows, x, cotangent=dy)
        yield Case("max-pool", "×".join(map(str, shape)), 1, lambda _, layout=layout: _pool(layout), draw, truth,
                   lambda *_: 0.0, quick=True)  # fmt: skip
    for shape in ((4, 16, 16, 16), (1, 8, 8, 33), (20, 2, 2, 512), (65, 1, 1, 3)):
        parts = (shape, shape[3:], shape[3:], shape)
        draw = lambda random, parts=parts: tuple(random.normal(size=part) for part in parts)
        truth = lambda x, scale, bias, dy: _taped(Tape.batch_norm, x, scale, bias, cotangent=dy)
        count = shape[0] * shape[1] * shape[2]
        bound = lambda rounding, *_, count=count: length_bound(rounding, count, 4)
        yield Case("batch normalisation", "×".join(map(str, shape)), count, _norm, draw, truth, bound, quick=shape[0] == 4)
    for batch, classes in ((64, 10), (1, 100), (7, 1000)):
        draw = lambda random, a=batch, b=classes: (3 * random.normal(size=(a, b)), random.normal(size=a), random.integers(0, b, a))
        truth = lambda z, dy, labels: _taped(lambda tape, z: tape.cross_entropy(z, labels), z, cotangent=dy)
        bound = lambda rounding, inputs, _, classes=classes: length_bound(rounding, classes, 4 + np.abs(inputs[0]).max())
        yield Case("cross entropy", f"{batch}×{classes}", classes, _entropy, draw, truth, bound, quick=batch == 64)


def _pool_whole_windows(tape, x):
    rows, columns = (n // 2 * 2 for n in x.value.shape[1:3])
    kept = tape.constant(x.value[:, :rows, :columns])
    out = tape.max_pool(kept, 2)

    def back():
        x.gradient[:, :rows, :columns] += kept.gradient

    tape._steps.insert(0, back)  # the last step of the way back
    return out
