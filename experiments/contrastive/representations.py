"""How good are representations? Two classifiers that learn nothing but themselves: nearest neighbours, and a linear probe.

Axes: N training examples, T test examples, D components, K classes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

import jaxbatch as jb

NEIGHBOURS = 20


@functools.partial(jax.jit, static_argnames=("num_classes", "k", "chunk_size"))
def nearest_accuracy(
    train: Float[Array, "N D"],
    train_labels: Int[Array, "N"],
    test: Float[Array, "T D"],
    test_labels: Int[Array, "T"],
    *,
    num_classes: int,
    k: int = NEIGHBOURS,
    chunk_size: int = 512,
) -> Float[Array, ""]:
    """The accuracy of a plain vote among the k nearest training examples by cosine; of equal votes the smallest class wins.

    Example:
        >>> train, labels = jnp.array([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]]), jnp.array([0, 0, 1])
        >>> nearest_accuracy(train, labels, jnp.array([[3.0, 0.0], [0.0, 9.0]]), jnp.array([0, 1]), num_classes=2, k=1).item()
        1.0
    """
    train, test = jb.unit_length(train), jb.unit_length(test)

    def guess(one):
        _, nearest = lax.top_k(train @ one, min(k, train.shape[0]))
        return jnp.bincount(train_labels[nearest], length=num_classes).argmax()

    return jnp.mean(lax.map(guess, test, batch_size=chunk_size) == test_labels)


@functools.partial(jax.jit, static_argnames=("num_classes",))
def probe_accuracy(
    train: Float[Array, "N D"],
    train_labels: Int[Array, "N"],
    test: Float[Array, "T D"],
    test_labels: Int[Array, "T"],
    *,
    num_classes: int,
    decay: float = 1e-3,
) -> Float[Array, ""]:
    r"""The accuracy of ridge regression onto the classes, in closed form: :math:`W = (X^\top X + N\lambda)^{-1} X^\top Y`.

    Components are standardised by the training examples; constant ones count nothing. The intercept is not decayed.

    Example:
        >>> x, labels = jnp.array([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]]), jnp.array([0, 0, 1])
        >>> probe_accuracy(x, labels, x, labels, num_classes=2).item()
        1.0
    """
    mean, deviation = train.mean(0, keepdims=True), train.std(0, keepdims=True)
    scale = jnp.where(deviation > 1e-6, 1 / jnp.maximum(deviation, 1e-6), 0)
    train, test = (train - mean) * scale, (test - mean) * scale
    targets = jax.nn.one_hot(train_labels, num_classes)
    centre = targets.mean(0, keepdims=True)
    square = train.T @ train + decay * train.shape[0] * jnp.eye(train.shape[1])
    weights = jnp.linalg.solve(square, train.T @ (targets - centre))
    return jnp.mean((test @ weights + centre).argmax(1) == test_labels)
