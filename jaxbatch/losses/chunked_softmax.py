r"""Log-sum-exps of very many logits, a chunk of classes at a time.

The loss of an example with logits z and label y needs of them only the target's logit :math:`t = z_y` and
:math:`r = \log\sum_{j \ne y} e^{z_j}`, the log-sum-exp of the others: it is :math:`\log(1 + e^{r - t})`, which loses no digits where
it is small, and whatever a margin does to t stays outside. So r is summed up chunk by chunk, relative to the largest logit so
far, and the backward pass computes each chunk's logits once more. ``jax.checkpoint`` would do that too, but its gradient of a
slice of the kernel is a whole kernel of zeros for each chunk.

Axes: B examples, D features, C classes of a device.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbatch.machine.platform import compiled_platform


class Plan(NamedTuple):
    """How the classes are gone through, see :func:`jaxbatch.chunked_cross_entropy`."""

    chunk_size: int
    axis: str | None
    num_classes: int | None
    with_sum: bool = False  # whether the sum of the others' logits is wanted too


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def others_and_target(plan, features, kernel, bias, labels):
    """The log-sum-exp of the logits that are not the target's, the target's logit, and None or the sum of the others' logits.

    Each is ``(B,)``; with an axis, of own examples. Labels may lie outside of the classes. Then the target's logit is 0.

    Example:
        >>> others, target, _ = others_and_target(Plan(2, None, None), jnp.eye(2), jnp.ones((2, 3)), None, jnp.array([0, 2]))
        >>> print(others.round(4), target)  # log(e + e)
        [1.6931 1.6931] [1. 1.]
    """
    return _forward(plan, features, kernel, bias, labels)[0]


def _forward(plan: Plan, features, kernel, bias, labels):
    gathered, own_labels, limit = _share(plan, features, kernel, labels)
    size, count = plan.chunk_size, kernel.shape[1] // plan.chunk_size

    def one(state, start, size=size):
        largest, total, plain = state
        logits = _without_targets(_logits(gathered, kernel, bias, start, size), own_labels, limit, start)[0]
        new = jnp.maximum(largest, logits.max(1))
        by = jnp.where(new == -jnp.inf, 0, new)  # no logit yet
        plain = plain + jnp.where(logits == -jnp.inf, 0, logits).sum(1) if plan.with_sum else None
        return new, total * jnp.exp(largest - by) + jnp.exp(logits - by[:, None]).sum(1), plain

    target, here = _targets(gathered, kernel, bias, own_labels)
    zeros = jnp.zeros_like(target)
    state = _over(one, (jnp.full_like(target, -jnp.inf), zeros, zeros if plan.with_sum else None), kernel.shape[1], size, count)
    others = jnp.where(state[0] == -jnp.inf, 0, state[0]) + jnp.log(state[1])
    target = jnp.where(here, target, 0)
    if plan.axis is not None:
        largest = lax.pmax(lax.stop_gradient(others), plan.axis)
        by = jnp.where(largest == -jnp.inf, 0, largest)
        others = by + jnp.log(lax.psum(jnp.exp(others - by), plan.axis))
        target = lax.psum(target, plan.axis)
    plain = state[2] if plan.axis is None or not plan.with_sum else lax.psum(state[2], plan.axis)
    kept = features, kernel, bias, labels, others
    return _own(plan, (others, target, plain), features.shape[0]), kept


def _backward(plan: Plan, kept, cotangents):
    features, kernel, bias, labels, others = kept
    gathered, own_labels, limit = _share(plan, features, kernel, labels)
    gather = lambda one: one if plan.axis is None else lax.all_gather(one, plan.axis, tiled=True)
    of_others, of_target, of_sum = jax.tree.map(gather, cotangents)
    by = jnp.where(others == -jnp.inf, 0, others)
    dtype, size = jnp.result_type(gathered, kernel), plan.chunk_size
    product = functools.partial(jnp.matmul, preferred_element_type=others.dtype)

    def one(state, start, size=size):
        of_features, of_kernel, of_bias = state
        logits, here = _without_targets(_logits(gathered, kernel, bias, start, size), own_labels, limit, start)
        of_logits = of_others[:, None] * jnp.exp(logits - by[:, None])
        if plan.with_sum:
            of_logits = of_logits + jnp.where(logits == -jnp.inf, 0, of_sum[:, None])
        of_logits = jnp.where(here, of_target[:, None], of_logits)
        if bias is not None:
            of_bias = lax.dynamic_update_slice_in_dim(of_bias, of_logits.sum(0).astype(bias.dtype), start, 0)
        of_logits = of_logits.astype(dtype)
        of_features = of_features + product(of_logits, lax.dynamic_slice_in_dim(kernel, start, size, 1).T)
        part = product(gathered.T, of_logits).astype(kernel.dtype)
        return of_features, lax.dynamic_update_slice_in_dim(of_kernel, part, start, 1), of_bias

    start = jnp.zeros_like(gathered, others.dtype), jnp.zeros_like(kernel), None if bias is None else jnp.zeros_like(bias)
    of_features, of_kernel, of_bias = _over(one, start, kernel.shape[1], size, kernel.shape[1] // size)
    if plan.axis is not None:
        of_features = lax.psum_scatter(of_features, plan.axis, tiled=True)
    return of_features.astype(features.dtype), of_kernel, of_bias, None


others_and_target.defvjp(_forward, _backward)


def _over(one, state, classes: int, size: int, count: int):
    """Goes over whole chunks in a compiled loop, and over the rest after it."""
    if count > 1:  # two at a time keep a CPU's cores busy: while one is in an operation of a single core, the other is not
        unroll = 2 if compiled_platform() == "cpu" else 1
        state = lax.scan(lambda state, start: (one(state, start), None), state, jnp.arange(count) * size, unroll=unroll)[0]
    elif count == 1:
        state = one(state, 0)
    rest = classes - count * size
    return one(state, count * size, rest) if rest else state


def _logits(features, kernel, bias, start, size: int):
    wide = jnp.promote_types(jnp.result_type(features, kernel), jnp.float32)
    logits = jnp.matmul(features, lax.dynamic_slice_in_dim(kernel, start, size, 1), preferred_element_type=wide)
    return logits if bias is None else logits + lax.dynamic_slice_in_dim(bias, start, size)[None].astype(wide)


def _without_targets(logits, labels, limit, start):
    """The logits, -inf for targets and for columns that are no class; and where the targets are."""
    column = start + jnp.arange(logits.shape[1])[None]
    here = column == labels[:, None]
    return jnp.where(here if limit is None else here | (column >= limit), -jnp.inf, logits), here


def _targets(features, kernel, bias, labels):
    """The products of examples and their own classes, and which of these are here."""
    here, column = (labels >= 0) & (labels < kernel.shape[1]), jnp.clip(labels, 0, kernel.shape[1] - 1)
    wide = jnp.promote_types(jnp.result_type(features, kernel), jnp.float32)
    target = (features.astype(wide) * kernel[:, column].T.astype(wide)).sum(1)
    return target if bias is None else target + bias[column].astype(wide), here


def _share(plan: Plan, features, kernel, labels):
    """All examples, their labels counted from the first class here, and the number of columns here that are classes."""
    if plan.axis is None:
        return features, labels, None
    first = lax.axis_index(plan.axis) * kernel.shape[1]
    features, labels = (lax.all_gather(one, plan.axis, tiled=True) for one in (features, labels))
    return features, labels - first, None if plan.num_classes is None else plan.num_classes - first


def _own(plan: Plan, results, batch_size: int):
    if plan.axis is None:
        return results
    first = lax.axis_index(plan.axis) * batch_size
    return jax.tree.map(lambda one: lax.dynamic_slice_in_dim(one, first, batch_size), results)
