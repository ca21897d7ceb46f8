"""The networks of the studies, in Flax Linen: ``model.init(key, images)``, ``model.apply(variables, images)``.

Images are ``(B, H, W, C)``. Networks with batch normalisation take ``train``: in training, ``model.apply(variables, images,
train=True, mutable=["batch_stats"])`` returns the logits and the batch's own moments (mean and variance). ``axis_name`` and
``ghost_size`` set over which examples the moments are taken, see :class:`jaxbatch.layers.BatchNorm`.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Shaped

from jaxbatch.layers import Conv, ConvBatchNorm, ConvMaxPool, Layout, choose_layout, flatten, he_fan_out, max_pool, to_layout, torch_uniform


class SimpleCNN(nn.Module):
    """The small network of the MNIST batch-size study, 12,930 parameters.

    Convolutions 1→10 (5 × 5), 10→20 (5 × 5), 20→40 (3 × 3) without padding, each followed by a 2 × 2
    max-pool and a ReLU (28 → 24 → 12 → 8 → 4 → 2 → 1 pixels), then a dense layer 40→10. Weights and biases
    start uniform on ±1/√fan-in, PyTorch's default. The study's network ends in a log-softmax with the
    negative log-likelihood as its loss; this one returns the logits, and
    :func:`jaxbatch.losses.classification.cross_entropy` computes the two together.

    Example:
        >>> import jax
        >>> model = SimpleCNN()
        >>> params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        12930
    """

    num_classes: int = 10
    layout: Layout | None = None  # None: the fastest on the platform
    dtype: Any = None  # of the computation; None: that of the images, at least float32

    @nn.compact
    def __call__(self, images: Shaped[Array, "B H W C"]) -> Float[Array, "B classes"]:
        layout = self.layout or choose_layout()
        x = to_layout(jnp.asarray(images, self.dtype or jnp.result_type(images, jnp.float32)), layout)
        for features, kernel_size in ((10, 5), (20, 5), (40, 3)):
            x = nn.relu(ConvMaxPool(features, kernel_size, 2, layout)(x))
        x = flatten(x, layout)
        return _dense(x, self.num_classes)


class MLP(nn.Module):
    """Dense layers with ReLUs between them and PyTorch's default initialisation. Matrix products take all of its time.

    Example:
        >>> import jax
        >>> shapes = jax.eval_shape(MLP((1024, 1024)).init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
        >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
        1863690
    """

    features: tuple[int, ...] = (1024, 1024)
    num_classes: int = 10
    dtype: Any = None  # of the computation; None: that of the images, at least float32

    @nn.compact
    def __call__(self, images: Shaped[Array, "B H W C"]) -> Float[Array, "B classes"]:
        dtype = self.dtype or jnp.result_type(images, jnp.float32)
        x = images.reshape(images.shape[0], -1).astype(dtype)
        for features in self.features:
            init = torch_uniform(x.shape[1])
            x = nn.relu(nn.Dense(features, kernel_init=init, bias_init=init, dtype=dtype)(x))
        return _dense(x, self.num_classes)


class AlexNet(nn.Module):
    """AlexNet for 32 × 32 images as AdaBatch uses it: 2,472,266 parameters for 10 classes, 2,495,396 for 100.

    Convolutions 64 (11 × 11, stride 4), 192 (5 × 5), 384, 256, 256 (3 × 3), each with a ReLU; 2 × 2 max-pools after
    the first, second and last (32 → 8 → 4 → 2 → 1 pixels); a dense layer. No batch normalisation, no dropout.
    PyTorch's default initialisation.

    Example:
        >>> import jax
        >>> shapes = jax.eval_shape(AlexNet().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
        2472266
    """

    num_classes: int = 10
    dtype: Any = jnp.float32  # of the computation; parameters and logits are float32

    @nn.compact
    def __call__(self, images: Shaped[Array, "B H W C"], train: bool = False) -> Float[Array, "B classes"]:
        x = jnp.asarray(images, self.dtype)
        # Pooling first gives the same result, and the ReLU then works on a quarter of the pixels.
        x = nn.relu(ConvMaxPool(64, 11, 2, "native", strides=4, padding=5)(x))
        x = nn.relu(ConvMaxPool(192, 5, 2, "native", padding=2)(x))
        x = nn.relu(Conv(384, 3, padding=1)(x))
        x = nn.relu(Conv(256, 3, padding=1)(x))
        x = nn.relu(ConvMaxPool(256, 3, 2, "native", padding=1)(x))
        return _dense(flatten(x, "native"), self.num_classes)


class _Normalised(nn.Module):
    """The settings that all networks with batch normalisation have."""

    num_classes: int = 10
    dtype: Any = jnp.float32
    axis_name: str | None = None  # moments over the devices along this axis
    ghost_size: int | None = None  # separate moments for each group of this many examples


class ResNet20(_Normalised):
    """ResNet-20 for 32 × 32 images as AdaBatch uses it: 272,474 parameters for 10 classes, 278,324 for 100.

    A 3 × 3 convolution to 16 channels, then three stages of three basic blocks with 16, 32, 64 channels and strides
    1, 2, 2; batch normalisation after each convolution, which has no bias; a 1 × 1 convolution with batch
    normalisation on the shortcut where the shape changes; the mean over the pixels; a dense layer.

    Example:
        >>> import jax
        >>> variables = jax.eval_shape(ResNet20().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        272474
    """

    @nn.compact
    def __call__(self, images: Shaped[Array, "B H W C"], train: bool = False) -> Float[Array, "B classes"]:
        conv = _normalised_conv(self, train)
        x = nn.relu(conv(jnp.asarray(images, self.dtype), 16, 3))
        for features, first in ((16, 1), (32, 2), (64, 2)):
            for strides in (first, 1, 1):
                inner = conv(nn.relu(conv(x, features, 3, strides)), features, 3)
                shortcut = x if x.shape == inner.shape else conv(x, features, 1, strides)
                x = nn.relu(inner + shortcut)
        return _dense(_wide(x).mean((1, 2)), self.num_classes)


class ResNet50(_Normalised):
    """ResNet-50 for ImageNet, 25,557,032 parameters for 1,000 classes.

    A 7 × 7 convolution of stride 2 to 64 channels, a 3 × 3 max-pool of stride 2, then four stages of 3, 4, 6 and 3
    bottleneck blocks (1 × 1, 3 × 3, 1 × 1 convolutions, the last four times as wide), strides 1, 2, 2, 2 on the 3 × 3
    convolution of a stage's first block; batch normalisation after each convolution; the mean over the pixels; a dense
    layer. Any image size from 32 × 32 on.

    Example:
        >>> import jax
        >>> variables = jax.eval_shape(ResNet50().init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
        >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        25557032

    References:
        He et al., `Deep Residual Learning <https://arxiv.org/abs/1512.03385>`_, 2015: table 1; the stride on the 3 × 3
        convolution as in Goyal et al., `Accurate, Large Minibatch SGD <https://arxiv.org/abs/1706.02677>`_, 2017.
    """

    num_classes: int = 1000

    @nn.compact
    def __call__(self, images: Shaped[Array, "B H W C"], train: bool = False) -> Float[Array, "B classes"]:
        conv = _normalised_conv(self, train)
        x = nn.relu(conv(jnp.asarray(images, self.dtype), 64, 7, 2))
        x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
        for features, blocks, first in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for strides in (first, *[1] * (blocks - 1)):
                inner = nn.relu(conv(nn.relu(conv(x, features, 1)), features, 3, strides))
                inner = conv(inner, 4 * features, 1)
                shortcut = x if x.shape == inner.shape else conv(x, 4 * features, 1, strides)
                x = nn.relu(inner + shortcut)
        return _dense(_wide(x).mean((1, 2)), self.num_classes)


class VGG19BN(_Normalised):
    """VGG-19 with batch normalisation for 32 × 32 images: 20,040,522 parameters for 10 classes, 20,086,692 for 100.

    Sixteen 3 × 3 convolutions with bias, batch normalisation and ReLU, 64 to 512 channels, five 2 × 2 max-pools
    (32 → 1 pixel), a dense layer; no dropout.

    Example:
        >>> import jax
        >>> variables = jax.eval_shape(VGG19BN().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        20040522
    """

    @nn.compact
    def __call__(self, images: Shaped[Array, "B H W C"], train: bool = False) -> Float[Array, "B classes"]:
        conv, x = _normalised_conv(self, train, use_bias=True), jnp.asarray(images, self.dtype)
        for features, count in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
            for _ in range(count):
                x = nn.relu(conv(x, features, 3))
            x = max_pool(x, 2, layout="native")
        init = nn.initializers.normal(0.01)
        return nn.Dense(self.num_classes, kernel_init=init)(_wide(flatten(x, "native")))


def _normalised_conv(network, train: bool, use_bias: bool = False):
    """``(x, features, kernel_size, strides) -> x``: a padded convolution, then the network's batch normalisation."""
    norm = {"use_bias": use_bias, "axis_name": network.axis_name, "ghost_size": network.ghost_size}

    def conv(x, features, kernel_size, strides=1):
        block = ConvBatchNorm(features, kernel_size, strides, kernel_size // 2, kernel_init=he_fan_out, **norm)
        return block(x, train=train)

    return conv


def _dense(x, num_classes: int):
    init = torch_uniform(x.shape[1])
    return nn.Dense(num_classes, kernel_init=init, bias_init=init)(_wide(x))


def _wide(x):
    """Casts to float32 at least: the work after the last convolution is cheap and holds sums."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
