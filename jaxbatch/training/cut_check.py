"""Refuses to train on parts of a batch what the parts would change: a loss that couples the examples, and sums in aux over devices.

Axes: N devices, M examples of a device.
"""

import collections
import threading
import weakref
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxbatch.augment import example_keys
from jaxbatch.data.streams import is_stream
from jaxbatch.gradients.cut import Cut
from jaxbatch.gradients.groups import is_weighted
from jaxbatch.gradients.independence import in_parts_differ, whole_and_in_parts, with_copies
from jaxbatch.gradients.tried import some_examples
from jaxbatch.layers.masking import held_moments
from jaxbatch.machine.constants import call_compiled
from jaxbatch.machine.platform import compiling_for
from jaxbatch.training.cut import choose_cut
from jaxbatch.training.devices import AXIS, alone
from jaxbatch.training.tasks import Task, fingerprint
from jaxbatch.training.train_state import start_shapes

_PART = 2  # examples in a part that is looked at
_KEPT = 64  # tasks whose passing is remembered
_MADE_BYTES = 2**29  # of parameters
_EQUAL = 1e-3  # a sum over N devices is N times as large as that of one, up to this


def check_parts(task: Task, params: PyTree, cut: Cut) -> None:
    """Checks that devices and microbatches train what one device trains that sees each batch, or group, whole.

    The losses of a few examples are computed whole and in parts, for these parameters and for others. Batch normalisation of
    :mod:`jaxbatch.layers` is left out of the comparison, because its moments are known to be those of a part. If a model with a state has
    none of these layers, what couples its examples may be another library's batch normalisation, and is taken. So is a task that is ``coupled``,
    and a loss that cannot be computed of so few examples. A router with places for a share of a batch shows only where a place is missing
    among these few. What has passed is remembered within the process, for the same functions, examples and shapes of parameters.

    Args:
        task: see :class:`jaxbatch.Task`.
        params: as training starts with them; or their shapes, for those of one seed.
        cut: of the run's largest batches.

    Raises:
        ValueError: the loss of an example changes with the parts; or, on several devices, an aux is a sum over examples.

    Example:
        >>> centred = Task(lambda key: jnp.ones(()), lambda w, x: (w * x - (w * x).mean()) ** 2, None, jnp.arange(8.0), None)
        >>> check_parts(centred, jnp.ones(()), choose_cut(centred, jnp.ones(()), 8))
        >>> check_parts(centred, jnp.ones(()), choose_cut(centred, jnp.ones(()), 8, microbatch_size=4))
        Traceback (most recent call last):
        ValueError: loss_fn: the loss of an example changes with the others in its batch, as a contrastive loss does, and a batch of 8 is
        worked on in microbatches of 4, each of which would have another objective. Take one device and no microbatches
        (microbatch_size=None, and the task's too); jaxbatch.coupled_gradient in a step of your own; or, if parts are meant, as in ghost
        batch normalisation, task._replace(coupled=True).
    """
    if cut.num_devices > 1:
        _check(task, params, cut.num_devices, _PART, f"a batch is shared by {cut.num_devices} devices")
    size = cut.unmeasured
    if not (task.coupled or size is None or size >= cut.share):
        group = f"a {'batch' if cut.num_groups == 1 else 'group'} of {cut.group_size}"
        _check(task, params, cut.num_devices, 2 * _PART, f"{group} is worked on in microbatches of {size}")


def check_parts_elsewhere(task: Task, batch_size: int, platform: str, *, microbatch_size: int | None = None, num_devices: int = 1) -> bool:
    """:func:`check_parts` for a platform that need not be here, with parameters as training starts with them.

    Args:
        task: of whose data the shapes suffice.
        batch_size, microbatch_size, num_devices: see :class:`jaxbatch.FitConfig`.
        platform: that is trained on, as ``"gpu"``.

    Returns:
        Whether it was checked: parameters above 512 MiB are not made.

    Raises:
        ValueError: as :func:`check_parts` does.

    Example:
        >>> task = Task(lambda key: jnp.ones(()), lambda w, x: w * x, None, jax.ShapeDtypeStruct((8,), jnp.float32), None)
        >>> check_parts_elsewhere(task, 8, "gpu", microbatch_size=4)
        True
    """
    params = start_shapes(task)
    if sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)) > _MADE_BYTES:
        return False
    with compiling_for(platform):
        cut = choose_cut(task, params, batch_size, microbatch_size=microbatch_size, num_devices=num_devices)
    check_parts(task, params, cut)
    return True


def _check(task: Task, params: PyTree, count: int, share: int, words: str) -> None:
    """Compares ``count`` shares of so many examples, in parts, with all of them at once, unless this task has passed before."""
    try:
        examples = _examples(task, count * share)
        asked = asked_of(task, params, examples, count, share)
    except Exception:  # training itself says what is wrong with the data
        return
    passes_once(task, asked, lambda: _compare(task, params, examples, count, words))


def asked_of(task: Task, params: PyTree, examples: PyTree, *more: Hashable) -> Hashable:
    """What :func:`passes_once` remembers of a question beside the functions of a task: the examples, and the shapes of parameters."""
    leaves, structure = jax.tree.flatten((params, examples))
    kinds = tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    return *more, task.coupled, jax.config.jax_enable_x64, structure, kinds, fingerprint(examples)  # type: ignore[attr-defined]


def passes_once(task: Task, asked: Hashable, passes: Callable[[], bool]) -> bool:
    """What ``passes()`` returns; True without calling it if the functions of this task have passed what is asked before, in this process."""
    functions = (task.loss_fn, task.prepare, task.update_model_state)
    known = _passed.has(asked, functions)
    if not known and (known := passes()):
        _passed.add(asked, functions)
    return known


class _Passed:
    """Which tasks have passed in this process: the newest few. The functions are compared as objects and are not kept alive.

    Example:
        >>> passed, one = _Passed(), lambda x: x
        >>> passed.add("asked", (one, None))
        >>> passed.has("asked", (one, None)), passed.has("asked", (lambda x: x, None)), passed.has("else", (one, None))
        (True, False, False)
    """

    def __init__(self):
        self._known: collections.OrderedDict[Hashable, tuple] = collections.OrderedDict()
        self._lock = threading.Lock()

    def has(self, asked: Hashable, functions: tuple) -> bool:
        """Whether these functions have passed what is asked. An id may be that of a later object, so the object is looked at too."""
        with self._lock:
            known = self._known.get((asked, *map(id, functions)))
        return known is not None and all(reference() is function for reference, function in zip(known, functions, strict=True))

    def add(self, asked: Hashable, functions: tuple) -> None:
        """Remembers that they have; of objects that cannot be referred to weakly nothing is remembered."""
        try:
            references = tuple((lambda: None) if function is None else weakref.ref(function) for function in functions)
        except TypeError:
            return
        with self._lock:
            self._known[asked, *map(id, functions)] = references
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)


_passed = _Passed()


def _compare(task: Task, params: PyTree, examples: PyTree, count: int, words: str) -> bool:
    """Whether the losses of the examples could be looked at; they are refused as :func:`check_parts` says."""
    numbers = np.arange(jax.tree.leaves(examples)[0].shape[0]).reshape(count, -1, _PART)
    parts, stateful = list(numbers.swapaxes(0, 1)), task.update_model_state is not None

    def of_devices(params, part):
        losses, aux = jax.vmap(lambda share: task.loss(params, share), axis_name=AXIS)(part)
        return losses, jax.tree.map(lambda leaf: leaf[0], aux)

    with held_moments() as layers:
        try:
            if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
                start = call_compiled(task.start, jax.random.key(0))
                params = start[0] if stateful else start
            batches = with_copies(_prepared(task, examples))
            compared = list(whole_and_in_parts(alone(task.loss.__call__), params, batches, parts, of_devices))  # here its programs run
        except Exception:  # a loss that needs more examples, or others: training itself says what is wrong with it
            return False
    if not task.coupled and (not stateful or len(layers) > 0):
        for (losses, _), of_parts in compared:
            # back to the order of the examples
            in_parts = jax.tree.map(lambda *leaves: np.stack(leaves, 1).reshape(-1), *(losses for losses, _ in of_parts))
            if in_parts_differ(losses, [in_parts]):
                raise ValueError(
                    f"loss_fn: the loss of an example changes with the others in its batch, as a contrastive loss does, and {words}, each of "
                    "which would have another objective. Take one device and no microbatches (microbatch_size=None, and the task's too); "
                    "jaxbatch.coupled_gradient in a step of your own; or, if parts are meant, as in ghost batch normalisation, "
                    "task._replace(coupled=True)."
                )
    if stateful and len(parts) == 1:
        for ((_, of_batch), _), ((_, of_copies), ((_, of_one),)) in zip(compared[::2], compared[1::2], strict=True):
            _check_sums(of_batch, of_copies, of_one, count)
    return True


def _examples(task: Task, count: int) -> PyTree:
    """A few training examples, the same ones again if there are fewer; random ones of a stream."""
    data = task.train_data
    if is_stream(data):
        data = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), data.example)
    return some_examples(data, count)


def _prepared(task: Task, examples: PyTree) -> PyTree:
    """Examples as the loss gets them."""
    count = jax.tree.leaves(examples)[0].shape[0]
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
