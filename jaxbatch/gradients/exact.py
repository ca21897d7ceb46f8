r"""Exact gradients of a batch, of its groups and of each of its examples, for any loss and any pytree.

Every function here takes ``loss_fn(params, batch) -> losses`` with **one loss per example**, shape ``(B,)``, or with each
example's total and weight (:class:`jaxbatch.Weighted`). ``batch`` is any
pytree whose leaves have the leading axis B. Random keys for dropout are part of the batch, one per example. With
``has_aux=True`` the loss function returns ``(losses, aux)``, where aux is any further output.

The loss is called on parts of the batch (a group, a microbatch, one example). So the loss of an example must not depend on
the other examples. With batch normalisation it does: on a group, the group's statistics are used (*ghost* batch norm). That
is exact for groups, but undefined for a single example, so it is refused there (:mod:`jaxbatch.gradients.independence`).

Axes: B examples, K groups, P parameters.
"""

import jax
from jaxtyping import Array, Float, PyTree

from jaxbatch.gradients.accumulation import mean_gradient
from jaxbatch.gradients.cut import Cut, Share
from jaxbatch.gradients.groups import LossFn, check_loss, check_num_groups, check_one_aux, of_each_device
from jaxbatch.gradients.independence import check_independent_losses
from jaxbatch.gradients.parts import CPU_VMAP, Method, Part, choose_method, fold, vmap_at_a_time
from jaxbatch.kinds import checked
from jaxbatch.machine.platform import compiled_platform
from jaxbatch.sums import Losses, loss_of_one


@checked
def per_example_gradients(loss_fn: LossFn, params: PyTree, batch: PyTree, *, microbatch_size: int | None = None) -> PyTree[Float[Array, "B ..."]]:
    r"""The gradient of every example's own loss, :math:`g_i = \nabla_\theta\, \ell_i(\theta)`.

    With :class:`jaxbatch.Weighted` losses it is that of the example's own mean, total / weight, and 0 for a weight of 0. So the
    gradient of the batch's mean is the mean of these, weighted by the weights.

    Args:
        loss_fn: ``(params, batch) -> losses``, see the module's docstring.
        params: pytree of floating-point arrays.
        batch: pytree with leading axis B.
        microbatch_size: examples worked on at a time. It bounds the memory of the activations and keeps them in the cache (the
            result itself is B copies of the parameters). ``None``: 64 on CPU, all at once elsewhere.

    Returns:
        A pytree like ``params``, each leaf with a leading axis B.

    Raises:
        ValueError: the batch is empty, its leaves disagree on B, ``microbatch_size`` is below 1, ``loss_fn`` does not return
            one loss per example, or an example's loss depends on the other examples.

    Example:
        >>> import jax.numpy as jnp
        >>> loss_fn = lambda w, x: 0.5 * (x @ w) ** 2
        >>> per_example_gradients(loss_fn, jnp.array([1.0, 2.0]), jnp.eye(2)).tolist()
        [[1.0, 0.0], [0.0, 2.0]]

    References:
        The construction, ``vmap`` of ``grad``, is that of the JAX documentation's section on per-example
        gradients.
    """
    loss, batch_size = check_loss(loss_fn, params, batch)
    check_independent_losses(loss, params, batch)
    if microbatch_size is None:
        microbatch_size = CPU_VMAP if compiled_platform() == "cpu" else batch_size
    params = of_each_device(params, batch)

    def gradient(one):
        return jax.tree.map(lambda leaf: leaf[None], jax.grad(lambda p: loss_of_one(loss(p, one)[0]))(params))

    return fold(lambda one: Part(examples=gradient(one)), batch, 1, method="vmap", at_a_time=microbatch_size).examples


@checked
def group_gradients(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    num_groups: int,
    *,
    has_aux: bool = False,
    microbatch_size: int | None = None,
    method: Method | None = None,
) -> PyTree:
    r"""The gradient of each group's mean loss, all at ``params``: :math:`g_k = \nabla_\theta \frac{K}{B}\sum_{i \in k} \ell_i(\theta)`.

    Groups are contiguous: group ``k`` is ``batch[k*B//K:(k+1)*B//K]``. The mean of the K gradients is the
    gradient of the batch's mean loss, at the cost of one ordinary gradient. With :class:`jaxbatch.Weighted` losses the mean of a
    group is weighted by its own weights.

    Args:
        loss_fn: ``(params, batch) -> losses``, or ``(losses, aux)`` with ``has_aux``.
        params: pytree of floating-point arrays.
        batch: pytree with leading axis B.
        num_groups: K, a divisor of B.
        has_aux: whether ``loss_fn`` returns ``(losses, aux)``.
        microbatch_size: within a group, examples worked on at a time; see :func:`jaxbatch.accumulated_gradient`.
            Not together with ``has_aux``.
        method: the order of work on the groups. ``"map"``: one after another in a compiled loop, with the memory of one group.
            ``"vmap"``: side by side. ``"unroll"``: one after another without a loop; a model with convolutions keeps XLA:CPU's
            fast ones, but compiling takes K times as long. ``None``: on CPU ``"unroll"`` for such a model and ``"map"`` for
            others; ``"vmap"`` elsewhere and for groups of one example.

    Returns:
        A pytree like ``params``, each leaf with a leading axis K. With ``has_aux``, a pair of that and ``aux``, whose leaves
        have a leading axis K too.

    Raises:
        ValueError: ``num_groups`` does not divide B (the message names the nearest divisors), and all errors of
            :func:`per_example_gradients`.

    Example:
        >>> import jax.numpy as jnp
        >>> loss_fn = lambda w, x: 0.5 * (x - w) ** 2
        >>> group_gradients(loss_fn, jnp.array(0.0), jnp.array([1.0, 3.0, 5.0, 7.0]), 2).tolist()
        [-2.0, -6.0]
    """
    _, gradients, aux = losses_and_group_gradients(
        loss_fn, params, batch, num_groups, has_aux=has_aux, microbatch_size=microbatch_size, method=method
    )
    return (gradients, aux) if has_aux else gradients


@checked
def losses_and_group_gradients(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    num_groups: int,
    *,
    has_aux: bool = False,
    microbatch_size: int | None = None,
    method: Method | None = None,
) -> tuple[Losses, PyTree, PyTree]:
    """Like :func:`group_gradients`, but also returns the losses of the forward pass: ``(losses, gradients, aux)``.

    ``aux`` is None without ``has_aux``.

    Example:
        >>> import jax.numpy as jnp
        >>> loss_fn = lambda w, x: 0.5 * (x - w) ** 2
        >>> losses, gradients, _ = losses_and_group_gradients(loss_fn, jnp.array(0.0), jnp.array([1.0, 3.0]), 2)
        >>> losses.tolist(), gradients.tolist()
        ([0.5, 4.5], [-1.0, -3.0])
    """
    loss, batch_size = check_loss(loss_fn, params, batch, has_aux)
    check_num_groups(num_groups, batch_size)
    check_one_aux(has_aux, microbatch_size)
    if num_groups == batch_size > 1:
        check_independent_losses(loss, params, batch)
    size, params = batch_size // num_groups, of_each_device(params, batch)

    def measure(group):
        losses, gradient, aux, _ = mean_gradient(loss, params, Share(group), Cut(size, microbatch_size=microbatch_size))
        return Part(examples=losses, each=(gradient, jax.tree.map(lambda leaf: leaf[0], aux)))

    method = method or choose_method(loss_fn, params, batch, size)
    groups = fold(measure, batch, size, method=method, at_a_time=vmap_at_a_time(size))
    return groups.examples, *groups.each


@checked
def losses_and_mean_gradient(loss_fn: LossFn, params: PyTree, batch: PyTree, *, microbatch_size: int | None = None) -> tuple[Losses, PyTree]:
    """The losses and the gradient of their mean, as in an ordinary step; in microbatches if a size is given.

    Example:
        >>> import jax.numpy as jnp
        >>> loss_fn = lambda w, x: 0.5 * (x - w) ** 2
        >>> losses, gradient = losses_and_mean_gradient(loss_fn, jnp.array(0.0), jnp.array([1.0, 3.0]))
        >>> losses.tolist(), float(gradient)
        ([0.5, 4.5], -2.0)
    """
    loss, batch_size = check_loss(loss_fn, params, batch)
    return mean_gradient(loss, params, Share(batch), Cut(batch_size, microbatch_size=microbatch_size))[:2]
