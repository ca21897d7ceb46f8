"""Runs of a training script in any framework: a shell command a run, whose looks are read from what it writes."""

import functools
import os
import pathlib
import re
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from experiments.advise.command_looks import Looks, compiled_pattern, csv_row, fields_for, json_row, look_from
from experiments.harness.children import Child, start
from experiments.harness.tail import Tail
from jaxbatch.advice.looks import Look, OutOfMemory, speaks_of_memory

RATES = ("learning_rate", "lr")
PER_RUN = ("batch_size", *RATES, "seed", "num_steps", "run", "log")  # what stands for a setting of the run in a command; `run` is its number
SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 0.5  # seconds between two looks at the files
LATE = 0.1  # how late a look may be seen, in the time since something was said; its time may be taken from when it is seen
WITHOUT_LOOK = 10  # times `silence` in which a child that does say something must say something that counts
KILLED = 137  # the exit code of what SIGKILL has ended
_LAST_LINES, _LAST_BYTES, _SHOWN = 50, 1 << 16, 300  # of a log: what is searched for words about memory; how many characters are shown
_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")  # colours and the like


class CommandSettings(NamedTuple):
    """What :class:`CommandRuns` runs, and how it reads it."""

    command: str  # with {batch_size}, {learning_rate} or {lr}, and as it needs them {seed}, {num_steps}, {run}, {log}, {metrics}
    metric: str  # of the target
    logs: str | os.PathLike  # the folder that keeps the output of each run
    metrics: str | None = None  # a file to which the command appends looks; its name may have the same names in braces
    pattern: str | None = None  # a regular expression for the lines of the output that are looks
    fields: str | None = None  # names of fields that are not the usual ones: "step=iter,seconds=t"
    silence: float = 600.0  # seconds without output after which a run has failed
    grace: float = 10.0  # seconds from SIGTERM to SIGKILL
    num_examples: int | None = None  # of the training set, for scripts that count epochs alone
    devices: tuple[str, ...] = ()  # one for each run at a time, as CUDA_VISIBLE_DEVICES names them


class CommandRuns:
    """Runs of a command.

    Raises:
        ValueError: the command, the pattern or the fields cannot be used; the message says why.
    """

    def __init__(self, settings: CommandSettings):
        self.settings, self.fields = settings, fields_for(settings.metric, settings.fields)
        self._template = _checked_template(settings)
        self._pattern = None if settings.pattern is None else compiled_pattern(settings.pattern, self.fields)
        self._logs = pathlib.Path(settings.logs)
        logs = self._logs.glob("run_*_B*.log")  # of a search that goes on
        self._number = max((int(match[1]) for log in logs if (match := re.match(r"run_(\d+)_", log.name))), default=0)
        self._lock, self._written = threading.Lock(), set()  # _written: files of metrics that a run is writing
        self._uses = dict.fromkeys(settings.devices, (0, 0))  # runs on it now, the number of its last run

    def run(self, batch_size: int, learning_rate: float, seed: int, num_steps: int | None = None) -> Iterator[Look]:
        """A run, for ``jaxbatch.advise_runs``: it begins with the first look that is asked for, and ends with the generator."""
        self.words(batch_size, learning_rate, seed, num_steps)  # so that what is wrong is said at once
        return self._looks(int(batch_size), float(learning_rate), int(seed), num_steps)

    def words(self, batch_size: int, learning_rate: float, seed: int, num_steps: int | None = None, number: int | None = None) -> list[str]:
        """The words of a run's command, as its ``number`` fills them in; by default that of the next run."""
        names = self._names(int(batch_size), float(learning_rate), int(seed), num_steps, self._number + 1 if number is None else number)
        if num_steps is None and any("{num_steps}" in word for word in self._template):
            raise ValueError(f"command={self.settings.command!r} holds {{num_steps}}, but the runs have no fixed length. Leave it out.")
        return [_filled(word, names) for word in self._template]

    def _names(self, batch_size: int, learning_rate: float, seed: int, num_steps: int | None, number: int) -> dict[str, str]:
        log = self._logs / f"run_{number}_B{batch_size}_lr{learning_rate:g}_seed{seed}.log"
        values = (batch_size, learning_rate, learning_rate, seed, num_steps, number, log)
        names = {name: str(value) for name, value in zip(PER_RUN, values, strict=True) if value is not None}
        return names | ({} if self.settings.metrics is None else {"metrics": _filled(self.settings.metrics, names)})

    def _looks(self, batch_size: int, learning_rate: float, seed: int, num_steps: int | None) -> Iterator[Look]:
        with self._lock:
            self._number += 1
            number = self._number
            device = min(self._uses, key=self._uses.get, default=None)
            names = self._names(batch_size, learning_rate, seed, num_steps, number)
            metrics = names.get("metrics")
            if metrics in self._written:
                raise ValueError(f"metrics={self.settings.metrics!r} is one file for two runs at a time. Let its name hold {{run}}.")
            self._count(device, 1, number, metrics)
        try:
            words = self.words(batch_size, learning_rate, seed, num_steps, number)
            looks = self._reader(names, batch_size)
            self._logs.mkdir(parents=True, exist_ok=True)
            env = {} if device is None else {"CUDA_VISIBLE_DEVICES": device, "HIP_VISIBLE_DEVICES": device}
            with start(words, names["log"], env, self.settings.grace) as child:
                yield from self._followed(child, looks, pathlib.Path(names["log"]))
            self._check_end(child.poll(), looks, pathlib.Path(names["log"]))
        finally:
            with self._lock:
                self._count(device, -1, number, metrics)

    def _count(self, device: str | None, change: int, number: int, metrics: str | None) -> None:
        """A run begins (1) or ends (-1)."""
        if device is not None:
            runs, last = self._uses[device]
            self._uses[device] = (runs + change, max(last, number))
        if metrics is not None:
            (self._written.add if change > 0 else self._written.discard)(metrics)

    def _reader(self, names: Mapping[str, str], batch_size: int) -> Looks:
        """What reads the looks of a run that is about to begin."""
        to_look = functools.partial(look_from, fields=self.fields, batch_size=batch_size, num_examples=self.settings.num_examples)
        json_of = functools.partial(json_row, metric=self.fields.metric)
        if self._pattern is not None:
            return Looks(Tail(names["log"]), self._matched, to_look)
        if self.settings.metrics is None:
            return Looks(Tail(names["log"]), json_of, to_look)
        path = pathlib.Path(names["metrics"])
        is_per_run = _filled(self.settings.metrics, names) != self.settings.metrics
        if is_per_run:  # of a search before; another file may hold what is not ours, and stays as it is
            path.unlink(missing_ok=True)
        tail = Tail(path, skip_existing=not is_per_run)
        csv_of = lambda line: csv_row(line, tail.header.decode(errors="replace").strip())
        return Looks(tail, csv_of if path.suffix == ".csv" else json_of, to_look)

    def _matched(self, line: str) -> dict[str, str] | None:
        match = self._pattern.search(line)
        row = {} if match is None else {name: text for name, text in match.groupdict().items() if text is not None}
        if "value" in row and self.fields.metric not in row:
            row[self.fields.metric] = row.pop("value")
        return row or None

    def _followed(self, child: Child, looks: Looks, log: pathlib.Path) -> Iterator[Look]:
        """The looks of a child until it ends."""
        num_bytes, silence = 0, self.settings.silence
        heard = looked = time.monotonic()
        while True:
            ended = child.poll() is not None  # before the files are read, so that nothing is missed that was written before the end
            for look in looks.new(final=ended):
                yield look
                heard = looked = time.monotonic()  # after whoever asked has come back
            if ended:
                return
            now, before = time.monotonic(), num_bytes
            num_bytes = looks.tail.num_bytes + log.stat().st_size
            if num_bytes != before:
                heard = now
            if now - heard > silence:
                raise RuntimeError(f"silent for {silence:g} s{_last_words(log)}")
            if now - looked > WITHOUT_LOOK * silence:
                raise RuntimeError(f"without a look for {WITHOUT_LOOK * silence:g} s: {self._wanted(looks)}{_last_words(log)}")
            time.sleep(min(LONGEST_PAUSE, max(SHORTEST_PAUSE, LATE * (now - heard))))

    def _check_end(self, code: int, looks: Looks, log: pathlib.Path) -> None:
        """Raises what is to be said of a run that has ended by itself, unless all is well."""
        if code < 0:
            raise RuntimeError(f"what supervises it was ended by {signal.Signals(-code).name}, and it was ended, too{_last_words(log)}")
        if code != 0 or not looks.num_looks:
            about_memory = [line for line in _last_lines(log) if speaks_of_memory(line)]
            if about_memory:
                raise OutOfMemory(_shortened(about_memory[-1]))
            if code == KILLED:
                raise OutOfMemory(f"ended by SIGKILL, as by a system that is out of memory{_last_words(log)}")
            if code != 0:
                reason = f"ended by {signal.Signals(code - 128).name}" if code - 128 in set(signal.Signals) else f"exit code {code}"
                raise RuntimeError(reason + _last_words(log))
            raise RuntimeError(f"ended without a look: {self._wanted(looks)}{_last_words(log)}")
        if looks.num_back > 1 and looks.num_back + 1 >= looks.num_looks:
            raise RuntimeError(
                f"its number of updates did not grow {looks.num_back} times: it must count from the start of the run, not of an epoch. Another field "
                "may do so: fields='step=NAME'."
            )

    def _wanted(self, looks: Looks) -> str:
        """What was looked for in vain."""
        if self._pattern is not None:
            return f"no line of its output matches pattern={self.settings.pattern!r}"
        if self.settings.metrics is None:
            return f"no line of its output holds a JSON object with {self.fields.metric!r}"
        return f"{looks.tail.path} " + (f"has no line with {self.fields.metric!r}" if looks.tail.path.exists() else "was not written")


def _checked_template(settings: CommandSettings) -> list[str]:
    """The words of a command, whose names in braces are not filled in yet."""
    try:
        words = shlex.split(settings.command)
    except ValueError as error:
        raise ValueError(f"command={settings.command!r} cannot be split into words: {error}.") from None
    for names in (("batch_size",), RATES):
        if not any(f"{{{name}}}" in word for name in names for word in words):
            wanted = " or ".join(f"{{{name}}}" for name in names)
            raise ValueError(f"command={settings.command!r} does not hold {wanted}. Write it where the script takes that number.")
    if settings.metrics is not None and settings.pattern is not None:
        raise ValueError(f"metrics={settings.metrics!r} and pattern={settings.pattern!r} exclude each other: a pattern is for the output.")
    if settings.metrics is None and any("{metrics}" in word for word in words):
        raise ValueError(f"command={settings.command!r} holds {{metrics}}, but there is no such file. Give metrics, or leave it out.")
    if "{" not in words[0] and shutil.which(words[0]) is None:
        advice = "Give one that is on the PATH, or its path; what a shell must read, as sh -c '...'."
        raise ValueError(f"command={settings.command!r}: there is no program {words[0]!r}. {advice}")
    return words


def _filled(text: str, names: Mapping[str, str]) -> str:
    """A text with the names in braces that are known filled in; other braces stay, such as those of JSON.

    Example:
        >>> _filled('--lr={lr} --json={"a":{seed}} {x}', {"lr": "0.1", "seed": "3"})
        '--lr=0.1 --json={"a":3} {x}'
    """
    return re.sub(r"\{(\w+)\}", lambda match: names.get(match[1], match[0]), text)


def _last_lines(log: pathlib.Path, count: int = _LAST_LINES) -> list[str]:
    """The last lines of a log that hold something, as plain text."""
    with open(log, "rb") as file:
        file.seek(max(0, os.path.getsize(log) - _LAST_BYTES))
        text = file.read().decode(errors="replace").replace("\r", "\n")
    return [line.strip() for line in _CONTROLS.sub("", text).splitlines() if line.strip()][-count:]


def _last_words(log: pathlib.Path) -> str:
    """The last lines of a log within one line, as the end of a sentence."""
    lines = _last_lines(log, 3)
    return f"; it said last: {_shortened(' | '.join(lines))}" if lines else "; it said nothing"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else "…" + text[-_SHOWN:]
