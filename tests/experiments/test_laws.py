"""python -m experiments.advise --laws: the table of published rules."""

import re

import jax.numpy as jnp
import pytest

import jaxbatch as jb
from experiments.advise.__main__ import main
from experiments.advise.laws import beside

FLAGS = ["--laws", "--num-parameters", "124e6", "--num-tokens", "2.5e9", "--sequence-length", "1024"]


def test_rules_side_by_side(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(FLAGS)
    text = capsys.readouterr().out
    assert re.search(r"Step Law +134,788 +132 +2\.33e-03 +no", text)
    assert re.search(r"Power Lines +249,151 +243 +– +range of D not read", text)
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


def test_beside_the_measured_answer_of_a_text():
    """Embeddings are not counted; the rules' own numbers stand there."""
    params = {"embed": {"embedding": jnp.zeros((50, 8))}, "layer": {"kernel": jnp.zeros((8, 8))}}
    task = jb.Task(lambda key: params, lambda params, batch: batch, lambda params, batch: {}, jnp.zeros(4), None)
    text = beside(task, 1e6, 64)
    rules = jb.published_rules(num_parameters=64, num_tokens=1e6, sequence_length=64).rules
    sizes = sorted(rule.batch_sequences for rule in rules if rule.kind == "best")
    assert f"say {sizes[0]:.2g} to {sizes[-1]:,.0f} sequences for 64 parameters and 1,000,000 tokens" in text and "0 of 7 were fitted" in text
