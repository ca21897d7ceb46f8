r"""Measures the noise of a batch's gradient, and the batch size at which noise and signal are equal.

The gradient of one example is :math:`g_i = G + \epsilon_i` with the full gradient G and noise of covariance
:math:`\Sigma`. The mean over B independent examples has the squared error :math:`\mathrm{tr}(\Sigma) / B`. So two numbers
describe the effect of the batch size: ``signal`` :math:`= |G|^2` and ``trace`` :math:`= \mathrm{tr}\,\Sigma`. Both are
estimated without bias from the gradients of a batch's groups. The ratio ``trace`` / ``signal`` is the *gradient noise scale*:
batches far below it are mostly noise, and batches far above it waste examples.

Axes: B examples, K groups, T steps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxbatch.gradients.accumulation import mean_gradient
from jaxbatch.gradients.cut import Cut, Share
from jaxbatch.gradients.deviations import no_deviations, statistics_of, with_parts
from jaxbatch.gradients.groups import LossFn, check_loss, check_num_groups, of_each_device
from jaxbatch.gradients.independence import check_independent_losses
from jaxbatch.gradients.norms import direction, norm
from jaxbatch.gradients.parts import CPU_VMAP, Method, Part, choose_method, fold
from jaxbatch.intervals import Interval, ratio_of_means
from jaxbatch.kinds import checked
from jaxbatch.sums import inner_product, weight_of, widen


class GradientStatistics(NamedTuple):
    r"""Unbiased estimates from one batch, or from T batches, stacked; an estimate may be negative by chance."""

    signal: Float[Array, "*T"]  # |G|^2
    trace: Float[Array, "*T"]  # tr Sigma, of one example


@checked
def gradient_statistics(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    *,
    num_groups: int | None = None,
    microbatch_size: int | None = None,
    method: Method | None = None,
) -> GradientStatistics:
    r"""Signal and noise of the gradient at ``params``, from the gradients of a batch's groups.

    With K groups of :math:`m = B / K` examples, s the mean of the groups' squared norms and b the squared norm of
    their mean,

    .. math:: |G|^2 = \frac{K b - s}{K - 1},\qquad \mathrm{tr}\,\Sigma = \frac{m K (s - b)}{K - 1}.

    With :class:`jaxbatch.Weighted` losses the formulas are those of :mod:`jaxbatch.gradients.signal_and_trace`. They are
    unbiased whatever the weights of the groups, and the trace is that of one example of this batch: the error of the batch's
    gradient is trace / B. They are NaN if fewer than two groups have a weight.

    The cost is one gradient of the batch (with K = B about two on CPU) and the memory of a few copies of the parameters,
    whatever K is. Fewer, larger groups cost less but give a less exact ``trace``. The examples of a batch are assumed to be
    independent draws.

    Args:
        loss_fn: ``(params, batch) -> losses``, one loss per example.
        params: pytree of floating-point arrays.
        batch: pytree with leading axis B.
        num_groups: K, a divisor of B, at least 2. ``None``: one group per example, K = B.
        microbatch_size: within a group, examples worked on at a time.
        method: the order of work on the groups, see :func:`jaxbatch.group_gradients`.

    Returns:
        ``signal`` and ``trace`` of shape ``()``. To stack the statistics of T steps, use ``jax.tree.map(lambda *x:
        jnp.stack(x), *statistics)``, or return them from a ``lax.scan``.

    Raises:
        ValueError: there are fewer than 2 groups, and all errors of :func:`jaxbatch.group_gradients`.

    Example:
        >>> loss_fn = lambda w, x: 0.5 * (x - w) ** 2  # the gradient of an example is w - x
        >>> found = gradient_statistics(loss_fn, jnp.array(0.0), jnp.array([1.0, 2.0, 3.0]))
        >>> round(found.trace.item(), 4), round(found.signal.item(), 4)  # the variance; mean squared less variance / 3
        (1.0, 3.6667)

    References:
        McCandlish et al., `An Empirical Model of Large-Batch Training <https://arxiv.org/abs/1812.06162>`_, 2018:
        appendix A.1, for any two batch sizes; here the sizes are m and B.
    """
    loss, batch_size = check_loss(loss_fn, params, batch)
    num_groups = batch_size if num_groups is None else num_groups
    if num_groups < 2:
        raise ValueError(f"num_groups={num_groups} must be at least 2: noise shows in how groups differ.")
    check_num_groups(num_groups, batch_size)
    if num_groups == batch_size > 1:
        check_independent_losses(loss, params, batch)
    size, params = batch_size // num_groups, of_each_device(params, batch)

    def measure(group):
        losses, gradient, *_ = mean_gradient(loss, params, Share(group), Cut(size, microbatch_size=microbatch_size))
        weight = weight_of(losses)
        if weight is not None:  # the gradient of the summed loss
            gradient = jax.tree.map(lambda leaf: leaf * weight.astype(leaf.dtype), widen(gradient))
        return Part((gradient, weight))

    start = no_deviations(params, loss.is_weighted(params, batch))
    method = method or choose_method(loss_fn, params, batch, size)
    at_a_time = CPU_VMAP if method == "vmap" else None
    total = fold(measure, batch, size, method=method, at_a_time=at_a_time, start=start, combine_several=with_parts).summed
    return GradientStatistics(*statistics_of(total, num_groups, batch_size))


@checked
def gradient_noise_scale(statistics: GradientStatistics) -> Interval:
    r"""Simple noise scale :math:`B_\text{simple} = \mathrm{tr}(\Sigma) / |G|^2`, in examples, with a 95% interval.

    Both parts are averaged over the recorded steps *before* dividing, because the ratio of two unbiased estimates is
    itself biased.

    Args:
        statistics: ``signal`` and ``trace`` of shape ``(T,)``, one per recorded step. Steps that are not finite are
            left out.

    Returns:
        ``value``, ``low``, ``high``, ``n`` and ``left_out``. ``float()`` of the result is the value, which lies within the interval. If
        the signal does not differ significantly from zero, ``high`` is infinite: record more steps. Then ``value`` may be infinite,
        too, where the estimates of the signal add up to less than nothing. The interval is Fieller's and assumes independent
        steps; with one step its ends are NaN.

    Raises:
        ValueError: there is no step.

    Example:
        >>> steps = GradientStatistics(signal=jnp.array([0.5, 1.5]), trace=jnp.array([12.0, 20.0]))
        >>> float(gradient_noise_scale(steps))
        16.0

    References:
        McCandlish et al., `An Empirical Model of Large-Batch Training <https://arxiv.org/abs/1812.06162>`_, 2018:
        eq. 2.9, estimators in appendix A.1. Fieller, *Some problems in interval estimation*, 1954.
    """
    if jnp.size(statistics.signal) == 0:
        raise ValueError("statistics holds no step: record at least one.")
    return ratio_of_means(np.asarray(statistics.trace), np.asarray(statistics.signal), nonnegative=True, scale="linear")


@checked
def cosine_similarity(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """The cosine of the angle between two pytrees seen as vectors; NaN where one is zero.

    Example:
        >>> cosine_similarity({"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([3.0, 4.0])}).item()
        0.6000000238418579
    """
    return inner_product(direction(a), direction(b))


@checked
def relative_squared_error(gradient: PyTree, reference: PyTree) -> Float[Array, ""]:
    r""":math:`|g - G|^2 / |G|^2`. For the mean of B independent examples its expectation is the noise scale ÷ B.

    Example:
        >>> round(relative_squared_error(jnp.array([1.0, 1.0]), jnp.array([2.0, 0.0])).item(), 6)
        0.5
    """
    difference = jax.tree.map(jnp.subtract, widen(gradient), widen(reference))
    return (norm(difference) / norm(reference)) ** 2
