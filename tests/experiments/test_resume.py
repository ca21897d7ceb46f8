"""Every study, killed between any two of its records and called again, ends in the records of a run that was not."""

import collections
import contextlib
import functools
import io
import json
import pathlib
import re
import shutil
import tempfile
from types import SimpleNamespace

import pytest

from experiments.adabatch import __main__ as adabatch
from experiments.adabatch_bound import __main__ as adabatch_bound
from experiments.advise import __main__ as advise
from experiments.batch_shape import __main__ as batch_shape
from experiments.contrastive import __main__ as contrastive
from experiments.convergence import __main__ as convergence
from experiments.critical_batch_size import __main__ as critical_batch_size
from experiments.faces import __main__ as faces
from experiments.gradient_smoothness import __main__ as gradient_smoothness
from experiments.imagenet import __main__ as imagenet
from experiments.iteration_speed import __main__ as iteration_speed
from experiments.language_model import __main__ as language_model
from experiments.large_batch import __main__ as large_batch
from experiments.learning_rate_grid import __main__ as learning_rate_grid
from experiments.memory import __main__ as memory
from experiments.nose_game import __main__ as nose_game
from experiments.sharpness import __main__ as sharpness
from experiments.split_backward import __main__ as split_backward
from jaxbatch.results.records import RunFolder
from tests.conftest import ROOT
from tests.data.test_streams import Network

COMMANDS = {
    adabatch: "--model mlp --epochs 2 --every 1 --num-examples 60 --batch-size 10 --max-batch-size 20 --seeds 1 --rounds 2 --tuned-rates 0.01,0.1",
    adabatch_bound: "--quick",
    advise: "--quick --verify --model mlp --objective examples --target accuracy>0.6 --batch-sizes 32,64 --learning-rates 0.01,0.1,1 --epochs 2",
    batch_shape: "--models mlp --centres 32 --dtypes float32 --rounds 2",
    contrastive: "--quick --batch-sizes 64,128 --learning-rates 0.01 --passes 0.2 --microbatch-size 64 --cost-sizes 128",
    convergence: "--quick --model mlp --batch-sizes 300,600 --seeds 2 --speed-rounds 2 --tuned-rates 0.01,0.1 --epochs 1",
    critical_batch_size: "--quick --model mlp --target accuracy>0.3 --batch-sizes 16,32 --learning-rates 0.1 --factors 2 --epochs 2",
    faces: "--quick --losses softmax --batch-sizes 64 --learning-rates 0.01,0.03 --passes 1 --identities 64 --verified 8",
    gradient_smoothness: "--model mlp --batch-sizes 300,600 --seeds 2 --iterations 3 --batches-compared 2",
    imagenet: "--quick --epochs 2 --every 1 --growths 1,2 --batch-size 8 --microbatch-size 8 --image-size 16 --num-workers 0 --seeds 2",
    iteration_speed: "--model mlp --batch-sizes 300,600 --rounds 3 --examples-per-round 600",
    language_model: "--quick --width 8 --num-layers 1 --num-heads 2 --batch-size 64 --epochs 2 --seeds 2",
    large_batch: "--epochs 2 --seeds 2 --tune-seeds 1 --learning-rates 0.01,0.1 --arms cosine,growth --batch-size 240",
    learning_rate_grid: "--model mlp --batch-sizes 300,600 --learning-rates 0.01,0.1 --seeds 2 --epochs 1 --evaluations-per-epoch 2",
    memory: "--quick --model mlp --dataset digits --targets here --budget 100MiB --batch-size 1500000",
    nose_game: "--batch-sizes 1,12 --num-steps 3 --seeds 3",
    sharpness: "--quick --model mlp --small-batch-size 300 --large-batch-size 600 --seeds 1 --learning-rates 0.1 --train-loss 2",
    split_backward: "--model mlp --batch-size 169 --num-groups 13 --seeds 2 --epochs 2 --cost-rounds 2 --learning-rates 0.01,0.1 --tune-seeds 1",
}
UNMEASURED = ("setting", "throughput")  # kinds of records with times in all their fields; what was chosen from them is in the others
SHORT = {study.__name__.split(".")[-2]: study for study in COMMANDS}


# What the compilers of accelerators say, which need not be here, and take minutes.
COMPILED = {
    "missing_compiler": lambda _: None,
    "shape_task": lambda *_: None,
    "work_by_batch_size": lambda *_: None,
    "make_measure": lambda *_, **__: lambda size: SimpleNamespace(batch_size=size, parameters=100),
    "make_step_bound": lambda *_: lambda memory: SimpleNamespace(seconds=memory.batch_size, bound=SimpleNamespace(compute=1.0, transfer=2.0)),
    "describe_setting": lambda *_: None,
    "print_table": lambda *_: None,
}


@pytest.fixture(autouse=True)
def small(monkeypatch, image_folder):
    """No figures; the ImageNet study with a small network on a small folder."""
    for study in COMMANDS:
        for drawing in ("show_results", "draw_figure", "print_tables"):
            monkeypatch.setattr(study, drawing, lambda *_: None, raising=False)
    monkeypatch.setattr(advise.records, "read_advice", lambda _: SimpleNamespace(batch_size=None))  # of which the snippet is made
    for name, compiled in COMPILED.items():
        monkeypatch.setattr(adabatch_bound, name, compiled)
    monkeypatch.setattr(imagenet.jb, "ResNet50", lambda *_, **__: Network())
    monkeypatch.setitem(COMMANDS, imagenet, f"{COMMANDS[imagenet]} --dataset colours --data-dir {image_folder}")


def call(study, folder):
    with contextlib.redirect_stdout(io.StringIO()):
        study.main([*COMMANDS[study].split(), "--output-dir", str(folder)])


def call_until(study, folder, records: int, late: bool) -> bool:
    """Stops as Ctrl-C would, once so many records are on disk. Returns whether it came to that.

    Right after the last of them is written; or ``late``: right before the next would be, with all that is kept in between.
    """
    written, count = RunFolder.append, 0

    def append(run, record):
        nonlocal count
        if late and count == records:
            raise KeyboardInterrupt
        written(run, record)
        count += 1
        if not late and count == records:
            raise KeyboardInterrupt

    RunFolder.append = append
    try:
        call(study, folder)
    except SystemExit as stopped:
        assert stopped.code == 130
        return True
    finally:
        RunFolder.append = written
    return False


def is_time(name):
    return name.endswith(("seconds", "ms"))


def records_in(folder):
    """All records of all run folders, without the times, each with the number of times it is there."""
    found = collections.Counter()
    for file in folder.rglob("records.jsonl"):
        for line in file.read_text().splitlines():
            record = {name: value for name, value in json.loads(line).items() if not is_time(name)}
            record = {"kind": record["kind"]} if record.get("kind") in UNMEASURED else record
            found[json.dumps([file.parts[-3], record], sort_keys=True)] += 1
    return found


@functools.cache
def whole(study):
    """The records of a run that nothing stopped."""
    with tempfile.TemporaryDirectory() as folder:
        call(study, folder)
        found = records_in(pathlib.Path(folder))
    assert sum(found.values()) >= 5 and max(found.values()) == 1  # told apart without their times
    return found


def check(study, folder, cuts):
    """Stops after each of ``cuts`` records (and late, or not), the count beginning anew with each call, and ends it at last."""
    stopped = [call_until(study, folder, *cut) for cut in cuts]
    call(study, folder)
    found = records_in(folder)
    assert stopped[0]
    assert not found - whole(study), "records that a whole run does not have, or not twice"
    assert not whole(study) - found, "records that are lost"


QUICK = ("learning_rate_grid",)  # the others take a quarter of a minute and more


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SHORT])
def test_a_study_that_was_stopped_thrice_ends_in_the_same_records(name, tmp_path):
    study = SHORT[name]
    half = sum(whole(study).values()) // 2
    # After the first, somewhere in the middle, shortly before the end.
    check(study, tmp_path, [(1, False), (half, True), (max(half - 2, 1), False)])
    found = records_in(tmp_path)
    call(study, tmp_path)
    assert records_in(tmp_path) == found  # nothing is measured again


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_study_that_was_stopped_anywhere_ends_in_the_same_records(name, tmp_path):
    study = SHORT[name]
    count, failed = sum(whole(study).values()), []
    for cut in [(records, late) for late in (False, True) for records in range(1 - late, count + 1 - late)]:
        try:
            check(study, tmp_path / f"{cut[0]}_{cut[1]}", [cut])
        except AssertionError as error:
            failed.append((cut, str(error).splitlines()[0]))
    assert not failed


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_study_that_is_stopped_again_and_again_comes_to_its_end(name, tmp_path):
    study = SHORT[name]
    check(study, tmp_path, [(2, bool(number % 2)) for number in range(sum(whole(study).values()) // 2)])


def cut(folder, records: int):
    """Leaves the first records of each run folder, as a kill does, and none of the files beside them."""
    for file in folder.rglob("records.jsonl"):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:records]))
        for other in file.parent.iterdir():
            if other.suffix == ".msgpack" or other.name == "in_flight":
                shutil.rmtree(other) if other.is_dir() else other.unlink()


def check_cuts(study, folder, lengths):
    """Cuts the records of a run that has ended, and calls the study again; then once more, with another kill in between."""
    call(study, folder)
    assert records_in(folder) == whole(study)
    for length in lengths:
        cut(folder, length)
        call(study, folder)
        assert records_in(folder) == whole(study), f"after {length} records"
        cut(folder, length)
        call_until(study, folder, 1, False)  # the last record but those that are missing, perhaps of a sweep that is written together
        call(study, folder)
        assert records_in(folder) == whole(study), f"after {length} records and another kill"


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SHORT])
def test_records_that_were_cut_are_made_again(name, tmp_path):
    study, count = SHORT[name], sum(whole(SHORT[name]).values())
    check_cuts(study, tmp_path, sorted({0, 1, count // 3, count // 2, count - 2, count - 1}))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_records_that_were_cut_anywhere_are_made_again(name, tmp_path):
    check_cuts(SHORT[name], tmp_path, range(sum(whole(SHORT[name]).values())))


def test_every_study_is_here():
    """A study opens a run folder; one that is not in COMMANDS is not killed by these tests."""
    studies = {path.parent.name for path in (ROOT / "experiments").glob("*/__main__.py") if "run = open_study(" in path.read_text(encoding="utf-8")}
    assert studies == set(SHORT)


def test_no_study_counts_rows():
    """What is there is asked of experiments/harness/resuming.py: rows that were written twice are no others."""
    for path in [*(ROOT / "experiments").rglob("*.py"), *(ROOT / "scripts").glob("score_*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"len\(\w+\.(find|read)\([^()]*\)\) *(<|>|>=|<=|==|//)", text), path
