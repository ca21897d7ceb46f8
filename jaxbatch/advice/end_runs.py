"""Runs of a length that is fixed beforehand, each with a schedule of rates that is stretched over it."""

from collections.abc import Iterator
from typing import NamedTuple

from jaxbatch.advice.ending import Ending
from jaxbatch.advice.probes import ProbePrograms, even_looks
from jaxbatch.batches import steps
from jaxbatch.training.fitting import fit_with
from jaxbatch.training.plans import FitConfig
from jaxbatch.training.tasks import Task

_LOOKS = 16  # of a run of the longest length, about


class EndRunner(NamedTuple):
    """Makes runs of one task.

    Args:
        programs: see :class:`jaxbatch.advice.probes.ProbePrograms`.
        metric: its name.
        longest: updates of the longest run, by batch size: how often a run looks depends on it.
    """

    programs: ProbePrograms
    metric: str
    longest: dict[int, int]

    @property
    def task(self) -> Task:
        """The task of the runs."""
        return self.programs.task

    def run(self, batch_size: int, learning_rate: float, num_steps: int, seed: int) -> Iterator[Ending]:
        """The run so far at each look, to its end or to divergence."""
        programs = self.programs.at(learning_rate, num_steps)
        config = FitConfig(programs.optimizer, batch_size, steps(num_steps), seed=seed, evaluations_per_epoch=self.looks_per_epoch(batch_size))
        records, looks = fit_with(programs, config, self.programs.start(learning_rate, seed, num_steps)), list[tuple[int, float]]()
        for record in records:
            value = float(record[f"test_{self.metric}"])
            looks.append((record["updates"], value))
            yield Ending(batch_size, learning_rate, seed, num_steps, record["updates"], record["diverged"], value, tuple(looks))

    def looks_per_epoch(self, batch_size: int) -> int:
        """How often a run evaluates: about 16 times in the longest run, at the same places in shorter ones, so that they share programs."""
        per_epoch = self.task.num_examples // batch_size
        return even_looks(per_epoch, max(1, round(_LOOKS * per_epoch / self.longest[batch_size])))
