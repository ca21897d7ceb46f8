"""Looks from what a script writes: to its output or to a file, as JSON, CSV or text, whatever else stands there."""

import math

import pytest

import jaxbatch as jb
from experiments.advise.command_looks import Fields, Looks, csv_row, fields_for, json_row, look_from
from experiments.harness.tail import Tail
from tests.experiments.test_children import mark  # noqa: F401 (a fixture)
from tests.experiments.test_command_runs import ARGUMENTS, failure, runs  # noqa: F401 (a fixture)


@pytest.mark.parametrize("name", ["{run}_{batch_size}.jsonl", "{seed}.csv"])
def test_a_file_of_metrics_of_the_run(runs, tmp_path, name):
    write = {
        ".jsonl": "for i in (1, 2): file.write(json.dumps({'iter': i, 'acc': i / 4, 'loss': 3}) + '\\n')",
        ".csv": "file.write('iter,acc,loss\\n1,0.25,3\\n,,2.5\\n1,,3\\n2,0.5,3')",
    }
    suffix = name[name.index(".") :]
    made = runs(f"print('noise')\nfile = open(rest[0], 'a')\n{write[suffix]}", ARGUMENTS + " {metrics}", "acc", metrics=f"{tmp_path}/{name}")
    old = tmp_path / name.format(run=1, batch_size=32, seed=5)
    old.write_text("of a search before, which is no reason to keep it")
    assert list(made.run(32, 0.1, 5)) == [jb.Look(1, None, None, 0.25, 3.0), jb.Look(2, None, None, 0.5, 3.0)]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_file_of_metrics_that_all_runs_share_keeps_what_it_holds(runs, tmp_path, suffix):
    lines = ['{"step": 9, "val_loss": 9}'] if suffix == "jsonl" else ["step,val_loss", "9,9"]
    line = {"jsonl": '\'{"step": 1, "val_loss": 2}\\n\'', "csv": "'1,2\\n'"}[suffix]
    path = tmp_path / f"metrics.{suffix}"
    path.write_text("".join(f"{line}\n" for line in lines))
    made = runs(f"open({str(path)!r}, 'a').write({line})\nif rest[0] == '2': time.sleep(60)", ARGUMENTS + " {run}", metrics=str(path))
    assert list(made.run(32, 0.1, 0)) == [jb.Look(1, None, None, 2.0)] and path.read_text().startswith(lines[0])
    with_it = made.run(32, 0.1, 0)
    assert next(with_it).updates == 1
    with pytest.raises(ValueError, match="is one file for two runs at a time. Let its name hold {run}"):
        next(made.run(64, 0.1, 0))
    with_it.close()
    assert len(path.read_text().splitlines()) == len(lines) + 2


def test_a_pattern_over_the_output(runs):
    body = "for i in range(3): print(f'iter {i * 5}: eval/loss {1 - i / 4:.2f} (lr {learning_rate})')"
    pattern = r"iter (?P<step>\d+): eval/loss (?P<value>\S+)"
    made = runs(body, metric="eval/loss", pattern=pattern)
    assert list(made.run(32, 0.1, 0)) == [jb.Look(0, None, None, 1.0), jb.Look(5, None, None, 0.75), jb.Look(10, None, None, 0.5)]
    message = failure(runs("print('iteration 5, loss 3')", metric="eval/loss", pattern=pattern))
    assert "no line of its output matches pattern='iter (?P<step>" in message and message.endswith("it said last: iteration 5, loss 3")


def test_updates_that_follow_from_examples_or_epochs(runs):
    made = runs("say(samples=99, t=3, val_loss=1)\nsay(samples=161, t=4, val_loss=1)", fields="seconds=t")
    assert list(made.run(32, 0.1, 0)) == [jb.Look(3, 99, 3.0, 1.0), jb.Look(5, 161, 4.0, 1.0)]
    made = runs("say(epoch=1, val_loss=1)\nsay(epoch=2.5, val_loss=1)", num_examples=1000)
    assert list(made.run(32, 0.1, 0)) == [jb.Look(31, 1000, None, 1.0), jb.Look(78, 2500, None, 1.0)]


def test_a_look_without_a_count_is_one_line(runs):
    message = failure(runs("say(epoch=1, t=3, val_loss=1)\ntime.sleep(60)"), ValueError)
    assert message == (
        "A line with 'val_loss' says not after how many updates: it has epoch, t, val_loss. Let it have a step, or name the field: "
        "fields='step=NAME', or give num_examples."
    )
    assert len(list(runs("say(step=1, val_loss=1)\nsay(best=True, val_loss=1)").run(32, 0.1, 0))) == 1  # a summary after looks


def test_rubbish_and_nan(runs):
    body = """
out = sys.stdout.buffer
for junk in (b"\\xff\\xfe\\x00", b'{"val_loss"', b"{" * 5000, b'{"val_loss":' * 30000, b'["val_loss"]', b"[1, 2", b"x" * 300000, b"val_loss {}"):
    out.write(junk + b"\\n")
say(step="three", val_loss=1)
say(step=-1, val_loss=1)
say(step=True, val_loss=1)
say(step=2, val_loss={"a": 1})
say(step=3, val_loss=float("nan"), loss="1.5", seconds=float("inf"))
out.write(b'\\xff{"step": 4, "val_loss": 1e999}')
"""
    first, last = runs(body).run(32, 0.1, 0)
    assert first[:3] == (3, None, None) and math.isnan(first.value) and first.loss == 1.5
    assert last == jb.Look(4, None, None, math.inf)


def test_updates_that_start_again_with_each_epoch(runs):
    body = "for epoch in range(4):\n    for i in range(3): say(step=i, val_loss=epoch + i)\n"
    message = failure(runs(body))
    assert message.startswith("its number of updates did not grow 6 times: it must count from the start of the run, not of an epoch")
    assert [look.value for look in runs("for i in (1, 2, 2, 1, 3): say(step=i, val_loss=i)").run(32, 0.1, 0)] == [1.0, 2.0, 3.0]


def test_a_file_that_is_written_anew_is_read_anew(tmp_path):
    """As a logger does that learns of a new column."""
    path = tmp_path / "metrics.csv"
    tail = Tail(path)
    looks = Looks(tail, lambda line: csv_row(line, tail.header.decode()), lambda row: look_from(row, Fields("loss"), 32))
    assert list(looks.new()) == []
    path.write_text("step,loss\r\n1,5\r\n2,4")
    assert [look.updates for look in looks.new()] == [1]  # the second line has no end yet
    path.write_text("epoch,step,loss\n0,1,5\n0,2,4\n0,3,3\n")
    assert [look[::3] for look in looks.new()] == [(2, 4.0), (3, 3.0)]
    path.write_text("step,loss\n4,2\n")
    assert [look[::3] for look in looks.new()] == [(4, 2.0)] and looks.num_back == 0


def test_the_first_usual_name_counts_and_a_given_one_replaces_them():
    row = {"iter": 5, "step": 3, "loss": 1, "train_loss": 2, "elapsed": 7}
    assert look_from(row, Fields("loss"), 32) == jb.Look(3, None, 7.0, 1.0, 2.0)
    assert look_from(row, fields_for("accuracy", "step=iter, metric=loss,loss=none"), 32) == jb.Look(5, None, 7.0, 1.0)
    assert json_row('{"a": 1} {"b": {"c": 2}, "é": 3}', "é") == {"b": {"c": 2}, "é": 3}
    assert all(look_from({name: 1, "loss": 1}, Fields("loss"), 32).updates == 1 for name in Fields("loss").step)
