"""The fields of a state that steps do not change: what a run needs besides to go on where it was stopped.

They are written in one function, :func:`written`. The programs of training never see them, and checkpoints take them from here.
"""

from typing import NamedTuple

from jaxtyping import PyTree

from jaxbatch.schedules.stretches import Progress
from jaxbatch.states import as_arrays
from jaxbatch.training.monitor import NoiseTrack, track_noise
from jaxbatch.training.plan_machine import Choice, Plan, begin_or_go_on
from jaxbatch.training.plans import FitConfig, write_progress
from jaxbatch.training.tasks import Task
from jaxbatch.training.train_state import TrainState, for_steps, state_shapes


class RunFields(NamedTuple):
    """What a run knows on the host."""

    progress: Progress
    choice: Choice
    noise: NoiseTrack  # it changes where it is

    @property
    def now(self) -> tuple[Progress, Choice]:
        """What decides how the run goes on."""
        return self.progress, self.choice


def written(fields: RunFields, updates: int) -> dict[str, PyTree]:
    """The fields as a state holds them, by name, after so many calls of the optimizer.

    Example:
        >>> written(RunFields(Progress(3, 8, 700, 5600), (), NoiseTrack(None, ())), 700)["progress"].tolist()
        [700, 3, 8, 700, 0, 5600]
    """
    return as_arrays({"progress": write_progress(fields.progress, updates), "noise": fields.noise.written(), "policy": fields.choice})


def take_out(plan: Plan, config: FitConfig, num_examples: int, state: TrainState) -> tuple[RunFields, TrainState]:
    """What a run knows at the start or at a state of its own, and the state as steps take it.

    Raises:
        ValueError: nothing is left to train, or the noise cannot be measured; see :func:`jaxbatch.training.plan_machine.begin_or_go_on`,
            :func:`jaxbatch.training.train_state.for_steps` and :func:`jaxbatch.training.monitor.track_noise`.
    """
    of_steps, noise = for_steps(state, config.monitor), track_noise(config.monitor, state, plan.batch_sizes)
    return RunFields(*begin_or_go_on(plan, config, num_examples, state), noise), of_steps


def put_back(fields: RunFields, state: TrainState) -> TrainState:
    """The state with which a run can go on."""
    return state._replace(**written(fields, int(state.step)))


def for_disk(plan: Plan, state: TrainState) -> TrainState:
    """What a checkpoint holds: where the progress follows from the number of updates and the plan, it is left out."""
    return state._replace(progress=()) if plan.is_fixed else state


def shapes_on_disk(task: Task, config: FitConfig, plan: Plan) -> TrainState:
    """The shapes of what a checkpoint of a run holds; nothing is trained."""
    shapes = state_shapes(task, config.optimizer, config.monitor)
    fields = RunFields(Progress(), plan.begin(()), NoiseTrack(config.monitor, shapes.params))
    return for_disk(plan, shapes._replace(**written(fields, 0)))


def is_over(plan: Plan, state: TrainState) -> bool:
    """Whether a run that came to a state is complete."""
    return plan.next(plan.progress(state.progress, int(state.step)), plan.begin(state.policy)) is None
