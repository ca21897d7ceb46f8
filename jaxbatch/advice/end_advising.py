"""Which batch size and rate end best when the length of the run is fixed, measured on the user's own task."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from jaxbatch.advice.end_advice import EndAdvice
from jaxbatch.advice.end_doubts import doubts_of_ends, why_no_end
from jaxbatch.advice.end_estimate import BANDS, EndSpace, largest_within, make_estimate
from jaxbatch.advice.end_law import BETA
from jaxbatch.advice.end_lengths import Seconds, checked_budget
from jaxbatch.advice.end_request import EndQuestion, Metric, check_earlier, check_end_question, check_known_ends, choose_sizes, first_size, make_space
from jaxbatch.advice.end_rows import rows_of
from jaxbatch.advice.end_runs import EndRunner
from jaxbatch.advice.end_search import has_ended, search_endings
from jaxbatch.advice.ending import Ending, as_written
from jaxbatch.advice.probes import ProbePrograms, make_adjustable
from jaxbatch.advice.request import LEARNING_RATES
from jaxbatch.advice.rules import rules_for
from jaxbatch.advice.settling import largest_that_fits
from jaxbatch.advice.throughput import Throughput
from jaxbatch.advice.timed_updates import find_throughput
from jaxbatch.advice.watch import Watch, print_progress
from jaxbatch.batches import Duration
from jaxbatch.gradients.run_lengths import for_length
from jaxbatch.gradients.updates import check_make_optimizer
from jaxbatch.intervals import around, unknown
from jaxbatch.training.tasks import Task
from jaxbatch.training.train_state import start_shapes


class EndSetting(NamedTuple):
    """What is settled before the first run."""

    metric: Metric
    space: EndSpace
    num_examples: int
    largest_batch_size: int | None  # that memory holds; None: every size that is considered fits; 0: not known
    rules: tuple[str, ...]


class EndRan(NamedTuple):
    """A run has ended."""

    ending: Ending
    number: int


EndEvent: TypeAlias = Throughput | EndSetting | EndRan | str


class EndBegun(NamedTuple):
    """What is known of an earlier search for the same question, which was stopped; none of it is measured again."""

    throughput: Throughput | None = None
    setting: EndSetting | None = None
    endings: tuple[Ending, ...] = ()


def advise_within(
    task: Task,
    goal: str | Metric,
    within: Duration | Seconds,
    *,
    optimizer: Callable[..., Any],
    horizon: Duration | None = None,
    batch_sizes: Sequence[int] | None = None,
    learning_rates: Sequence[float] = LEARNING_RATES,
    full_runs: float = 8.0,
    target: str = "here",
    memory: str | float | None = None,
    budget: float | None = None,
    seed: int = 0,
    throughput: Throughput | None = None,
    known: Sequence[Ending] = (),
    on_ending: Callable[[Ending, int], None] = lambda ending, number: None,
    on_progress: Callable[[str], None] | None = print_progress,
) -> EndAdvice:
    """Recommends the batch size and learning rate whose run of a fixed length ends best, and says how large a batch loses nothing.

    Short runs, each with the schedule of its own length, come first, then longer ones, then whole ones. All enter one law of what a run
    ends with by batch size, rate and length (:mod:`jaxbatch.advice.end_law`).

    Args:
        task: its ``test_data`` are what the end is judged on; hold them out of the training set (:func:`jaxbatch.hold_out`).
        goal: a metric and its direction, as ``"loss<"`` or ``"accuracy>"``.
        within: the length of the run: ``jaxbatch.epochs(10)``, ``examples``, ``tokens``, ``steps`` or :func:`jaxbatch.seconds`.
        optimizer: ``(learning_rate, num_steps) -> optimizer``, such as ``jaxbatch.scheduled(optax.adamw, "cosine", warmup=0.05)``, or
            ``learning_rate -> optimizer`` for a constant rate.
        horizon: the length of the run that the answer is for, if it is too long to be made here: only runs up to ``within`` are made, and
            the law is read at the horizon.
        batch_sizes: to choose from; ``None``: powers of two up to half the data set.
        learning_rates: to choose from.
        full_runs: what all runs together may cost, in runs of the length ``within``.
        target: the device whose memory bounds the batch; see :func:`jaxbatch.advise`. Runs, and times for ``seconds``, are of this one.
        memory: bytes that a step may need, such as ``"8GiB"``. ``None``: what the device has.
        budget: seconds from the call on. When they are over, no further run begins. ``None``: ``full_runs`` alone decides.
        seed: the seed of the first run; each later one has its own.
        throughput: times of an update, if they were measured before; only ``seconds`` needs them.
        known: runs of an earlier call that was stopped; they are not made again.
        on_ending: called after each run, with the run and its number, for records.
        on_progress: called with a line on what is going on; by default it is printed to standard error. ``None``: nothing is said.

    Returns:
        An :class:`EndAdvice`. If no run comes to its end, it holds no batch size, and its ``doubts`` say why.

    Raises:
        ValueError: an argument is of another kind or out of range; the task lacks the metric; the data hold NaN.

    References:
        Shallue et al., `Measuring the Effects of Data Parallelism <https://arxiv.org/abs/1811.03600>`_, 2018: the best rate of every
        batch size at a fixed budget. Li et al., `Step Law <https://arxiv.org/abs/2503.04715>`_, 2025, and Bergsma et al., `Power Lines
        <https://arxiv.org/abs/2505.13738>`_, 2025: how both change with the length of the run.
    """
    check_earlier(throughput, known, on_ending, on_progress)
    question = EndQuestion(
        goal,
        optimizer,
        within,
        horizon,
        batch_sizes=batch_sizes,
        learning_rates=learning_rates,
        full_runs=full_runs,
        target=target,
        memory=memory,
        budget=budget,
        seed=seed,
    )

    def on_event(event: EndEvent) -> None:
        if isinstance(event, EndRan):
            on_ending(*event)
        elif isinstance(event, str) and on_progress is not None:
            on_progress(event)

    return answer_within(task, question, on_event, EndBegun(throughput, None, tuple(map(as_written, known))))


def answer_within(task: Task, question: EndQuestion, on_event: Callable[[EndEvent], None], begun: EndBegun = EndBegun()) -> EndAdvice:
    """The search behind :func:`advise_within`.

    Args:
        task: see :func:`advise_within`.
        question: what is asked.
        on_event: called with everything that was measured as soon as it is known, for records, and with messages.
        begun: what an earlier call gave to its ``on_event``.
    """
    watch = Watch(checked_budget(question.budget), on_event)
    watch.say("looking at the task")
    metric, sizes = check_end_question(task, question), choose_sizes(task, question.batch_sizes)
    rates = sorted({float(rate) for rate in question.learning_rates})
    check_make_optimizer(question.optimizer, rates[0], "optimizer", 100)
    make = for_length(question.optimizer, 100)
    programs = ProbePrograms(task, make_adjustable(question.optimizer, rates[0], start_shapes(task), 100), rates[0], 100)
    throughput, setting = begun.throughput, begun.setting
    if throughput is None and isinstance(question.within, Seconds):
        shared: dict[str, Any] = {"programs": programs.at(rates[0]), "start": lambda: programs.start(rates[0], question.seed)}
        throughput = find_throughput(task, make(rates[0]), sizes, "here", watch.left, watch.say, **shared)
        on_event(throughput)
    if setting is None:
        begin = programs.start(rates[0], question.seed)
        first = programs.at(rates[0])
        start = float(first.test()(first.data(jax.devices()[:1])[1], begin)[metric.name])
        largest = largest_that_fits(task, make(rates[0]), sizes, question.target, question.memory)
        sizes = tuple(size for size in sizes if not largest or size <= largest)
        if not sizes:
            raise ValueError(f"memory={question.memory!r} holds a batch of at most {largest}: there is nothing to choose from.")
        space = make_space(task, question, metric, sizes, start, throughput)
        setting = EndSetting(metric, space, task.num_examples, largest, tuple(rules_for(begin.opt_state)))
        on_event(setting)
    check_known_ends(begun.endings, setting.space)
    runner = EndRunner(programs, metric.name, dict(setting.space.payable_steps))

    def report(ending: Ending, number: int) -> None:
        end = "diverged" if ending.diverged else f"{metric.name} {ending.value:.4g}"
        part = f"{ending.updates} of {ending.num_steps} updates" if ending.updates < ending.num_steps else f"{ending.updates} updates"
        watch.say(f"run {number + 1}: B = {ending.batch_size}, learning rate {ending.learning_rate:.3g}, {part}: {end}")
        on_event(EndRan(ending, number))

    endings = search_endings(
        runner,
        setting.space,
        first_size=first_size(setting.space.payable_steps),
        most=question.full_runs,
        seed=question.seed,
        known=begun.endings,
        on_ending=report,
        within_budget=lambda: not watch.is_over,
    )
    return conclude_within(question.within, question.horizon, setting, throughput, endings)


def conclude_within(
    within: Duration | Seconds, horizon: Duration | None, setting: EndSetting, throughput: Throughput | None, endings: Sequence[Ending]
) -> EndAdvice:
    """The advice that follows from runs. Nothing is run.

    Args:
        within: the length of the longest run.
        horizon: the length that the answer is for, if it is longer.
        setting: what was settled before the first run.
        throughput: times of an update, if there are any.
        endings: the runs.
    """
    space = setting.space
    horizon = None if space.num_steps == space.payable_steps else horizon  # the runs were as long as that
    cost = sum(ending.updates / space.num_steps[ending.batch_size] for ending in endings)
    common: dict[str, Any] = {
        "metric": setting.metric,
        "within": within,
        "horizon": horizon,
        "start": setting.space.start,
        "cost_in_runs": cost,
        "endings": tuple(endings),
        "throughput": throughput,
        "largest_batch_size": setting.largest_batch_size,
        "rules": setting.rules,
    }
    if not has_ended(endings, space):
        why = why_no_end(setting.metric.name, endings)
        nothing: dict[str, Any] = {"choices": (), "best_size": unknown(), "largest_in_noise": None, "largest_within": (None,) * len(BANDS)}
        return EndAdvice(None, None, growth=unknown(), doubts=(why,), **nothing, **common)
    estimate = make_estimate(endings, space, final=True)
    size, rate = space.batch_sizes[estimate.best[0]], space.learning_rates[estimate.best[1]]
    drawn = np.array(space.batch_sizes)[estimate.value.min(2).argmin(1)]
    low, high = np.quantile(drawn, [0.05, 0.95], method="closest_observation")
    beta = np.quantile(estimate.fitted.draws[:, BETA], [0.025, 0.5, 0.975])
    return EndAdvice(
        size,
        rate,
        choices=rows_of(estimate, space, endings),
        best_size=around(float(size), min(float(low), size), max(float(high), size), len(endings)),
        largest_in_noise=largest_within(estimate, space, None),
        largest_within=tuple(largest_within(estimate, space, band) for band in BANDS),
        growth=around(float(beta[1]), float(beta[0]), float(beta[2]), len(endings)),
        doubts=tuple(doubts_of_ends(estimate, space, endings, setting.num_examples, setting.largest_batch_size)),
        **common,
    )
