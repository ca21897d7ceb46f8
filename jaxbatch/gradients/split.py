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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, PyTree

from jaxbatch.gradients.accumulation import AuxInTurn, mean_gradient
from jaxbatch.gradients.groups import LossFn, check_loss, check_microbatch_size, check_num_groups, check_one_aux
from jaxbatch.gradients.independence import check_independent_losses
from jaxbatch.gradients.part_norms import BatchNoise, NoiseMonitor, NoiseSums, metric_of, norms_of, statistics_of_parts
from jaxbatch.gradients.parts import Method, Part, Take, choose_method, fold, vmap_at_a_time
from jaxbatch.gradients.updates import Optimizer, update
from jaxbatch.kinds import checked
from jaxbatch.states import is_known
from jaxbatch.sums import Losses, add, mean_loss, mean_over_devices, something_counts, zero_sum

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
    if num_groups < 1:
        raise ValueError(f"num_groups={num_groups} must be at least 1.")
    check_microbatch_size(microbatch_size)
    check_one_aux(has_aux, microbatch_size)

    @jax.jit
    def step(params, opt_state, batch):
        params, opt_state, losses, aux, *_ = update_by_groups(
            loss_fn, optimizer, params, opt_state, batch, num_groups, has_aux=has_aux, microbatch_size=microbatch_size, method=method
        )
        return (params, opt_state, losses, jax.tree.map(lambda leaf: leaf[:, 0], aux)) if has_aux else (params, opt_state, losses)

    return step


def update_by_groups(
    loss_fn: LossFn,
    optimizer: Optimizer,
    params: PyTree,
    opt_state: PyTree,
    batch: PyTree,
    num_groups: int = 1,
    *,
    has_aux: bool = False,
    microbatch_size: int | None = None,
    method: Method | None = None,
    mask: Bool[Array, "B"] | None = None,
    batch_size: int | None = None,
    axis: str | None = None,
    monitor: NoiseMonitor | None = None,
    batches: Int32[Array, ""] | int = 0,
    cut_to_measure: int | None = None,
    take: Take | None = None,
    aux_in_turn: AuxInTurn | None = None,
) -> tuple[PyTree, PyTree, Losses, PyTree, Float[Array, "K"], BatchNoise | None]:
    """K updates from the gradients of K groups at ``params``. Training steps use this; an ordinary step has K = 1.

    Args:
        loss_fn, optimizer, num_groups, has_aux, microbatch_size, method: see :func:`split_backward`.
        params, opt_state: the parameters and the optimizer's state before the updates.
        batch: leaves ``(B, ...)``; on several devices, this device's share of each group in turn.
        mask, batch_size, axis, take, aux_in_turn: see :func:`jaxbatch.gradients.accumulation.mean_gradient`; the last for K = 1.
        monitor: how the noise is measured from the parts of all groups; ``None``: not at all.
        batches: the number of batches before this one, for ``monitor.every``.
        cut_to_measure: a smaller ``microbatch_size`` for the batches that are measured; not with ``has_aux``.

    Returns:
        Parameters and optimizer state after the updates, the losses at the incoming parameters, aux with leading axes of
        groups and microbatches, each group's mean loss, and the batch's noise.
    """
    examples = batch if take is None else jax.eval_shape(take, batch)
    share = check_loss(loss_fn, params, examples, has_aux=has_aux)
    check_num_groups(num_groups, share)
    if num_groups == share > 1 and axis is None:
        check_independent_losses(loss_fn, params, examples, has_aux=has_aux)
    size, group_size = share // num_groups, (batch_size or share) // num_groups
    metric = norms = None
    if monitor is not None:
        metric = metric_of(monitor, params, opt_state, batches)
        norms = norms_of(monitor, metric)
    settings: dict[str, Any] = {"has_aux": has_aux, "batch_size": group_size, "axis": axis, "take": take, "aux_in_turn": aux_in_turn}

    def measure(part):
        gradient_with = lambda size, norms: mean_gradient(loss_fn, params, part[0], mask=part[1], microbatch_size=size, norms=norms, **settings)
        if metric is None or cut_to_measure is None:
            losses, gradient, aux, noise = gradient_with(microbatch_size, norms)
        else:
            measured = lambda: gradient_with(cut_to_measure, norms)
            nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(measured)[3])
            losses, gradient, aux, noise = lax.cond(metric.wanted, measured, lambda: (*gradient_with(microbatch_size, None)[:3], nothing))
        loss = mean_loss(losses) if axis is None else mean_over_devices(losses, group_size, axis)
        spread, summed = (None, None) if noise is None else noise
        return Part((gradient, loss, something_counts(losses, axis), summed), losses, (aux, loss, spread))

    def combine(state, group):
        (params, opt_state, total), (gradient, loss, counts, summed) = state, group
        return *update(optimizer, gradient, opt_state, params, loss, counts), add(total, summed)

    method = method or ("unroll" if num_groups == 1 else choose_method(loss_fn, params, examples, size))
    at_a_time = vmap_at_a_time(size) if method == "vmap" else None
    start = params, opt_state, None if monitor is None else zero_sum(params)
    groups = fold(measure, (batch, mask), size, method=method, at_a_time=at_a_time, start=start, combine=combine)
    (params, opt_state, total), (aux, means, spreads) = groups.summed, groups.each
    noise = None
    if monitor is not None and metric is not None:
        sums = NoiseSums(jax.tree.map(lambda leaf: leaf.sum(0), spreads), total)
        noise = statistics_of_parts(monitor, metric, sums, group_size * num_groups)
    return params, opt_state, groups.examples, aux, means, noise


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
    if is_known(learning_rate) and not learning_rate > 0:
        raise ValueError(f"learning_rate={learning_rate} must be above 0.")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum} must be at least 0 and below 1.")
    if num_groups < 1:
        raise ValueError(f"num_groups={num_groups} must be at least 1.")
    velocity = sum(momentum**j for j in range(num_groups))
    weight = sum((1 - momentum ** (k + 1)) / (1 - momentum) for k in range(num_groups))
    decay = momentum**num_groups
    alternating = 2 * (1 + decay) / (learning_rate * (weight * (1 + decay) - momentum * velocity**2))
    gain = momentum * velocity**2 - decay * weight  # 0 for K = 1 and without momentum
    circling = (1 - decay) / (learning_rate * gain) if gain > 1e-12 else math.inf
    return min(alternating, circling) if is_known(learning_rate) else jnp.minimum(alternating, circling)
