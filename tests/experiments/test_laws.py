"""python -m experiments.advise --laws: the table of published rules."""

import re

import pytest

from experiments.advise.__main__ import main

FLAGS = ["--laws", "--num-parameters", "124e6", "--num-tokens", "2.5e9", "--sequence-length", "1024"]


def test_rules_side_by_side(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(FLAGS)
    text = capsys.readouterr().out
    assert re.search(r"Step Law +134,788 +132 +2\.33e-03 +no", text)
    assert re.search(r"Moonlight .* N 3\.2 times below 3\.99e\+08; D 3\.6 times below 8\.92e\+09", text)
    assert "disagree by a factor of 2.0 on the best batch, 4.6 on the critical one and 3.6 on the learning rate" in text
    assert "arXiv 2503.04715, eq. 1" in text and "MiniCPM: " not in text and "MiniCPM's rule needs --loss" in text
    assert not any(tmp_path.iterdir())  # no run folder
    main([*FLAGS, "--loss", "3"])
    assert "MiniCPM: B = 1.21e9 / L^6.24 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (FLAGS[:5], "--sequence-length is needed."),
        ([*FLAGS[:5], "--sequence-length", "0"], "sequence_length=0 must be above 0, and no more than a training run can have."),
        ([*FLAGS, "--epochs", "3"], "unrecognized --epochs; --help shows the flags."),
    ],
)
def test_mistakes_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == 2 and capsys.readouterr().err == f"error: {message}\n"
