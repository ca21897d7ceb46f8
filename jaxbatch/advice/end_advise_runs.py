"""Which batch size and learning rate end best at a fixed length, for runs that any function makes."""

import math
from collections.abc import Callable, Sequence

from jaxbatch.advice.any_runs import AnyEndRuns, MakeRun, check_run, takes_length
from jaxbatch.advice.end_advice import EndAdvice
from jaxbatch.advice.end_advising import EndSetting, conclude_within
from jaxbatch.advice.end_estimate import EndSpace
from jaxbatch.advice.end_failures import CountedRuns, Failed, endings_of, fails_always, space_that_fits
from jaxbatch.advice.end_law import choose_scale
from jaxbatch.advice.end_lengths import check_full_runs, check_lengths, checked_budget
from jaxbatch.advice.end_request import FEWEST_STEPS, Metric, as_metric, check_known_ends, first_size
from jaxbatch.advice.end_search import search_endings
from jaxbatch.advice.ending import Ending
from jaxbatch.advice.looks import OutOfMemory
from jaxbatch.advice.request import LEARNING_RATES, check_functions, check_lists
from jaxbatch.advice.run_sizes import sizes_to_choose, steps_at
from jaxbatch.advice.watch import Watch, print_progress
from jaxbatch.batches import Duration, check_seed
from jaxbatch.kinds import check_kind


def advise_runs_within(
    run: MakeRun,
    goal: str | Metric,
    within: Duration,
    *,
    horizon: Duration | None = None,
    batch_sizes: Sequence[int] | None = None,
    learning_rates: Sequence[float] = LEARNING_RATES,
    num_examples: int | None = None,
    start: float | None = None,
    full_runs: float = 8.0,
    budget: float | None = None,
    seed: int = 0,
    known: Sequence[Ending | Failed] = (),
    on_run: Callable[[Ending | Failed, int], None] = lambda ending, number: None,
    on_progress: Callable[[str], None] | None = print_progress,
) -> EndAdvice:
    """Recommends the batch size and rate whose run of a fixed length ends best, for runs that a function makes in any framework.

    It is the search of :func:`jaxbatch.advise_within`, over the runs of :func:`jaxbatch.advise_runs`.

    Args:
        run: ``run(batch_size, learning_rate, seed, num_steps)`` that yields :class:`jaxbatch.Look` as for :func:`jaxbatch.advise_runs`, up to
            ``num_steps`` updates, over which its schedule is to be stretched.
        goal: a metric and its direction, as ``"val_loss<"``; the looks hold it.
        within: the length of a whole run: steps, examples, or epochs with ``num_examples``.
        horizon: the length that the answer is for, if it is too long to be made; see :func:`jaxbatch.advise_within`.
        batch_sizes: to choose from; ``None``: powers of two from 8 to 1,024, or up to half of ``num_examples``, with at least 8 updates.
        learning_rates: to choose from.
        num_examples: in the training set.
        start: the metric before training, if it is known.
        full_runs: what all runs together may cost, in runs of the length ``within``.
        budget: seconds from the call on. When they are over, no further run begins.
        seed: the seed of the first run; each later one has its own.
        known: what an earlier call that was stopped gave to its ``on_run``; it is not made again.
        on_run: called after each run with what it showed and its number.
        on_progress: called with a line on what is going on. ``None``: nothing is said.

    Returns:
        An :class:`EndAdvice`. After three runs that failed, it rests on the others, and its ``doubts`` say why they did.

    Raises:
        ValueError: an argument is of another kind or out of range, or ``run`` does not take ``num_steps``.

    Example:
        >>> from jaxbatch import Look, steps
        >>> def run(batch_size, learning_rate, seed, num_steps):  # stands for a training loop
        ...     gained = num_steps * min(learning_rate, 0.01 / learning_rate) / (1 + 64 / batch_size)
        ...     yield Look(num_steps, num_steps * batch_size, None, 1 / (1 + gained) + 1e-3 * (seed % 3))
        >>> advice = advise_runs_within(run, "error<", steps(200), batch_sizes=[16, 64], full_runs=4, start=1.0, on_progress=None)
        >>> advice.batch_size, advice.learning_rate
        (64, 0.1)
    """
    check_run(run)
    if not takes_length(run):
        raise ValueError("run must take num_steps, the updates of the whole run, over which its schedule is stretched and after which it ends.")
    check_lists(batch_sizes, learning_rates, some=True)
    check_lengths(within, horizon)
    check_full_runs(full_runs)
    check_functions(on_run=on_run, on_progress=on_progress)
    check_seed(seed)
    check_kind("start", start, float | int | None)
    if not isinstance(known, Sequence) or not all(isinstance(one, Ending | Failed) for one in known):
        raise ValueError(f"known={known!r} must be a list of what an earlier call gave to on_run.")
    watch = Watch(checked_budget(budget), on_progress)
    setting = settle_runs(as_metric(goal), within, horizon, batch_sizes, learning_rates, num_examples, start)
    check_known_ends([one for one in known if isinstance(one, Ending)], setting.space)
    made = search_any_endings(AnyEndRuns(run), setting.space, full_runs, seed, known, on_run, watch)
    return conclude_any(within, horizon, setting, made)


def settle_runs(
    metric: Metric,
    within: Duration,
    horizon: Duration | None,
    batch_sizes: Sequence[int] | None,
    learning_rates: Sequence[float],
    num_examples: int | None,
    start: float | None,
) -> EndSetting:
    """What is settled before the first run."""
    sizes, rates = list(sizes_to_choose(batch_sizes, num_examples)), tuple(sorted(map(float, {*learning_rates})))
    payable = steps_at(within, sizes, num_examples, "within")
    if batch_sizes is None:
        sizes = [size for size in sizes if payable[size] >= FEWEST_STEPS]
    if not sizes:
        raise ValueError(f"within={within} has fewer than {FEWEST_STEPS} updates at every batch size: give more.")
    asked = payable if horizon is None else steps_at(horizon, sizes, num_examples, "horizon")
    if any(asked[size] < payable[size] for size in sizes):
        raise ValueError(f"horizon={horizon} must not be shorter than within={within}, the longest run that may be made.")
    begun, middle = math.nan if start is None else float(start), sizes[len(sizes) // 2]
    space = EndSpace(
        tuple(sizes),
        rates,
        {size: int(asked[size]) for size in sizes},
        {size: int(payable[size]) for size in sizes},
        choose_scale(metric.above, begun, [], 1000),
        begun,
        float(asked[middle] * middle),
    )
    return EndSetting(metric, space, num_examples or 2**62, 0, ())


def search_any_endings(
    runs: AnyEndRuns,
    space: EndSpace,
    full_runs: float,
    seed: int,
    known: Sequence[Ending | Failed],
    on_run: Callable[[Ending | Failed, int], None],
    watch: Watch,
) -> tuple[Ending | Failed, ...]:
    """Makes run after run. A size that does not fit is out, with all that are larger; what was learned of them is left aside."""
    made = list(known)
    while True:
        inside = space_that_fits(made, space)
        if not inside.batch_sizes or fails_always(made):
            return tuple(made)

        def report(one: Ending | Failed) -> None:
            watch.say(f"run {len(made) + 1}: {describe_ending(one)}")
            on_run(one, len(made))
            made.append(one)

        counted = CountedRuns(runs, seed, made)
        try:
            search_endings(
                counted,
                inside,
                first_size=first_size(inside.payable_steps),
                most=full_runs,
                known=endings_of(made, inside),
                on_ending=lambda ending, _: report(ending),
                within_budget=lambda: not watch.is_over,
            )
            return tuple(made)
        except (OutOfMemory, RuntimeError) as error:
            if error is not counted.error:  # it is not the run's, but that of on_run
                raise
            report(counted.failed())


def describe_ending(one: Ending | Failed) -> str:
    """A run in a line.

    Example:
        >>> describe_ending(Ending(8, 0.1, 0, 100, 100, False, 0.3, ()))
        'B = 8, learning rate 0.1, 100 updates: ended with 0.3'
    """
    setting = f"B = {one.batch_size}, learning rate {one.learning_rate:.3g}"
    if isinstance(one, Failed):
        return f"{setting}: {'failed' if one.fits else 'does not fit'}: {one.reason}"
    part = f"{one.updates} of {one.num_steps} updates" if one.updates < one.num_steps else f"{one.updates} updates"
    return f"{setting}, {part}: {'diverged' if one.diverged else f'ended with {one.value:.4g}'}"


def conclude_any(within: Duration, horizon: Duration | None, setting: EndSetting, made: Sequence[Ending | Failed]) -> EndAdvice:
    """The advice that follows from runs. Nothing is run."""
    space, considered = space_that_fits(made, setting.space), setting.space.batch_sizes
    sizes, failed = space.batch_sizes, [one for one in made if isinstance(one, Failed)]
    unfit, broken = [one for one in failed if not one.fits], [one for one in failed if one.fits or one.batch_size in sizes]
    doubts = []
    if not sizes:
        doubts.append(f"No batch size fits into memory: {unfit[-1].reason}")
    elif len(sizes) < len(considered):
        setting = setting._replace(space=space, largest_batch_size=sizes[-1])
        doubts.append(f"B = {considered[len(sizes)]} did not fit into memory, and it and larger ones are left out.")
    if broken:
        ended = " one after another, so the search ended" if fails_always(made) else ""
        doubts.append(f"{len(broken)} of {len(made)} runs failed{ended}; the last one: {broken[-1].reason}")
    advice = conclude_within(within, horizon, setting, None, endings_of(made, space) if sizes else ())
    first = () if advice.batch_size is None and failed else advice.doubts
    return advice._replace(doubts=(*first, *doubts))
