"""Probes: short runs to a goal, each at one batch size and one learning rate, that end as soon as they cannot matter.

What a run shows of the updates to the goal has one of three forms. It *reached* the goal between two looks: after more than
``more_than`` updates, and at most ``updates``. It was stopped before (*censored*): it needs more than ``more_than``, which is what
it made. It *diverged*: it never reaches the goal, however long it goes on.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbatch.batches import Duration
from jaxbatch.gradients.part_norms import NoiseMonitor
from jaxbatch.gradients.run_lengths import for_length, takes_num_steps
from jaxbatch.gradients.updates import Optimizer, call_update, takes_traced
from jaxbatch.machine.constants import take_out_constants
from jaxbatch.states import as_arrays
from jaxbatch.training.fitting import fit_with
from jaxbatch.training.goals import Goal, until_reached
from jaxbatch.training.monitor import ChangesTraining
from jaxbatch.training.plans import FitConfig
from jaxbatch.training.run_programs import RunPrograms
from jaxbatch.training.tasks import Task, updates_of
from jaxbatch.training.train_state import TrainState, init_state

_MONITOR = NoiseMonitor(every=8, parts=2)  # costs a step of one part little, and one of several parts nothing
MakeOptimizer = Callable[..., Optimizer]  # learning rate -> optimizer, or (learning rate, updates of the run) -> optimizer


class Probe(NamedTuple):
    """What one run showed."""

    batch_size: int
    learning_rate: float
    seed: int
    updates: int  # that were made, until the look that ended the run
    reached: bool
    diverged: bool
    more_than: int  # updates at the last look without the goal, see last_without; old records of runs that reached it hold ``updates``
    value: float  # the goal's metric at the end
    best: float  # the best value on the way
    loss: float  # mean training loss since the evaluation before the last one
    signal: float = math.nan  # |G|^2, mean over the run; NaN: not measured
    trace: float = math.nan  # tr Sigma of one example, mean over the run
    repeat: bool = False  # whether it repeats what was the best setting before it ran; it was not chosen for its own luck


class RateState(NamedTuple):
    """The state of :func:`with_rate_in_state`."""

    learning_rate: jax.Array
    inner: Any
    num_steps: Any = None  # updates of the run; None: the optimizer is made from the rate alone


def with_rate_in_state(make_optimizer: MakeOptimizer, learning_rate: float = 1.0, num_steps: int = 1) -> optax.GradientTransformation:
    """An optimizer whose learning rate is part of its state, so that one compiled program serves all rates; and so is the length of its run.

    Args:
        make_optimizer: ``learning_rate -> optimizer``, or ``(learning_rate, num_steps) -> optimizer``.
        learning_rate: what the state holds at first.
        num_steps: likewise, if ``make_optimizer`` takes it.

    Example:
        >>> optimizer, params = with_rate_in_state(optax.sgd), jnp.array(1.0)
        >>> state = optimizer.init(params)._replace(learning_rate=jnp.array(0.5))
        >>> optimizer.update(jnp.array(1.0), state, params)[0].item()
        -0.5
    """

    def init(params):
        inner = for_length(make_optimizer, num_steps)(learning_rate).init(params)
        return RateState(
            jnp.asarray(learning_rate, jnp.float32), inner, jnp.asarray(num_steps, jnp.int32) if takes_num_steps(make_optimizer) else None
        )

    def step(gradient, state, params=None, *, value=None, **_):
        optimizer = for_length(make_optimizer, state.num_steps)(state.learning_rate)
        updates, inner = call_update(optimizer, gradient, state.inner, params, value)
        return updates, state._replace(inner=inner)

    return optax.GradientTransformationExtraArgs(init, step)


def make_start(task: Task, optimizer: Any) -> Callable[[int], TrainState]:
    """:func:`jaxbatch.init_state` for any seed by one program, which is compiled once.

    Example:
        >>> task = Task(lambda key: jax.random.normal(key, (2,)), None, None, jnp.zeros((4, 1)), None)
        >>> bool((make_start(task, optax.sgd(0.1))(3).params == init_state(task, optax.sgd(0.1), 3).params).all())
        True
    """
    run, constants = take_out_constants(lambda seed: init_state(task, optimizer, seed), jnp.uint32(0))
    compiled = jax.jit(run)
    return lambda seed: compiled(constants, jnp.uint32(seed))


def make_adjustable(make_optimizer: MakeOptimizer, learning_rate: float, params: Any, num_steps: int = 1) -> Any:
    """:func:`with_rate_in_state` if one program can serve all rates and lengths; else ``make_optimizer`` as it is, to be called for each.

    Args:
        make_optimizer: ``learning_rate -> optimizer``, or ``(learning_rate, num_steps) -> optimizer``.
        learning_rate: any that is allowed.
        params: only their shapes are used.
        num_steps: any length of a run that is allowed.

    Example:
        >>> callable(make_adjustable(optax.adam, 0.1, jnp.ones(2))), callable(make_adjustable(optax.inject_hyperparams(optax.sgd), 0.1, jnp.ones(2)))
        (False, True)
    """
    make, settings = lambda both: for_length(make_optimizer, both[1])(both[0]), (learning_rate, num_steps)
    one_program = takes_traced(make, settings, params) and not _keeps_settings(make, settings, params)
    return with_rate_in_state(make_optimizer, learning_rate, num_steps) if one_program else make_optimizer


def _keeps_settings(make: Callable[[Any], Optimizer], settings: tuple[float, int], params: Any) -> bool:
    """Whether an optimizer's first state depends on the rate or the length, so that others cannot be put into its later steps alone."""
    program = jax.make_jaxpr(lambda both, params: jax.tree.leaves(make(both).init(params)))(settings, params).jaxpr
    dependent = {id(variable) for variable in program.invars[: len(settings)]}
    for equation in program.eqns:
        if any(id(variable) in dependent for variable in equation.invars):
            dependent.update(id(variable) for variable in equation.outvars)
    return any(id(variable) in dependent for variable in program.outvars)


class ProbePrograms:
    """The start of every seed and the programs of every learning rate and length, each made once for all probes of a task.

    Args:
        task: see :class:`jaxbatch.Task`.
        optimizer: from :func:`make_adjustable`. One with its rate in its state has the same programs for all rates and lengths; a function
            makes one for each rate, or for each rate and length, and each has its own.
        learning_rate: any that is allowed.
        num_steps: a length of a run that is allowed, which runs have unless they are given another one.

    Example:
        >>> task = Task(lambda key: jax.random.normal(key, (2,)), None, None, jnp.zeros((4, 1)), None)
        >>> programs = ProbePrograms(task, with_rate_in_state(optax.sgd), 0.1)
        >>> programs.at(0.1) is programs.at(0.2), float(programs.start(0.2, seed=3).opt_state.learning_rate)
        (True, 0.20000000298023224)
    """

    def __init__(self, task: Task, optimizer: Any, learning_rate: float, num_steps: int = 1):
        self.task = task
        self._make: MakeOptimizer | None = optimizer if callable(optimizer) else None
        self._num_steps = num_steps
        self._first = RunPrograms(task, for_length(self._make, num_steps)(learning_rate) if self._make else optimizer)
        self._by_setting = {self._setting(learning_rate, num_steps): self._first}
        self._start = make_start(task, self._first.optimizer)

    def at(self, learning_rate: float, num_steps: int | None = None) -> RunPrograms:
        """What runs with this learning rate share, and with this number of updates if the optimizer depends on it."""
        if self._make is None:
            return self._first
        setting = self._setting(learning_rate, num_steps)
        if setting not in self._by_setting:
            self._by_setting[setting] = self._first.with_optimizer(for_length(self._make, setting[1])(learning_rate))
        return self._by_setting[setting]

    def start(self, learning_rate: float, seed: int, num_steps: int | None = None) -> TrainState:
        """The state from which a run of so many updates starts."""
        state = self._start(seed)
        if self._make is None:
            begun = state.opt_state._replace(learning_rate=jnp.asarray(learning_rate, jnp.float32))
            if begun.num_steps is not None and num_steps is not None:
                begun = begun._replace(num_steps=jnp.asarray(num_steps, jnp.int32))
            return state._replace(opt_state=begun)
        # As arrays all together: an optimizer may keep the parameters themselves, and a program that reuses memory cannot be given one array twice.
        return as_arrays(state._replace(opt_state=self.at(learning_rate, num_steps).optimizer.init(state.params)))

    def _setting(self, learning_rate: float, num_steps: int | None) -> tuple[float, int | None]:
        """What programs depend on, where each setting has its own."""
        length = self._num_steps if num_steps is None else num_steps
        return learning_rate, length if takes_num_steps(self._make) else None


class Prober(NamedTuple):
    """Runs probes of one task."""

    programs: ProbePrograms
    goal: Goal
    longest: Duration
    evaluations_per_epoch: int
    measure_noise: bool = True

    @property
    def task(self) -> Task:
        """The task of the runs."""
        return self.programs.task

    def run(self, batch_size: int, learning_rate: float, seed: int) -> Iterator[Probe]:
        """The run so far at each evaluation, until the goal, divergence, or the longest duration."""
        length = updates_of(self.task, self.longest, batch_size)
        programs, state = self.programs.at(learning_rate, length), self.programs.start(learning_rate, seed, length)
        looks = even_looks(self.task.num_examples // batch_size, self.evaluations_per_epoch)
        config = FitConfig(programs.optimizer, batch_size, self.longest, seed=seed, evaluations_per_epoch=looks)
        if self.measure_noise and batch_size > 1:
            config = config._replace(monitor=self._monitor(programs, config, state, batch_size))
        best, better = (-math.inf, max) if self.goal.above else (math.inf, min)
        before = 0
        sums = np.zeros(3)  # measurements, signal, trace
        records = until_reached(fit_with(programs, config, state), self.goal)
        del state  # the run frees it after its first step
        for record in records:
            value, updates, reached = self.goal.in_record(record), record["updates"], record["reached"]
            best = best if math.isnan(value) else better(best, value)
            if record.get("noise_measurements"):
                sums += record["noise_measurements"] * np.array([1, record["noise_signal"], record["noise_trace"]])
            noise = (sums[1:] / sums[0]).tolist() if sums[0] else [math.nan, math.nan]
            more_than, before = last_without(before, updates, reached), updates
            yield Probe(batch_size, learning_rate, seed, updates, reached, record["diverged"], more_than, value, best, record["loss"], *noise)

    def _monitor(self, programs: RunPrograms, config: FitConfig, state: TrainState, batch_size: int) -> NoiseMonitor | None:
        """None where noise is not measured, because a cut would change moments or train another model."""
        if self.task.update_model_state is not None:
            return None
        try:
            programs.cuts(config._replace(monitor=_MONITOR), state.params, frozenset([batch_size]))
        except ChangesTraining:
            return None
        return _MONITOR


def even_looks(steps_per_epoch: int, looks: int) -> int:
    """About so many evaluations an epoch, with as many updates before each, if possible: other lengths need other programs.

    Example:
        >>> even_looks(18, 12), even_looks(37, 12), even_looks(5, 12), even_looks(5, 1)
        (9, 12, 5, 1)
    """
    if steps_per_epoch <= looks:
        return max(1, steps_per_epoch)
    near = range(max(1, looks * 2 // 3), looks * 3 // 2 + 1)
    return min(near, key=lambda count: (steps_per_epoch % count != 0, abs(count - looks)))


def last_without(before: int, updates: int, reached: bool) -> int:
    """The updates at the last look that did not show the goal; ``before`` are those at the look before this one.

    Example:
        >>> last_without(30, 40, reached=True), last_without(30, 40, reached=False)
        (30, 40)
    """
    return before if reached else updates
