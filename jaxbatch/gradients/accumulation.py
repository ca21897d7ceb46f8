"""The gradient of a batch's mean loss, in one piece or summed over microbatches (parts of a batch) and devices.

Axes: B examples.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Float, PyTree

from jaxbatch.gradients.accumulators import NOTHING_MORE, Accumulator, Measured, gradient_sum, measure_part, together
from jaxbatch.gradients.aux_means import mean_aux
from jaxbatch.gradients.cut import Cut, Share
from jaxbatch.gradients.groups import Loss, LossFn, check_loss, leading_axis
from jaxbatch.gradients.parts import Part, fold
from jaxbatch.kinds import checked
from jaxbatch.layers import loops_are_slow
from jaxbatch.part_lengths import part_size
from jaxbatch.sums import Losses, divisor, mean_loss, mean_of_sum, widen, zero_sum


@checked
def accumulated_gradient(loss_fn: LossFn, params: PyTree, batch: PyTree, microbatch_size: int) -> PyTree[Float[Array, "..."]]:
    r"""The gradient of the batch's mean loss, summed over microbatches, so that it needs the memory of one microbatch.

    The sum is kept in float32 at least and cast to the parameters' types at the end. It equals ``jax.grad`` of the mean loss
    up to the order of summation. A microbatch counts by its number of examples, and one of :class:`jaxbatch.Weighted` losses by its
    weight. It is not looked whether the loss of an example depends on the others, because parts may be meant, as in ghost batch
    normalisation; :func:`jaxbatch.coupled_gradient` is for such losses. On CPU a model with
    XLA's convolutions, which are slow in compiled loops, runs in a Python loop over a compiled accumulation; inside ``jit``
    only the compiled loop is possible.

    Args:
        loss_fn: ``(params, batch) -> losses``.
        params: pytree of floating-point arrays.
        batch: pytree with leading axis B.
        microbatch_size: the most examples worked on at a time. It need not divide B, but a divisor of B that is close below
            it is used instead; without one, parts are as equal as whole examples allow.

    Raises:
        ValueError: as :func:`per_example_gradients`.

    Example:
        >>> import jax.numpy as jnp
        >>> loss_fn = lambda w, x: 0.5 * (x - w) ** 2
        >>> accumulated_gradient(loss_fn, jnp.array(0.0), jnp.array([1.0, 3.0, 5.0]), 2).tolist()
        -3.0
    """
    loss, batch_size = check_loss(loss_fn, params, batch)
    cut = Cut(batch_size, microbatch_size=microbatch_size)
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, batch)))
    if traced or not loops_are_slow(loss_fn, params, batch):
        return mean_gradient(loss, params, Share(batch), cut)[1]

    def measure(part):
        measured = measure_part(loss, params, part)
        return Part(measured.gradient, measured.losses)

    total, losses, _ = fold(measure, batch, cut.at_a_time, in_python=True, start=zero_sum(params))
    return mean_of_sum(total, divisor(losses, batch_size), params)


def mean_gradient(
    loss: Loss, params: PyTree, share: Share, cut: Cut, more: Mapping[str, Accumulator] = NOTHING_MORE
) -> tuple[Losses, PyTree, PyTree, dict[str, PyTree]]:
    """Losses, the gradient of their mean, and aux, of a group. Ordinary training steps use this.

    Args:
        loss: in the one form.
        params: pytree of floating-point arrays.
        share: the examples of the group; on several devices, those of this device.
        cut: how many examples a group has on all devices, the microbatch and the axis of devices are used.
        more: what else is collected from the parts, by name. With ``"model_state"``, which takes every aux in turn, none is kept.

    Returns:
        ``(losses, gradient, aux, totals)``. The losses are those of the share, and 0 for fillers, weights too. aux has a leading axis of
        microbatches. Its leaves must have the same shapes in microbatches that are not equally large, as moments do. The totals are those of
        ``more``, finished, and ``"gradient"``, of the summed loss, on all devices.

    Example:
        >>> import jax.numpy as jnp
        >>> loss = Loss(lambda w, x: 0.5 * (x - w) ** 2)
        >>> losses, gradient, *_ = mean_gradient(loss, jnp.array(0.0), Share(jnp.array([1.0, 3.0])), Cut(2))
        >>> losses.tolist(), float(gradient)
        ([0.5, 4.5], -2.0)
    """
    batch, mask, take = share
    count, collect = leading_axis(batch), together({"gradient": gradient_sum(params), **more})
    size, take = part_size(count, cut.microbatch_size), take or (lambda part: part)
    if size == count and mask is None and cut.axis is None:
        examples = take(batch)

        def mean(p):
            losses, aux = loss(p, examples)
            return mean_loss(losses), (losses, aux)

        (_, (losses, aux)), gradient = jax.value_and_grad(mean, has_aux=True)(params)
        total = {}
        if more:
            of_sum = jax.tree.map(lambda leaf: leaf * divisor(losses, count), widen(gradient))
            total = _finished(collect, collect.add(collect.start(), collect.of_part(Measured(of_sum, losses, aux))), divisor(losses, count))[1]
        return losses, gradient, jax.tree.map(lambda leaf: leaf[None], aux), total

    def measure(part):
        measured = measure_part(loss, params, take(part[0]), part[1])
        kept = () if "model_state" in more else (measured.aux, measured.number)
        return Part(collect.of_part(measured), measured.losses, kept)

    total, losses, kept = fold(measure, (batch, mask), size, start=collect.start(), combine=collect.add)
    aux = kept[0] if kept else None
    if cut.axis is not None:
        total, aux = collect.over_devices(cut.axis, total), mean_aux(cut.axis, *kept)
    gradient, total = _finished(collect, total, divisor(losses, cut.group_size, cut.axis))
    return losses, gradient, aux, total


def _finished(collect: Accumulator, total: dict[str, PyTree], whole: Any) -> tuple[PyTree, dict[str, PyTree]]:
    """The mean gradient, and the finished totals with the gradient's sum.

    The noise takes the sum, not the mean: XLA would not fuse a division that has two users, which changes bits of the update.
    """
    done = collect.finish(total, whole)
    return done["gradient"], {**done, "gradient": total["gradient"]}
