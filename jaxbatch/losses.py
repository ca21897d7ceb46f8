"""Losses and metrics. They return one value per example, because a mean can only be taken once the groups are known."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from jaxbatch.augment import normalise


def cross_entropy(logits: Float[Array, "*B classes"], labels: Int[Array, "*B"]) -> Float[Array, "*B"]:
    r"""Negative log-likelihood of each label, :math:`-\log \text{softmax}(z)_y`, in nats.

    Example:
        >>> round(cross_entropy(jnp.zeros((1, 4)), jnp.array([2])).item(), 4)
        1.3863
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def correct(logits: Float[Array, "*B classes"], labels: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """1 for an example whose largest logit is the label's, else 0; always 0 for an example with a logit that is not finite.

    Example:
        >>> correct(jnp.array([[0.1, 0.9], [0.8, 0.2]]), jnp.array([1, 1])).tolist()
        [1.0, 0.0]
    """
    hit = (logits.argmax(-1) == labels) & jnp.isfinite(logits).all(-1)
    return hit.astype(logits.dtype)


def classification_loss(
    apply: Callable[[PyTree, Array], Array],
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
    *,
    has_aux: bool = False,
) -> Callable[[PyTree, tuple[Array, Array]], Float[Array, "B"] | tuple[Float[Array, "B"], PyTree]]:
    """Makes ``loss_fn(params, (images, labels)) -> losses`` of a model; it normalises the images first.

    Args:
        apply: ``apply(params, images) -> logits``.
        mean, std: per channel, see :func:`jaxbatch.augment.normalise`.
        has_aux: whether ``apply`` returns ``(logits, aux)``; then the loss function returns ``(losses, aux)``.
    """

    def loss_fn(params, batch):
        images, labels = batch
        result = apply(params, normalise(images, mean, std))
        if has_aux:
            return cross_entropy(result[0], labels), result[1]
        return cross_entropy(result, labels)

    return loss_fn


def classification_metrics(
    apply: Callable[[PyTree, Array], Array], mean: tuple[float, ...] = (0.0,), std: tuple[float, ...] = (1.0,)
) -> Callable[[PyTree, tuple[Array, Array]], dict[str, Float[Array, "B"]]]:
    """Makes ``metrics_fn(params, (images, labels))``: per-example ``loss`` and ``accuracy`` in one forward pass."""

    def metrics_fn(params, batch):
        images, labels = batch
        logits = apply(params, normalise(images, mean, std))
        return {"loss": cross_entropy(logits, labels), "accuracy": correct(logits, labels)}

    return metrics_fn
