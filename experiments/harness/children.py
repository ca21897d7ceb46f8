"""Commands that run beside this process, each under a supervisor of its own, so that nothing of them outlives this process.

Of the standard library alone, and of no other module, so that a test can load it by itself. ``supervise.py`` says what happens to a command.
"""

import atexit
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import uuid
import weakref
from collections.abc import Mapping, Sequence

MARK = "JAXBATCH_CHILD"  # the environment variable by which everything that a command has started is known
_SUPERVISOR = pathlib.Path(__file__).with_name("supervise.py")
_SLACK = 25.0  # seconds after its grace in which a supervisor must have ended; it gives up a little earlier itself
_running: "weakref.WeakSet[Child]" = weakref.WeakSet()


class Child:
    """A command that :func:`start` has started. As a context, it is ended with everything that it has started."""

    def __init__(self, supervisor: subprocess.Popen, pid: int, mark: str, grace: float):
        self.pid, self.supervisor_pid = pid, supervisor.pid
        self._supervisor, self._mark, self._grace = supervisor, mark, grace
        _running.add(self)

    def poll(self) -> int | None:
        """The exit code, 128 + a signal's number for one that ended it; None: it runs. Negative: its supervisor was ended by that signal."""
        code = self._supervisor.poll()
        if code is not None and self in _running:
            self._supervisor.stdin.close()
            _running.discard(self)
            if code < 0:
                self._kill()
        return code

    def stop(self) -> int:
        """Ends it with everything that it has started, if it still runs: SIGTERM, and SIGKILL after the grace. Its exit code."""
        if self.poll() is None:
            self._supervisor.stdin.close()
            try:
                self._supervisor.wait(self._grace + _SLACK)
            except subprocess.TimeoutExpired:
                self._supervisor.kill()
                self._supervisor.wait()
        return self.poll()

    def _kill(self) -> None:
        """Ends at once what the supervisor could not end."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        for _ in range(10):  # what is killed may have started something just before
            left = marked(self._mark)
            for process in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process, signal.SIGKILL)
            if not left:
                break

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def start(command: Sequence[str], log: str | os.PathLike, env: Mapping[str, str] | None = None, grace: float = 5.0) -> Child:
    """Starts a command, whose output goes into a file.

    Args:
        command: its words; no shell reads them.
        log: the file for standard output and standard error, written anew.
        env: variables of its environment, besides those of this process.
        grace: seconds from SIGTERM to SIGKILL, for it and everything that it has started.

    Raises:
        ValueError: there is no such program, or it cannot be run.

    Example:
        >>> import os, sys, time
        >>> with start([sys.executable, "-c", "print('done')"], os.devnull) as child:
        ...     while child.poll() is None:
        ...         time.sleep(0.01)
        >>> child.poll()
        0
    """
    mark = uuid.uuid4().hex
    environ = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
    environ[MARK] = f"{os.environ.get(MARK, '')}:{mark}"  # a command that starts others in the same manner is known by both marks
    # Without the site packages, for a quick start, and without this folder, whose modules have common names.
    words = [sys.executable, "-I", "-S", str(_SUPERVISOR), "--grace", str(grace), "--", *command]
    with open(log, "wb") as file:
        # In a session of its own, so that Ctrl-C in a terminal reaches this process alone, which then ends what it has started.
        supervisor = subprocess.Popen(
            words, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, env=environ, start_new_session=True
        )
    with supervisor.stdout as answer:
        kind, _, rest = answer.readline().decode(errors="replace").strip().partition(" ")
    if kind == "pid":
        return Child(supervisor, int(rest), mark, grace)
    supervisor.stdin.close()
    code = supervisor.wait()
    reason = rest if kind == "error" else f"its supervisor ended with exit code {code}"
    raise ValueError(f"command={command[0]!r} cannot be started: {reason}. Give a program that is on the PATH, or the path of one.")


def marked(mark: str) -> list[int]:
    """The processes whose environment holds a mark, which they have from the one that started them; Linux alone has such a list."""
    processes = []
    for process in filter(str.isdigit, os.listdir("/proc") if sys.platform == "linux" else ()):
        with contextlib.suppress(OSError), open(f"/proc/{process}/environ", "rb") as file:
            if mark.encode() in file.read():  # of one that has ended it is empty
                processes.append(int(process))
    return processes


@atexit.register
def stop_all() -> None:
    """Ends all commands that run: tells all at once, then waits for each."""
    for child in list(_running):
        child._supervisor.stdin.close()
    for child in list(_running):
        child.stop()
