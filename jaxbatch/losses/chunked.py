r"""The softmax cross-entropy of very many classes, a chunk of classes at a time, on one device or with classes shared by several.

The logits of B examples and C classes are B × C numbers: 8,192 tokens and 128,000 words make 4 GB in float32, more than the rest
of a training step. The loss needs of them only two sums an example, which :mod:`jaxbatch.losses.chunked_softmax` takes.

Axes: B examples, D features, C classes (of a device, where several share them).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxbatch.kinds import checked
from jaxbatch.losses.chunked_softmax import Plan, others_and_target

Number = float | Float[Array, ""]
Margin = Callable[[Float[Array, "B"]], Float[Array, "B"]]


@checked
def chunked_cross_entropy(
    features: Float[Array, "*B D"],
    kernel: Float[Array, "D C"],
    labels: Int[Array, "*B"],
    *,
    chunk_size: int,
    bias: Float[Array, "C"] | None = None,
    scale: Number = 1.0,
    margin: Margin | None = None,
    label_smoothing: float = 0.0,
    axis: str | None = None,
    num_classes: int | None = None,
) -> Float[Array, "*B"]:
    r"""The softmax cross-entropy of ``scale * features @ kernel + bias``, which never holds these B × C logits.

    Value and gradients are those of :func:`jaxbatch.cross_entropy` up to the order of summation, whether ``chunk_size`` divides C
    or not. It costs one matrix product more, four in place of three. Maxima and sums are in float32 at least.

    **Faces, products, speakers.** With features and classes of unit length a product is a cosine, and ``margin`` makes the target's
    smaller: :func:`jaxbatch.additive_margin` (CosFace), :func:`jaxbatch.angular_margin` (ArcFace), or any function of one array.
    ``scale``, the margin and what they depend on may be learned.

    **Classes shared by devices.** With ``axis``, in ``shard_map`` or ``pmap``, each device has its own examples and its own C
    classes: device n has those from nC on. Features are gathered, each device works out its classes for all examples, and gets the
    losses of its own examples back. Differentiate the sum of a device's own losses, as without devices: the gradients of
    ``features``, ``kernel`` and ``bias`` are then whole, those of the sum over all devices. For parameters of which every
    device has a copy, such as an encoder's, each device gets a part of the gradient. Add the parts up with ``lax.psum``, as always.

    Args:
        features: ``(B, D)``, or any number of leading axes, such as (sequences, tokens).
        kernel: ``(D, C)``.
        labels: the classes, of all devices, ``(B,)``. The loss of a label outside of them is NaN; it has no gradient if it does not count.
        chunk_size: the most classes worked on at a time; B × ``chunk_size`` numbers are in memory.
        bias: ``(C,)``.
        scale: multiplies the products, an inverse temperature.
        margin: takes the targets' products, before ``scale``, and returns what takes their place.
        label_smoothing: the share of the target that goes to all classes alike, as in :func:`jaxbatch.cross_entropy`.
        axis: the name of the axis of devices that share the classes.
        num_classes: with ``axis``, the number of classes on all devices, if the last columns are only there to give every device as many.

    Returns:
        One loss per example, in float32 at least.

    Raises:
        ValueError: shapes do not go together, ``chunk_size`` is below 1, a margin is given with a bias, ``num_classes`` without ``axis``, or
            ``label_smoothing`` is not from 0 to 1.

    Example:
        >>> features, kernel = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]])
        >>> losses = chunked_cross_entropy(features, kernel, jnp.array([0, 1]), chunk_size=2)
        >>> [round(loss, 3) for loss in losses.tolist()]
        [1.408, 0.143]

    References:
        Milakov and Gimelshein, `Online normalizer calculation for softmax <https://arxiv.org/abs/1805.02867>`_, 2018;
        Wijmans et al., `Cut Your Losses in Large-Vocabulary Language Models <https://arxiv.org/abs/2411.09009>`_, 2024.
    """
    _check(features, kernel, labels, bias, margin, axis, num_classes)
    shape, flat = labels.shape, labels.reshape(-1)
    classes = kernel.shape[1] * (1 if axis is None else lax.axis_size(axis))
    classes = classes if num_classes is None else num_classes
    scaled = features.reshape(-1, features.shape[-1])
    scaled = scaled if isinstance(scale, float | int) and scale == 1 else (scaled * scale).astype(features.dtype)
    plan = Plan(min(chunk_size, kernel.shape[1]), axis, num_classes, label_smoothing > 0)
    others, target, plain = others_and_target(plan, scaled, kernel, bias, flat)
    if margin is not None:
        target = scale * margin(target / scale)
    losses = jax.nn.softplus(others - target)
    if label_smoothing:  # in place of a share of the target's logit, that of the mean logit
        losses = losses + label_smoothing * (target - (plain + target) / classes)
    valid = (flat >= 0) & (flat < classes)
    return jnp.where(valid, losses, jnp.nan).reshape(shape)


@checked
def additive_margin(margin: Number) -> Margin:
    r"""CosFace: the target's cosine becomes :math:`\cos\theta - m`.

    Example:
        >>> print(additive_margin(0.35)(jnp.array([1.0])))
        [0.65]

    References:
        Wang et al., `CosFace <https://arxiv.org/abs/1801.09414>`_, 2018: eq. 4; they take m = 0.35 with a scale of 64.
    """
    return lambda cosine: cosine - margin


@checked
def angular_margin(margin: Number) -> Margin:
    r"""ArcFace: the target's cosine becomes :math:`\cos(\theta + m)`.

    Where :math:`\theta + m > \pi` the cosine would rise again; there it is :math:`\cos\theta - m \sin m`, as in the authors' code.

    Example:
        >>> [round(x, 3) for x in angular_margin(0.5)(jnp.array([1.0, 0.0, -1.0])).tolist()]  # cos(0.5), cos(π/2 + 0.5), -1 - 0.5 sin(0.5)
        [0.877, -0.479, -1.24]

    References:
        Deng et al., `ArcFace <https://arxiv.org/abs/1801.07698>`_, 2018: eq. 3; they take m = 0.5 with a scale of 64.
    """

    def apply(cosine):
        least = jnp.finfo(cosine.dtype).eps  # at a cosine of 1 or -1 the sine has no derivative
        sine = jnp.sqrt(jnp.maximum(1 - cosine**2, least))
        turned = cosine * jnp.cos(margin) - sine * jnp.sin(margin)
        return jnp.where(cosine > -jnp.cos(margin), turned, cosine - margin * jnp.sin(margin)).astype(cosine.dtype)

    return apply


def _check(features, kernel, labels, bias, margin, axis, num_classes) -> None:
    if features.shape[-1] != kernel.shape[0] or features.shape[:-1] != labels.shape:
        raise ValueError(
            f"features {features.shape}, kernel {kernel.shape} and labels {labels.shape} do not go together: features are (B, D), the kernel (D, C), "
            "labels (B,)."
        )
    if bias is not None and bias.shape != kernel.shape[1:]:
        raise ValueError(f"bias has shape {bias.shape}, and kernel {kernel.shape} needs {kernel.shape[1:]}.")
    if margin is not None and bias is not None:
        raise ValueError("margin changes a cosine, which has no bias: leave out bias.")
    if num_classes is not None and axis is None:
        raise ValueError(f"num_classes={num_classes} is for classes shared by devices, with axis. On one device, cut the kernel instead.")
