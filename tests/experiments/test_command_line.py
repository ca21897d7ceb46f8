"""The command lines of the studies: one line and exit code 2 for whatever a user gets wrong."""

import dataclasses
import os
import subprocess
import sys
from typing import Literal

import pytest

from experiments.adabatch import __main__ as adabatch
from experiments.adabatch_figures import __main__ as adabatch_figures
from experiments.batch_shape import __main__ as batch_shape
from experiments.convergence import __main__ as convergence
from experiments.cross_check import __main__ as cross_check
from experiments.gradient_smoothness import __main__ as gradient_smoothness
from experiments.harness.command_line import flags_of, parse
from experiments.imagenet import __main__ as imagenet
from experiments.iteration_speed import __main__ as iteration_speed
from experiments.large_batch import __main__ as large_batch
from experiments.learning_rate_grid import __main__ as learning_rate_grid
from experiments.nose_game import __main__ as nose_game
from experiments.split_backward import __main__ as split_backward
from tests.conftest import ROOT

STUDIES = (adabatch, batch_shape, convergence, gradient_smoothness, imagenet, iteration_speed, large_batch, learning_rate_grid)
STUDIES += (nose_game, split_backward)


def ended(main, arguments, capsys):
    """The one line that a wrong command line ends with."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    out, error = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and error.startswith("error: ") and error.count("\n") == 1
    return error.removeprefix("error: ").rstrip()


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.__name__.split(".")[-2])
def test_every_study_knows_a_misspelt_flag(study, capsys):
    assert ended(study.main, ["--datset", "mnist"], capsys) == "unrecognized --datset; did you mean --dataset?"
    assert ended(study.main, ["--seedz=3"], capsys) == "unrecognized --seedz; did you mean --seeds?"
    assert ended(study.main, ["--no-resme"], capsys) == "unrecognized --no-resme; did you mean --no-resume?"
    assert ended(study.main, ["--seeds"], capsys) == "--seeds needs a value: a whole number."
    assert ended(study.main, ["--seeds", "three"], capsys) == "--seeds three must be a whole number."
    assert ended(study.main, ["mnist"], capsys) == "unrecognized mnist; --help shows the flags."
    assert ended(study.main, ["--seeds", "3", "4"], capsys) == "unrecognized 4; --help shows the flags."


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (cross_check.main, ["--qick"], "unrecognized --qick; did you mean --quick?"),
        (cross_check.main, ["--seed", "1.5"], "--seed 1.5 must be a whole number."),
        (adabatch_figures.main, ["--output", "x"], "unrecognized --output; did you mean --output-dir?"),
        (adabatch.main, ["--model", "resnet"], "--model resnet must be one of simple_cnn, mlp, transformer, alexnet, resnet20, vgg19_bn."),
        (adabatch.main, ["--devices", "1,two"], "--devices two must be a whole number."),
        (adabatch.main, ["--learning-rate=fast"], "--learning-rate fast must be a number."),
        (adabatch.main, ["--epochs", "--quick"], "--epochs needs a value: a whole number."),
        (adabatch.main, ["--something-else", "1"], "unrecognized --something-else; --help shows the flags."),
        (split_backward.main, ["--num_group", "4"], "unrecognized --num_group; did you mean --num-groups?"),
        (split_backward.main, ["--dataset", "mnits"], "unknown dataset name='mnits'. Did you mean 'mnist'?"),
    ],
)
def test_what_else_a_user_gets_wrong(main, arguments, message, capsys):
    assert message in ended(main, arguments, capsys)


@dataclasses.dataclass(frozen=True)
class Everything:
    """A field of every kind."""

    needed: str
    count: int | None = None
    rate: float = 0.1
    rates: tuple[float, ...] = (1.0,)
    names: tuple[str, ...] = ()
    way: Literal["here", "there"] = "here"
    quick: bool = False


def test_right_command_lines_are_read():
    args = ["--needed", "a b", "--count", "None", "--rate", "-1e-3", "--rates", "1,2.5", "--names=x,y", "--way", "there", "--quick"]
    assert parse(Everything, "", args) == Everything("a b", None, -1e-3, (1.0, 2.5), ("x", "y"), "there", True)
    args = ["--needed=--x", "--count=3", "--rates", "1", "-2", "--no-quick"]
    assert parse(Everything, "", args) == Everything("--x", 3, rates=(1.0, -2.0))
    assert {"--needed", "--quick", "--no-quick"} < set(flags_of(Everything)) and "--no-way" not in flags_of(Everything)


def test_a_flag_that_is_needed(capsys):
    assert ended(lambda args: parse(Everything, "", args), ["--quick"], capsys) == "--needed is needed."


def test_help_is_tyros(capsys):
    with pytest.raises(SystemExit) as stopped:
        split_backward.main(["--help"])
    assert stopped.value.code == 0 and "--num-groups" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["-m", "experiments.adabatch"], ["scripts/make_images.py"]])
def test_as_a_process(command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command, "--datset", "mnist"], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr, done.stdout) == (2, "error: unrecognized --datset; did you mean --dataset?\n", "")
