"""How pages are made from kept runs: blocks, sentences, figures, and whatever is refused."""

import dataclasses
import doctest
import gzip
import io
import json
import math
import pathlib
import types

import pytest
from PIL import Image
from rich.console import Console

from experiments.harness.study import open_study
from experiments.learning_rate_grid import __main__ as learning_rate_grid
from jaxbatch.results import plots
from jaxbatch.results.report import as_markdown, print_table, printed
from scripts import kept_numbers, measured_runs, measured_score, page_blocks, page_figures, page_sentences
from scripts.page_blocks import content_of, write_blocks
from scripts.page_sentences import Sentence, bring_up_to_date, changes, is_allowed, unheld_intervals
from tests.experiments.test_mnist_reports import grid_records


def test_examples_in_the_scripts():
    for module in (page_blocks, page_sentences):
        outcome = doctest.testmod(module)
        assert outcome.attempted and not outcome.failed, module.__name__


RATES = tuple(10.0 ** (n / 2) for n in range(-8, 2))
BEST = {1: 0.001, 10: 0.01, 100: 0.1}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A run whose records are known, kept in another folder."""
    monkeypatch.setattr(measured_runs, "MEASURED", tmp_path / "measured")
    forget()
    config = learning_rate_grid.Config(learning_rates=RATES, seeds=3, batch_sizes=tuple(BEST), target="accuracy>0.98", epochs=5)
    run = open_study("learning_rate_grid", dataclasses.replace(config, output_dir=str(tmp_path / "results")), Console(quiet=True))
    for record in grid_records(config, BEST):
        run.append(record)
    measured_runs.MEASURED.mkdir()
    (measured_runs.MEASURED / "awaited.txt").write_text("learning_rate_grid/known\nscore\n", encoding="utf-8")
    yield measured_runs.keep(run.path, "known")
    forget()


def forget():
    measured_runs.read.cache_clear()
    measured_runs.report_of.cache_clear()


def test_a_page_is_made_of_a_kept_run(kept, tmp_path):
    order = "learning_rate_grid/known | setting | table The best | without diverged at | verdict 1 1"
    page = f"Rates:\n\n<!-- measured: {order} -->\nold\n<!-- end -->\nRest.\n"
    text = write_blocks(page)
    assert (
        "| 10 | 0.01 | 3/3 |" in text
        and "diverged at |" not in text.replace(order, "")
        and "old" not in text
        and text.endswith("<!-- end -->\nRest.\n")
    )
    assert "*digits, simple_cnn, SGD with momentum 0.5, up to 5 epochs, 3 seeds;" in text and "- The best rate grows as B^p with p = 1.0" in text
    assert write_blocks(text) == text
    [figure] = measured_runs.draw("learning_rate_grid/known", tmp_path)
    assert figure.name == "learning_rate_grid_known.png"
    before = page_figures.fingerprint_of(figure)

    records = gzip.decompress((kept / "records.jsonl.gz").read_bytes())
    (kept / "records.jsonl.gz").write_bytes(gzip.compress(records.replace(b"0.99", b"0.97")))  # now no run reaches the target
    forget()
    assert "not reached" in write_blocks(text)
    assert page_figures.fingerprint_of(measured_runs.draw("learning_rate_grid/known", tmp_path)[0]) != before
    for order, message in (
        ("table No such", "0 tables .* begin with 'No such'; their titles are The best"),
        ("picture", "'picture' must begin with"),
    ):
        with pytest.raises(ValueError, match=message):
            content_of(f"learning_rate_grid/known | {order}")


def test_a_kept_run_is_read_as_it_was(kept):
    assert kept.name == "known"
    assert sorted(path.name for path in kept.iterdir()) == ["config.json", "records.jsonl.gz"]
    measured_runs.unpack(kept, kept.parent)
    lines = [json.loads(line) for line in (kept.parent / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == measured_runs.read("learning_rate_grid/known").records and len(lines) > 100
    assert (kept.parents[1] / "awaited.txt").read_text(encoding="utf-8") == "score\n"
    before = (kept / "records.jsonl.gz").read_bytes()
    measured_runs.compress(kept.parent / "records.jsonl", kept)
    assert (kept / "records.jsonl.gz").read_bytes() == before  # no time of day in it


def test_wrong_runs_are_refused(kept, tmp_path):
    with pytest.raises(ValueError, match="no run folder"):
        measured_runs.keep(tmp_path, "nothing")
    with pytest.raises(ValueError, match="no run 'nose_game/other' is kept: there are learning_rate_grid/known"):
        measured_runs.read("nose_game/other")
    about = json.loads((kept / "config.json").read_text(encoding="utf-8"))
    about["config"]["helpers"] = 3
    (kept / "config.json").write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(ValueError, match="the study has no helpers"):
        measured_runs.read("learning_rate_grid/known")


def table(ms: str):
    [one] = printed(lambda console: print_table(console, "Costs", ["step", "ms"], [["a | b", ms]])).tables.values()
    return one


def test_a_table_is_the_same_in_markdown():
    assert as_markdown(table("1.2 [1.1, 1.3]")) == "| step | ms |\n|---|---:|\n| a \\| b | 1.2 [1.1, 1.3] |"
    assert as_markdown(table("1.2"), ["ms"]) == "| step |\n|---|\n| a \\| b |"
    with pytest.raises(ValueError, match="seconds"):
        as_markdown(table("1.2"), ["seconds"])
    shown = io.StringIO()
    print_table(Console(width=80, file=shown), "Costs", ["step", "ms"], [["a", "1.2 [1.1, 1.3]"]])
    assert "1.2 [1.1, 1.3]" in shown.getvalue()


def test_the_blocks_of_a_run_that_is_awaited_stay():
    assert write_blocks(text := "<!-- measured: no/run | setting -->\nold\n<!-- end -->") == text


@pytest.mark.parametrize("number", ["1.18 [1.08, 1.30]", "12,500", "-3.1", "nan", "none", "0.2 [-inf, inf]", "1.5 [1, 2] (2 of 4 left out)"])
def test_a_wrong_number_in_a_sentence_is_replaced(number):
    page = f"Before. The split needs {number} times the\nexamples, and 3 others. After 1.18 [1.08, 1.30]."
    sentence = Sentence("page", "The split needs {ratio:.1f} times the examples, and {others} others.", lambda: {"ratio": 2.04, "others": 4})
    assert bring_up_to_date(page, [sentence]) == "Before. The split needs 2.0 times the\nexamples, and 4 others. After 1.18 [1.08, 1.30]."
    assert changes(page, page.replace("3 others", "4 others"), [sentence]) == [
        f"- The split needs {number} times the examples, and 3 others.\n+ The split needs {number} times the examples, and 4 others."
    ]
    assert unheld_intervals(page, [sentence]) == ["1.18 [1.08, 1.30]"]
    assert is_allowed(sentence) and not is_allowed(sentence._replace(holds=lambda: False))
    assert not is_allowed(sentence._replace(numbers=lambda: {"ratio": plots.Interval(math.nan, math.nan, math.nan, 0), "others": 4}))
    with pytest.raises(ValueError, match="holds this sentence 0 times"):
        bring_up_to_date(page.replace("needs", "wants"), [sentence])


def figure(height: float, label: str = "loss"):
    drawn, axes = plots.subplots()
    axes.plot([0, 1], [1.0, height], label=label)
    plots_band = [plots.Interval(1.0, 0.5, 1.5, 3), plots.Interval(height, height - 0.5, height + 0.5, 3)]
    plots.band(axes, [0, 1], plots_band, color="black")
    axes.bar([0], [height])
    axes.imshow([[height, math.pi]])
    return drawn


def test_a_figure_says_what_it_shows(tmp_path):
    plots.save(figure(2.0), tmp_path)
    with Image.open(tmp_path / "figure.png") as image:
        assert image.info[plots.FINGERPRINT] == plots.fingerprint(figure(2.0)) == plots.fingerprint(figure(2.0 + 1e-9))
    assert len({plots.fingerprint(one) for one in (figure(2.0), figure(2.01), figure(2.0, "error"))}) == 3
    assert page_figures.fingerprint_of(tmp_path / "none.png") is None


@pytest.mark.parametrize("name", measured_score.SCRIPTS)
def test_the_score_is_kept_and_read(name, tmp_path, monkeypatch):
    monkeypatch.setattr(measured_runs, "MEASURED", tmp_path / "measured")
    with pytest.raises(ValueError, match="no files of a score"):
        measured_score.keep_score(tmp_path, name)
    assert not page_blocks.is_kept(name)
    (tmp_path / "digits.sweep.jsonl").write_text('{"batch_size": 4}\n', encoding="utf-8")
    measured_score.keep_score(tmp_path, name)
    assert page_blocks.is_kept(name) and (tmp_path / "measured" / name / "config.json").exists()

    def run(command, **_):
        assert command[-4].endswith(measured_score.SCRIPTS[name]) and command[-2] == "--output"
        assert (pathlib.Path(command[-1]) / "digits.sweep.jsonl").read_text(encoding="utf-8") == '{"batch_size": 4}\n'
        lines = ["| case |", "|---|", "| digits |", "advise: median regret 1.00, worst inf, over 2 scored cases", "| more |", "|---|"]
        return types.SimpleNamespace(stdout="\n".join(lines))

    measured_score.lines.cache_clear()
    monkeypatch.setattr(measured_score.subprocess, "run", run)
    assert content_of(f"{name} | table | verdict").split("\n\n") == [
        "| case |\n|---|\n| digits |", "| more |\n|---|", "- advise: median regret 1.00, worst inf, over 2 scored cases",
    ]  # fmt: skip
    assert name != "score" or kept_numbers.score("advise") == {"median": "1.00", "worst": "inf"}
    measured_score.lines.cache_clear()
