"""The validation part: what it holds, and that no study chooses by anything else."""

import contextlib
import functools
import io
import json
import pathlib
import tempfile

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbatch as jb
from experiments.adabatch import __main__ as adabatch
from experiments.convergence import __main__ as convergence
from experiments.harness import task as study_task
from experiments.learning_rate_grid import __main__ as learning_rate_grid
from experiments.split_backward import __main__ as split_backward
from jaxbatch.data.held_out import hold_out_arrays
from jaxbatch.results.records import RunFolder


def numbered(labels, name="made up"):
    """A data set whose training images tell their places by their only pixels."""
    labels = np.asarray(labels, np.int32)
    images = np.arange(len(labels)).astype(np.uint8).reshape(-1, 1, 1, 1)
    return jb.Dataset(name, images, labels, images[:2], labels[:2], int(labels.max()) + 1, (0.0,), (1.0,))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=200), st.data())
def test_the_parts_are_disjoint_whole_and_have_each_class(labels, data):
    count, seed = data.draw(st.integers(1, len(labels) - 1)), data.draw(st.integers(0, 2**40))
    dataset = numbered(labels)
    found = jb.hold_out(dataset, count, seed=seed)
    held, rest = (part.ravel().tolist() for part in (found.test_images, found.train_images))
    assert len(held) == count and sorted(held + rest) == list(range(len(labels))) and held == sorted(held) and rest == sorted(rest)
    assert np.array_equal(found.test_labels, dataset.train_labels[held]) and np.array_equal(found.train_labels, dataset.train_labels[rest])
    for label in range(4):
        share = labels.count(label) * count / len(labels)
        assert abs(np.sum(found.test_labels == label) - share) < 1 + 1e-9
    again = jb.hold_out(dataset, count, seed=seed)
    assert all(np.array_equal(a, b) for a, b in zip(found[1:5], again[1:5], strict=True))


def test_another_seed_draws_another_part_and_every_example_is_drawn_alike():
    dataset = numbered(np.arange(60) % 5)
    drawn = [frozenset(jb.hold_out(dataset, seed=seed).test_images.ravel().tolist()) for seed in range(2000)]
    assert len(set(drawn)) > 1990
    counts = np.bincount([place for part in drawn for place in part], minlength=60)
    assert abs(counts - 2000 / 6).max() < 5 * np.sqrt(2000 / 6)  # 10 of 60 each time, five standard deviations


@pytest.mark.parametrize("count", [0, -1, 12, 13])
def test_a_part_that_leaves_nothing_is_refused(count):
    with pytest.raises(ValueError, match=f"num_examples={count} of 12 training examples must be at least 1 and leave"):
        jb.hold_out(numbered([0, 1] * 6), count)


def test_too_few_for_a_sixth_and_a_negative_seed_are_refused():
    with pytest.raises(ValueError, match="num_examples=0 of 5"):
        jb.hold_out(numbered([0, 1, 0, 1, 0]))
    with pytest.raises(ValueError, match="seed=-1 must be at least 0"):
        jb.hold_out(numbered([0, 1] * 6), seed=-1)


# The studies choose on it, and on it alone.

SMALL = ["--quick", "--model", "mlp", "--epochs", "2", "--seeds", "1"]
SIZES = ["--batch-sizes", "60", "600"]
STUDIES = {
    learning_rate_grid: [*SMALL, *SIZES, "--learning-rates", "0.01", "0.1"],
    convergence: [*SMALL, *SIZES, "--tuned-rates", "0.3", "0.3", "--target", "accuracy>0.9"],
    split_backward: [*SMALL, "--batch-size", "32", "--learning-rates", "0.03", "0.3", "--target", "accuracy>0.8"],
    adabatch: [*SMALL, "--batch-size", "16", "--max-batch-size", "32", "--num-examples", "600"],
}


def name_of(module):
    return module.__name__.split(".")[1]


def run(module, folder):
    """Runs a study in small, draws nothing, and returns its records."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(module, "show_results", lambda *args: None)
        module.main([*STUDIES[module], "--output-dir", str(folder)])
    return records_in(module, folder)


@functools.cache
def whole(module):
    """The records of a study in small that nothing has disturbed."""
    with tempfile.TemporaryDirectory() as folder:
        return run(module, pathlib.Path(folder))


def records_in(module, folder):
    (file,) = folder.glob(f"{name_of(module)}/*/records.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def without(records, *fragments):
    """Records in a settled order without the fields whose names hold one of the fragments."""
    rows = [{k: v for k, v in record.items() if not any(part in k for part in fragments)} for record in records]
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


LONG = (convergence, adabatch, split_backward)


@pytest.mark.parametrize("module", [pytest.param(module, marks=pytest.mark.slow if module in LONG else ()) for module in STUDIES], ids=name_of)
def test_other_test_labels_change_no_choice_and_no_record_but_the_test_figures(module, tmp_path, monkeypatch):
    truth, load = whole(module), jb.load_dataset

    def permuted(*args, **kwargs):
        dataset = load(*args, **kwargs)
        return dataset._replace(test_labels=np.random.default_rng(0).permutation(dataset.test_labels))

    monkeypatch.setattr(study_task, "load_dataset", permuted)
    monkeypatch.setattr(jb, "load_dataset", permuted)
    other = run(module, tmp_path)
    times = ("seconds", "_ms")
    assert without(truth, "test_", *times) == without(other, "test_", *times)
    if module is not learning_rate_grid:  # which never looks: its records have no such figure
        assert without(truth, *times) != without(other, *times)
    else:
        assert not any("test_" in key for record in truth for key in record)


@pytest.mark.slow  # tests/experiments/test_resume.py stops every study at a few places
@pytest.mark.parametrize("module", [convergence, split_backward], ids=name_of)
def test_a_study_that_is_stopped_within_each_kind_of_records_ends_in_the_same_ones(module, tmp_path, monkeypatch):
    kinds = [record["kind"] for record in whole(module)]
    places = {kinds.index(kind) + 1 for kind in set(kinds)}  # within the records of each kind
    written = RunFolder.append

    def stopped_at(stops):
        def append(folder, record):
            if len(folder.records) in stops:
                stops.discard(len(folder.records))
                raise KeyboardInterrupt
            written(folder, record)

        return append

    monkeypatch.setattr(RunFolder, "append", stopped_at(set(places)))  # one run, stopped again and again
    for _ in places:
        with pytest.raises(SystemExit) as stopped:
            run(module, tmp_path)
        assert stopped.value.code == 130
    monkeypatch.setattr(RunFolder, "append", written)
    times = ("seconds", "_ms")
    assert without(run(module, tmp_path), *times) == without(whole(module), *times)


def test_a_split_study_that_is_stopped_within_its_checks_of_exactness_goes_on_with_them(tmp_path, monkeypatch):
    command = ["--model", "mlp", "--epochs", "1", "--seeds", "1", "--batch-size", "16", "--cost-rounds", "1", "--no-tune"]
    monkeypatch.setitem(STUDIES, split_backward, command)
    written = RunFolder.append

    def stop(folder, record):
        if len(folder.records) == 2:
            raise KeyboardInterrupt
        written(folder, record)

    monkeypatch.setattr(RunFolder, "append", stop)
    with pytest.raises(SystemExit):
        run(split_backward, tmp_path)
    monkeypatch.setattr(RunFolder, "append", written)
    groups = [record["num_groups"] for record in run(split_backward, tmp_path) if record["kind"] == "exactness"]
    assert groups == [1, 2, 4, 8, 16]


# Any pytree of arrays.


def test_the_parts_of_arrays_are_a_partition_and_a_function_of_the_seed():
    arrays = {"x": np.arange(100.0), "keys": jax.random.split(jax.random.key(0), 100)}
    rest, held = hold_out_arrays(arrays, seed=3)
    assert sorted([*rest["x"], *held["x"]]) == list(range(100)) and len(held["x"]) == 16
    assert (np.diff(rest["x"]) > 0).all() and (np.diff(held["x"]) > 0).all()
    assert (held["keys"] == arrays["keys"][held["x"].astype(int)]).all()
    again, other = (hold_out_arrays(arrays, seed=seed)[1]["x"].tolist() for seed in (3, 4))
    assert again == held["x"].tolist() != other


@pytest.mark.parametrize(
    ("arrays", "settings", "message"),
    [
        (np.arange(5), {}, "num_examples=0 of 5 training examples must be at least 1"),
        (np.arange(12), {"num_examples": 12}, "num_examples=12 of 12 training examples"),
        (np.arange(12), {"seed": -1}, "seed=-1 must be at least 0"),
        ((np.arange(12), np.arange(11)), {}, r"arrays: the leaves disagree on the number of examples: \[11, 12\]"),
    ],
)
def test_arrays_that_cannot_be_held_out_of(arrays, settings, message):
    with pytest.raises(ValueError, match=message):
        hold_out_arrays(arrays, **settings)
