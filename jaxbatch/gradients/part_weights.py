r"""Signal and noise of a gradient from parts whose losses have weights (:class:`jaxbatch.Weighted`).

Part k has the summed gradient :math:`g_k` and the weight :math:`w_k`. With :math:`W = \sum_k w_k`, the gradient of the batch's
mean is :math:`\bar g = \frac1W \sum_k g_k`. Parts are assumed to be independent, with :math:`E\,g_k = w_k G`. Nothing is assumed
of how the noise of a part goes with its weight, because the tokens of one sequence need not be independent. Then products of
*different* parts have no noise:

.. math:: E \sum_{j \ne k} g_j \cdot g_k = |G|^2 \sum_{j \ne k} w_j w_k,\qquad\text{so}\qquad
    |G|^2 = \frac{|\sum_k g_k|^2 - \sum_k |g_k|^2}{W^2 - \sum_k w_k^2},\qquad
    \mathrm{tr}\,\Sigma = B\,\big(|\bar g|^2 - |G|^2\big)

are unbiased, given the weights. The trace is what makes :math:`E|\bar g - G|^2 = \mathrm{tr}\,\Sigma / B` hold. So it is that of
one *example* of this batch, as it is without weights, and the noise scale is in examples; times the mean weight of an example it
is in tokens. With equal weights in parts of equal sizes, these are the formulas of :mod:`jaxbatch.gradients.part_norms`.

Where weights are themselves random, the denominator estimates :math:`(E\,W)^2` and the result has a relative bias of order one
over the number of parts, as any ratio of sums.

Axes: L layers.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def signal_and_trace(
    square_of_sum: Float[Array, "*L"], squares: Float[Array, "*L"], square_weights: Float[Array, ""], weight: Float[Array, ""], batch_size: int
) -> tuple[Float[Array, "*L"], Float[Array, "*L"], Bool[Array, ""]]:
    r"""Signal and trace, and whether there are two parts to tell them from; where there are not, both are 0.

    Args:
        square_of_sum: :math:`|\sum_k g_k|^2`.
        squares: :math:`\sum_k |g_k|^2`.
        square_weights: :math:`\sum_k w_k^2`.
        weight: W.
        batch_size: B.

    Example:
        >>> found = signal_and_trace(*map(jnp.asarray, (9.0, 5.0, 2.0, 2.0)), 2)  # gradients 1 and 2, of weight 1 each
        >>> [value.item() for value in found]  # their product; their variance
        [2.0, 0.5, True]
    """
    pairs = weight**2 - square_weights
    several = pairs > 1e-6 * weight**2  # less is rounding, or a second part that says nothing
    square_of_mean = square_of_sum / jnp.where(several, weight**2, 1)
    # B (|mean|^2 - |G|^2), written so that only the parts' noise is left of two nearly equal numbers.
    trace = batch_size * jnp.where(several, squares - square_weights * square_of_mean, 0) / jnp.where(several, pairs, 1)
    return jnp.where(several, square_of_mean - trace / batch_size, 0), trace, several
