"""Decides how the batches of a task go through a step. The cut of a size is the same for programs that run here and for those that are
compiled for elsewhere.

Axes: B examples in a batch, K groups, N devices.
"""

from typing import Any

from jaxbatch.data.streams import is_stream
from jaxbatch.gradients.cut import Cut
from jaxbatch.gradients.groups import check_count, check_microbatch_size, check_num_groups
from jaxbatch.gradients.independence import has_independent_prepare
from jaxbatch.gradients.part_norms import NoiseMonitor
from jaxbatch.gradients.parts import choose_method
from jaxbatch.layers import loops_are_slow
from jaxbatch.training.devices import AXIS, alone
from jaxbatch.training.tasks import Task, smallest

MOST_EVALUATED = 500  # examples at a time where nothing bounds them; more are hardly faster


def choose_cut(
    task: Task,
    params: Any,
    batch_size: int,
    *,
    num_groups: int | None = None,
    microbatch_size: int | None = None,
    num_devices: int = 1,
    monitor: NoiseMonitor | None = None,
    may_piece: bool = True,
) -> Cut:
    """Decides how batches of ``batch_size`` are cut, on the platform that is compiled for.

    A Python loop runs the pieces of a step for a stream, and for several parts if compiled loops are slow. If a batch has fewer parts
    than the monitor asks for, it is cut further: only to be measured, where one program can hold both forms of a step, else always.

    A compiled step takes each part's examples when it works on it, so that the batch is never in memory whole, except if it has no loop over
    parts: no parts at all, or groups side by side, or one after another without a loop, where the compiler keeps what all of them need
    anyway. A batch is also taken whole if ``prepare`` changes an example with the others in its batch: on one device it sees all of them, and
    its numbers must not depend on the cut.

    Args:
        task: see :class:`jaxbatch.Task`.
        params: only their shapes are used.
        batch_size: B, over all devices.
        num_groups: K, the updates per batch; ``None``: one.
        microbatch_size: the most examples that a device works on at a time; ``None``: as the task says.
        num_devices: N.
        monitor: how noise is measured.
        may_piece: False where steps are always whole, as in a sweep.

    Raises:
        ValueError: K does not divide B, a size is below 1, or there is no device.
    """
    groups, several_devices, axis = 1 if num_groups is None else num_groups, num_devices > 1, AXIS if num_devices > 1 else None
    check_num_groups(groups, batch_size)
    check_microbatch_size(microbatch_size)
    if num_devices < 1:
        raise ValueError("devices is empty: at least 1 is needed.")
    loss_fn, streamed, in_cache = alone(task.loss_fn), is_stream(task.train_data), task._replace(microbatch_size=None).examples_at_a_time

    def cut_at(size: int | None) -> Cut:
        several = size is not None and batch_size // groups > size * num_devices
        in_pieces = may_piece and (streamed or (several and slow(size)))
        splits_prepare = several_devices or (in_pieces and (several or groups > 1))
        at_a_time = size if in_pieces else smallest(size, in_cache)
        return Cut(batch_size, groups, num_devices, at_a_time, axis, None, at_a_time, in_pieces, splits_prepare=splits_prepare)

    slow = lambda size: loops_are_slow(loss_fn, params, task.shapes_of_batch(smallest(size, in_cache) or batch_size))
    asked = smallest(microbatch_size, task.microbatch_size)
    cut = cut_at(asked)
    further = _finer(cut, monitor)
    if monitor is not None and further is not None:
        one_form = several_devices or task.update_model_state is not None or streamed
        always = monitor.every == 1 or one_form or slow(asked)
        cut = cut_at(further)._replace(unmeasured=cut.microbatch_size) if always else cut._replace(to_measure=further)
    if cut.in_pieces:
        return cut
    method = choose_method(loss_fn, params, task.shapes_of_batch(cut.share), cut.share) if groups > 1 else None
    parts = (smallest(cut.to_measure, cut.microbatch_size) or cut.share) < cut.share or method == "map"
    return cut._replace(by_part=parts and has_independent_prepare(task), method=method)


def _finer(cut: Cut, monitor: NoiseMonitor | None) -> int | None:
    """A smaller microbatch, if the batch has fewer parts than the monitor asks for and can be cut further; else None.

    Example:
        >>> _finer(Cut(9), NoiseMonitor()), _finer(Cut(9, microbatch_size=3), NoiseMonitor())
        (5, None)
        >>> _finer(Cut(16, 2, 2), NoiseMonitor(parts=8))  # each device's share of a group, 4 examples, is cut in 2
        2
    """
    if monitor is None:
        return None
    each = -(-monitor.parts // (cut.num_groups * cut.num_devices))
    wanted, there = -(-cut.share // each), -(-cut.share // cut.at_a_time)
    return wanted if there < each and wanted < cut.share else None


def choose_evaluation_size(task: Task, microbatch_size: int | None = None, evaluation_batch_size: int | None = None, *, at_once: int = 1) -> int:
    """The number of test examples that are evaluated at a time: no more than training works on at a time where that is bounded.

    So evaluation needs no more memory than training has, and on a CPU its activations stay in the cache, too.

    Args:
        task: its ``microbatch_size``, and on a CPU its ``cpu_microbatch_size``, are bounds.
        microbatch_size: the run's own bound, see :class:`jaxbatch.FitConfig`.
        evaluation_batch_size: what the user asks for, which holds; ``None``: the smallest bound, and 500 where there is none.
        at_once: runs that are evaluated at the same time. The 500 are shared among them; the bounds are those of each, as in training.

    Raises:
        ValueError: a size is not a whole number of at least 1.

    Example:
        >>> task = Task(None, None, None, None, None, microbatch_size=8)
        >>> choose_evaluation_size(task), choose_evaluation_size(task, 4), choose_evaluation_size(task, None, 100)
        (8, 4, 100)
    """
    check_microbatch_size(microbatch_size)
    check_count("evaluation_batch_size", evaluation_batch_size, optional=True)
    if evaluation_batch_size is not None:
        return int(evaluation_batch_size)
    return min(-(-MOST_EVALUATED // at_once), smallest(microbatch_size, task.examples_at_a_time) or MOST_EVALUATED)
