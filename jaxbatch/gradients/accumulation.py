"""The gradient of a batch's mean loss, in one piece or summed over microbatches (parts of a batch) and devices.

Axes: B examples.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from jaxbatch.gradients.aux_means import mean_aux
from jaxbatch.gradients.groups import LossFn, check_loss, check_microbatch_size, has_weights, leading_axis, losses_and_aux
from jaxbatch.gradients.part_norms import NoiseSums, Norms
from jaxbatch.gradients.parts import Part, Take, fold
from jaxbatch.hints import call_function
from jaxbatch.kinds import checked
from jaxbatch.layers import loops_are_slow, own_examples
from jaxbatch.machine.compiling import compile_ahead
from jaxbatch.part_lengths import part_size, part_slices
from jaxbatch.states import difference
from jaxbatch.sums import Losses, add, divisor, mean_loss, mean_of_sum, or_one, totals, weight_of, widen, zero_sum

AuxInTurn = tuple[Callable[[PyTree, PyTree], PyTree], PyTree]


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
        >>> loss_fn = lambda w, x: 0.5 * (x - w) ** 2
        >>> accumulated_gradient(loss_fn, jnp.array(0.0), jnp.array([1.0, 3.0, 5.0]), 2).tolist()
        -3.0
    """
    batch_size = check_loss(loss_fn, params, batch)
    check_microbatch_size(microbatch_size)
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, batch)))
    if traced or not loops_are_slow(loss_fn, params, batch):
        return mean_gradient(loss_fn, params, batch, microbatch_size=microbatch_size)[1]
    weight = jnp.zeros(()) if has_weights(loss_fn, params, batch) else None
    total, size = (zero_sum(params), weight), part_size(batch_size, microbatch_size)

    def add_part(total, params, part):
        gradient, losses, _ = summed_gradient(loss_fn, params, part)
        return add(total, (gradient, weight_of(losses)))

    programs = {}
    for own in part_slices(batch_size, size):
        part = jax.tree.map(lambda leaf: leaf[own], batch)
        length = leading_axis(part)
        if length not in programs:
            # Traced at every call, because by now another function may have the same hash.
            programs[length] = compile_ahead(jax.jit(add_part, donate_argnums=0), total, params, part)
        total = programs[length](total, params, part)
    gradient, weight = total
    return mean_of_sum(gradient, batch_size if weight is None else or_one(weight), params)


def mean_gradient(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    *,
    has_aux: bool = False,
    microbatch_size: int | None = None,
    mask: Bool[Array, "B"] | None = None,
    batch_size: int | None = None,
    axis: str | None = None,
    norms: Norms | None = None,
    take: Take | None = None,
    aux_in_turn: AuxInTurn | None = None,
) -> tuple[Losses, PyTree, PyTree, NoiseSums | None]:
    """Losses, the gradient of their mean, and aux. Ordinary training steps use this.

    Args:
        loss_fn: ``(params, batch) -> losses``, or ``(losses, aux)`` with ``has_aux``.
        params: pytree of floating-point arrays.
        batch: pytree with leading axis B; on several devices, the share of this device.
        has_aux: whether ``loss_fn`` returns ``(losses, aux)``.
        microbatch_size: the most examples worked on at a time; ``None``: all.
        mask: False for fillers, which fill up a share and do not count.
        batch_size: the number of examples in all shares together; ``None``: B.
        axis: the name of the axis of devices over which to sum.
        norms: measures each part's gradient, see :func:`jaxbatch.gradients.part_norms.norms_of`.
        take: makes the examples of a part from that part of ``batch``, which may then be indices, so that no more examples than
            those of a part are in memory; ``None``: ``batch`` holds the examples.
        aux_in_turn: ``(update, state)``; then aux is the state after ``update(state, aux)`` for each microbatch in turn, so that the
            aux of all are never kept. Not with ``axis``.

    Returns:
        ``(losses, gradient, aux, noise)``. The losses are those of the share, and 0 where ``mask`` is False, weights too. aux has a leading
        axis of microbatches. Its leaves must have the same shapes in microbatches that are not equally large, as moments do. The
        noise is that of all parts, on all devices; None without ``norms``.

    Example:
        >>> loss_fn = lambda w, x: 0.5 * (x - w) ** 2
        >>> losses, gradient, *_ = mean_gradient(loss_fn, jnp.array(0.0), jnp.array([1.0, 3.0]))
        >>> losses.tolist(), float(gradient)
        ([0.5, 4.5], -2.0)
    """
    share = leading_axis(batch)
    noise, take = None, take or (lambda part: part)
    size = part_size(share, microbatch_size)
    if size == share and mask is None and axis is None:
        examples = take(batch)

        def mean(p):
            losses, aux = losses_and_aux(loss_fn, p, examples, has_aux)
            return mean_loss(losses), (losses, aux)

        (_, (losses, aux)), gradient = jax.value_and_grad(mean, has_aux=True)(params)
        if norms is not None:
            of_sum = jax.tree.map(lambda leaf: leaf * divisor(losses, share), widen(gradient))
            noise = NoiseSums(norms(of_sum, share, weight_of(losses)), of_sum)
        aux = jax.tree.map(lambda leaf: leaf[None], aux)
        return losses, gradient, update_in_turn(*aux_in_turn, aux) if aux_in_turn else aux, noise
    measure = lambda part: summed_gradient(loss_fn, params, take(part[0]), mask=part[1], has_aux=has_aux, norms=norms)
    if aux_in_turn is None:
        gradient, losses, (aux, own, spreads) = fold(measure, (batch, mask), size, start=zero_sum(params))
    else:
        (gradient, aux), losses, (own, spreads) = _fold_aux(measure, (batch, mask), size, zero_sum(params), *aux_in_turn)
    if axis is not None:
        gradient, aux = lax.psum(gradient, axis), mean_aux(axis, aux, own)
    if norms is not None:  # not of the mean: XLA would not fuse a division that has two users, which changes bits of the update
        spread = jax.tree.map(lambda leaf: leaf.sum(0), spreads)
        noise = NoiseSums(spread if axis is None else lax.psum(spread, axis), gradient)
    return losses, mean_of_sum(gradient, divisor(losses, batch_size or share, axis), params), aux, noise


def _fold_aux(measure: Callable[[PyTree], Part], batch: PyTree, size: int, start: PyTree, update: Callable, state: PyTree) -> Part:
    """:func:`fold` of parts with aux, whose sum is a pair of the gradient and the state after every aux in turn."""

    def with_aux(part):
        gradient, losses, (aux, *others) = measure(part)
        return Part((gradient, aux), losses, tuple(others))

    def combine(total, part):
        return add(total[0], part[0]), update_in_turn(update, total[1], jax.tree.map(lambda leaf: leaf[None], part[1]))

    return fold(with_aux, batch, size, start=(start, state), combine=combine)


def update_in_turn(update_model_state: Callable[[PyTree, PyTree], PyTree], model_state: PyTree, aux: PyTree) -> PyTree:
    """Updates the model's state with several aux, one after another; they are stacked along the leading axis.

    Example:
        >>> update_in_turn(lambda old, new: 10 * old + new, jnp.array(1), jnp.array([2, 3])).item()
        123
    """
    if not jax.tree.leaves(aux):
        raise ValueError("update_model_state needs the aux that loss_fn returns, but it holds no array: return in it what the state is made of.")
    return lax.scan(lambda old, one: (next_model_state(update_model_state, old, one), None), model_state, aux)[0]


def next_model_state(update_model_state: Callable[[PyTree, PyTree], PyTree], model_state: PyTree, aux: PyTree) -> PyTree:
    """``update_model_state(model_state, aux)``; one that takes other arguments, or returns another form of state, raises an error that says so."""
    state = call_function("update_model_state", update_model_state, model_state, aux, gets="the model's state and the aux of loss_fn")
    change = difference(state, model_state)
    if change is not None:
        raise ValueError(f"update_model_state must return a state of the form that it got, and what it returned {change}.")
    return state


def summed_gradient(
    loss_fn: LossFn,
    params: PyTree,
    part: PyTree,
    *,
    mask: Bool[Array, "m"] | None = None,
    has_aux: bool = False,
    norms: Norms | None = None,
) -> Part:
    """The gradient of a part's summed loss, its losses, and ``(aux, number of examples that count, spread)``."""

    def loss_sum(p):
        with own_examples(mask):
            losses, aux = losses_and_aux(loss_fn, p, part, has_aux)
        # Fillers repeat real examples, so that no zero meets a value that is not finite.
        losses = losses if mask is None else jax.tree.map(lambda leaf: jnp.where(mask, leaf, 0), losses)
        return widen(totals(losses)).sum(), (losses, aux)

    total, pull_back, (losses, aux) = jax.vjp(loss_sum, params, has_aux=True)
    gradient = _gradient_of_sum(total, pull_back, losses, params)
    own = None if mask is None else mask.sum(dtype=jnp.int32)
    spread = None if norms is None else norms(gradient, totals(losses).size if own is None else own, weight_of(losses))
    return Part(widen(gradient), losses, (aux, own, spread))


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
