r"""Split backward: K optimizer updates from one big batch, with one forward pass.

This is not the "split backward" of pipeline parallelism, which computes the gradients with respect to inputs and to
weights at different times. Here the *batch* is split into K groups. The gradients of the groups

.. math:: g_k = \nabla_\theta \frac{K}{B} \sum_{i \in \text{group } k} \ell_i(\theta_0), \qquad k = 1 \dots K

are all taken at the same starting weights :math:`\theta_0` and given to the optimizer one after another.

The result depends on the optimizer:

* SGD with rate :math:`\eta` and no momentum makes exactly one update with rate :math:`K\eta` on the batch's mean gradient,
  :math:`\theta_K = \theta_0 - K\eta\,\bar g`.
* With momentum :math:`\mu` and velocity :math:`v_0`, :math:`\theta_K = \theta_0 - \eta\big[v_0 \sum_{j=1}^K \mu^j +
  \sum_k g_k \frac{1-\mu^{K-k+1}}{1-\mu}\big]`, so that earlier groups have more weight.
* Adam and other normalised optimizers make K updates of about :math:`\eta` each, which is not one rescaled update.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from jaxbatch.gradients.accumulation import mean_gradient
from jaxbatch.gradients.accumulators import NOTHING_MORE, Accumulator, gradient_sum, together
from jaxbatch.gradients.cut import Cut, Share
from jaxbatch.gradients.groups import Loss, LossFn, check_num_groups, check_one_aux, check_params, leading_axis
from jaxbatch.gradients.independence import check_independent_losses
from jaxbatch.gradients.parts import Method, Part, choose_method, fold, vmap_at_a_time
from jaxbatch.gradients.updates import Optimizer, update
from jaxbatch.kinds import checked
from jaxbatch.states import is_known
from jaxbatch.sums import Losses, mean_loss, mean_over_devices, something_counts

Number = float | Float[Array, ""]


@checked
def split_backward(
    loss_fn: LossFn,
    optimizer: Optimizer,
    num_groups: int,
    *,
    has_aux: bool = False,
    microbatch_size: int | None = None,
    method: Method | None = None,
) -> Callable[[PyTree, PyTree, PyTree], tuple]:
    """A compiled step that makes K optimizer updates from one batch, with all gradients at the incoming parameters.

    With :class:`jaxbatch.Weighted` losses the mean of a group is weighted by its own weights.

    It costs as much as one ordinary step, because every example goes forward and backward once. In a loop over groups
    (``method="map"``) a group's gradient is used before the next one is computed, so there are never K gradients in memory.
    (PyTorch's ``loss[group].mean().backward(retain_graph=True)`` goes through the graph of the whole batch K times instead.)

    Args:
        loss_fn: ``(params, batch) -> losses`` of shape ``(B,)``, or ``(losses, aux)`` with ``has_aux``.
        optimizer: any optax optimizer. Its step count goes up by K, so a schedule sees K steps. An optimizer that uses the loss
            gets the mean loss of the update's group.
        num_groups: K, a divisor of the batch size.
        has_aux: whether ``loss_fn`` returns ``(losses, aux)``.
        microbatch_size: within a group, examples worked on at a time, for large groups.
        method: the order of work on the groups, see :func:`jaxbatch.gradients.exact.group_gradients`.

    Returns:
        ``step(params, opt_state, batch) -> (params, opt_state, losses)``, jit-compiled and usable inside ``lax.scan``. The
        ``losses`` of shape ``(B,)``, or :class:`jaxbatch.Weighted` ones, come from the single forward pass, at the incoming
        parameters. With ``has_aux`` there is a fourth result, ``aux`` with a leading axis K.

    Raises:
        ValueError: the step raises it at its first call if the batch is empty, K does not divide it, or ``loss_fn`` does not
            return one loss per example; with groups of one example, also if an example's loss depends on the others.

    Example:
        >>> import optax
        >>> loss_fn = lambda w, x: 0.5 * (x - w) ** 2
        >>> step = split_backward(loss_fn, optax.sgd(0.1), num_groups=2)
        >>> params, opt_state, losses = step(jnp.array(0.0), optax.sgd(0.1).init(0.0), jnp.array([1.0, 3.0]))
        >>> round(float(params), 6)  # one update at rate 0.2: 0 + 0.2 * 2
        0.4

    References:
        For the cost in PyTorch, issues 4952, 9701 and 74604 of pytorch/pytorch.
    """
    check_one_aux(has_aux, microbatch_size)

    loss = Loss(loss_fn, has_aux)

    @jax.jit
    def step(params, opt_state, batch):
        cut = Cut(leading_axis(batch), num_groups, microbatch_size=microbatch_size, method=method)
        (params, opt_state), losses, aux, *_ = update_by_groups(loss, optimizer, (params, opt_state), Share(batch), cut)
        return (params, opt_state, losses, jax.tree.map(lambda leaf: leaf[:, 0], aux)) if has_aux else (params, opt_state, losses)

    return step


def update_by_groups(
    loss: Loss, optimizer: Optimizer, start: tuple[PyTree, PyTree], share: Share, cut: Cut, more: Mapping[str, Accumulator] = NOTHING_MORE
) -> tuple[tuple[PyTree, PyTree], Losses, PyTree, Float[Array, "K"], dict[str, PyTree]]:
    """K updates from the gradients of K groups at the parameters of ``start``. Training steps use this; an ordinary step has K = 1.

    Args:
        loss: in the one form.
        optimizer: see :func:`split_backward`.
        start: the parameters and the optimizer's state before the updates.
        share: the examples; on several devices, this device's share of each group in turn.
        cut: how they go through the step. If it says so, ``more`` is collected from smaller microbatches than others, in the batches in which
            it is wanted.
        more: see :func:`jaxbatch.gradients.accumulation.mean_gradient`; a model's state only for K = 1.

    Returns:
        Parameters and optimizer state after the updates, the losses at the incoming parameters, aux with leading axes of
        groups and microbatches, each group's mean loss, and the totals of ``more`` and of the gradient over all groups.
    """
    params, groups = start[0], cut.num_groups
    examples = share.batch if share.take is None else jax.eval_shape(share.take, share.batch)
    count = leading_axis(examples)
    check_params(params)
    check_num_groups(groups, count)
    if groups == count > 1 and cut.axis is None:
        check_independent_losses(loss, params, examples)
    size = count // groups
    wanted = [one.wanted for one in more.values() if one.wanted is not None]
    if any(other is not wanted[0] for other in wanted[1:]):
        raise ValueError("more: its accumulators want different batches, and a step has one cut for those that are measured.")

    def measure(part):
        gradient_of = lambda microbatch, more: mean_gradient(loss, params, Share(*part, share.take), cut._replace(microbatch_size=microbatch), more)
        if cut.to_measure is None or not wanted:
            losses, gradient, aux, total = gradient_of(cut.microbatch_size, more)
        else:
            measured = lambda: gradient_of(cut.to_measure, more)
            nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(measured)[3])
            plain = lambda: (*gradient_of(cut.microbatch_size, NOTHING_MORE)[:3], nothing)
            losses, gradient, aux, total = lax.cond(wanted[0], measured, plain)
        mean = mean_loss(losses) if cut.axis is None else mean_over_devices(losses, cut.group_size, cut.axis)
        return Part((gradient, mean, something_counts(losses, cut.axis), total if more else {}), losses, (aux, mean))

    def combine(state, group):
        (params, opt_state, total), (gradient, mean, counts, of_group) = state, group
        return *update(optimizer, gradient, opt_state, params, mean, counts), of_group if groups == 1 else collect.add(total, of_group)

    collect = together({"gradient": gradient_sum(params), **more} if more else {})
    method = cut.method or ("unroll" if groups == 1 else choose_method(loss.function, params, examples, size))
    at_a_time = vmap_at_a_time(size) if method == "vmap" else None
    begin = *start, collect.start() if more and groups > 1 else {}
    folded = fold(measure, (share.batch, share.mask), size, method=method, at_a_time=at_a_time, start=begin, combine=combine)
    (params, opt_state, total), (aux, means) = folded.summed, folded.each
    return (params, opt_state), folded.examples, aux, means, total


@checked
def largest_stable_curvature(learning_rate: Number, momentum: float, num_groups: int = 1) -> Number:
    r"""The curvature up to which SGD with split batches is stable on a quadratic loss.

    On :math:`\ell(\theta) = \tfrac12 \lambda \theta^2` one batch of K updates is a linear map of :math:`(\theta, v)`. The pair
    grows with alternating sign if :math:`1 + \mathrm{tr} + \det < 0`, and in circles if :math:`\det > 1`. So the step is
    unstable if the curvature is above the smaller of

    .. math:: \frac{2 (1 + \mu^K)}{\eta\,[W (1 + \mu^K) - \mu s^2]},\qquad
        \frac{1 - \mu^K}{\eta\,[\mu s^2 - \mu^K W]},\qquad
        s = \sum_{j=0}^{K-1} \mu^j,\quad W = \sum_{k=1}^{K} \frac{1 - \mu^{K-k+1}}{1 - \mu}.

    For K = 1 this is the textbook limit :math:`2(1+\mu)/\eta`. Without momentum it is :math:`2/(K\eta)`, the limit of one
    update at K times the rate. With momentum the limit is lower than that of such an update, because the K updates use up the
    velocity within the batch, so that it averages over this batch alone. At K = 10 the limit is 2.4 times lower with
    :math:`\mu = 0.5`, and 14 times lower with :math:`\mu = 0.9`.

    Args:
        learning_rate: :math:`\eta`, of each of the K updates.
        momentum: :math:`\mu`, at least 0 and below 1.
        num_groups: K.

    Raises:
        ValueError: the rate is not above 0, the momentum is outside [0, 1), or K is below 1.

    Example:
        >>> largest_stable_curvature(0.2, 0.5), round(largest_stable_curvature(0.02, 0.5, num_groups=10), 2)
        (15.0, 6.25)

    References:
        For K = 1: Polyak, *Some methods of speeding up the convergence of iteration methods*, 1964.
    """
    velocity = sum(momentum**j for j in range(num_groups))
    weight = sum((1 - momentum ** (k + 1)) / (1 - momentum) for k in range(num_groups))
    decay = momentum**num_groups
    alternating = 2 * (1 + decay) / (learning_rate * (weight * (1 + decay) - momentum * velocity**2))
    gain = momentum * velocity**2 - decay * weight  # 0 for K = 1 and without momentum
    circling = (1 - decay) / (learning_rate * gain) if gain > 1e-12 else math.inf
    return min(alternating, circling) if is_known(learning_rate) else jnp.minimum(alternating, circling)
