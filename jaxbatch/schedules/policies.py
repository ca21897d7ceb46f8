"""Batch sizes that follow what training shows: policies, which are pure state machines that are asked after every record."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int32, PyTree

from jaxbatch.batches import steps_per_epoch
from jaxbatch.kinds import check_fields
from jaxbatch.states import as_arrays, difference

# Of a record, besides what the clock says: with that the same run would choose other sizes another time.
_NOT_MEASURED = {"total_batches", "diverged", "diverged_at_batch"}


class BatchSizePolicy(NamedTuple):
    """A batch size that follows what training shows: a pure state machine, for :class:`jaxbatch.FitConfig` in place of a number.

    ``init()`` returns a pair, the state at the start and the first batch size. After every record of a run (``evaluations_per_epoch`` of
    them an epoch) ``next(state, measured)`` returns the next state and the size of the batches up to the next record. The state is a pytree of
    arrays and numbers and is part of ``record["state"]`` and of checkpoints, so that a run which was stopped goes on with the same sizes.
    ``measured`` is that record: its ``loss``, ``epoch``, ``batches``, ``examples``, ``updates``, ``batch_size``, ``test_<name>`` of every metric,
    and with a monitor what it says of the noise, from ``noise_signal`` to ``noise_scale_average_high``, None where nothing was
    measured. It has no times, so that a run can be repeated. ``sizes`` are all sizes that the policy may name: those that may come next are
    compiled in the background, as the sizes of a schedule are. An error in ``next`` comes after the record, whose state then still has the size
    before. A duration of 2.5 epochs ends after half of *all* examples of the third epoch, because nobody knows which of them fill batches.

    ``learning_rate(state, batch_size)``, if given, is the rate of the batches that follow. It takes the place of ``learning_rate`` in the state of
    the optimizer, which must be made by ``optax.inject_hyperparams``. Without it the rate is as the optimizer has it:
    :func:`jaxbatch.coupled_learning_rate` needs a schedule that is known beforehand.

    Example:
        >>> import optax
        >>> from jaxbatch import FitConfig, Task, epochs, fit
        >>> loss_fn = lambda w, x: 0.5 * (x - w) ** 2
        >>> task = Task(lambda key: jnp.array(4.0), loss_fn, None, jnp.arange(8.0) % 2, None)
        >>> grown = lambda measured: min(8, measured["batch_size"] * (2 if measured["loss"] < 1 else 1))
        >>> follow = lambda state, measured: (state, grown(measured))
        >>> policy = BatchSizePolicy(lambda: ((), 2), follow, sizes=(2, 4, 8), learning_rate=lambda state, size: 0.05 * size)
        >>> optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
        >>> [(record["batch_size"], record["batches"]) for record in fit(task, FitConfig(optimizer, policy, epochs(6)))]
        [(2, 4), (2, 8), (2, 12), (2, 16), (4, 18), (8, 19)]
    """

    init: Callable[[], tuple[PyTree, int]]
    next: Callable[[PyTree, Mapping[str, Any]], tuple[PyTree, int]]  # (state, measured) -> (state, batch size)
    sizes: Sequence[int]
    learning_rate: Callable[[PyTree, int], float] | None = None  # (state, batch size) -> rate


class Choice(NamedTuple):
    """What a policy has chosen, as a state of training holds it."""

    batch_size: Int32[Any, ""]
    state: PyTree


def check_policy(policy: BatchSizePolicy, num_examples: int) -> tuple[int, ...]:
    """The sizes of a policy, each once.

    Raises:
        ValueError: a field is of another kind, there is no size, or one is below 1 or larger than the data set.

    Example:
        >>> check_policy(BatchSizePolicy(lambda: ((), 2), lambda state, measured: (state, 2), sizes=(2, 16)), 8)
        Traceback (most recent call last):
        ValueError: batch_size.sizes=(2, 16): batch_size=16 is larger than the data set (num_examples=8): no batch is full. Take a smaller one.
    """
    check_fields(policy, "batch_size.")
    sizes = tuple(int(size) for size in policy.sizes)
    if not sizes:
        raise ValueError("batch_size.sizes=() must hold every batch size that the policy may name.")
    for size in sizes:
        try:
            steps_per_epoch(num_examples, size)
        except ValueError as error:
            raise ValueError(f"batch_size.sizes={sizes}: {error}") from error
    return tuple(dict.fromkeys(sizes))


def first_choice(policy: BatchSizePolicy) -> Choice:
    """What a policy chooses for the start of a run.

    Raises:
        ValueError: as :func:`next_choice`.

    Example:
        >>> int(first_choice(BatchSizePolicy(lambda: (0.5, 2), lambda state, measured: (state, 2), sizes=(2,))).batch_size)
        2
    """
    return _as_choice(policy, "init", policy.init())


def next_choice(policy: BatchSizePolicy, choice: Choice, record: Mapping[str, Any]) -> Choice:
    """What a policy chooses after a record.

    Raises:
        ValueError: ``next`` asks for what the record lacks, returns no pair, names a size that is not in ``sizes``, or returns a state that
            is not made of arrays, or of another form than before.

    Example:
        >>> policy = BatchSizePolicy(lambda: (0, 2), lambda state, measured: (state + 1, 4), sizes=(2, 4))
        >>> [leaf.item() for leaf in next_choice(policy, first_choice(policy), {"loss": 0.5})]
        [4, 1]
    """
    measured = {name: value for name, value in record.items() if name not in _NOT_MEASURED and not name.endswith("seconds")}
    try:
        returned = policy.next(choice.state, measured)
    except KeyError as error:
        name = error.args[0] if error.args else None
        if not isinstance(name, str) or name in measured:
            raise
        hint = ": give FitConfig(monitor=jaxbatch.NoiseMonitor())" if name.startswith("noise") else ""
        raise ValueError(f"batch_size.next asks for {name!r}, and what is measured are {', '.join(measured)}{hint}.") from error
    after = _as_choice(policy, "next", returned)
    change = difference(after.state, choice.state)
    if change is not None:
        raise ValueError(f"batch_size.next must return a state of the form that it got: its state {change}.")
    return after


def going_on(policy: BatchSizePolicy, kept: PyTree) -> Choice:
    """The choice with which a run goes on.

    Args:
        policy: the policy of the run.
        kept: what its state holds; nothing at the start of a run, or after one with a number or a schedule.

    Raises:
        ValueError: it is that of another policy.

    Example:
        >>> int(going_on(BatchSizePolicy(lambda: ((), 2), lambda state, measured: (state, 2), sizes=(2,)), ()).batch_size)
        2
    """
    first = first_choice(policy)
    if not jax.tree.leaves(kept):
        return first
    change = difference(kept, first)
    if change is None and int(kept.batch_size) not in list(policy.sizes):
        change = f"has batch_size={int(kept.batch_size)}, which is not in sizes={tuple(policy.sizes)}"
    if change is not None:
        raise ValueError(f"state.policy is that of another policy ({change}): give state._replace(policy=()) to begin with this one.")
    return kept


def with_rate(policy: BatchSizePolicy, choice: Choice, opt_state: PyTree) -> PyTree:
    """The optimizer's state with the learning rate that goes with a choice.

    Raises:
        ValueError: the optimizer keeps no learning rate in its state, or computes it; or the rate is not finite, or below 0.

    Example:
        >>> policy = BatchSizePolicy(lambda: ((), 8), lambda state, measured: (state, 8), (8,), lambda state, size: 0.01 * size)
        >>> opt_state = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1).init(jnp.ones(2))
        >>> round(float(with_rate(policy, first_choice(policy), opt_state).hyperparams["learning_rate"]), 4)
        0.08
    """
    if policy.learning_rate is None:
        return opt_state
    leaves = optax.tree_utils.tree_get_all_with_path(opt_state, "learning_rate")
    owners = {getattr(path[-2], "name", None) if len(path) > 1 else None for path, _ in leaves}
    if owners != {"hyperparams"}:
        kept = "computes its learning rate by a schedule" if owners else "keeps no learning rate in its state"
        raise ValueError(
            f"batch_size.learning_rate needs an optimizer as optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), and this one {kept}."
        )
    size = int(choice.batch_size)
    rate = float(policy.learning_rate(choice.state, size))
    if not (math.isfinite(rate) and rate >= 0):
        raise ValueError(f"batch_size.learning_rate gives {rate} for batch_size={size}, and must give a finite number of at least 0.")
    return optax.tree_utils.tree_set(opt_state, learning_rate=jnp.asarray(rate, leaves[0][1].dtype))


def _as_choice(policy: BatchSizePolicy, name: str, returned: Any) -> Choice:
    """What a function of a policy returned, in arrays: the state is then the same whether it went through a checkpoint or not."""
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise ValueError(f"batch_size.{name} must return a pair (state, batch size), and returned a {type(returned).__name__}.")
    state, size = returned
    whole = not isinstance(size, bool) and np.shape(size) == () and np.asarray(size).dtype.kind in "iu"
    if not whole or int(size) not in list(policy.sizes):
        raise ValueError(f"batch_size.{name} names batch size {size}, which is not in sizes={tuple(policy.sizes)}: all that it names must be.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not isinstance(leaf, jax.Array) and np.asarray(leaf).dtype.kind not in "biufc":
            at = jax.tree_util.keystr(path)
            raise ValueError(f"batch_size.{name} must return a state of arrays and numbers, and state{at} is a {type(leaf).__name__}.")
    return as_arrays(Choice(jnp.asarray(int(size), jnp.int32), state))
