"""python -m experiments.advise --within: runs of a fixed length, from the command line to the answer; killed and called again."""

import json
import pathlib
import re

import pytest

from experiments.advise import within_figure, within_records, within_report
from experiments.advise.__main__ import main
from experiments.advise.within import Config

SMALL = ["--model", "mlp", "--batch-sizes", "16,64", "--learning-rates", "0.01,0.03,0.1,0.3", "--full-runs", "2", "--no-check-backend"]
FLAGS = ["--within", "1epochs", "--optimizer", "momentum", *SMALL]


def run(folder, *flags):
    main([*FLAGS, *flags, "--output-dir", str(folder)])
    (path,) = pathlib.Path(folder).glob("advise_within/*")
    return path, [json.loads(line) for line in (path / "records.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("within")
    return (folder, *run(folder))


@pytest.mark.slow
def test_the_answer_and_its_files(made, capsys):
    folder, path, records = made
    run(folder)  # from the records alone
    text = capsys.readouterr().out
    assert [record["kind"] for record in records[:2]] == ["setting", "ending"]
    assert re.search(r"Train 1 epochs with batch size (16|64) and learning rate", text)
    assert "jb.scheduled(functools.partial(optax.sgd, momentum=0.9), 'cosine')" in text
    assert {"figure.png", "figure.pdf", "config.json"} <= {file.name for file in path.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("kept", [1, 2, 4])
def test_killed_and_called_again(made, tmp_path, kept):
    _, path, records = made
    target = tmp_path / "advise_within" / path.name
    target.mkdir(parents=True)
    (target / "config.json").write_bytes((path / "config.json").read_bytes())
    lines = (path / "records.jsonl").read_text().splitlines(keepends=True)
    (target / "records.jsonl").write_text("".join(lines[:kept]) + lines[kept][:20])
    assert run(tmp_path)[1] == records


@pytest.mark.slow
def test_published_rules_stand_beside_the_answer_for_a_text(tmp_path, capsys):
    flags = ["--dataset", "generated", "--quick", "--model", "transformer", "--batch-sizes", "8,32", "--learning-rates", "0.003,0.01,0.03"]
    main(["--within", "300examples", *flags, "--full-runs", "2", "--no-check-backend", "--output-dir", str(tmp_path)])
    assert re.search(r"Published rules say .* sequences for [0-9,]+ parameters and [0-9]+,[0-9]+ tokens", capsys.readouterr().out)


def test_records_are_read_as_they_were_written():
    setting = {
        "kind": "setting",
        "metric": "loss<",
        "batch_sizes": [8, 32],
        "learning_rates": [0.01, 0.1],
        "num_steps": [80, 20],
        "payable_steps": [40, 10],
        "start": 2.3,
        "length": 640.0,
        "scale_kind": "log",
        "scale_above": False,
        "scale_unit": 1.0,
        "num_examples": 640,
        "largest_batch_size": None,
        "rules": ["Momentum: kept."],
    }
    read = within_records.read_setting([setting])
    assert within_records.write_setting(read) == setting
    assert read.space.num_steps == {8: 80, 32: 20} and read.space.payable_steps == {8: 40, 32: 10}


def endings():
    """Records of runs, one of which diverged, and one that was ended early."""
    rows = []
    for number, (size, rate, steps, value) in enumerate(
        [(8, 0.01, 10, 1.5), (8, 0.1, 10, 1.2), (32, 0.1, 10, 1.4), (8, 0.1, 40, 0.7), (32, 0.1, 10, 1.0)]
    ):
        rows.append(
            {"batch_size": size, "learning_rate": rate, "seed": number, "num_steps": steps, "updates": steps, "diverged": False, "value": value}
        )
    rows.append(rows[-1] | {"learning_rate": 1.0, "seed": 9, "updates": 3, "diverged": True, "value": None})
    rows.append(rows[3] | {"learning_rate": 0.01, "seed": 10, "updates": 20, "value": 2.3})
    return [{"kind": "ending", "number": n, "repeat": False, "looks": [[row["updates"], row["value"]]], **row} for n, row in enumerate(rows)]


@pytest.mark.parametrize("horizon", [None, "10epochs"])
def test_the_report_follows_from_the_records(horizon, tmp_path, capsys):
    steps = [40, 10] if horizon is None else [800, 200]
    setting = {"kind": "setting", "metric": "loss<", "batch_sizes": [8, 32], "learning_rates": [0.01, 0.1, 1.0], "num_steps": steps}
    setting |= {"payable_steps": [40, 10], "start": 2.3, "length": 8.0 * steps[0], "scale_kind": "log", "scale_above": False, "scale_unit": 1.0}
    setting |= {"num_examples": 640, "largest_batch_size": None, "rules": []}
    records, config = [setting, *endings()], Config(within="0.5epochs", horizon=horizon, target="loss<")
    advice = within_report.read_advice(config, records)
    assert [choice.batch_size for choice in advice.choices] == [8, 32] and advice.batch_size in (8, 32)
    assert advice.cost_in_runs == pytest.approx(sum(row["updates"] / steps[row["batch_size"] == 32] for row in endings()))
    sentences = " ".join(within_report.verdict(config, records))
    assert f"{advice.choice.value:.4g}" in sentences
    assert ("was not made" in sentences) == (horizon is not None)
    assert within_figure.draw_figure(config, records, tmp_path).exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--within", "5epochs", "--seeds", "3"], "--seeds 3: the search gives every run a seed of its own; leave the flag out."),
        (["--within", "5"], "--within 5 must be a number with its unit, as 5epochs, 50000examples, 1e6tokens, 2000steps or 600seconds."),
        (["--within", "1.5steps"], "--within 1.5steps: steps=1.5 must be a finite whole number of at least 0."),
        (["--within", "1epochs", "--target", "loss<0.1"], "--target loss<0.1 must name a metric and its direction without a value"),
        (["--within", "1epochs", "--target", "error<"], "--target error<: the metrics are accuracy, loss."),
        (
            ["--within", "9seconds", "--horizon", "9epochs"],
            "--within 9seconds: with a horizon, both lengths are in epochs, examples,",
        ),
        (["--within", "2epochs", "--horizon", "1epochs"], "must not be shorter than within"),
        (["--within", "1epochs", "--full-runs", "1"], "full_runs=1.0 must be a number of at least 2"),
        (["--within", "1epochs", "--warmup", "2"], "--warmup 2 must be a share of the run"),
        (["--horizon", "1epochs", "--objective", "time"], "unrecognized --objective"),
    ],
)
def test_mistakes_are_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(
            [*flags, *SMALL, "--output-dir", str(tmp_path)]
            if "--full-runs" not in flags
            else [*flags, "--model", "mlp", "--output-dir", str(tmp_path)]
        )
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1, error
