"""Runs of a command: whatever a script prints, does or does not do, a run gives looks or ends in one line, and leaves no process."""

import os
import pathlib
import signal
import sys

import pytest

import jaxbatch as jb
from experiments.advise import command_runs
from experiments.advise.command_runs import CommandRuns, CommandSettings
from tests.experiments.test_children import mark, processes_with, wait_until  # noqa: F401 (a fixture)

HEAD = """
import json, os, sys, time
batch_size, learning_rate, seed, *rest = sys.argv[1:]
def say(**look):
    print(json.dumps(look))
"""
ARGUMENTS = "{batch_size} {learning_rate} {seed}"


@pytest.fixture
def runs(tmp_path, mark):
    """A function from the body of a script to the runs of it; every process of them bears the mark, and none is left in the end."""

    def make(body, arguments=ARGUMENTS, metric="val_loss", **settings):
        script = tmp_path / "train.py"
        script.write_text(HEAD + body)
        settings = {"silence": 30.0, "grace": 0.5, **settings}
        return CommandRuns(CommandSettings(f"{sys.executable} -S {script} {arguments} {mark}", metric, tmp_path / "logs", **settings))

    yield make
    assert processes_with(mark) == []


def failure(runs, error=RuntimeError):
    """The message of a run that fails, which is one line, after the looks that it gives."""
    looks = []
    with pytest.raises(error) as raised:
        looks += runs.run(32, 0.1, 0)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_json_lines_among_other_text(runs, tmp_path):
    made = runs(
        'print("loading", {"a": 1})\nfor i in range(3):\n    '
        "say(step=10 * i, examples=320 * i, seconds=i / 2, train_loss=1.5, val_loss=1 / (1 + i))\n"
        'print(" 50%|##  | 1/2", end="\\r")\nsay(step=40, val_loss=0.1)\nsay(train_loss=1)\nsay(val_loss=None, step=50)\nprint(sys.argv[1:4])'
    )
    assert list(made.run(32, 1e-5, 7)) == [
        jb.Look(0, 0, 0.0, 1.0, 1.5),
        jb.Look(10, 320, 0.5, 0.5, 1.5),
        jb.Look(20, 640, 1.0, 1 / 3, 1.5),
        jb.Look(40, None, None, 0.1),
    ]
    assert (tmp_path / "logs" / "run_1_B32_lr1e-05_seed7.log").read_text().splitlines()[-1] == "['32', '1e-05', '7']"
    again = runs("say(step=1, val_loss=0)")
    assert len(list(again.run(64, 0.1, 0))) == 1
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["run_1_B32_lr1e-05_seed7.log", "run_2_B64_lr0.1_seed0.log"]


def test_looks_come_while_the_script_runs(runs, mark):
    made = runs("say(step=1, val_loss=1)\ntime.sleep(60)").run(32, 0.1, 0)
    assert processes_with(mark) == []  # nothing runs before it is asked
    assert next(made) == jb.Look(1, None, None, 1.0) and len(processes_with(mark)) == 1
    made.close()
    assert processes_with(mark) == []


def test_closing_a_run_ends_all_that_it_has_started(runs, mark):
    body = "import subprocess\nfor apart in (0, 1):\n    subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)', sys.argv[4]],"
    made = runs(body + " start_new_session=bool(apart))\nsay(step=1, val_loss=1)\ntime.sleep(60)").run(32, 0.1, 0)
    next(made)
    assert len(processes_with(mark)) == 3
    made.close()
    assert processes_with(mark) == []


def test_a_million_lines(runs):
    body = """
line = "a line of no interest to anybody at all\\n" * 1000
for i in range(1000):
    sys.stdout.write(line)
    if i % 250 == 249:
        say(step=i + 1, val_loss=1)
"""
    assert [look.updates for look in runs(body).run(32, 0.1, 0)] == [250, 500, 750, 1000]


def test_nobody_need_read_what_a_script_prints(runs):
    """A script that prints much while nobody asks for a look goes on to its end."""
    made = runs("say(step=1, val_loss=1)\nfor i in range(100): print('x' * 10000)\nsay(step=2, val_loss=1)\nopen(__file__ + '.done', 'w')")
    looks = made.run(32, 0.1, 0)
    next(looks)
    done = made.words(32, 0.1, 0)[2] + ".done"
    assert wait_until(lambda: os.path.exists(done))
    assert [look.updates for look in looks] == [2]


def test_a_script_that_says_nothing(runs, monkeypatch):
    assert failure(runs("time.sleep(60)", silence=0.4)) == "silent for 0.4 s; it said nothing"
    assert failure(runs("say(step=1, val_loss=1)\nprint('waits')\ntime.sleep(60)", silence=0.9)).endswith('"val_loss": 1} | waits')
    monkeypatch.setattr(command_runs, "WITHOUT_LOOK", 1.5)
    message = failure(runs("while True:\n    time.sleep(0.05)\n    print('waits')", silence=1))
    assert message.startswith("without a look for 1.5 s: no line of its output holds a JSON object with 'val_loss'; it said last: waits | waits")


def test_an_end_without_looks_says_what_was_looked_for(runs, tmp_path):
    assert failure(runs("")) == "ended without a look: no line of its output holds a JSON object with 'val_loss'; it said nothing"
    assert failure(runs("say(step=1, loss=2)")).endswith("""with 'val_loss'; it said last: {"step": 1, "loss": 2}""")
    path = tmp_path / "never.csv"
    assert failure(runs("", metrics=str(path))) == f"ended without a look: {path} was not written; it said nothing"
    assert "has no line with 'val_loss'" in failure(runs(f"open({str(path)!r}, 'w').write('a,b')", metrics=str(path)))


def test_a_script_that_fails_shows_its_last_lines(runs):
    message = failure(runs("say(step=1, val_loss=1)\nprint('\\x1b[31mred\\x1b[0m')\nraise KeyError('no such\\tlayer')"))
    assert message.startswith("exit code 1; it said last: ") and message.endswith("KeyError: 'no such\\tlayer'") and "\x1b" not in message
    assert failure(runs("print('x' * 1000)\nsys.exit(4)")) == f"exit code 4; it said last: …{'x' * 300}"
    assert failure(runs("sys.exit(-1)")) == "exit code 255; it said nothing"
    assert failure(runs("os.kill(os.getpid(), 11)")) == "ended by SIGSEGV; it said nothing"
    no_script = runs("")
    os.remove(no_script.words(1, 0.1, 0)[2])
    assert "exit code 2; it said last: " in (message := failure(no_script)) and "can't open file" in message


@pytest.mark.parametrize(
    "body, reason",
    [
        ("raise RuntimeError('CUDA out of memory. Tried to allocate 20 GiB')", "RuntimeError: CUDA out of memory. Tried to allocate 20 GiB"),
        ("print('RESOURCE_EXHAUSTED: 5 bytes')\n" + "print('after it')\n" * 40 + "os.abort()", "RESOURCE_EXHAUSTED: 5 bytes"),
        ("print('CUDA out of memory')", "CUDA out of memory"),
        ("print('big')\nos.kill(os.getpid(), 9)", "ended by SIGKILL, as by a system that is out of memory; it said last: big"),
        ("sys.exit(137)", "ended by SIGKILL, as by a system that is out of memory; it said nothing"),
    ],
)
def test_a_batch_that_does_not_fit(runs, body, reason):
    assert failure(runs(body), jb.OutOfMemory) == reason


def test_words_about_memory_long_before_the_end_are_not_its_reason(runs):
    body = "print('out of memory: smaller parts')\n" + "print('trains')\n" * 50 + "sys.exit(1)"
    assert failure(runs(body)) == "exit code 1; it said last: trains | trains | trains"
    assert len(list(runs("print('out of memory: smaller parts')\nsay(step=1, val_loss=1)").run(32, 0.1, 0))) == 1


def test_what_is_killed_from_outside(runs, mark):
    body = "import subprocess\nother = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)', sys.argv[4]])\n"
    made = runs(body + "say(step=1, val_loss=1)\nother.wait()\nsay(step=2, val_loss=1)")
    looks = made.run(32, 0.1, 0)
    next(looks)
    (other,) = [process for process in processes_with(mark) if os.getsid(process) != process]
    os.kill(other, signal.SIGKILL)  # of the script's own: the script decides
    assert [look.updates for look in looks] == [2]
    looks = made.run(32, 0.1, 0)
    next(looks)
    (script,) = [process for process in processes_with(mark) if os.getsid(process) == process]
    supervisor = int(pathlib.Path(f"/proc/{script}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(supervisor, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="what supervises it was ended by SIGKILL, and it was ended, too"):
        next(looks)


def test_runs_take_the_devices_that_are_free(runs):
    made = runs(
        "say(step=1, val_loss=os.environ['CUDA_VISIBLE_DEVICES'])\nsay(step=2, val_loss=os.environ['HIP_VISIBLE_DEVICES'])", devices=("0", "1")
    )
    first, second, third = (made.run(32, 0.1, seed) for seed in range(3))
    device = lambda looks: int(next(looks).value)
    assert device(first) == 0 and device(second) == 1
    second.close()
    assert device(third) == 1 and device(third) == 1
    first.close()
    third.close()
    assert [device(made.run(32, 0.1, 0)) for _ in range(4)] == [0, 1, 0, 1]


def test_a_fixed_length(runs):
    made = runs("say(step=int(rest[0]), val_loss=1)", ARGUMENTS + " {num_steps}")
    assert list(made.run(32, 0.1, 0, num_steps=50)) == [jb.Look(50, None, None, 1.0)]
    with pytest.raises(ValueError, match="holds {num_steps}, but the runs have no fixed length"):
        made.run(32, 0.1, 0)
    assert [look.updates for look in runs("say(step=1, val_loss=1)").run(32, 0.1, 0, num_steps=50)] == [1]


@pytest.mark.parametrize(
    "command, settings, message",
    [
        ("python t.py --lr {lr}", {}, "does not hold {batch_size}. Write it where the script takes that number"),
        ("python t.py {batch_size} {rate}", {}, "does not hold {learning_rate} or {lr}"),
        ("python 't.py {batch_size} {lr}", {}, "cannot be split into words: No closing quotation"),
        ("no-such-program {batch_size} {lr}", {}, "there is no program 'no-such-program'. Give one that is on the PATH, or its path"),
        ("python {batch_size} {lr} {metrics}", {}, "holds {metrics}, but there is no such file"),
        ("python {batch_size} {lr}", {"metrics": "a", "pattern": "b"}, "metrics='a' and pattern='b' exclude each other"),
        ("python {batch_size} {lr}", {"pattern": "(?P<step>"}, "pattern='(?P<step>' is no regular expression"),
        ("python {batch_size} {lr}", {"pattern": "(?P<step>.)"}, "lacks a group for the metric: write (?P<loss>...) or (?P<value>...)"),
        ("python {batch_size} {lr}", {"pattern": "(?P<loss>.)"}, "lacks a group for the number of updates: write (?P<step>...)"),
        ("python {batch_size} {lr}", {"fields": "stp=iter"}, "fields='stp=iter' must be FIELD=NAME, where FIELD is one of metric, step"),
        ("python {batch_size} {lr}", {"fields": "step"}, "fields='step' must be FIELD=NAME"),
    ],
)
def test_settings_that_cannot_be_are_one_line(tmp_path, command, settings, message):
    with pytest.raises(ValueError) as error:
        CommandRuns(CommandSettings(command, "loss", tmp_path, **settings))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_only_known_names_in_braces_are_filled_in(tmp_path):
    command = """python t.py '{"a": {batch_size}}' {lr}{learning_rate} {x} --log={log} {run} {{seed}}"""
    runs = CommandRuns(CommandSettings(command, "loss", "logs"))
    assert runs.words(8, 0.5, 3) == ["python", "t.py", '{"a": 8}', "0.50.5", "{x}", "--log=logs/run_1_B8_lr0.5_seed3.log", "1", "{3}"]
