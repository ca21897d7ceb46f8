"""Refuses to train on parts of a batch what the parts would change: a loss that couples the examples, and sums in aux over devices.

Axes: N devices, M examples of a device.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxbatch.augment import example_keys
from jaxbatch.data.streams import is_stream
from jaxbatch.gradients.cutting import parts_matter
from jaxbatch.gradients.groups import is_weighted, losses_and_aux
from jaxbatch.gradients.independence import differ, some_examples
from jaxbatch.layers.masking import held_moments
from jaxbatch.machine.compiling import call_compiled
from jaxbatch.training.devices import AXIS, alone, share_of_group
from jaxbatch.training.epochs import choose_cut
from jaxbatch.training.tasks import Task, smallest

_PART = 2  # examples in a part that is looked at
_EQUAL = 1e-3  # a sum over N devices is N times as large as that of one, up to this


def check_parts(
    task: Task,
    params: PyTree,
    batch_sizes: Sequence[int],
    *,
    num_groups: int | None = None,
    microbatch_size: int | None = None,
    num_devices: int = 1,
) -> None:
    """Checks that devices and microbatches train what one device trains that sees each batch, or group, whole.

    The losses of a few examples are computed whole and in parts, for these parameters and for others. Batch normalisation of
    :mod:`jaxbatch.layers` is left out of the comparison, because its moments are known to be those of a part. If a model with a state has
    none of these layers, what couples its examples may be another library's batch normalisation, and is taken. So is a task that is ``coupled``,
    and a loss that cannot be computed of so few examples. A router with places for a share of a batch shows only where a place is missing
    among these few.

    Args:
        task: see :class:`jaxbatch.Task`.
        params: as training starts with them.
        batch_sizes: of the run.
        num_groups, microbatch_size, num_devices: see :class:`jaxbatch.FitConfig`.

    Raises:
        ValueError: the loss of an example changes with the parts; or, on several devices, an aux is a sum over examples.

    Example:
        >>> centred = Task(lambda key: jnp.ones(()), lambda w, x: (w * x - (w * x).mean()) ** 2, None, jnp.arange(8.0), None)
        >>> check_parts(centred, jnp.ones(()), [8])
        >>> check_parts(centred, jnp.ones(()), [8], microbatch_size=4)
        Traceback (most recent call last):
        ValueError: loss_fn: the loss of an example changes with the others in its batch, as a contrastive loss does, and a batch of 8 is
        worked on in microbatches of 4, each of which would have another objective. Take one device and no microbatches
        (microbatch_size=None, and the task's too); jaxbatch.coupled_gradient in a step of your own; or, if parts are meant, as in ghost
        batch normalisation, task._replace(coupled=True).
    """
    groups = num_groups or 1
    if num_devices > 1:
        _check(task, params, num_devices, _PART, f"a batch is shared by {num_devices} devices")
    if task.coupled:
        return
    for size in sorted(set(batch_sizes), reverse=True):
        share, bound = share_of_group(size, groups, num_devices), smallest(microbatch_size, task.examples_at_a_time)
        if bound is None or bound >= share:
            continue
        cut = choose_cut(task, params, size, num_groups=groups, microbatch_size=microbatch_size, num_devices=num_devices)
        if cut.at_a_time is not None and cut.at_a_time < share:
            of = "batch" if groups == 1 else "group"
            _check(task, params, num_devices, 2 * _PART, f"a {of} of {size // groups} is worked on in microbatches of {cut.at_a_time}")
            return


def _check(task: Task, params: PyTree, count: int, share: int, words: str) -> None:
    """Compares ``count`` shares of so many examples, in parts, with all of them at once."""
    stateful = task.update_model_state is not None
    results = lambda params, batch: losses_and_aux(task.loss_fn, params, batch, stateful)

    def in_parts(params, batch):
        parts = jax.tree.map(lambda leaf: leaf.reshape(count, share // _PART, _PART, *leaf.shape[1:]), batch)
        over_devices = jax.vmap(lambda part: results(params, part), axis_name=AXIS)
        losses, aux = jax.vmap(over_devices, in_axes=1, out_axes=1)(parts)  # traced once for all parts
        return jax.tree.map(lambda leaf: leaf.reshape(-1), losses), jax.tree.map(lambda leaf: leaf[0, 0], aux)

    with held_moments() as layers:
        try:
            batch = _prepared(task, count * share)
            compared = list(parts_matter(alone(results), in_parts, params, batch))  # here its programs run
        except Exception:  # a loss that needs more examples, or others: training itself says what is wrong with it
            return
        known = not task.coupled and (not stateful or len(layers) > 0)
        of_batch = None
        for of, (losses, aux), (of_parts, part_of_aux) in compared:
            if known and any(map(differ, jax.tree.leaves(losses), jax.tree.leaves(of_parts))):
                raise ValueError(
                    f"loss_fn: the loss of an example changes with the others in its batch, as a contrastive loss does, and {words}, each of "
                    "which would have another objective. Take one device and no microbatches (microbatch_size=None, and the task's too); "
                    "jaxbatch.coupled_gradient in a step of your own; or, if parts are meant, as in ghost batch normalisation, "
                    "task._replace(coupled=True)."
                )
            if of == "the batch":
                of_batch = aux
            elif stateful and share == _PART:
                _check_sums(of_batch, aux, part_of_aux, count)


def _prepared(task: Task, count: int) -> PyTree:
    """A few training examples as the loss gets them, the same ones again if there are fewer; random ones of a stream."""
    data = task.train_data
    if is_stream(data):
        data = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), data.example)
    examples = some_examples(data, count)
    return examples if task.prepare is None else call_compiled(task.prepare, example_keys(0, 0, jnp.arange(count)), examples)


def _check_sums(of_batch: PyTree, of_all: PyTree, of_one: PyTree, count: int) -> None:
    """Refuses an aux that is ``count`` times as large for ``count`` times as many copies of an example."""
    flat = lambda tree: jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_weighted)
    for (path, batch), (_, whole), (_, part) in zip(flat(of_batch), flat(of_all), flat(of_one), strict=True):
        if is_weighted(whole):
            continue
        batch, whole, part = (np.asarray(leaf, np.float64) for leaf in (batch, whole, part))
        size = np.linalg.norm(whole)
        if np.linalg.norm(whole - count * part) <= _EQUAL * size and size > _EQUAL * np.linalg.norm(batch):
            raise ValueError(
                f"aux{jax.tree_util.keystr(path)} is a sum over the examples of a device, and on {count} devices the mean of their aux is taken. "
                "Return the mean over examples; or, to have the sum over all devices, a jaxbatch.Weighted with one total and one weight for "
                "each example."
            )
