"""``experiments.advise --command``: a training script of any kind, as its user calls it."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from experiments.advise.__main__ import main
from tests.conftest import ROOT

# Runs that follow a law, in a moment: the updates to the goal are 60 (1 + 32 / B) times the price of a rate that is not 0.03.
SCRIPT = """
import json, math, random, sys
size, rate, seed, steps = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
if size > 100:
    sys.exit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9.00 GiB")
random.seed(seed)
price = (2 * (rate / 0.03) ** -0.8 + 0.8 * (rate / 0.03) ** 2) / 2.8
needed = 60 * (1 + 32 / size) * price * math.exp(0.1 * random.gauss(0, 1))
print("a line of a log")
for step in range(4, steps + 1, 4):
    loss = 0.1 ** (step / needed) if rate < 1 or step < needed / 4 else math.nan
    print(json.dumps({"step": step, "val_loss": loss, "seconds": 0.5 + 0.01 * step * (1 + size / 48)}))
"""
FLAGS = ["--target", "val_loss<0.1", "--batch-sizes", "8", "32", "128", "--learning-rates", "0.001", "0.01", "0.1", "1", "--longest", "20000steps"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT, encoding="utf-8")
    return tmp_path


def command(folder, *flags, given=None):
    words = f"{sys.executable} {folder / 'train.py'} {{batch_size}} {{lr}} {{seed}} {{num_steps}}" if given is None else given
    return [sys.executable, "-m", "experiments.advise", "--command", words, *flags, "--output-dir", str(folder / "results")]


def call(folder, *flags, given=None):
    return subprocess.run(command(folder, *flags, given=given), capture_output=True, text=True, cwd=ROOT, timeout=300)


def trainings(folder):
    """How many processes are running the script."""
    wanted, count = [sys.executable, str(folder / "train.py")], 0
    for file in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            count += file.read_bytes().decode(errors="replace").split("\0")[:2] == wanted
    return count


def runs_of(folder):
    (file,) = (folder / "results").glob("advise_command/*/records.jsonl")
    return file, [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_script_gets_its_answer_and_goes_on_to_the_same_one(folder):
    first = call(folder, *FLAGS, "--max-probes", "12")
    assert first.returncode == 0, first.stderr
    found = re.search(r"Train with batch size (8|32) and learning rate (0.01|0.1): the least time to val_loss<0.1.", first.stdout)
    file, runs = runs_of(folder)
    logs = sorted((file.parent / "logs").iterdir())
    assert found and len(runs) == len(logs) <= 12 and "a line of a log" in logs[0].read_text(encoding="utf-8")
    assert any(not run["fits"] for run in runs) == ("B = 128 did not fit into memory" in first.stdout)
    assert first.stdout.rstrip().splitlines()[-1].split()[-4:-2] == [found[1], found[2]]  # the command that trains with it
    file.write_text("".join(json.dumps(run) + "\n" for run in runs[:7]), encoding="utf-8")
    second = call(folder, *FLAGS, "--max-probes", "12")
    assert second.returncode == 0 and f"Continuing from 7 runs in {file.parent}" in second.stdout
    answer = lambda text: [line for line in text.splitlines() if line.startswith(("Train with", "Expected", "These", "By these"))]
    assert answer(second.stdout) == answer(first.stdout) and runs_of(folder)[1] == runs
    (folder / "train.py").write_text(SCRIPT + "# edited\n", encoding="utf-8")
    assert call(folder, *FLAGS, "--max-probes", "1").returncode == 0 and len(list((folder / "results").glob("advise_command/*"))) == 2


def test_runs_of_a_fixed_length(folder):
    flags = ["--target", "val_loss<", "--within", "120steps", "--batch-sizes", "16", "64", "--full-runs", "2", "--learning-rates", "0.01", "0.1"]
    done = call(folder, *flags)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Train 120 steps with batch size (16|64) and learning rate 0.01: 120 updates\.", done.stdout)
    assert {run["num_steps"] for run in runs_of(folder)[1]} <= {16, 30, 60, 120}


def test_killed_in_the_middle_of_a_run_it_goes_on(folder):
    slow = SCRIPT.replace("import json,", "import time, json,").replace("    print(json", "    time.sleep(0.02); print(json")
    (folder / "train.py").write_text(slow, encoding="utf-8")
    flags = [*FLAGS, "--max-probes", "5"]
    going = subprocess.Popen(command(folder, *flags), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while time.monotonic() < until and not any(
        len(file.read_bytes().splitlines()) >= 2 for file in (folder / "results").glob("advise_command/*/rec*")
    ):
        time.sleep(0.05)
    os.kill(going.pid, signal.SIGKILL)
    going.wait()
    until = time.monotonic() + 20
    while time.monotonic() < until and trainings(folder):
        time.sleep(0.1)
    assert not trainings(folder)
    done = call(folder, *flags)
    assert done.returncode == 0 and "Continuing from" in done.stdout
    assert [run["number"] for run in runs_of(folder)[1]] == [0, 1, 2, 3, 4]


def test_several_at_a_time_end_with_ctrl_c(folder):
    sleepy = SCRIPT.replace("import json,", "import time, json,").replace("    print(json", "    time.sleep(9)\n    print(json")
    (folder / "train.py").write_text(sleepy, encoding="utf-8")
    # Where tests run in the background, Ctrl-C is ignored by all that they start.
    heard = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); runpy.run_module('experiments.advise', run_name='__main__')"
    )
    args = [sys.executable, "-c", heard, *command(folder, *FLAGS, "--jobs", "2")[3:]]
    with subprocess.Popen(args, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as going:
        try:
            until = time.monotonic() + 60
            while time.monotonic() < until and trainings(folder) < 2:
                time.sleep(0.05)
            assert trainings(folder) == 2
            going.send_signal(signal.SIGINT)
            begun = time.monotonic()
            _, text = going.communicate(timeout=60)
        finally:
            going.kill()
    assert going.returncode == 130 and time.monotonic() - begun < 8 and "Traceback" not in text and trainings(folder) == 0


def test_the_first_command_alone(folder):
    done = call(folder, *FLAGS, "--dry-run")
    assert done.returncode == 0 and done.stdout == f"{sys.executable} {folder / 'train.py'} 32 0.001 0 20000\n"
    assert not (folder / "results").exists()


@pytest.mark.parametrize(
    ("given", "flags", "message"),
    [
        ("true", FLAGS, "{batch_size}"),
        ("no-such-program-here {batch_size} {lr}", FLAGS, "no-such-program-here"),
        (None, ["--target", "val_loss<", "--longest", "9steps"], "goal='val_loss<' must name a metric, a direction and a number"),
        (None, ["--target", "val_loss<0.1", "--longest", "3epochs"], "num_examples"),
        (None, [*FLAGS, "--horizon", "9steps"], "--horizon 9steps needs --within"),
        (None, [*FLAGS, "--within", "9steps"], "--longest and --within exclude each other"),
        ("true {batch_size} {lr}", ["--target", "val_loss<", "--within", "90steps"], "{num_steps}"),
        (None, ["--target", "val_loss<", "--within", "90seconds"], "steps, examples or epochs"),
        (None, ["--target", "val_loss<0.1"], "--command holds {num_steps}, the updates of a run: give --longest"),
        (None, [*FLAGS, "--jobs", "2", "--devices", "0"], "--devices names 1 devices for --jobs 2"),
        (None, [*FLAGS, "--silence", "0"], "--silence 0.0 must be above 0"),
        (None, [*FLAGS, "--max-prob", "3"], "did you mean --max-probes?"),
        (None, FLAGS[2:], "--target is needed"),
    ],
)
def test_slips_are_one_line(folder, capsys, given, flags, message):
    args = command(folder, *flags, given=given)[3:]
    with pytest.raises(SystemExit) as stopped:
        main(args)
    text = capsys.readouterr().err
    assert stopped.value.code == 2 and message in text and len(text.strip().splitlines()) == 1
