"""Commands that run beside us: whatever is killed, and however, nothing of them is left."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time
import uuid

import pytest

from experiments.harness import children, supervise
from experiments.harness.children import start
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are counted through /proc")

# A child, its child, and one that has moved into a session of its own; all three bear the mark among their words, and sleep.
FAMILY = """
import subprocess, sys, time
mark, depth, stubborn = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if stubborn == "stubborn":
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if depth:
    for apart in (False, True):
        subprocess.Popen([sys.executable, "-S", __file__, mark, str(depth - 1), stubborn], start_new_session=apart)
open(f"{__file__}.{mark}.{depth}.{time.monotonic_ns()}", "w").close()
time.sleep(60)
"""
OURS = """
import sys, time
sys.path.insert(0, sys.argv[1])
import children
child = children.start(sys.argv[3:], sys.argv[2], grace=0.5)
print(child.pid, flush=True)
time.sleep(60)
"""


def processes_with(mark: str) -> list[int]:
    """The ids of the processes that bear a mark among their words, without supervisors."""
    marked = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if mark.encode() in words and b"supervise.py" not in words:
            marked.append(int(folder.name))
    return marked


def wait_until(condition, seconds=20.0):
    """Waits for what must come soon, on a busy machine too; whether it came."""
    deadline = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.03)
    return true


@pytest.fixture
def mark():
    """Words that no other process bears; whatever a test that fails has left is ended."""
    mark = f"mark-{uuid.uuid4().hex}"
    yield mark
    for process in processes_with(mark):
        os.kill(process, signal.SIGKILL)


def family(folder, mark, depth=1, manner="meek"):
    """The words of a command that starts 2 processes, and each of them 2 for ``depth`` 2."""
    script = folder / "family.py"
    script.write_text(FAMILY)
    return [sys.executable, "-S", str(script), mark, str(depth), manner]


def is_grown(folder, mark, depth=1):
    """Whether all of a family run, and have done what they do before they sleep."""
    return len(list(folder.glob(f"family.py.{mark}.*"))) == 2 ** (depth + 1) - 1


def test_stop_ends_the_whole_family(tmp_path, mark):
    with start(family(tmp_path, mark, depth=2), tmp_path / "log") as child:
        assert wait_until(lambda: is_grown(tmp_path, mark, depth=2)) and len(processes_with(mark)) == 7
        assert child.poll() is None and os.getpgid(child.pid) == child.pid != os.getpgid(0)
        assert child.stop() == 128 + signal.SIGTERM
        assert processes_with(mark) == []
    assert child.poll() == child.stop() == 128 + signal.SIGTERM


def test_who_does_not_listen_is_killed_after_the_grace(tmp_path, mark):
    with start(family(tmp_path, mark, manner="stubborn"), tmp_path / "log", grace=0.3) as child:
        assert wait_until(lambda: is_grown(tmp_path, mark))
        begun = time.monotonic()
        assert child.stop() == 128 + signal.SIGKILL and time.monotonic() - begun > 0.3
    assert processes_with(mark) == []


def test_a_grace_is_given(tmp_path, mark):
    script = """
import signal, sys, time
def end(*_):
    time.sleep(0.3)
    print("saved")
    sys.exit(5)
signal.signal(signal.SIGTERM, end)
print("ready")
time.sleep(60)
"""
    with start([sys.executable, "-S", "-c", script, mark], tmp_path / "log", grace=20) as child:
        assert wait_until(lambda: "ready" in (tmp_path / "log").read_text())
        assert child.stop() == 5
    assert (tmp_path / "log").read_text().split() == ["ready", "saved"]


def test_what_is_left_when_the_command_ends_is_ended(tmp_path, mark):
    script = f"import subprocess, sys; subprocess.Popen({family(tmp_path, mark)}, start_new_session=True); sys.exit(3)"
    with start([sys.executable, "-S", "-c", script], tmp_path / "log", grace=0.5) as child:
        assert wait_until(lambda: child.poll() is not None) and child.poll() == 3
        assert processes_with(mark) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_when_ours_is_ended_nothing_is_left(tmp_path, mark, number):
    (tmp_path / "ours.py").write_text(OURS)
    words = [sys.executable, str(tmp_path / "ours.py"), str(ROOT / "experiments" / "harness"), str(tmp_path / "log"), *family(tmp_path, mark)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as ours:
        assert int(ours.stdout.readline()) in processes_with(mark) and wait_until(lambda: is_grown(tmp_path, mark))
        ours.send_signal(number)
        ours.wait()
    assert wait_until(lambda: not processes_with(mark), 10)


def test_an_exit_of_ours_waits_until_nothing_is_left(tmp_path, mark):
    (tmp_path / "ours.py").write_text(textwrap.dedent(OURS).replace("time.sleep(60)", "time.sleep(0.5)"))
    words = [sys.executable, str(tmp_path / "ours.py"), str(ROOT / "experiments" / "harness"), str(tmp_path / "log")]
    done = subprocess.run([*words, *family(tmp_path, mark, manner="stubborn")], capture_output=True, text=True, check=True)
    assert done.stderr == "" and processes_with(mark) == []


def test_when_the_supervisor_is_killed_nothing_is_left(tmp_path, mark):
    with start(family(tmp_path, mark), tmp_path / "log") as child:
        assert wait_until(lambda: is_grown(tmp_path, mark))
        os.kill(child.supervisor_pid, signal.SIGKILL)
        assert wait_until(lambda: child.poll() is not None) and child.poll() == -signal.SIGKILL
        assert wait_until(lambda: not processes_with(mark), 10)


@pytest.mark.parametrize("who", ["the command", "one that has moved into a session of its own"])
def test_when_one_of_them_is_killed_the_command_decides(tmp_path, mark, who):
    with start(family(tmp_path, mark), tmp_path / "log", grace=0.5) as child:
        assert wait_until(lambda: is_grown(tmp_path, mark))
        if who == "the command":
            os.kill(child.pid, signal.SIGKILL)
            assert wait_until(lambda: child.poll() is not None) and child.poll() == 128 + signal.SIGKILL
        else:
            others = [process for process in processes_with(mark) if os.getsid(process) != child.pid]
            assert len(others) == 1
            os.kill(others[0], signal.SIGKILL)
            time.sleep(0.1)
            assert child.poll() is None
    assert processes_with(mark) == []


def test_the_supervisor_obeys_signals_too(tmp_path, mark):
    with start(family(tmp_path, mark), tmp_path / "log") as child:
        assert wait_until(lambda: is_grown(tmp_path, mark))
        os.kill(child.supervisor_pid, signal.SIGTERM)
        assert wait_until(lambda: child.poll() is not None) and child.poll() == 128 + signal.SIGTERM
    assert processes_with(mark) == []


def test_a_command_that_cannot_be_started_is_one_line(tmp_path):
    with pytest.raises(ValueError) as error:
        start(["no-such-program", "x"], tmp_path / "log")
    assert str(error.value) == (
        "command='no-such-program' cannot be started: No such file or directory. Give a program that is on the PATH, or the path of one."
    )
    (tmp_path / "text").write_text("no program")
    with pytest.raises(ValueError, match="cannot be started: Permission denied"):
        start([str(tmp_path / "text")], tmp_path / "log")


def test_output_goes_into_the_log_as_it_is_written(tmp_path):
    script = "import os, sys; print(os.environ['PYTHONUNBUFFERED'], os.environ['A']); print('error', file=sys.stderr); print(sys.stdin.read())"
    (tmp_path / "log").write_text("of a run before")
    with start([sys.executable, "-S", "-c", script], tmp_path / "log", env={"A": "b"}) as child:
        assert wait_until(lambda: child.poll() is not None) and child.poll() == 0
    assert (tmp_path / "log").read_text() == "1 b\nerror\n\n"


def test_without_the_extras_of_linux_the_group_is_ended(tmp_path, mark, monkeypatch):
    """As on macOS: the same program, which does not look into /proc."""
    script = pathlib.Path(supervise.__file__).read_text().replace('LINUX = sys.platform == "linux"', "LINUX = False")
    (tmp_path / "supervise.py").write_text(script)
    monkeypatch.setattr(children, "_SUPERVISOR", tmp_path / "supervise.py")
    # The command waits for what it has started, as nobody else does for sure: what has ended and was not waited for counts as one of the group.
    script = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: (other.wait(), sys.exit(7)))
other = subprocess.Popen({family(tmp_path, mark, depth=0)})
time.sleep(60)
"""
    with start([sys.executable, "-S", "-c", script], tmp_path / "log", grace=20) as child:
        assert wait_until(lambda: is_grown(tmp_path, mark, depth=0)) and child.pid in processes_with(mark)
        assert child.stop() == 7
    assert processes_with(mark) == []
