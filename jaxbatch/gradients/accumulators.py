"""What is collected from the parts of a batch: each quantity is an accumulator, made here or beside its formulas. What a record shows of it
is decided in :mod:`jaxbatch.gradients.part_norms`, which ends a measured batch, and in :mod:`jaxbatch.training.monitor`.

Parts are summed by :func:`jaxbatch.gradients.parts.fold` in a program, and by the pieces of a step in a Python loop; both call these
functions, and devices are summed by them too.

Axes: m examples of a part.
"""

import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, PyTree

from jaxbatch.gradients.aux_means import mean_aux
from jaxbatch.gradients.groups import Loss
from jaxbatch.hints import call_function
from jaxbatch.layers import own_examples
from jaxbatch.states import difference
from jaxbatch.sums import Losses, Weighted, add, mean_of_sum, sum_losses, totals, weight_of, widen, zero_sum


class Measured(NamedTuple):
    """A part after its backward pass."""

    gradient: PyTree  # of the summed loss, in float32 at least
    losses: Losses  # (m,), 0 for fillers, weights too
    aux: PyTree
    number: Int32[Array, ""] | None = None  # of the examples that count; None: all


class Accumulator(NamedTuple):
    """A quantity that parts add up to."""

    start: Callable[[], PyTree]  # the total before the first part
    of_part: Callable[[Measured], PyTree]
    add: Callable[[PyTree, PyTree], PyTree] = add  # (total, of a part) -> total
    finish: Callable[[PyTree, Any], PyTree] = lambda total, whole: total  # (total, the number or weight of all examples) -> result
    over_devices: Callable[[str, PyTree], PyTree] = lambda axis, total: lax.psum(total, axis)
    wanted: Bool[Array, ""] | None = None  # in this batch; None: in every one


NOTHING_MORE: Mapping[str, Accumulator] = types.MappingProxyType({})


def together(several: Mapping[str, Accumulator]) -> Accumulator:
    """Several quantities as one, whose totals are a dict.

    Example:
        >>> both = together({"gradient": gradient_sum(jnp.zeros(())), "loss": loss_sum(False)})
        >>> part = Measured(jnp.array(6.0), jnp.array([1.0, 3.0]), None)
        >>> {name: float(mean) for name, mean in both.finish(both.add(both.start(), both.of_part(part)), 2).items()}
        {'gradient': 3.0, 'loss': 2.0}
    """
    each = lambda function: {name: function(name, one) for name, one in several.items()}
    return Accumulator(
        lambda: each(lambda name, one: one.start()),
        lambda part: each(lambda name, one: one.of_part(part)),
        lambda total, part: each(lambda name, one: one.add(total[name], part[name])),
        lambda total, whole: each(lambda name, one: one.finish(total[name], whole)),
        lambda axis, total: each(lambda name, one: one.over_devices(axis, total[name])),
    )


def gradient_sum(params: PyTree) -> Accumulator:
    """The gradient of the summed loss, which ends as that of the mean, in the types of the parameters."""
    return Accumulator(lambda: zero_sum(params), lambda part: part.gradient, finish=lambda total, whole: mean_of_sum(total, whole, params))


def loss_sum(weighted: bool) -> Accumulator:
    """The summed loss, which ends as the mean."""
    start = lambda: Weighted(jnp.zeros(()), jnp.zeros(())) if weighted else jnp.zeros(())
    return Accumulator(start, lambda part: sum_losses(part.losses), finish=lambda total, whole: totals(total) / whole)


def state_in_turn(update_model_state: Callable[[PyTree, PyTree], PyTree], model_state: PyTree) -> Accumulator:
    """The model's state after the aux of each part in turn, so that the aux of all are never kept."""
    over_devices = lambda axis, part: (mean_aux(axis, *part), None)
    advance = lambda state, part: next_model_state(update_model_state, state, part[0])
    return Accumulator(lambda: model_state, lambda part: (part.aux, part.number), advance, over_devices=over_devices)


def next_model_state(update_model_state: Callable[[PyTree, PyTree], PyTree], model_state: PyTree, aux: PyTree) -> PyTree:
    """``update_model_state(model_state, aux)``; one that takes other arguments, or returns another form of state, raises an error that says so."""
    _check_aux(aux)
    state = call_function("update_model_state", update_model_state, model_state, aux, gets="the model's state and the aux of loss_fn")
    change = difference(state, model_state)
    if change is not None:
        raise ValueError(f"update_model_state must return a state of the form that it got, and what it returned {change}.")
    return state


def _check_aux(aux: PyTree) -> None:
    if not jax.tree.leaves(aux):
        raise ValueError("update_model_state needs the aux that loss_fn returns, but it holds no array: return in it what the state is made of.")


def update_in_turn(update_model_state: Callable[[PyTree, PyTree], PyTree], model_state: PyTree, aux: PyTree) -> PyTree:
    """Updates the model's state with several aux, one after another; they are stacked along the leading axis.

    Example:
        >>> update_in_turn(lambda old, new: 10 * old + new, jnp.array(1), jnp.array([2, 3])).item()
        123
    """
    _check_aux(aux)
    return lax.scan(lambda old, one: (next_model_state(update_model_state, old, one), None), model_state, aux)[0]


def measure_part(loss: Loss, params: PyTree, part: PyTree, mask: Bool[Array, "m"] | None = None) -> Measured:
    """The gradient of a part's summed loss, and what else is known after it; ``mask`` is False for fillers."""

    def summed(p):
        with own_examples(mask):
            losses, aux = loss(p, part)
        # Fillers repeat real examples, so that no zero meets a value that is not finite.
        losses = losses if mask is None else jax.tree.map(lambda leaf: jnp.where(mask, leaf, 0), losses)
        return widen(totals(losses)).sum(), (losses, aux)

    total, pull_back, (losses, aux) = jax.vjp(summed, params, has_aux=True)
    gradient = _gradient_of_sum(total, pull_back, losses, params)
    return Measured(widen(gradient), losses, aux, None if mask is None else mask.sum(dtype=jnp.int32))


def _gradient_of_sum(total: Float[Array, ""], pull_back: Callable[[Array], tuple[PyTree]], losses: Losses, params: PyTree) -> PyTree:
    """The gradient of the sum of ``losses``; where float16 takes part, of about their mean, which then is multiplied in float32.

    The gradient of a mean of thousands fits into float16, whose largest number is 65,504, and that of their sum does not. The factor
    is a power of two, so that nothing is rounded.
    """
    one = jnp.ones_like(total)
    taking_part = jax.tree.leaves((pull_back, losses, params))  # what the backward pass keeps of the forward pass is in pull_back
    if not any(getattr(leaf, "dtype", None) == jnp.float16 for leaf in taking_part):
        return pull_back(one)[0]
    weight = weight_of(losses)
    exponent = jnp.frexp(jnp.asarray(totals(losses).size, one.dtype) if weight is None else weight)[1]
    exponent = jnp.clip(exponent, 0, 14)  # a smaller factor has fewer digits in float16
    return jax.tree.map(lambda leaf: jnp.ldexp(leaf, exponent), widen(pull_back(jnp.ldexp(one, -exponent))[0]))
