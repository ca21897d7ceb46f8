"""Losses and metrics. They return one value per example, because a mean can only be taken once the groups are known."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from jaxbatch.augment import normalise
from jaxbatch.kinds import checked


@checked
def cross_entropy(logits: Float[Array, "*B classes"], labels: Int[Array, "*B"], *, label_smoothing: float = 0.0) -> Float[Array, "*B"]:
    r"""Negative log-likelihood of each label, :math:`-\log \text{softmax}(z)_y`, in nats.

    Args:
        logits: z, of C classes.
        labels: y, from 0 to C - 1. Where a label such as -1 means that an example does not count, give it a valid one and the weight 0:
            ``Weighted(cross_entropy(logits, jnp.maximum(labels, 0)), labels >= 0)``.
        label_smoothing: the share :math:`\alpha` of the target that goes to all classes alike:
            :math:`-(1 - \alpha) \log \text{softmax}(z)_y - \frac{\alpha}{C} \sum_c \log \text{softmax}(z)_c`.

    Returns:
        One loss per label. Within ``jit``, where labels have no values yet, the loss of a label that is no class is NaN.

    Raises:
        ValueError: a label is no class, or ``label_smoothing`` is not from 0 to 1.

    Example:
        >>> round(cross_entropy(jnp.zeros((1, 4)), jnp.array([2])).item(), 4)
        1.3863
        >>> cross_entropy(jnp.zeros((2, 4)), jnp.array([2, 4]))
        Traceback (most recent call last):
        ValueError: labels[1]=4 is no class: 4 classes have the labels 0 to 3. Examples that do not count need a valid label and a weight of 0.

    References:
        Szegedy et al., `Rethinking the Inception Architecture <https://arxiv.org/abs/1512.00567>`_, 2016: section 7.
    """
    classes = logits.shape[-1]
    check_labels(labels, classes)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * jax.nn.log_softmax(logits).mean(-1)
    return jnp.where((labels >= 0) & (labels < classes), losses, jnp.nan)


def check_labels(labels: Int[Array, "*B"], classes: int, name: str = "labels") -> None:
    """Raises a ValueError that names the first label that is no class, for labels whose values are known.

    JAX would take the nearest class, or count from the last, and train on it.
    """
    if isinstance(labels, jax.core.Tracer):
        return
    known = np.asarray(labels)
    wrong = np.argwhere((known < 0) | (known >= classes))
    if len(wrong):
        where = "".join(f"[{index}]" for index in wrong[0].tolist())
        raise ValueError(
            f"{name}{where}={known[tuple(wrong[0])]} is no class: {classes} classes have the labels 0 to {classes - 1}. Examples that do not count "
            "need a valid label and a weight of 0."
        )


@checked
def correct(logits: Float[Array, "*B classes"], labels: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """1 for an example whose largest logit is the label's, else 0; always 0 for an example with a logit that is not finite.

    Example:
        >>> correct(jnp.array([[0.1, 0.9], [0.8, 0.2]]), jnp.array([1, 1])).tolist()
        [1.0, 0.0]
    """
    hit = (logits.argmax(-1) == labels) & jnp.isfinite(logits).all(-1)
    return hit.astype(logits.dtype)


@checked
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


@checked
def classification_metrics(
    apply: Callable[[PyTree, Array], Array], mean: tuple[float, ...] = (0.0,), std: tuple[float, ...] = (1.0,)
) -> Callable[[PyTree, tuple[Array, Array]], dict[str, Float[Array, "B"]]]:
    """Makes ``metrics_fn(params, (images, labels))``: per-example ``loss`` and ``accuracy`` in one forward pass."""

    def metrics_fn(params, batch):
        images, labels = batch
        logits = apply(params, normalise(images, mean, std))
        return {"loss": cross_entropy(logits, labels), "accuracy": correct(logits, labels)}

    return metrics_fn
