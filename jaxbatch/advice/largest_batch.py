"""The largest batch whose training fits in a device's memory: found on a line through compiled sizes, and verified by compiling.

Memory grows almost linearly with the batch, apart from small batches, where workspaces of fixed size weigh, and apart from
TPUs near their limit, where the compiler starts to compute things twice in order to fit. So the answer is never taken from
the line: the size that is returned was compiled and fits, and the next one was compiled and does not. Compilers choose
algorithms by size, so memory may also fall from one size to the next; then a larger size may fit again, which is not looked for.
"""

import bisect
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxbatch.advice.memory import make_measure
from jaxbatch.advice.memory_parts import Memory
from jaxbatch.machine.targets import Target, as_bytes, find_target, format_bytes
from jaxbatch.training.tasks import Task

FIRST = 64  # the first size that is compiled; from here on most networks' memory is a line
CAP = 2**24  # larger than any batch that anybody trains with; memory that does not grow would otherwise have no end
UNKNOWN = 2**60  # bytes; a compiler that refuses without a number is taken to need more
MARGIN = 0.05  # enough for most steps in docs/memory.md, not for small convolutions in float32 on a GPU


class LargestBatch(NamedTuple):
    """The answer and what it rests on."""

    batch_size: int
    memory: Memory  # of training with this batch
    next_memory: Memory | None  # of the next larger one, which does not fit; None: even the cap fits
    limit: int  # bytes that a step may need: the budget less the margin
    profile: dict[int, Memory]  # everything that was compiled

    @property
    def bytes_per_example(self) -> float:
        """The slope of the line between the smallest and the largest compiled size that fit; from 0 on, where it would begin below 0."""
        return self._line()[1]

    @property
    def fixed_bytes(self) -> float:
        """Where that line meets a batch of no example."""
        return self._line()[0]

    def _line(self) -> tuple[float, float]:
        fit = sorted(size for size, memory in self.profile.items() if memory.step <= self.limit)
        small, large = self.profile[fit[0]], self.profile[fit[-1]]
        slope = (large.step - small.step) / max(1, large.batch_size - small.batch_size)
        level = small.step - slope * small.batch_size
        return (level, slope) if level >= 0 else (0.0, large.step / large.batch_size)


def max_batch_size(
    task: Task | Callable[..., Any],
    *,
    optimizer: Any = None,
    target: str | Target = "here",
    budget: str | float | None = None,
    margin: float = MARGIN,
    **settings: Any,
) -> int:
    """The largest batch size, any integer, with which :func:`jaxbatch.fit` fits on a target, evaluation included. Nothing is run.

    Both this size, which fits, and the next one, which does not, are compiled. The test set is evaluated some examples at a time,
    whatever the batch size: if that alone does not fit, the message says what to set. The search ends at 2²⁴ = 16,777,216 examples; if this is the
    answer, it is only known that at least so many fit.

    Args:
        task, optimizer, target: as :func:`jaxbatch.memory_profile` takes them. Data sets on the device count.
        budget: bytes that training may need on each device, such as ``"8GiB"``. ``None``: what JAX's programs can use on the
            target (three quarters of a GPU's memory by default).
        margin: the share of the budget that is left free, because the compiler does not know the allocator's overhead.
        settings: ``num_groups``, ``num_devices`` (the answer is a multiple of both), ``microbatch_size``,
            ``evaluation_batch_size``, ``monitor``, ``arguments``, ``donate``, ``effort``: see :func:`jaxbatch.memory_profile`.

    Raises:
        ValueError: not even the smallest batch fits (the message says how much is missing); memory does not depend on the size; or the settings are
            wrong.

    Example:
        >>> import optax
        >>> from jaxbatch import MLP, classification_task, load_dataset, memory_profile
        >>> task = classification_task(MLP(), load_dataset("digits"), microbatch_size=10**6)
        >>> size = max_batch_size(task, optimizer=optax.sgd(0.1), target="cpu", budget="256MiB", margin=0)
        >>> profile = memory_profile(task, [size, size + 1], optimizer=optax.sgd(0.1), target="cpu")
        >>> profile[size].total <= 2**28 < profile[size + 1].total
        True
    """
    return find_largest_batch(task, optimizer=optimizer, target=target, budget=budget, margin=margin, **settings).batch_size


def find_largest_batch(
    task: Task | Callable[..., Any],
    *,
    optimizer: Any = None,
    target: str | Target = "here",
    budget: str | float | None = None,
    margin: float = MARGIN,
    **settings: Any,
) -> LargestBatch:
    """:func:`max_batch_size` with everything that the answer rests on."""
    device, limit = find_limit(target, budget, margin)
    measure = make_measure(task, optimizer=optimizer, target=device, **settings)
    unit = (settings.get("num_groups") or 1) * (settings.get("num_devices") or 1)  # other sizes leave devices with fillers
    profile: dict[int, Memory] = {}

    def need(size: int) -> int:
        if size not in profile:
            profile[size] = measure(size)
            if profile[size].kept <= limit < max(profile[size].evaluation, profile[size].ordering):  # whatever the batch size
                raise ValueError(_too_large_beside(profile[size], device, limit, margin))
        return profile[size].step

    kept = lambda: min(memory.kept for memory in profile.values())
    size = search_largest(need, limit, range(unit, max(unit, CAP) + 1, unit), FIRST, kept)
    if size == 0:
        raise ValueError(_too_large(profile[unit], device, limit, margin))
    if len(profile) > 1 and len({memory.step for memory in profile.values()}) == 1:
        raise ValueError("memory does not depend on the batch size: does the function `arguments` use the size that it gets?")
    return LargestBatch(size, profile[size], profile.get(size + unit), limit, dict(sorted(profile.items())))


def find_limit(target: str | Target, budget: str | float | None, margin: float, name: str = "budget") -> tuple[Target, int]:
    """The target, and the bytes that training may need there: the budget, or what the target has, less the margin.

    Raises:
        ValueError: one of them is wrong, or no budget is given and the target's memory is not known.

    Example:
        >>> find_limit("cpu", "100MB", 0.05)[1]
        95000000
    """
    device = find_target(target)
    if isinstance(margin, bool) or not isinstance(margin, numbers.Real) or not 0 <= margin < 1:
        raise ValueError(f"margin={margin!r} must be a number of at least 0 and below 1.")
    limit = int((device.usable if budget is None else as_bytes(budget, name)) * (1 - margin))
    if limit < 1:
        raise ValueError(f"{name}=None, and the memory of {device.title} is not known: give {name}, for example '16GiB'.")
    return device, limit


def search_largest(need: Callable[[int], int], limit: int, sizes: Sequence[int], first: int, fixed: Callable[[], int] = lambda: 0) -> int:
    """The largest of ``sizes`` that needs at most ``limit``, while the next one needs more; 0 if not even the smallest fits.

    Looks where the line through two known sizes near the limit meets it. If the need is no line, the search goes
    on in growing steps, and then halves the interval of possible answers.

    Args:
        need: the bytes that a size needs; they grow with the size.
        limit: see above.
        sizes: in ascending order, for example a ``range``.
        first: about where to look first.
        fixed: what every size needs, asked for after the first look; for the second look.

    Example:
        >>> looks = []
        >>> search_largest(lambda n: looks.append(n) or 100 + 7 * n, 10_000, range(1, 2**20), 64), looks
        (1414, [64, 1051, 1414, 1415])
    """
    known: dict[int, int] = {}
    low, high, gap = -1, len(sizes), 1  # the answer's place is at least low and below high
    number = min(bisect.bisect_left(sizes, first), high - 1)
    while high - low > 1:
        size = sizes[number]
        known[size] = need(size)
        low, high = (number, high) if known[size] <= limit else (low, number)
        guess = _meets_limit(known, limit, fixed)
        bracketed = low >= 0 and high < len(sizes)
        number = (low if low >= 0 else high) if guess is None else bisect.bisect_right(sizes, guess) - 1
        if bracketed and (guess is None or len(known) > 12):
            number = (low + high) // 2
        elif number <= low:  # the line says that low is the answer: see whether the next one fits, then ever larger ones
            number, gap = low + gap, 8 * gap
        elif number >= high:
            number, gap = high - gap, 8 * gap
        else:
            gap = 1
        if bracketed and not low < number < high:  # a jump beyond the other end
            number, gap = (low + high) // 2, 1
        number = max(low + 1, min(number, high - 1))
    return sizes[low] if low >= 0 else 0


def _meets_limit(known: dict[int, int], limit: int, fixed: Callable[[], int]) -> int | None:
    """Where the line through two known sizes near the limit, but not near each other, meets it; None: there is none."""
    measured = sorted((size for size in known if known[size] < UNKNOWN), key=lambda size: abs(known[size] - limit))
    if len(measured) == 1:  # somewhat less than the line says, so that the second look probably fits
        slope = max(1, known[measured[0]] - fixed()) / measured[0]
        return int(0.9 * max(0, limit - fixed()) / slope)
    distant = [size for size in measured if abs(size - measured[0]) > measured[0] // 20]  # on CPU, sizes nearby differ by chance
    if not distant:
        return None
    a, b = measured[0], distant[0]
    slope = (known[b] - known[a]) / (b - a)
    return int(a + (limit - known[a]) / slope) if slope > 0 else None


def _too_large(memory: Memory, target: Target, limit: int, margin: float) -> str:
    return (
        f"batch_size={memory.batch_size} already {_needs(memory.step, target, limit, margin)} {_kept(memory)}, activations and workspaces "
        f"{format_bytes(memory.temporaries + memory.results)}."
    )


def _too_large_beside(memory: Memory, target: Target, limit: int, margin: float) -> str:
    """Why training does not fit, although a step with some batch size might."""
    if memory.evaluation > limit:
        return (
            f"evaluating {memory.evaluation_batch_size} test examples at a time {_needs(memory.evaluation, target, limit, margin)} "
            f"{_kept(memory)}, activations and workspaces {format_bytes(memory.evaluation - memory.kept)}. Give a smaller "
            "evaluation_batch_size, here (jaxbatch.advise takes none) and in FitConfig, or a task with a smaller microbatch_size."
        )
    return (
        f"drawing the order of an epoch {_needs(memory.ordering, target, limit, margin)} {_kept(memory)}, the order and its copies "
        f"{format_bytes(memory.ordering - memory.kept)}. Take a part of the data at a time."
    )


def _needs(count: int, target: Target, limit: int, margin: float) -> str:
    free = f" (the budget less the margin of {margin:.0%})" if margin else ""
    return (
        f"needs {format_bytes(count)} on {target.title}, but only {format_bytes(limit)}{free} are there: {format_bytes(count - limit)} are missing."
    )


def _kept(memory: Memory) -> str:
    last = f", those of the last record {format_bytes(memory.last_state)}" if memory.last_state else ""
    test = f", test data {format_bytes(memory.test_data)}" if memory.test_data else ""
    return (
        f"Parameters and optimizer state are {format_bytes(memory.parameters + memory.optimizer_state)}{last}, data {format_bytes(memory.data)}{test}"
    )
