r"""The gradient of a loss that couples all examples of a batch, such as a contrastive one, in the memory of a microbatch.

Every other gradient here is a sum over examples, so that a batch can be cut. A contrastive loss is not: each example is compared
with all others. But it sees examples only through their representations, a few hundred numbers each. So (*GradCache*)

1. representations :math:`r_i = f(\theta, x_i)` are computed microbatch by microbatch, and activations are forgotten;
2. the gradient of the loss with respect to all representations is taken, :math:`c_i = \partial L / \partial r_i`;
3. each microbatch is run again, now with activations, and :math:`\sum_i (\partial r_i / \partial \theta)^\top c_i` summed up.

This is the chain rule, so the gradient is the whole batch's, for one more forward pass: 4/3 of the work where a backward pass
costs two forward passes.

Axes: B examples, M examples of a microbatch.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from jaxbatch.gradients.cut import Cut
from jaxbatch.gradients.groups import check_microbatch_size, check_params, leading_axis, vary_along
from jaxbatch.gradients.independence import company_matters
from jaxbatch.gradients.parts import Part, fold
from jaxbatch.kinds import checked
from jaxbatch.layers import loops_are_slow
from jaxbatch.machine.compiling import compile_ahead
from jaxbatch.sums import Losses, Weighted, add, cast_like, counted, mean_loss, widen, zero_sum

Encode = Callable[[PyTree, PyTree], PyTree]


class CoupledGradient(NamedTuple):
    """What the loss function returned, and the gradient of its mean, a pytree like the parameters."""

    losses: Losses
    gradient: PyTree


@checked
def coupled_gradient(
    loss_fn: Callable[[PyTree, PyTree], Losses],
    encode: Encode | tuple[Encode, ...],
    params: PyTree,
    batch: PyTree,
    microbatch_size: int | tuple[int, ...],
    *,
    axis: str | None = None,
) -> CoupledGradient:
    r"""Losses that couple the whole batch through its representations, and the gradient of their mean, in the memory of a microbatch.

    The gradient is that of ``loss_fn(params, encode(params, batch))`` in one piece, up to the order of summation, for every
    ``microbatch_size``. Sums are kept in float32 at least. Put keys for dropout into the batch, one per example, so that both
    passes over a microbatch drop the same.

    On CPU an encoder with XLA's convolutions, which are slow in compiled loops, runs in a Python loop over compiled microbatches;
    inside ``jit`` only the compiled loop is possible.

    Args:
        loss_fn: ``(params, representations) -> losses``, one per example, :class:`jaxbatch.Weighted`, or a single number. It sees
            the whole batch. What it takes from ``params`` itself, such as a learned temperature, gets its gradient too.
        encode: ``(params, batch) -> representations``, any pytree with leading axis B. What the loss needs beside them, such as
            labels or weights, ``encode`` passes on from the batch: ``lambda p, b: (apply(p, b["x"]), b["label"])``. Two encoders
            are one function of pairs, or, with microbatches of their own, a tuple; then ``params`` and ``batch`` are tuples of as
            many, and ``loss_fn`` gets tuples. They may have different numbers of examples.
        params: pytree of floating-point arrays.
        batch: pytree with leading axis B.
        microbatch_size: the most examples encoded at a time, for each encoder if it is a tuple. It need not divide B, but a
            divisor of B that is close below it is used instead.
        axis: in ``shard_map`` or ``pmap``, the name of the axis of devices. ``batch`` is then a device's share, all of the same
            size; representations are gathered, so that examples are compared with those of all devices. The gradient comes back summed,
            the same on all devices; do not sum it again. Every device computes the whole loss, which is little beside an encoder.

    Returns:
        ``(losses, gradient)``; with ``axis``, the losses are those of the share, a device's part of as many as ``loss_fn`` returns, or the
        single number.

    Raises:
        ValueError: the representation of an example changes with the others in its microbatch, as through batch normalisation;
            ``encode`` does not return one representation per example; ``loss_fn`` returns something else than losses.

    Example:
        >>> encode = lambda w, x: x @ w
        >>> variance = lambda w, z: (z - z.mean(0)) ** 2  # each example is compared with the mean of all
        >>> w, x = jnp.array([1.0, 0.0]), jnp.array([[1.0, 0.0], [2.0, 1.0], [6.0, 2.0]])
        >>> losses, gradient = coupled_gradient(variance, encode, w, x, microbatch_size=2)
        >>> losses.tolist(), [round(x, 3) for x in gradient.tolist()]
        ([4.0, 1.0, 9.0], [9.333, 3.333])

    References:
        Gao et al., `Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup
        <https://arxiv.org/abs/2101.06983>`_, 2021: section 3.
    """
    towers, several = _towers(encode, params, batch, microbatch_size), isinstance(encode, tuple)
    for number, tower in enumerate(towers):
        _check(tower, f"[{number}]" if several else "")
    together = lambda parts: tuple(parts) if several else parts[0]
    if axis is not None:  # as values of this device, or JAX would sum over devices what is summed here
        towers = [tower._replace(params=jax.tree.map(lambda leaf: vary_along(leaf, {axis}), tower.params)) for tower in towers]
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, batch)))
    in_python = not traced and any(loops_are_slow(tower.encode, tower.params, tower.batch) for tower in towers)
    in_turn: dict[str, Any] = {"in_python": in_python, "at_a_time": 1}  # so that there are the activations of one microbatch

    encoded = [fold(functools.partial(_encoded, tower), tower.batch, tower.cut.at_a_time, start=(), **in_turn).examples for tower in towers]
    whole = encoded if axis is None else jax.tree.map(lambda leaf: lax.all_gather(leaf, axis, tiled=True), encoded)

    def of_loss(params, whole):
        return _loss_gradient(loss_fn, together, params, whole)

    run = compile_ahead(jax.jit(of_loss), [tower.params for tower in towers], whole) if in_python else of_loss
    losses, (direct, cotangents) = run([tower.params for tower in towers], whole)
    if axis is not None:
        cotangents = [_own(one, axis) for one in cotangents]
        losses = lax.pmean(losses, axis) if jnp.ndim(jax.tree.leaves(losses)[0]) == 0 else _own(losses, axis)
    gradients = []
    for tower, part, own in zip(towers, direct, cotangents, strict=True):
        # Zeros made of the parameters, because in shard_map they know which devices they differ on.
        summed = fold(functools.partial(_pulled_back, tower), (tower.batch, own), tower.cut.at_a_time, start=zero_sum(tower.params), **in_turn).summed
        if axis is not None:
            summed, part = lax.psum(summed, axis), lax.pmean(part, axis)
        gradients.append(cast_like(add(summed, part), tower.params))
    return CoupledGradient(losses, together(gradients))


class _Tower(NamedTuple):
    encode: Encode
    params: PyTree
    batch: PyTree
    cut: Cut


def _towers(encode, params, batch, microbatch_size) -> list[_Tower]:
    if not isinstance(encode, tuple):
        check_microbatch_size(microbatch_size)
        return [_Tower(encode, params, batch, Cut(leading_axis(batch), microbatch_size=microbatch_size))]
    for name, given in (("params", params), ("batch", batch)):
        if not isinstance(given, tuple) or len(given) != len(encode):
            raise ValueError(f"encode is a tuple of {len(encode)}, so {name} must be a tuple of {len(encode)} too, one for each encoder.")
    sizes = microbatch_size if isinstance(microbatch_size, tuple) else (microbatch_size,) * len(encode)
    if len(sizes) != len(encode):
        raise ValueError(f"microbatch_size={microbatch_size} must be one number, or one for each of {len(encode)} encoders.")
    return [tower for each in zip(encode, params, batch, sizes, strict=True) for tower in _towers(*each)]


def _check(tower: _Tower, which: str) -> None:
    check_params(tower.params)
    batch_size = leading_axis(tower.batch)
    shapes = jax.eval_shape(tower.encode, tower.params, tower.batch)
    returned = leading_axis(shapes, f"what encode{which} returns")
    if returned != batch_size:
        raise ValueError(f"encode{which} must return one representation per example, {batch_size}, but returned {returned}.")
    if not any(map(_has_gradient, jax.tree.leaves(shapes))):
        raise ValueError(f"encode{which} returned no floating-point array, so there is nothing that a gradient could go through.")
    if company_matters(tower.encode, tower.params, tower.batch):
        raise ValueError(
            f"encode{which}: the representation of an example changes with the others in its microbatch, as through batch normalisation, so "
            "it would depend on how the batch is cut. Take a model without such layers (layer or group normalisation), or one microbatch "
            "with jax.grad."
        )


def _has_gradient(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _floating(tree: PyTree) -> list:
    """The leaves that a gradient can go through; labels that ``encode`` passes on are left out."""
    return [leaf for leaf in jax.tree.leaves(tree) if _has_gradient(leaf)]


def _encoded(tower: _Tower, part: PyTree) -> Part:
    return Part(examples=tower.encode(tower.params, part))


def _pulled_back(tower: _Tower, part: PyTree) -> Part:
    inputs, cotangents = part
    _, pull_back = jax.vjp(lambda p: _floating(tower.encode(p, inputs)), tower.params)
    return Part(widen(pull_back(cotangents)[0]))


def _loss_gradient(loss_fn, together, params: list, whole: list):
    """The losses; the gradients of their mean with respect to the parameters of each encoder, and to its representations."""

    def mean(params, floating):
        given = []
        for tree, own in zip(whole, floating, strict=True):
            leaves, structure = jax.tree.flatten(tree)
            left = iter(own)
            given.append(jax.tree.unflatten(structure, [next(left) if _has_gradient(leaf) else leaf for leaf in leaves]))
        losses = loss_fn(together(params), together(given))
        if isinstance(losses, Weighted):
            losses = counted(losses)
        for leaf in jax.tree.leaves(losses):
            if jnp.ndim(leaf) > 1 or not _has_gradient(leaf):
                raise ValueError(
                    "loss_fn must return floating-point losses, one per example, or a single one, but returned "
                    f"{leaf.dtype} of shape {jnp.shape(leaf)}."
                )
        return mean_loss(losses), losses

    (_, losses), gradients = jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)(params, [_floating(tree) for tree in whole])
    return losses, gradients


def _own(tree: PyTree, axis: str) -> PyTree:
    """This device's part of leaves that all devices have: of their lengths, which two encoders need not share, the N-th part."""
    count = lax.axis_size(axis)

    def own(leaf):
        size, rest = divmod(leaf.shape[0], count)
        if rest:
            raise ValueError(
                f"loss_fn returned {leaf.shape[0]} losses on {count} devices, of which each would get a part: return one for each example of an "
                "encoder, of all devices, or a single number."
            )
        return lax.dynamic_slice_in_dim(leaf, lax.axis_index(axis) * size, size)

    return jax.tree.map(own, tree)
