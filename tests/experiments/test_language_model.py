"""The study of a language model: its command line in small, what a kill leaves, and its sentences from records made by hand."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

import jaxbatch as jb
from experiments.language_model import __main__ as language_model
from experiments.language_model.report import at_the_end, seconds, verdict
from jaxbatch.results.records import read_records
from tests.experiments.test_command_line import ended

SMALL = ["--quick", "--width", "8", "--num-layers", "1", "--num-heads", "2", "--seeds", "1", "--sequence-length", "32", "--batch-size", "32"]


def run(folder, *flags):
    language_model.main([*SMALL, "--output-dir", str(folder), *flags])
    (file,) = folder.glob("*/*/records.jsonl")
    return read_records(file.parent)


def test_the_text_is_learned_and_the_test_text_is_used_once(tmp_path, capsys):
    records = run(tmp_path)
    epochs, ends = ([record for record in records if record["kind"] == kind] for kind in ("epoch", "end"))
    assert [record["epoch"] for record in epochs] == [1, 2] and len(ends) == 1
    assert epochs[1]["tokens"] == 2 * 512 * 32
    assert 3.5 < epochs[1]["validation_bits_per_token"] < epochs[0]["validation_bits_per_token"] < math.log2(28) + 0.1
    assert ends[0]["test_bits_per_token"] == pytest.approx(epochs[1]["validation_bits_per_token"], abs=0.1)
    assert ends[0]["test_bits_per_token"] != epochs[1]["validation_bits_per_token"]
    told = capsys.readouterr().out
    assert "best possible" in told and "The best possible number is 1.0412" in told and "after 32,768 tokens" in told
    assert len(run(tmp_path)) == len(records)  # the second call measures nothing again


@pytest.mark.slow
def test_a_kill_before_the_end_loses_no_record(tmp_path, monkeypatch, capsys):
    evaluate = jb.make_evaluate

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(language_model.jb, "make_evaluate", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(tmp_path)
    monkeypatch.setattr(language_model.jb, "make_evaluate", evaluate)
    records = run(tmp_path)
    whole = run(tmp_path / "whole")
    for kind in ("epoch", "end"):
        found, expected = ([record for record in of if record["kind"] == kind] for of in (records, whole))
        assert len(found) == len(expected) > 0
        for one, other in zip(found, expected, strict=True):
            for key in {"loss", "validation_bits_per_token", "test_bits_per_token"} & one.keys():
                assert one[key] == other[key]
    assert not list(tmp_path.glob("*/*/in_flight"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "digits"], "unknown text name='digits'"),
        (["--width", "9"], "width=9 must be a multiple of num_heads=2"),
        (["--epochs", "-1"], "--epochs -1 must be above 0"),
        (["--sequence-length", "99999"], "an example takes 100000 tokens"),
    ],
)
def test_flags_that_cannot_be(flags, message, tmp_path, capsys):
    assert message in ended(language_model.main, [*SMALL, *flags, "--output-dir", str(tmp_path)], capsys)


def records_of(bits, entropy=1.0, diverged=False):
    found = [{"kind": "text", "entropy": entropy, "vocab_size": 28, "parameters": 9}]
    for seed, value in enumerate(bits):
        common = {"diverged": diverged, "seed": seed}
        found += [{"kind": "epoch", "epoch": n, "tokens": 100 * n, "loss": 1.0, "train_seconds": 2.0, **common} for n in (1, 2)]
        found.append({"kind": "end", "test_bits_per_token": value, **common})
    return json.loads(json.dumps(found))


def test_the_sentence_says_how_much_is_left():
    records = records_of([1.02, 1.03, 1.04])
    assert at_the_end(records).value == pytest.approx(1.03) and seconds(records).value == 4.0
    first, second = verdict(SimpleNamespace(seeds=3), records)
    assert first.startswith("The test text takes 1.030 [") and "after 200 tokens and 4 [4, 4] s" in first
    assert second.startswith("The best possible number is 1.0000, so 0.0300 [0.0052, 0.0552]")
    assert len(verdict(SimpleNamespace(seeds=3), records_of([1.5], entropy=None))) == 1
    assert verdict(SimpleNamespace(seeds=1), records_of([np.nan], diverged=True)) == ["1 of 1 runs diverged: lower --learning-rate."]
