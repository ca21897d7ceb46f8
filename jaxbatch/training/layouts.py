"""The programs of a step as functions and shapes of arguments: one layout for those that run here and those compiled for elsewhere.

A program takes its examples by their indices, whole batches or each part when it is worked on.

Axes: S steps, B examples in a batch, N devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key, PyTree

from jaxbatch.augment import example_keys
from jaxbatch.gradients.part_norms import WithNoise
from jaxbatch.gradients.parts import Take
from jaxbatch.weighted import mean_loss

Step = Callable[..., tuple[Any, Float[Array, "..."] | WithNoise]]  # (state, batch) -> (state, losses)
Prepare = Callable[[Key[Array, "B"], PyTree], PyTree]  # (a key for each example, batch) -> batch


def one_step(step: Step, prepare: Prepare | None, state: Any, data: PyTree, index: Any, seed_epoch: Any, *mask: Any, by_part: bool):
    """Takes the examples ``index`` from the data, prepares them and makes a step: ``-> (state, mean loss)``.

    With ``by_part`` the step does the taking. A monitored step returns the noise with the loss.
    """
    take = make_take(data, prepare, seed_epoch)
    if by_part:
        state, losses = step(state, index, *(mask or (None,)), take)
    else:
        state, losses = step(state, take(index), *mask)
    if isinstance(losses, WithNoise):
        return state, losses._replace(losses=mean_loss(losses.losses))
    return state, mean_loss(losses)


def make_take(data: PyTree, prepare: Prepare | None, seed_epoch: Any) -> Take:
    """The function that takes examples from the data by their indices, and prepares them; it can be an argument of a program.

    Example:
        >>> take = make_take(jnp.array([5.0, 6.0, 7.0]), lambda keys, x: -x, jnp.array([0, 0], jnp.uint32))
        >>> take(jnp.array([2, 0])).tolist()
        [-7.0, -5.0]
    """

    def take(data, seed_epoch, index):
        return prepared(prepare, jax.tree.map(lambda leaf: leaf[index], data), seed_epoch, index)

    return jax.tree_util.Partial(take, data, seed_epoch)


def prepared(prepare: Prepare | None, batch: PyTree, seed_epoch: Any, index: Any) -> PyTree:
    """The examples ``index`` after ``prepare``, with the key of each; as they are without it."""
    return batch if prepare is None else prepare(example_keys(seed_epoch[0], seed_epoch[1], index), batch)


class Layout(NamedTuple):
    """A program as a function and the shapes of its arguments, before it is compiled, here or for another device."""

    function: Callable[..., Any]
    arguments: dict[str, PyTree]  # shapes by what they hold: "state", "data", "batch", ...
    donate: tuple[str, ...]  # arguments whose memory is reused
    split: tuple[str, ...]  # arguments that are split over the devices

    def places(self, names: tuple[str, ...]) -> list[bool]:
        """For each argument, whether it is among ``names``."""
        return [key in names for key in self.arguments]

    def numbers(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """The places of ``names`` among the arguments."""
        return tuple(number for number, here in enumerate(self.places(names)) if here)


def lay_out_step(
    step: Step,
    state: Any,
    data: PyTree,
    batch_size: int,
    *,
    prepare: Prepare | None = None,
    num_groups: int = 1,
    num_devices: int = 1,
    by_part: bool = False,
    num_steps: int | None = None,
) -> Layout:
    """The program of a step, or of ``num_steps`` steps in one compiled loop; see :func:`compile_epoch` for the arguments.

    Example:
        >>> laid = lay_out_step(lambda state, batch: (state, batch), jnp.array(0.0), jnp.ones(8), 4)
        >>> laid.arguments["index"].shape, laid.arguments["mask"], laid.donate
        ((4,), None, ('state',))
    """
    share = num_groups * -(-batch_size // num_groups // num_devices)
    filled_up = share * num_devices > batch_size  # then some slots hold fillers

    def one(state, data, index, mask, seed_epoch):
        given = () if num_devices == 1 else (mask if filled_up else None,)
        return one_step(step, prepare, state, data, index, seed_epoch, *given, by_part=by_part)

    def all_steps(state, data, index, mask, seed_epoch):
        return lax.scan(lambda state, batch: one(state, data, *batch, seed_epoch), state, (index, mask))

    lead = (() if num_devices == 1 else (num_devices,)) + (() if num_steps is None else (num_steps,))
    arguments = {
        "state": shapes_of(state),
        "data": shapes_of(data),
        "index": jax.ShapeDtypeStruct((*lead, share), jnp.int32),
        "mask": None if num_devices == 1 else jax.ShapeDtypeStruct((*lead, share), jnp.bool_),
        "seed_epoch": None if prepare is None else jax.ShapeDtypeStruct((2,), jnp.uint32),
    }
    return Layout(one if num_steps is None else all_steps, arguments, ("state",) if num_devices == 1 else (), ("index", "mask"))


def lay_out_part(
    add: Callable[..., tuple], total: PyTree, params: PyTree, data: PyTree, length: int, num_devices: int = 1, *, streamed: bool = False
) -> Layout:
    """The program that adds a part of ``length`` examples, over all devices, to the sum of its batch.

    Args:
        add: ``(total, params, data, index, mask, seed_epoch) -> (total, loss)``, see :func:`jaxbatch.training.pieces.make_pieces`.
        total: the sum; here and below only shapes are used.
        params: the parameters.
        data: the data set, leaves ``(N, ...)``, or one example of a stream.
        length: examples in the part, without fillers.
        num_devices: N.
        streamed: whether ``add`` gets the examples of its part, and not the data set.

    Example:
        >>> laid = lay_out_part(lambda total, *rest: (total, total), jnp.zeros(()), jnp.zeros(()), jnp.ones(3), 5, 2, streamed=True)
        >>> laid.arguments["batch"].shape, laid.split
        ((2, 3, 3), ('batch', 'index', 'mask'))
    """
    lead = (length,) if num_devices == 1 else (num_devices, -(-length // num_devices))
    of_part = lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype)
    arguments = {
        "total": shapes_of(total),
        "params": shapes_of(params),
        **({"batch": jax.tree.map(of_part, data)} if streamed else {"data": shapes_of(data)}),
        "index": jax.ShapeDtypeStruct(lead, jnp.int32),
        "mask": jax.ShapeDtypeStruct(lead, jnp.bool_),
        "seed_epoch": jax.ShapeDtypeStruct((2,), jnp.uint32),
    }
    # If the number of devices divides the length, there are no fillers and no mask is needed.
    without_mask = lambda total, params, data, index, mask, seed_epoch: add(total, params, data, index, None, seed_epoch)
    return Layout(add if length % num_devices else without_mask, arguments, ("total",), ("batch", "index", "mask"))


def shapes_of(tree: PyTree) -> PyTree:
    """The shapes and types of a tree's leaves."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree)
