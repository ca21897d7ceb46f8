"""The networks of the studies, in Flax Linen: ``model.init(key, images)``, ``model.apply(variables, images)``."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Shaped

from jaxbatch.layers import ConvMaxPool, Layout, choose_layout, flatten, to_layout, torch_uniform


class SimpleCNN(nn.Module):
    """The small network of the MNIST batch-size study, 12,930 parameters.

    Convolutions 1→10 (5 × 5), 10→20 (5 × 5), 20→40 (3 × 3) without padding, each followed by a 2 × 2
    max-pool and a ReLU (28 → 24 → 12 → 8 → 4 → 2 → 1 pixels), then a dense layer 40→10. Weights and biases
    start uniform on ±1/√fan-in, PyTorch's default. The study's network ends in a log-softmax with the
    negative log-likelihood as its loss; this one returns the logits, and
    :func:`jaxbatch.losses.cross_entropy` computes the two together.

    Example:
        >>> import jax
        >>> model = SimpleCNN()
        >>> params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        12930
    """

    num_classes: int = 10
    layout: Layout | None = None  # None: the fastest on the platform

    @nn.compact
    def __call__(self, images: Shaped[Array, "B H W C"]) -> Float[Array, "B classes"]:
        layout = self.layout or choose_layout()
        x = to_layout(jnp.asarray(images, jnp.result_type(images, jnp.float32)), layout)
        for features, kernel_size in ((10, 5), (20, 5), (40, 3)):
            x = nn.relu(ConvMaxPool(features, kernel_size, 2, layout)(x))
        x = flatten(x, layout)
        init = torch_uniform(x.shape[1])
        return nn.Dense(self.num_classes, kernel_init=init, bias_init=init)(x)
