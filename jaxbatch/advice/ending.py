"""What one run of a length that is fixed beforehand shows: an ending."""

import math
from typing import NamedTuple


class Ending(NamedTuple):
    """A run with ``num_steps`` updates planned, over which its schedule of rates is stretched."""

    batch_size: int
    learning_rate: float
    seed: int
    num_steps: int
    updates: int  # that were made
    diverged: bool
    value: float  # the metric at the last look
    looks: tuple[tuple[int, float], ...]  # (updates, metric) at every look
    repeat: bool = False  # whether it repeats what was the best setting before it ran; it was not chosen for its own luck

    @property
    def ended(self) -> bool:
        """Whether it was run to its end, and did not diverge."""
        return not self.diverged and self.updates >= self.num_steps and math.isfinite(self.value)

    @property
    def examples(self) -> int:
        """Examples of the whole run, whether or not it was made whole."""
        return self.num_steps * self.batch_size

    def at(self, part: float) -> float:
        """The metric at the last look within a part of the run; NaN if there was none.

        Example:
            >>> ending = Ending(8, 0.1, 0, 100, 100, False, 0.3, ((25, 0.6), (50, 0.5), (100, 0.3)))
            >>> ending.at(0.5), ending.at(0.2)
            (0.5, nan)
        """
        seen = [value for updates, value in self.looks if updates <= part * self.num_steps]
        return seen[-1] if seen else math.nan


def as_written(ending: Ending) -> Ending:
    """The run with Python's numbers and tuples, which a file or an array may have made others of.

    Example:
        >>> as_written(Ending(8, 0.1, 0, 9, 9, False, 0.3, [[9, 0.3]])).looks
        ((9, 0.3),)
    """
    looks = tuple((int(updates), float(value)) for updates, value in ending.looks)
    return ending._replace(value=float(ending.value), looks=looks)
