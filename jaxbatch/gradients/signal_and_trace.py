r"""Signal and noise of a gradient from the parts of a batch: the formulas, for parts of any sizes and for weights.

Part k (a group, a microbatch, a device's share) has :math:`m_k` examples, and :math:`g_k` is its *summed* gradient. Over the P parts of a batch
of :math:`B = \sum_k m_k` examples, with :math:`\bar g = \frac1B \sum_k g_k`,

.. math:: \mathrm{tr}\,\Sigma = \frac{1}{P - 1} \Big( \sum_k \frac{|g_k|^2}{m_k} - B\,|\bar g|^2 \Big),\qquad
    |G|^2 = |\bar g|^2 - \frac{\mathrm{tr}\,\Sigma}{B}.

Both are unbiased for parts of any sizes, because :math:`E|g_k|^2 = m_k^2 |G|^2 + m_k\,\mathrm{tr}\,\Sigma`. Other weights of
the squares would be unbiased too. These are the ones of the analysis of variance: each part counts as one measurement of the
noise whatever its size, which has the least variance for normally distributed noise. For equal parts the formulas are those of
:func:`jaxbatch.gradient_statistics`.

Where losses have weights (:class:`jaxbatch.Weighted`), part k has the weight :math:`w_k`. With :math:`W = \sum_k w_k`, the gradient of the batch's
mean is :math:`\bar g = \frac1W \sum_k g_k`. Parts are assumed to be independent, with :math:`E\,g_k = w_k G`. Nothing is assumed
of how the noise of a part goes with its weight, because the tokens of one sequence need not be independent. Then products of
*different* parts have no noise:

.. math:: E \sum_{j \ne k} g_j \cdot g_k = |G|^2 \sum_{j \ne k} w_j w_k,\qquad\text{so}\qquad
    |G|^2 = \frac{|\sum_k g_k|^2 - \sum_k |g_k|^2}{W^2 - \sum_k w_k^2},\qquad
    \mathrm{tr}\,\Sigma = B\,\big(|\bar g|^2 - |G|^2\big)

are unbiased, given the weights. The trace is again what makes :math:`E|\bar g - G|^2 = \mathrm{tr}\,\Sigma / B` hold. So it is that of
one *example* of this batch, as it is without weights, and the noise scale is in examples; times the mean weight of an example it
is in tokens. With equal weights in parts of equal sizes, both are the same.

Where weights are themselves random, the denominator estimates :math:`(E\,W)^2` and the result has a relative bias of order one
over the number of parts, as any ratio of sums.

Axes: L layers.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Number = Float[Array, "*L"]


def signal_and_trace(
    square_of_mean: Number, noise: Number, degrees: int | Float[Array, ""], batch_size: int, each: float = 1.0
) -> tuple[Number, Number]:
    r"""Unbiased :math:`|G|^2` and :math:`\mathrm{tr}\,\Sigma`, the latter of one of ``batch_size`` examples.

    Args:
        square_of_mean: :math:`|\bar g|^2`.
        noise: what is left of the parts' squares without the mean's: ``degrees / each`` times the trace, and noise.
        degrees: P - 1; with weights see :func:`pairs_of`, and the noise is then B times what is left.
        batch_size: B.
        each: where ``noise`` is of the parts' means, the examples of a part.

    Example:
        >>> found = signal_and_trace(jnp.array(2.25), jnp.array(5.0 - 4.5), 1, 2)  # gradients 1 and 2
        >>> [value.item() for value in found]  # their product; their variance
        [2.0, 0.5]
    """
    trace = noise / degrees * each
    return square_of_mean - trace / batch_size, trace


def pairs_of(weight: Float[Array, ""], square_weights: Float[Array, ""]) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    r""":math:`W^2 - \sum_k w_k^2`, to divide by, and whether there are two parts to tell anything from.

    Example:
        >>> [value.item() for value in pairs_of(jnp.array(2.0), jnp.array(2.0))]  # of weight 1 each
        [2.0, True]
    """
    pairs = weight**2 - square_weights
    several = pairs > 1e-6 * weight**2  # less is rounding, or a second part that says nothing
    return jnp.where(several, pairs, 1), several
