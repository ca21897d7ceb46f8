"""The race of runs that cannot be kept waiting beside each other: heat after heat, each longer and with fewer learning rates."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxbatch.advice.any_runs import Shown
from jaxbatch.advice.choices import Objective
from jaxbatch.advice.search import rates_beside

_LONGER = 4  # how many times longer the runs of the next heat are
_MOST_HEATS = 9  # where no longest run is known and runs do not end by themselves
_FEWEST = 8  # updates of the shortest runs
_HEATS = 1024  # the longest run ÷ the shortest at most, where the longest is known
PENDING = "is being made"  # the failure of a run that has not ended


class RunQuestion(NamedTuple):
    """What a search over somebody else's runs chooses from, and when it ends."""

    objective: Objective
    batch_sizes: tuple[int, ...]
    learning_rates: tuple[float, ...]
    num_steps: Mapping[int, float]  # updates of the longest run, by batch size; infinite: not known
    num_examples: int | None = None  # in the training set, if it is known
    max_probes: int = 40
    tolerance: float = 0.05
    seed: int = 0

    @property
    def prefer(self) -> str:
        """Which of two sizes to take that cost the same, see :class:`jaxbatch.advice.settling.Setting`."""
        return "larger" if self.objective == "examples" else "smaller"


class NextRun(NamedTuple):
    """The run to make next, and when it ends if it has not reached the goal."""

    batch_size: int
    learning_rate: float
    most: float  # updates, after which it ends at its next look
    needs_progress: bool = False  # whether it ends at a quarter of these, too, if its loss has not fallen
    repeat: bool = False  # whether it repeats the best setting


def race_runs(inside: Sequence[Shown], question: RunQuestion, size: int) -> NextRun | None:
    """The next of the runs that look for a rate that works, at one size: heat after heat, each longer and with fewer rates.

    A heat begins with the rates that were best in the one before. The last one is as long as a run may be, or its runs end by themselves.
    """
    here, longest = [shown for shown in inside if shown.probe.batch_size == size], question.num_steps[size]
    in_epoch = 0 if question.num_examples is None else question.num_examples / size / 8
    length = math.ceil(max(_FEWEST, in_epoch, longest / _HEATS if math.isfinite(longest) else 0))
    rates = list(question.learning_rates[::2]) if len(question.learning_rates) > 3 else list(question.learning_rates)
    while len(rates) > max(2, question.max_probes // 2):
        rates = rates[::2]
    left = list(here)
    for _ in range(_MOST_HEATS):
        heat = list[Shown]()
        for rate in rates:
            mine = next((shown for shown in left if shown.probe.learning_rate == rate), None)
            if mine is None:
                return NextRun(size, rate, min(length, longest))
            left.remove(mine)
            heat.append(mine)
        if any(shown.failure == PENDING for shown in heat):
            return None  # the next heat depends on how these end
        updates = max(shown.probe.updates for shown in heat)
        if updates < length or length >= longest:  # none goes on
            break
        order = sorted(range(len(heat)), key=lambda number: _rank(heat[number]))
        finite = [number for number in order if math.isfinite(_rank(heat[number]))]
        if not finite:
            break
        keep = finite[: max(2, math.ceil(len(rates) / 3))]
        rates, length = [rates[number] for number in keep], _LONGER * max(length, updates)
    tried = {shown.probe.learning_rate for shown in here}
    beside = rates_beside([shown.probe for shown in here if shown.counts], question.learning_rates[::2], question.learning_rates)
    untried = [rate for rate in beside if rate not in tried]
    return NextRun(size, untried[0], longest) if untried else None


def _rank(shown: Shown) -> float:
    return shown.probe.loss if shown.counts and not shown.probe.diverged and math.isfinite(shown.probe.loss) else math.inf
