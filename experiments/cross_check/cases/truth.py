r"""What the networks compute, in float64 on the host, by NumPy alone: the truth of the cross-check.

A :class:`Tape` records layers in the forward pass and goes through them backwards for gradients. It shares no code and no
compiler with the library. Beside the truth it computes how far from the truth a correct machine may be:

* *Rounding.* A sum of n terms with independent roundings of unit roundoff u is off by about :math:`\sqrt n\,u` of its size
  (Higham and Mary, `A New Approach to Probabilistic Rounding Error Analysis
  <https://doi.org/10.1137/18M1226312>`_, 2019). A tape with ``rounding`` adds noise of that size to every sum, forward and
  backward; how far the result moves is the effect of rounding, which includes the conditioning of the network.
* *Kinks.* If a ReLU's input, or the distance of a maximum from the next value, is smaller than the rounding before it, the
  machine may take the other branch. A tape with ``side`` 1 or -1 takes all such branches one way or the other.

Axes: B examples, H × W pixels, C channels, O output channels, k kernel width.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int

_MARGIN = 4.0  # a value below this many times the rounding so far is near a kink


class Rounding(NamedTuple):
    """A precision on a machine: sums are kept in one type, results are stored in another."""

    sums: float  # unit roundoff of additions
    stored: float  # unit roundoff of stored values, including factors of products

    def of(self, length: int) -> float:
        """Relative size of the error of a sum of ``length`` terms after it is stored."""
        return math.sqrt(length) * self.sums + self.stored


class Var:
    """A value on a tape, its gradient, and the rounding that has gone into it, relative to its size."""

    def __init__(self, value: np.ndarray, rounding: float = 0.0):
        self.value, self.rounding, self.gradient = value, rounding, np.zeros_like(value)

    @property
    def margin(self) -> float:
        """Values smaller than this count as near zero."""
        return _MARGIN * self.rounding * float(np.sqrt(np.mean(self.value**2)))


class Tape:
    """Records layers in the forward pass; :meth:`backward` goes through them backwards."""

    def __init__(self, rounding: Rounding = Rounding(0.0, 0.0), random: np.random.Generator | None = None, side: int = 0):
        self.rounding, self._random, self._side = rounding, random, side
        self._steps: list[Callable[[], None]] = []

    def constant(self, value: np.ndarray) -> Var:
        """An input or a parameter, as it is stored."""
        value = np.asarray(value, np.float64)
        return Var(self._off(value, 0), self.rounding.stored)

    def backward(self, out: Var, cotangent: np.ndarray) -> None:
        """Adds to the ``gradient`` of everything from which ``out`` was computed."""
        out.gradient = out.gradient + cotangent
        for step in reversed(self._steps):
            step()

    def conv(self, x: Var, kernel: Var, strides: int = 1, padding: int = 0) -> Var:
        """Images (B, H, W, C), kernel (O, k, k, C)."""
        size = kernel.value.shape[1]
        padded = np.pad(x.value, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (1, 2))[:, ::strides, ::strides]
        patches = np.ascontiguousarray(windows.transpose(0, 1, 2, 4, 5, 3)).reshape(-1, kernel.value[0].size)
        rows, columns = windows.shape[1:3]
        flat = kernel.value.reshape(len(kernel.value), -1)
        made = (patches @ flat.T).reshape(len(padded), rows, columns, len(flat))
        out = self._result(made, flat.shape[1], x, kernel)

        def back():
            cotangent = out.gradient.reshape(-1, len(flat))
            kernel.gradient += self._off((cotangent.T @ patches).reshape(kernel.value.shape), len(cotangent))
            parts = (cotangent @ flat).reshape(len(padded), rows, columns, size, size, -1)
            gradient = np.zeros_like(padded)
            for i in range(size):
                for j in range(size):
                    gradient[:, i : i + strides * rows : strides, j : j + strides * columns : strides] += parts[:, :, :, i, j]
            inside = gradient[:, padding : gradient.shape[1] - padding, padding : gradient.shape[2] - padding]
            x.gradient += self._off(inside, size * size * len(flat))

        return self._record(out, back)

    def dense(self, x: Var, kernel: Var) -> Var:
        """(B, in) times (in, out)."""
        out = self._result(x.value @ kernel.value, len(kernel.value), x, kernel)

        def back():
            kernel.gradient += self._off(x.value.T @ out.gradient, len(x.value))
            x.gradient += self._off(out.gradient @ kernel.value.T, kernel.value.shape[1])

        return self._record(out, back)

    def add_bias(self, x: Var, bias: Var) -> Var:
        """Adds a number to each channel."""
        out = self._result(x.value + bias.value, 1, x, bias)

        def back():
            x.gradient += out.gradient
            axes = tuple(range(x.value.ndim - 1))
            bias.gradient += self._off(out.gradient.sum(axes), x.value.size // len(bias.value))

        return self._record(out, back)

    def add(self, x: Var, y: Var) -> Var:
        """Adds two values, as a shortcut does."""
        out = self._result(x.value + y.value, 1, x, y)

        def back():
            x.gradient += out.gradient
            y.gradient += out.gradient

        return self._record(out, back)

    def relu(self, x: Var) -> Var:
        """max(x, 0); the gradient passes where x is above zero (near zero, ``side`` decides)."""
        out = Var(np.maximum(x.value, 0), x.rounding)
        passes = x.value > -self._side * x.margin

        def back():
            x.gradient += out.gradient * passes

        return self._record(out, back)

    def max_pool(self, x: Var, window: int, strides: int | None = None, padding: int = 0) -> Var:
        """The gradient goes to the first of the largest values; ``side`` -1 or 1 takes the first or last of those near it."""
        strides = strides or window
        padded = np.pad(x.value, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=-np.inf)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (window, window), (1, 2))[:, ::strides, ::strides]
        flat = windows.reshape(*windows.shape[:4], window * window)
        largest = flat.max(-1)
        near = flat >= (largest - abs(self._side) * x.margin)[..., None]
        taken = near.argmax(-1) if self._side <= 0 else window * window - 1 - near[..., ::-1].argmax(-1)
        out = Var(largest, x.rounding)

        def back():
            gradient = np.zeros_like(padded)
            b, h, w, c = np.indices(taken.shape)
            np.add.at(gradient, (b, h * strides + taken // window, w * strides + taken % window, c), out.gradient)
            x.gradient += gradient[:, padding : gradient.shape[1] - padding, padding : gradient.shape[2] - padding]

        return self._record(out, back)

    def batch_norm(self, x: Var, scale: Var, bias: Var, epsilon: float = 1e-5) -> Var:
        """Normalises by the batch's own mean and biased variance."""
        axes, count = (0, 1, 2), x.value.size // x.value.shape[3]
        mean, variance = x.value.mean(axes), x.value.var(axes)
        inverse = 1 / np.sqrt(variance + epsilon)
        normal = (x.value - mean) * inverse
        out = self._result(normal * scale.value + bias.value, count, x)

        def back():
            scale_gradient, bias_gradient = (out.gradient * normal).sum(axes), out.gradient.sum(axes)
            scale.gradient += self._off(scale_gradient, count)
            bias.gradient += self._off(bias_gradient, count)
            inner = out.gradient - bias_gradient / count - normal * scale_gradient / count
            x.gradient += self._off(scale.value * inverse * inner, count)

        return self._record(out, back)

    def mean_pixels(self, x: Var) -> Var:
        """(B, H, W, C) to (B, C)."""
        pixels = x.value.shape[1] * x.value.shape[2]
        out = self._result(x.value.mean((1, 2)), pixels, x)

        def back():
            x.gradient += out.gradient[:, None, None] / pixels

        return self._record(out, back)

    def flatten(self, x: Var) -> Var:
        """(B, H, W, C) to (B, features)."""
        out = Var(x.value.reshape(len(x.value), -1), x.rounding)

        def back():
            x.gradient += out.gradient.reshape(x.value.shape)

        return self._record(out, back)

    def cross_entropy(self, logits: Var, labels: Int[np.ndarray, "B"]) -> Var:
        """One loss for each example."""
        shifted = logits.value - logits.value.max(1, keepdims=True)
        powers = np.exp(shifted)
        sums, rows = powers.sum(1), np.arange(len(labels))
        out = self._result(np.log(sums) - shifted[rows, labels], logits.value.shape[1], logits)

        def back():
            softmax = powers / sums[:, None]
            softmax[rows, labels] -= 1
            logits.gradient += self._off(softmax * out.gradient[:, None], logits.value.shape[1])

        return self._record(out, back)

    def _off(self, value: np.ndarray, length: int) -> Float64[np.ndarray, "..."]:
        if self._random is None or value.size == 0:
            return value
        size = self.rounding.of(length) * np.sqrt(np.mean(value**2))
        return value + size * self._random.normal(size=value.shape)

    def _result(self, value: np.ndarray, length: int, *inputs: Var) -> Var:
        before = max(one.rounding for one in inputs)
        return Var(self._off(value, length), math.hypot(before, self.rounding.of(length)))

    def _record(self, out: Var, back: Callable[[], None]) -> Var:
        self._steps.append(back)
        return out
