"""Runs that somebody else makes, in any framework, as what a search sees of them: probes to a goal, and endings of a fixed length."""

import contextlib
import inspect
import math
import statistics
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxbatch.advice.ending import Ending
from jaxbatch.advice.looks import Look, OutOfMemory, checked_look, does_not_fit
from jaxbatch.advice.probes import Probe, last_without
from jaxbatch.training.goals import Goal

MakeRun = Callable[..., Iterable[Look]]  # batch_size, learning_rate, seed, and num_steps if it takes it
_COUNTED = 0.5  # seconds from one look to another, from which on they are told by our clock
_WHOLE = 0.9  # a run that ends by itself after this part of its updates was meant to end there


class Shown(NamedTuple):
    """What one run showed, and how it went."""

    probe: Probe
    seconds_per_update: float  # between looks, or since its start, see ``looks``; NaN: it had none
    look: int  # updates between two looks, the median; 0: it had none
    looks: int  # over how many its seconds were counted; 1: since its start
    start: float = math.nan  # the metric before training, if the run showed it
    failure: str = ""  # why it failed; nothing: it did not
    fits: bool = True  # whether its batch fits into memory
    cut: bool = False  # whether it was ended before it had shown what it was to show, because the time was over

    @property
    def counts(self) -> bool:
        """Whether it says anything of how long runs take."""
        return self.fits and not self.failure


class AnyRuns(NamedTuple):
    """Makes runs with a user's own function."""

    run: MakeRun
    goal: Goal
    num_steps: Mapping[int, float]  # updates of the longest run, by batch size; infinite: until it ends by itself

    def show(self, batch_size: int, learning_rate: float, seed: int) -> Generator[Shown, None, None]:
        """The run so far at each look, until the goal, divergence, the longest run or its own end. It ends when this is closed."""
        taken, clock, own = list[int](), list[float](), list[float]()  # clock: the run's own seconds; own: ours
        best, better = (-math.inf, max) if self.goal.above else (math.inf, min)
        start, shown, began = math.nan, None, time.perf_counter()
        longest = self.num_steps[batch_size]
        looks = looks_of(self.run, batch_size, learning_rate, seed, None if math.isinf(longest) else int(longest))
        try:
            for look in looks:
                if look.updates == 0:
                    start = look.value
                    if self.goal.reached(start):
                        raise ValueError(f"{self.goal} is reached before training, at {start:.4g}. Take a goal that has to be learned.")
                    continue
                taken.append(look.updates)
                clock.append(look.seconds or math.nan)
                own.append(time.perf_counter() - began)
                loss = look.loss if look.loss is not None else -look.value if self.goal.above else look.value
                reached = self.goal.reached(look.value)
                lost = not reached and not (math.isfinite(look.value) and math.isfinite(loss))
                best = best if math.isnan(look.value) else better(best, look.value)
                more_than = last_without(taken[-2] if len(taken) > 1 else 0, look.updates, reached)
                probe = Probe(batch_size, learning_rate, seed, look.updates, reached, lost, more_than, look.value, best, loss)
                shown = Shown(probe, *_pace(taken, clock, own), start)
                yield shown
                if reached or lost or look.updates >= longest:
                    return
        except (Exception, SystemExit) as error:
            yield (shown or _nothing(batch_size, learning_rate, seed, start))._replace(failure=reason_of(error), fits=not does_not_fit(error))
        else:
            if shown is None:
                yield _nothing(batch_size, learning_rate, seed, start)._replace(failure="it gave no look after an update")
        finally:
            looks.close()


class AnyEndRuns(NamedTuple):
    """The same for runs of a fixed length."""

    make: MakeRun

    def run(self, batch_size: int, learning_rate: float, num_steps: int, seed: int) -> Generator[Ending, None, None]:
        """The run so far at each look, to its end.

        Raises:
            OutOfMemory: the batch does not fit.
            RuntimeError: the run failed, or ended long before its end.
        """
        seen, looks = list[tuple[int, float]](), looks_of(self.make, batch_size, learning_rate, seed, num_steps)
        ending = lambda updates, lost: Ending(batch_size, learning_rate, seed, num_steps, updates, lost, seen[-1][1], tuple(seen))
        try:
            for look in looks:
                if look.updates == 0:
                    continue
                seen.append((min(look.updates, num_steps), look.value))
                lost = not math.isfinite(look.value)
                yield ending(seen[-1][0], lost)
                if lost or look.updates >= num_steps:
                    return
        except (Exception, SystemExit) as error:
            raise (OutOfMemory if does_not_fit(error) else RuntimeError)(reason_of(error)) from error
        finally:
            looks.close()
        made = seen[-1][0] if seen else 0
        if made < _WHOLE * num_steps:
            raise RuntimeError(f"the run ended by itself after {made} of num_steps={num_steps} updates. Let it go on to num_steps.")
        if made < num_steps:
            yield ending(num_steps, False)


def looks_of(run: MakeRun, batch_size: int, learning_rate: float, seed: int, num_steps: int | None) -> Generator[Look, None, None]:
    """The looks of a user's run, checked. Closing this ends the run.

    Args:
        run: the user's function.
        batch_size: of the run.
        learning_rate: likewise.
        seed: likewise.
        num_steps: updates of the whole run, for a function that takes them; None: until the run ends by itself.
    """
    settings: dict[str, Any] = {"batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    before, ended = None, False
    made = run(**settings, **({} if num_steps is None or not takes_length(run) else {"num_steps": num_steps}))
    if not isinstance(made, Iterable) or isinstance(made, Look):
        raise ValueError(f"run returned {made!r}: let it yield each jaxbatch.Look, so that it is a generator.")
    looks = iter(made)
    try:
        for one in looks:
            before = checked_look(one, before)
            yield before
        ended = True
    finally:
        if hasattr(looks, "close"):
            with contextlib.nullcontext() if ended else contextlib.suppress(Exception, SystemExit):  # it was ended here, and has shown what it should
                looks.close()


def takes_length(run: MakeRun) -> bool:
    """Whether a function takes ``num_steps``.

    Example:
        >>> takes_length(lambda batch_size, learning_rate, seed: []), takes_length(lambda batch_size, learning_rate, seed, **budget: [])
        (False, True)
    """
    parameters = inspect.signature(run).parameters
    return "num_steps" in parameters or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())


def must_have_length(run: MakeRun) -> bool:
    """Whether a function cannot be called without ``num_steps``.

    Example:
        >>> must_have_length(lambda batch_size, learning_rate, seed, num_steps: []), must_have_length(lambda **settings: [])
        (True, False)
    """
    length = inspect.signature(run).parameters.get("num_steps")
    return length is not None and length.default is inspect.Parameter.empty


def check_run(run: Any) -> None:
    """Checks that a function can be called for a run.

    Raises:
        ValueError: it is no function, or lacks an argument.

    Example:
        >>> check_run(lambda batch_size, rate: [])
        Traceback (most recent call last):
        ValueError: run must take batch_size, learning_rate and seed by name (and num_steps, if its schedule depends on its length): ...
    """
    if not callable(run):
        raise ValueError(f"run={run!r} must be a function: run(batch_size, learning_rate, seed) that yields jaxbatch.Look.")
    try:
        inspect.signature(run).bind(batch_size=1, learning_rate=0.1, seed=0, **({"num_steps": 1} if takes_length(run) else {}))
    except TypeError as error:
        raise ValueError(
            f"run must take batch_size, learning_rate and seed by name (and num_steps, if its schedule depends on its length): {error}."
        ) from error


def reason_of(error: BaseException) -> str:
    """What an error says, in one line, shortened.

    Example:
        >>> reason_of(RuntimeError("exit code 2: no such file")), reason_of(KeyError("x"))
        ('exit code 2: no such file', "KeyError: 'x'")
    """
    text = " ".join(str(error).split())
    named = text if type(error) in (RuntimeError, OutOfMemory) and text else f"{type(error).__name__}: {text}" if text else type(error).__name__
    return named if len(named) <= 300 else f"{named[:150]} … {named[-145:]}"


def _nothing(batch_size: int, learning_rate: float, seed: int, start: float) -> Shown:
    """A run that has shown nothing."""
    return Shown(Probe(batch_size, learning_rate, seed, 0, False, False, 0, math.nan, math.nan, math.nan), math.nan, 0, 0, start)


def _pace(updates: Sequence[int], clock: Sequence[float], own: Sequence[float]) -> tuple[float, int, int]:
    """Seconds of an update, updates between looks, and of how many looks these seconds are.

    The run's own clock counts where all looks have it, from the first look to the last. Ours counts over the same looks if half a second lies
    between them: looks that were waiting come one upon the other. Else it counts from the start of the run, as over a single look.
    """
    look = int(statistics.median(after - before for before, after in zip([0, *updates], updates, strict=False)))
    for seconds, least in ((clock, 0.0), (own, _COUNTED)):
        if len(updates) > 1 and all(map(math.isfinite, seconds)) and seconds[-1] - seconds[0] > least:
            return (seconds[-1] - seconds[0]) / (updates[-1] - updates[0]), look, len(updates)
    return own[-1] / updates[-1], look, 1
