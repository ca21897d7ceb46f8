"""Runs one command, and ends it with everything that it has started: a program of the standard library alone.

    python -I -S supervise.py --grace SECONDS -- COMMAND...

Its standard input is a pipe that whoever started it keeps open: when that process ends, however it ends, the pipe closes, and the command is
ended. SIGTERM does the same. The command is asked by SIGTERM first, and ended by SIGKILL after the grace. What it has left behind when it ends
by itself is ended, too. Standard output gets one line, ``pid NUMBER`` or ``error REASON``; the command's own output goes where standard error
goes. The exit code is the command's, or 128 + the number of the signal that ended it.

On Linux, processes that have moved into a session of their own are children of this one in the end (it is a "subreaper"), and are ended as well;
and the command is ended by the kernel if this program is killed. Elsewhere, the command's process group is ended.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

LINUX = sys.platform == "linux" and os.path.exists("/proc/self/stat")
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of <linux/prctl.h>
ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}  # what tells this program to end the command
PAUSE = 0.03  # seconds between two looks at what is left
PATIENCE = 20.0  # seconds after SIGKILL: a process that waits for a broken device cannot be ended, and is left
CANNOT_START = 127  # the exit code of shells for it


def main(arguments: list[str]) -> int:
    """Runs the command to its end, or ends it; returns its exit code."""
    _, grace, _, *command = arguments
    libc = ctypes.CDLL(None) if LINUX else None
    if libc:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    wake, own_id = woken_by_signals(), os.getpid()

    def ends_with_us():
        if libc:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != own_id:  # it had ended before it could be followed
                os._exit(128 + signal.SIGKILL)

    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, stderr=2, start_new_session=True, preexec_fn=ends_with_us)
    except OSError as error:
        print(f"error {error.strerror}", flush=True)
        return CANNOT_START
    with contextlib.suppress(BrokenPipeError):
        print(f"pid {process.pid}", flush=True)
    code = None
    while code is None:
        ready, _, _ = select.select([0, wake], [], [])
        code = reaped(process.pid)
        if 0 in ready or (wake in ready and ENDING & set(os.read(wake, 4096))):
            break
    code = end_all(process.pid, float(grace), code)
    process.returncode = code
    return code


def woken_by_signals() -> int:
    """A file that can be read when a child has ended or a signal tells this program to end; it gives the numbers of the signals."""
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    for number in (*ENDING, signal.SIGCHLD):
        signal.signal(number, lambda number, frame: None)
    return wake


def reaped(command: int) -> int | None:
    """Takes note of children that have ended, adopted ones too; the exit code of the command, if it is among them."""
    code = None
    with contextlib.suppress(ChildProcessError):
        while True:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child == 0:
                break
            if child == command:
                code = os.waitstatus_to_exitcode(status)
                code = 128 - code if code < 0 else code
    return code


def end_all(command: int, grace: float, code: int | None) -> int:
    """Ends the command, if it has not ended (``code`` is None), and everything that it has started; returns its exit code."""
    send(signal.SIGTERM, living(command))
    begun, empty = time.monotonic(), 0
    while True:
        last = reaped(command)
        code = last if code is None else code
        left = living(command)
        # A process whose parent ends during a scan may be missed by it, but not by the next.
        empty = 0 if left else empty + 1
        if code is not None and empty >= 2:
            return code
        spent = time.monotonic() - begun
        if left and spent > grace:
            send(signal.SIGKILL, left)
        if spent > grace + PATIENCE:
            print(f"These processes cannot be ended: {left}", file=sys.stderr, flush=True)
            return 128 + signal.SIGKILL if code is None else code
        if left or code is None:
            time.sleep(PAUSE)


def living(command: int) -> list[int]:
    """The ids of the processes below this one that have not ended; without Linux's list of processes, minus the id of the command's group."""
    if not LINUX:
        try:
            os.killpg(command, 0)
        except (ProcessLookupError, PermissionError):  # the second: nothing is left of it but what has ended
            return []
        return [-command]
    states, children = {}, {}
    for process in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            with open(f"/proc/{process}/stat", "rb") as file:
                states[process], parent = file.read().rpartition(b")")[2].split()[:2]  # its name, before it, may hold anything
            children.setdefault(int(parent), []).append(process)
    below = list(children.get(os.getpid(), []))
    for process in below:  # it grows as it is gone through
        below += children.get(process, [])
    return [process for process in below if states[process] not in (b"Z", b"X")]


def send(number: int, processes: list[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
