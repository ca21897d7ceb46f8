"""Runs of a command as flat records, on a board while they are made, and the answer that follows from them."""

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from experiments.advise import figure, report, within_figure, within_report
from experiments.harness.lengths import read_length
from jaxbatch.advice.advice import Advice
from jaxbatch.advice.advise_runs import ask_runs
from jaxbatch.advice.any_runs import Shown
from jaxbatch.advice.end_advice import EndAdvice
from jaxbatch.advice.end_advise_runs import settle_runs
from jaxbatch.advice.end_advising import EndSetting
from jaxbatch.advice.end_failures import Failed
from jaxbatch.advice.end_request import as_metric
from jaxbatch.advice.ending import Ending, as_written
from jaxbatch.advice.probes import Probe
from jaxbatch.advice.run_race import RunQuestion
from jaxbatch.results.records import Record, RunFolder

_SHOWN = 15  # runs on the board


def write(one: Shown | Ending | Failed, number: int) -> Record:
    """A run as a record."""
    kind = {Shown: "run", Ending: "ending", Failed: "failed"}[type(one)]
    fields = one._asdict()
    if isinstance(one, Shown):
        fields |= fields.pop("probe")._asdict()
    return {"kind": kind, "number": number, **fields}


def read_runs(records: Sequence[Record]) -> dict[int, Any]:
    """The runs of records by number, in their order."""
    known = lambda value: math.nan if value is None else value

    def read(row: Record) -> Shown | Ending | Failed:
        if row["kind"] == "failed":
            return Failed(**{name: row[name] for name in Failed._fields})
        if row["kind"] == "ending":
            return as_written(Ending(**{name: known(row[name]) for name in Ending._fields} | {"looks": [(u, known(v)) for u, v in row["looks"]]}))
        probe = Probe(**{name: known(row[name]) for name in Probe._fields})
        return Shown(probe, **{name: known(row[name]) for name in Shown._fields if name != "probe"})

    return {row["number"]: read(row) for row in sorted(records, key=lambda row: row["number"])}


def without_last_failures(runs: Mapping[int, Any]) -> dict[int, Any]:
    """The runs but for those at the end that failed without a look: what was wrong with them may be mended, and they are made again."""
    kept = dict(runs)
    for number, one in sorted(runs.items(), reverse=True):
        if not (isinstance(one, Failed) and one.fits) and not (isinstance(one, Shown) and one.failure and one.fits and not one.look):
            break
        del kept[number]
    return kept


def setting_of_lengths(config: Any) -> EndSetting:
    """What is settled before the first run of a fixed length."""
    flags = {"--within": config.within, "--horizon": config.horizon}
    lengths: Any = [None if text is None else read_length(text, flag) for flag, text in flags.items()]
    return settle_runs(as_metric(config.target), *lengths, config.batch_sizes, config.learning_rates, config.num_examples, None)


def question_of(config: Any) -> RunQuestion:
    """What is asked of runs to a goal."""
    longest: Any = None if config.longest is None else read_length(config.longest, "--longest")
    no_run = lambda batch_size, learning_rate, seed: ()
    return ask_runs(no_run, config.batch_sizes, config.learning_rates, longest, config.num_examples, config.objective, max_probes=config.max_probes)


class Board:
    """The last runs in a table that is drawn anew after each look; where the output is no terminal, a line a run.

    Args:
        console: to draw on.
        config: of the study.
    """

    def __init__(self, console: Console, config: Any):
        self._console, self._config, self._began = console, config, time.perf_counter()
        self._rows, self._now, self._live = list[list[str]](), "", Live(console=console, transient=True, auto_refresh=False)

    def __enter__(self) -> "Board":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def add(self, one: Shown | Ending | Failed, number: int) -> None:
        """Shows a run that has ended."""
        run = one.probe if isinstance(one, Shown) else one
        failure = one.failure if isinstance(one, Shown) else one.reason if isinstance(one, Failed) else ""
        fits = one.fits if isinstance(one, Shown | Failed) else True
        if failure:
            state = f"{'failed' if fits else 'does not fit'}: {failure}"
        elif isinstance(one, Shown):
            state = "reached the goal" if one.probe.reached else "diverged" if one.probe.diverged else "ended before"
        else:
            state = "diverged" if one.diverged else "whole" if one.updates >= one.num_steps else "ended early"  # type: ignore[union-attr]
        value, updates = getattr(run, "value", math.nan), getattr(run, "updates", 0)
        self._rows.append([str(number + 1), f"{run.batch_size:,}", f"{run.learning_rate:.3g}", f"{updates:,}", f"{value:.4g}", state])
        if not self._console.is_terminal:
            self._console.print("run " + "  ".join(self._rows[-1]), soft_wrap=True, markup=False)
        self.say("")

    def say(self, message: str) -> None:
        """Shows what is going on."""
        self._now = message
        if self._console.is_terminal:
            self._live.update(self.table(), refresh=True)

    def table(self) -> Table:
        """The last runs, and how long it may go on."""
        seconds = time.perf_counter() - self._began
        left = "" if self._config.budget is None else f", at most {max(0.0, self._config.budget - seconds):,.0f} s left"
        most = "" if self._config.within else f" of at most {self._config.max_probes}"
        table = Table(title=f"{len(self._rows)} runs{most}, {seconds:,.0f} s{left}", caption=escape(self._now) or None)
        for name in ("run", "B", "rate", "updates", "value", ""):
            table.add_column(name, justify="left" if not name else "right")
        for row in self._rows[-_SHOWN:]:
            table.add_row(*map(escape, row))  # a log may hold what rich would read as a style
        return table


def show(console: Console, config: Any, run: RunFolder, runs: Any, advice: Advice | EndAdvice) -> None:
    """Table, figure, answer, and the command that trains with it."""
    cell = lambda size: f"{size:,}"
    console.print(f"\n{config.command}; {config.target}, {len(run.records)} runs", soft_wrap=True, markup=False)
    title = "a command"
    if isinstance(advice, EndAdvice):
        within_report.print_choices(console, advice, cell)
        drawn = within_figure.draw_advice(advice, title, run.path)
    else:
        report.print_choices(console, advice, cell)
        drawn = figure.draw_advice(advice, title, run.path)
    for sentence in advice.sentences():
        console.print(sentence, style="bold", soft_wrap=True, markup=False)
    console.print(f"Figure: {drawn}; the output of every run: {run.path / 'logs'}", soft_wrap=True)
    if advice.batch_size is not None and advice.learning_rate is not None:
        steps = advice.choice.num_steps if isinstance(advice, EndAdvice) else advice.choice.enough_updates
        words = runs.words(advice.batch_size, advice.learning_rate, 0, steps if "{num_steps}" in config.command else None)
        console.print(f"\n{shlex.join(words)}", soft_wrap=True, markup=False)
