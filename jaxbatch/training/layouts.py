"""The programs of a step as functions and shapes of arguments: one layout for those that run here and those compiled for elsewhere.

A program takes its examples by their indices, whole batches or each part when it is worked on.

Axes: S steps, B examples in a batch, N devices.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh
from jaxtyping import PyTree

from jaxbatch.augment import Prepare, prepared
from jaxbatch.gradients.cut import Cut
from jaxbatch.gradients.groups import leading_axis
from jaxbatch.gradients.part_norms import WithNoise
from jaxbatch.machine.compiling import compile_ahead
from jaxbatch.machine.constants import copies_on, inlined, take_out_constants
from jaxbatch.sums import Losses, loss_of_batch
from jaxbatch.training.devices import Parallel, over_devices

Step = Callable[..., tuple[Any, Losses | WithNoise]]  # (state, batch) -> (state, losses)


def one_step(step: Step, prepare: Prepare | None, state: Any, data: PyTree, index: Any, seed_epoch: Any, *mask: Any, by_part: bool):
    """Takes the examples ``index`` from the data, prepares them and makes a step: ``-> (state, the batch's loss)``.

    The loss is that of :func:`jaxbatch.sums.loss_of_batch`. With ``by_part`` the step does the taking. A monitored step returns the
    noise with the loss.
    """
    take = _Take(prepare)
    if by_part:  # a step that takes its examples gets a function that can be an argument of a program
        state, losses = step(state, index, *(mask or (None,)), jax.tree_util.Partial(take, data, seed_epoch))
    else:
        state, losses = step(state, take(data, seed_epoch, index), *mask)
    if isinstance(losses, WithNoise):
        return state, losses._replace(losses=loss_of_batch(losses.losses))
    return state, loss_of_batch(losses)


class _Take(NamedTuple):
    """What takes examples; equal for the same ``prepare``, so that a step is not traced again."""

    prepare: Prepare | None

    def __call__(self, data: PyTree, seed_epoch: Any, index: Any) -> PyTree:
        return prepared(self.prepare, jax.tree.map(lambda leaf: leaf[index], data), seed_epoch, index)


def check_indices(indices: Any, data: PyTree) -> None:
    """Raises a ValueError for an index that is no example, in place of which JAX would take another; while traced, it has no value.

    Example:
        >>> check_indices(np.array([[0, 3]]), jnp.ones(3))
        Traceback (most recent call last):
        ValueError: indices hold 3, and the data have the examples 0 to 2.
    """
    count = leading_axis(data, "data")  # JAX would clamp an index beyond a shorter leaf, too
    if isinstance(indices, jax.core.Tracer) or np.size(indices) == 0:
        return
    known = np.asarray(indices)
    for index in (int(known.min()), int(known.max())):
        if not 0 <= index < count:
            raise ValueError(f"indices hold {index}, and the data have the examples 0 to {count - 1}.")


class Layout(NamedTuple):
    """A program as a function and the shapes of its arguments, before it is compiled, here or for another device."""

    function: Callable[..., Any]
    arguments: dict[str, PyTree]  # shapes by what they hold: "state", "data", "batch", ...
    donate: tuple[str, ...]  # arguments whose memory is reused
    split: tuple[str, ...]  # arguments that are split over the devices

    @property
    def is_split(self) -> list[bool]:
        """For each argument, whether it is split over the devices."""
        return [name in self.split for name in self.arguments]

    @property
    def donated(self) -> tuple[int, ...]:
        """The numbers of the arguments whose memory is reused."""
        return tuple(number for number, name in enumerate(self.arguments) if name in self.donate)

    def over(self, devices: Sequence[jax.Device] | AbstractMesh, parallel: Parallel) -> tuple[Any, Callable[..., tuple]]:
        """The function over devices, and what moves its arguments there; see :func:`jaxbatch.training.devices.over_devices`."""
        return over_devices(self.function, devices, parallel, self.is_split, donate=self.donated)

    def compile(self, devices: Sequence[jax.Device], parallel: Parallel) -> tuple[Callable[..., Any], Callable[..., tuple]]:
        """The compiled program over devices that are here, and what moves its arguments there.

        On one device, arrays that the function closes over become arguments: a pretrained model is not compiled, and steps that differ in
        such arrays alone, as by rates of :func:`jaxbatch.coupled_learning_rate`, are one program.
        """
        program, put = self.over(devices, parallel)
        if len(devices) > 1 or jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            return compile_ahead(program, *self.arguments.values(), devices=devices), put
        run, constants = take_out_constants(self.function, *self.arguments.values())
        lifted = jax.jit(run, donate_argnums=tuple(number + 1 for number in self.donated))
        constants = copies_on(devices[0], constants)
        compiled = functools.partial(compile_ahead(lifted, constants, *self.arguments.values(), devices=devices), constants)
        return lambda *arguments: (program if jax.config.jax_disable_jit else compiled)(*arguments), put  # type: ignore[attr-defined]


def lay_out_step(step: Step, state: Any, data: PyTree, cut: Cut, *, prepare: Prepare | None = None, num_steps: int | None = None) -> Layout:
    """The program of a step, or of ``num_steps`` steps in one compiled loop; see :func:`compile_epoch` for the arguments.

    Example:
        >>> laid = lay_out_step(lambda state, batch: (state, batch), jnp.array(0.0), jnp.ones(8), Cut(4))
        >>> laid.arguments["index"].shape, laid.arguments["mask"], laid.donate
        ((4,), None, ('state',))
    """
    alone = cut.num_devices == 1
    step = inlined(step) if alone else step  # for Layout.compile, which takes constants out

    def one(state, data, index, mask, seed_epoch):
        given = () if alone else (mask if cut.has_fillers else None,)
        return one_step(step, prepare, state, data, index, seed_epoch, *given, by_part=cut.by_part)

    def all_steps(state, data, index, mask, seed_epoch):
        return lax.scan(lambda state, batch: one(state, data, *batch, seed_epoch), state, (index, mask))

    slots = (() if alone else (cut.num_devices,)) + (() if num_steps is None else (num_steps,)) + (cut.num_groups * cut.share,)
    arguments = {
        "state": shapes_of(state),
        "data": shapes_of(data),
        "index": jax.ShapeDtypeStruct(slots, jnp.int32),
        "mask": None if alone else jax.ShapeDtypeStruct(slots, jnp.bool_),
        "seed_epoch": None if prepare is None else jax.ShapeDtypeStruct((2,), jnp.uint32),
    }
    return Layout(one if num_steps is None else all_steps, arguments, ("state",) if alone else (), ("index", "mask"))


def shapes_of(tree: PyTree) -> PyTree:
    """The shapes and types of a tree's leaves."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree)
