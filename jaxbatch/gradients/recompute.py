"""Computes activations again in the backward pass instead of keeping them, so that a step needs less memory and more operations.

``jax.checkpoint`` does this for a function. Around a whole loss it saves nothing, because the backward pass then needs all
activations at once. So ``"segments"`` cuts any loss function, traced into its list of operations, into consecutive segments and
puts ``jax.checkpoint`` around each: only what passes from one segment to the next is kept (Chen et al., `Training Deep Nets
with Sublinear Memory Cost <https://arxiv.org/abs/1604.06174>`_, 2016, algorithm 1). The model need not be changed.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import PyTree

from jaxbatch.gradients.groups import LossFn
from jaxbatch.kinds import checked
from jaxbatch.machine.constants import open_jitted

Keep = Literal["everything", "products", "segments"]
KEEPS: tuple[Keep, ...] = ("everything", "products", "segments")
_PRODUCTS = ("dot_general", "conv_general_dilated")


@checked
def recompute(loss_fn: LossFn, keep: Keep) -> LossFn:
    """A loss function with the same losses and gradients, which keeps fewer activations for the backward pass.

    Args:
        loss_fn: ``(params, batch) -> losses``, or ``(losses, aux)``.
        keep: ``"everything"``: the function itself. ``"products"``: results of matrix products and convolutions are kept; what
            follows from them, such as normalisation and ReLU, is computed again. ``"segments"``: only what passes between √n
            segments of a network with n products is kept, which costs about one more forward pass.

    Raises:
        ValueError: ``keep`` is unknown.

    Example:
        >>> loss_fn = lambda w, x: jnp.sin(jnp.sin(x @ w)) ** 2
        >>> w, x = jnp.ones(3), jnp.ones((2, 3))
        >>> gradient = lambda loss_fn: jax.grad(lambda w: loss_fn(w, x).mean())(w)
        >>> bool(jnp.allclose(gradient(recompute(loss_fn, "segments")), gradient(loss_fn)))
        True
    """
    if keep not in KEEPS:
        raise ValueError(f"keep={keep!r} must be one of {', '.join(map(repr, KEEPS))}.")
    if keep == "everything":
        return loss_fn
    if keep == "products":
        return jax.checkpoint(loss_fn, policy=lambda primitive, *_, **__: primitive.name in _PRODUCTS)
    return lambda params, batch: _in_segments(loss_fn, params, batch)


def _in_segments(loss_fn: LossFn, params: PyTree, batch: PyTree):
    closed, shapes = jax.make_jaxpr(loss_fn, return_shape=True)(params, batch)
    jaxpr, constants = open_jitted(closed)
    leaves = jax.tree.leaves((params, batch))
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *leaves)))
    for number, (start, stop) in enumerate(cuts := _cut(jaxpr)):
        equations = jaxpr.eqns[start:stop]
        later = _uses(jaxpr.eqns[stop:]) | {one for one in jaxpr.outvars if isinstance(one, core.Var)}
        made = {one for equation in equations for one in equation.outvars}
        given = [one for one in known if one in _uses(equations)]
        kept = [one for equation in equations for one in equation.outvars if one in later and one in made]
        names = jaxpr.debug_info.with_unknown_names()  # the segments have other arguments and results
        segment = jaxpr.replace(constvars=[], invars=given, outvars=kept, eqns=equations, debug_info=names)
        run = lambda *values, segment=segment: jax.core.eval_jaxpr(segment, (), *values)
        # The last segment's activations are needed right away.
        run = run if number == len(cuts) - 1 else jax.checkpoint(run)
        known |= dict(zip(kept, run(*(known[one] for one in given))))
    results = [one.val if isinstance(one, core.Literal) else known[one] for one in jaxpr.outvars]
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def _cut(jaxpr) -> list[tuple[int, int]]:
    """The bounds of √n segments of about equal bytes, cut near where the fewest bytes pass."""
    equations = jaxpr.eqns
    count = max(2, math.isqrt(sum(_products(equation) for equation in equations)))
    if len(equations) < 2 * count:
        count = max(1, len(equations) // 2)
    sizes = [sum(_bytes(one) for one in equation.outvars) for equation in equations]
    last_use = {one: number for number, equation in enumerate(equations) for one in _uses([equation])}
    alive, passing = 0, []
    ends: dict[int, int] = {}
    for number, equation in enumerate(equations):
        for one in equation.outvars:
            if last_use.get(one, -1) > number:
                alive += _bytes(one)
                ends[last_use[one]] = ends.get(last_use[one], 0) + _bytes(one)
        alive -= ends.get(number, 0)
        passing.append(alive)
    total, so_far, bounds = sum(sizes), 0, [0]
    for number, size in enumerate(sizes):
        so_far += size
        if len(bounds) < count and so_far >= total * len(bounds) / count:
            window = range(max(bounds[-1] + 1, number - len(sizes) // (4 * count)), number + 1)
            bounds.append(min(window, key=lambda number: passing[number], default=number) + 1)
    bounds = sorted({*bounds, len(equations)})
    return list(zip(bounds, bounds[1:]))


def _products(equation) -> int:
    if equation.primitive.name in _PRODUCTS:
        return 1
    inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda one: isinstance(one, core.Jaxpr | core.ClosedJaxpr))
    jaxprs = [getattr(one, "jaxpr", one) for one in inner if isinstance(one, core.Jaxpr | core.ClosedJaxpr)]
    return sum(_products(one) for jaxpr in jaxprs for one in jaxpr.eqns)


def _uses(equations) -> set:
    return {one for equation in equations for one in equation.invars if isinstance(one, core.Var)}


def _bytes(variable) -> int:
    shape, dtype = variable.aval.shape, variable.aval.dtype
    return math.prod(shape) * getattr(jnp.dtype(dtype) if not jax.dtypes.issubdtype(dtype, jax.dtypes.extended) else None, "itemsize", 8)
