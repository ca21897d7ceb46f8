"""What runs of one task with one optimizer compile and look at once, and share: programs, checks, data on the device.

Whoever makes several such runs makes this value and gives it to each of them; a run alone has its own.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxbatch.gradients.cut import Cut
from jaxbatch.gradients.part_norms import NoiseMonitor
from jaxbatch.gradients.updates import Optimizer
from jaxbatch.states import as_arrays
from jaxbatch.training.cut import choose_cut, choose_evaluation_size
from jaxbatch.training.cut_check import check_parts
from jaxbatch.training.devices import Parallel, put_data
from jaxbatch.training.divergence import make_check, which_are_finite
from jaxbatch.training.epochs import compile_task_epoch
from jaxbatch.training.evaluation import make_test
from jaxbatch.training.monitor import check_unchanged, cuts_of
from jaxbatch.training.plans import FitConfig
from jaxbatch.training.tasks import Task, check_data
from jaxbatch.training.train_state import TrainState, for_steps, make_init_state, start_state

T = TypeVar("T")


class Once:
    """Values by what they depend on: each is made once, at the first request, also where two threads ask at the same time.

    An error is not remembered: who asks again makes the value again.

    Example:
        >>> made = Once()
        >>> made("greeting", lambda: "hello"), made("greeting", lambda: "another")
        ('hello', 'hello')
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, Future] = {}
        self._lock = threading.Lock()

    def __call__(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of the key."""
        with self._lock:
            known, mine = self._made.get(key), Future[T]()
            if known is None:
                self._made[key] = mine
        if known is not None:
            return known.result()
        try:
            mine.set_result(make())
        except BaseException as error:
            with self._lock:
                del self._made[key]
            mine.set_exception(error)
        return mine.result()


class RunPrograms:
    """What runs of one task with one optimizer share.

    Args:
        task: see :class:`jaxbatch.Task`.
        optimizer: any optax optimizer. One whose learning rate is in its state serves all rates.
        of_task: what does not depend on the optimizer, of an earlier value; see :meth:`with_optimizer`.

    Raises:
        ValueError: see :func:`jaxbatch.training.tasks.check_data`.

    Example:
        >>> import optax
        >>> task = Task(lambda key: jnp.array(0.0), lambda w, x: 0.5 * (x - w) ** 2, None, jnp.ones(8), None)
        >>> programs = RunPrograms(task, optax.sgd(0.5))
        >>> state = programs.begin(0, None)
        >>> programs.epoch(state, 2, 4) is programs.epoch(state, 2, 4), programs.epoch(state, 2, 4) is programs.epoch(state, 1, 4)
        (True, False)
    """

    def __init__(self, task: Task, optimizer: Optimizer, of_task: Once | None = None):
        check_data(task)
        self.task, self.optimizer = task, optimizer
        self._of_task, self._own = of_task or Once(), Once()
        self._any_length: dict[Hashable, Any] = {}

    def with_optimizer(self, optimizer: Optimizer) -> "RunPrograms":
        """Those of the same task with another optimizer: what does not depend on it is shared."""
        return RunPrograms(self.task, optimizer, self._of_task)

    def begin(self, seed: int, state: TrainState | None) -> TrainState:
        """See :func:`jaxbatch.training.train_state.start_state`; states of one form are looked at once."""
        if state is None:
            begin = self._of_task("begin", lambda: make_init_state(self.task))
            return begin(self.optimizer, seed)
        if not isinstance(state, TrainState):
            return start_state(self.task, self.optimizer, seed, state)  # which refuses it
        form = _form(for_steps(state))
        self._own(("begin", form), lambda: start_state(self.task, self.optimizer, seed, state) is not None)
        return as_arrays(state)

    def epoch(
        self,
        state: Any,
        num_steps: int,
        batch_size: int,
        *,
        cut: Cut | None = None,
        microbatch_size: int | None = None,
        devices: Sequence[jax.Device] | None = None,
        parallel: Parallel = "jit",
        monitor: NoiseMonitor | None = None,
    ) -> Callable[..., tuple[TrainState, Any]]:
        """See :func:`jaxbatch.training.epochs.compile_task_epoch`; without a ``cut``, one update a batch in microbatches."""
        devices = tuple(jax.devices()[:1] if devices is None else devices)
        form = _form(for_steps(state))
        asked: dict[str, Any] = {"microbatch_size": microbatch_size, "num_devices": len(devices), "monitor": monitor}
        if cut is None:
            decide = lambda: choose_cut(self.task, state.params, batch_size, **asked)
            cut = self._of_task(("cut", batch_size, *asked.values(), form), decide)
        settings: dict[str, Any] = {"devices": devices, "parallel": parallel, "monitor": monitor, "cut": cut}
        key = (batch_size, *settings.values(), form)
        if key not in self._any_length:
            make = lambda: compile_task_epoch(self.task, self.optimizer, state, num_steps, batch_size, **settings)
            run = self._own(("epoch", num_steps, *key), make)
            if not getattr(run, "any_length", False):
                return run
            self._any_length[key] = run
        return self._any_length[key]

    def test(
        self,
        microbatch_size: int | None = None,
        evaluation_batch_size: int | None = None,
        eval_params: Callable[[PyTree, PyTree], PyTree] | None = None,
    ) -> Callable[[PyTree, TrainState], dict[str, jax.Array]]:
        """See :func:`jaxbatch.training.evaluation.make_test`."""
        size = choose_evaluation_size(self.task, microbatch_size, evaluation_batch_size)
        make = lambda: make_test(self.task, size, eval_params)
        return self._of_task(("test", size), make) if eval_params is None else make()

    def is_finite(self, start: PyTree) -> Callable[[PyTree], jax.Array]:
        """See :func:`jaxbatch.training.divergence.make_is_finite`."""
        watched = which_are_finite(start)
        return self._of_task(("is finite", watched), lambda: make_check(watched))

    def data(self, devices: Sequence[jax.Device]) -> tuple[Any, Any]:
        """Training and test data on their devices, once for all runs: NumPy's would be moved for each record."""
        devices = list(devices)
        both = lambda: (put_data(self.task.train_data, devices), put_data(self.task.test_data, devices[:1]))
        return self._of_task(("data", tuple(devices)), both)

    def cuts(self, config: FitConfig, params: PyTree, batch_sizes: frozenset[int]) -> Callable[[int], Cut]:
        """``batch_size -> cut`` of a run; parts of batches that would train something else than whole batches are refused."""

        def checked_cuts() -> Callable[[int], Cut]:
            cut_of = cuts_of(self.task, config, params)
            if batch_sizes:
                check_parts(self.task, params, cut_of(max(batch_sizes)))
            check_unchanged(self.task, config, params, list(batch_sizes), cut_of)
            return cut_of

        cut = (config.num_groups, config.microbatch_size, config.num_devices, config.monitor)
        return self._of_task(("cuts", *cut, _form(params), batch_sizes), checked_cuts)


def _form(tree: PyTree) -> Hashable:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((jnp.shape(leaf), str(leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf))) for leaf in leaves)
