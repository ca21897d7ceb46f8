"""What a loss, its parameters and a batch must be.

Axes: B examples, K groups.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from jaxbatch.hints import call_function, check_nothing_untrained, how_to_hand_in, library_of
from jaxbatch.layers import example_mask
from jaxbatch.sums import Losses, Weighted, counted, widen

LossFn = Callable[[PyTree, PyTree], Any]  # (params, batch) -> (B,) losses or Weighted, or a pair of these and aux


class Loss(NamedTuple):
    """A loss in the one form that everything takes, ``loss(params, batch) -> (losses, aux)``; every call checks what it returns.

    Example:
        >>> Loss(lambda w, x: w * x)(jnp.array(2.0), jnp.ones(1))
        (Array([2.], dtype=float32), None)
    """

    function: LossFn
    has_aux: bool = False

    def __call__(self, params: PyTree, batch: PyTree) -> tuple[Losses, PyTree]:
        return losses_and_aux(self.function, params, batch, self.has_aux)

    def is_weighted(self, params: PyTree, batch: PyTree) -> bool:
        """Whether it returns :class:`jaxbatch.Weighted` losses; it is traced, not run."""
        return is_weighted(jax.eval_shape(lambda p, b: self(p, b), params, batch)[0])


def check_loss(loss_fn: LossFn, params: PyTree, batch: PyTree, has_aux: bool = False) -> tuple[Loss, int]:
    """The door of a loss: checks that ``loss_fn`` returns one loss per example (it is traced, not run); the loss in the one form, and B.

    A negative weight cannot be found here, because weights have no values while they are traced: it makes the mean NaN.

    Raises:
        ValueError: the batch is empty, its leaves disagree on B, the losses (or totals and weights) do not have shape ``(B,)``,
            or losses or parameters are not floating-point.
    """
    batch_size, loss = leading_axis(batch), Loss(loss_fn, has_aux)
    check_params(params)
    loss.is_weighted(params, batch)  # raises an error if the result is no loss
    return loss, batch_size


def losses_and_aux(loss_fn: LossFn, params: PyTree, batch: PyTree, has_aux: bool = False) -> tuple[Losses, PyTree]:
    """Calls ``loss_fn`` and checks its result: the losses, and aux as a pytree of arrays (None without ``has_aux``).

    All code calls losses through this function. So a mean, a sum or a table of losses is always refused: on several devices,
    in microbatches, from a stream. Losses with weights come back as :func:`jaxbatch.sums.counted` makes them.

    Raises:
        ValueError: the result is not one floating-point loss per example.

    Example:
        >>> losses_and_aux(lambda w, x: (w * x, 7), jnp.array(2.0), jnp.ones(1), has_aux=True)[1].item()
        7
    """
    alone_or_not = " (the model's state goes to metrics_fn and update_model_state)" if has_aux else ""
    result = call_function("loss_fn", loss_fn, params, batch, gets=f"params alone{alone_or_not} and a batch")
    alone = isinstance(result, Weighted)  # which is a tuple too
    if has_aux and (alone or not (isinstance(result, tuple) and len(result) == 2)):
        raise ValueError("loss_fn must return a pair (losses, aux), because of has_aux=True or the task's update_model_state.")
    if not has_aux and isinstance(result, tuple) and not alone:
        raise ValueError("loss_fn returned a tuple. If it is (losses, aux), the task needs update_model_state; without a task, pass has_aux=True.")
    losses, aux = result if has_aux else (result, None)
    aux = _summed_over_examples(aux, leading_axis(batch))
    wanted = (leading_axis(batch),)
    if isinstance(losses, Weighted):
        return _counted(losses, wanted), jax.tree.map(jnp.asarray, aux)
    shape = getattr(losses, "shape", None)
    if shape != wanted:
        hint = " Leave out the mean." if shape == () else ""
        raise ValueError(f"loss_fn must return one loss per example, shape {wanted}, but returned shape {shape}.{hint}")
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise ValueError(f"loss_fn must return floating-point losses, but returned {losses.dtype}.")
    return losses, jax.tree.map(jnp.asarray, aux)


def is_weighted(node: Any) -> bool:
    """Whether a node of a tree is a :class:`jaxbatch.Weighted`, which in aux is a sum."""
    return isinstance(node, Weighted)


def _summed_over_examples(aux: PyTree, batch_size: int) -> PyTree:
    """aux with every :class:`jaxbatch.Weighted` of one total and weight per example summed, without fillers."""

    def one(node):
        if not is_weighted(node):
            return node
        of_total, of_weight = map(jnp.shape, node)
        if of_total != of_weight or of_total[:1] != (batch_size,):
            raise ValueError(
                f"aux must have one total and one weight per example in a Weighted, of one shape with the leading axis {batch_size}, but has shapes "
                f"{of_total} and {of_weight}. Leave out the sum: it is taken over all parts and devices."
            )
        mask = example_mask()
        own = lambda leaf: leaf if mask is None else jnp.where(mask.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0)
        return Weighted(*(widen(own(leaf)).sum(0) for leaf in counted(node)))

    return jax.tree.map(one, aux, is_leaf=is_weighted)


def _counted(losses: Weighted, wanted: tuple[int]) -> Weighted:
    of_total, of_weight = (getattr(leaf, "shape", None) for leaf in losses)
    if of_total != wanted or of_weight != wanted:
        raise ValueError(
            f"loss_fn must return one total and one weight per example, shape {wanted}, but returned Weighted with a total of shape "
            f"{of_total} and a weight of shape {of_weight}. Sum over an example's tokens, and over nothing else."
        )
    if not jnp.issubdtype(losses.total.dtype, jnp.floating):
        raise ValueError(f"loss_fn must return floating-point totals, but returned {losses.total.dtype}.")
    if not (losses.weight.dtype == bool or jnp.issubdtype(losses.weight.dtype, jnp.integer) or jnp.issubdtype(losses.weight.dtype, jnp.floating)):
        raise ValueError(f"loss_fn must return weights that are numbers of at least 0, but returned {losses.weight.dtype}.")
    return counted(losses)


def check_params(params: PyTree) -> None:
    """Raises a ValueError that names the first leaf that is no floating-point array, or that is not learned.

    It says how parameters are handed in from the library that the leaf is from.

    Example:
        >>> check_params({"w": jnp.ones(2), "steps": jnp.array(3)})
        Traceback (most recent call last):
        ValueError: params['steps'] is int32 and has no gradient: keep it out of params, as a constant that loss_fn closes over.
    """
    check_nothing_untrained(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = f"params{jax.tree_util.keystr(path)}"
        dtype = getattr(leaf, "dtype", None)
        if library_of(leaf) or (dtype is None and not isinstance(leaf, float)):
            raise ValueError(f"{name} is a {type(leaf).__name__} and not an array: {how_to_hand_in(leaf, params)}")
        if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"{name} is {dtype} and has no gradient: {how_to_hand_in(leaf, params)}")


def leading_axis(batch: PyTree, name: str = "batch") -> int:
    """The number of examples in a pytree of arrays; raises a ValueError if the leaves have no common number.

    Args:
        batch: leaves ``(B, ...)``.
        name: the name of the batch in an error message.

    Example:
        >>> leading_axis((jnp.ones((4, 2)), jnp.ones(3)), "train_data")
        Traceback (most recent call last):
        ValueError: train_data: the leaves disagree on the number of examples: [0] has 4, [1] has 3.
    """
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if not leaves:
        raise ValueError(f"{name} must be a pytree of arrays with one leading axis of examples, but holds no array.")
    for path, leaf in leaves:
        where = f"{name}{jax.tree_util.keystr(path)}"
        if not hasattr(leaf, "shape"):
            raise ValueError(f"{where} is a {type(leaf).__name__}, and {name} must be a pytree of arrays: use numpy.asarray.")
        if getattr(leaf.dtype, "kind", "f") in "OUSMm":
            raise ValueError(f"{where} is {leaf.dtype}, and JAX knows numbers only: give texts as tokens, and names as their indices.")
        if len(leaf.shape) == 0:
            raise ValueError(f"{where} is a single number, and {name} must be a pytree of arrays with one leading axis of examples.")
    sizes = [leaf.shape[0] for _, leaf in leaves]
    if len(set(sizes)) > 1:
        listed = ", ".join(f"{jax.tree_util.keystr(path)} has {size}" for (path, _), size in zip(leaves, sizes, strict=True))
        raise ValueError(f"{name}: the leaves disagree on the number of examples: {listed}.")
    if sizes[0] == 0:
        raise ValueError(f"{name} is empty: the mean loss of no examples is undefined.")
    return sizes[0]


def of_each_device(params: PyTree, batch: PyTree) -> PyTree:
    """In ``shard_map`` with ``check_vma``, parameters as values of each device over which ``batch`` is shared; else as they are.

    JAX sums the gradient of a parameter that all devices share over the devices. A gradient of one example or of one group would then
    be a sum over examples of different devices.
    """
    axes = set().union(*(varying_axes(jax.typeof(leaf)) for leaf in jax.tree.leaves(batch)))
    return jax.tree.map(lambda leaf: vary_along(leaf, axes), params)


def varying_axes(of: Any) -> set[str]:
    """The axes of devices along which an array's type, or what ``jax.eval_shape`` returns, says that it differs."""
    kind = getattr(of, "manual_axis_type", None)  # of older versions of JAX: vma
    return set((getattr(of, "vma", None) if kind is None else kind.varying) or ())


def vary_along(leaf: Any, axes: set[str]) -> Any:
    """The array as one that may differ along these axes of devices, which JAX's types say of it from here on."""
    missing = axes - varying_axes(jax.typeof(leaf))
    return lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf


def check_num_groups(num_groups: int, batch_size: int) -> None:
    """Raises a ValueError if K is no whole number or does not divide B; it names the nearest divisors."""
    if isinstance(num_groups, bool) or not isinstance(num_groups, int | np.integer):
        check_count("num_groups", num_groups)
    if num_groups >= 1 and batch_size % num_groups == 0:
        return
    divisors = [k for k in range(1, batch_size + 1) if batch_size % k == 0]
    below = [k for k in divisors if k < num_groups][-1:]
    above = [k for k in divisors if k > num_groups][:1]
    raise ValueError(f"num_groups={num_groups} does not divide batch_size={batch_size}. Nearest that do: {' and '.join(map(str, below + above))}.")


def check_microbatch_size(microbatch_size: int | None) -> None:
    """Raises a ValueError for a size below 1."""
    check_count("microbatch_size", microbatch_size, optional=True)


def check_count(name: str, count: Any, *, optional: bool = False) -> None:
    """Refuses a count that is not a whole number of at least 1; ``optional`` allows None.

    Raises:
        ValueError: as said.

    Example:
        >>> check_count("num_devices", 2.0)
        Traceback (most recent call last):
        ValueError: num_devices=2.0 must be a whole number of at least 1.
    """
    if count is None and optional:
        return
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
        raise ValueError(f"{name}={count!r} must be a whole number of at least 1.")


def check_one_aux(has_aux: bool, microbatch_size: int | None) -> None:
    """Raises a ValueError if a group would have several aux."""
    if has_aux and microbatch_size is not None:
        raise ValueError(
            f"microbatch_size={microbatch_size} with has_aux=True: how to combine the aux of microbatches is not "
            "defined. Leave out microbatch_size, or use more groups."
        )
