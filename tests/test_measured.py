"""The numbers of README and docs follow from the records in docs/measured; what has no records is listed here, with the reason."""

import doctest
import io
import json
import math
import re

import pytest
from PIL import Image
from rich.console import Console

from jaxbatch.results import plots
from jaxbatch.results.records import open_run
from jaxbatch.results.report import as_markdown, print_table, printed
from scripts import make_pages, measured_runs, page_blocks, page_figures, page_sentences
from scripts.page_blocks import BLOCK, content_of, is_kept, pages, run_of, without_blocks, write_blocks
from scripts.page_findings import SENTENCES
from scripts.page_sentences import Sentence, bring_up_to_date, pattern_of, unheld_intervals, words_of
from tests.conftest import ROOT

# Runs that pages or sentences name, and that are not kept yet: their blocks and sentences hold older numbers.
AWAITED = {
    "adabatch/cifar10_alexnet",
    "adabatch/cifar10_resnet20",
    "adabatch/cifar10_vgg19_bn",
    "advise/digits",
    "convergence/mnist",
    "critical_batch_size/digits",
    "large_batch/digits",
    "large_batch/mnist",
    "learning_rate_grid/mnist",
    "score",
    "split_backward/digits",
    "split_backward/mnist",
    "split_backward/mnist_no_momentum",
}

# Page: tables outside of blocks, and why they do not follow from records of runs.
OTHER_TABLES = {
    "README.md": (1, "the contents"),
    "docs/adabatch.md": (4, "the arms; the runs of which no records are left; speed-ups on an idle machine; bounds from data sheets"),
    "docs/contrastive.md": (6, "runs that were not repeated"),
    "docs/critical_batch_size.md": (2, "the three ways; MNIST, which was not repeated"),
    "docs/cross_check.md": (1, "what is checked, with its bounds"),
    "docs/engine.md": (2, "times by scripts/bench.py"),
    "docs/gpu.md": (4, "times and memory on a GPU that is not here"),
    "docs/language_model.md": (3, "runs that were not repeated"),
    "docs/large_batch.md": (4, "the arms; MNIST at 20,000 and CIFAR-10 twice, which were not repeated (their intervals are Student's)"),
    "docs/memory.md": (6, "bytes by compilers, from docs/measured/*_memory.jsonl and from targets that are not here"),
    "docs/mnist_study.md": (5, "claims; smoothness, speed, and powers of two, which were not repeated"),
    "docs/negative_results.md": (1, "a list with links"),
    "docs/noise.md": (2, "times by scripts/bench.py; intervals against chance by tests"),
    "docs/own_model.md": (1, "no measurements"),
    "docs/sharpness.md": (2, "runs that were not repeated"),
    "docs/speed.md": (1, "times by scripts/bench.py"),
}

# Figures of the pages that do not follow from kept or awaited runs.
OTHER_FIGURES = {
    "adabatch_cifar10_throughput.png": "times on an idle machine",
    "contrastive_digits.png": "a run that was not repeated",
    "contrastive_mnist.png": "a run that was not repeated",
    "cross_check.png": "drawn by experiments.cross_check on an earlier machine",
    "faces.png": "a run that was not repeated",
    "language_model_entropy.png": "a run that was not repeated",
    "language_model_generated.png": "a run that was not repeated",
    "language_model_tiny_shakespeare.png": "a run that was not repeated",
    "memory_resnet50.png": "bytes by compilers for other targets",
    "mnist_batch_shape.png": "times on an idle machine",
    "mnist_gradient_smoothness.png": "a run that was not repeated",
    "mnist_gradient_smoothness_errors.png": "a run that was not repeated",
    "mnist_gradient_smoothness_overlaid.png": "a run that was not repeated",
    "mnist_iteration_speed.png": "times on an idle machine",
    "nose_game.png": "a run that was not repeated",
    "sharpness_digits.png": "a run that was not repeated",
}

# Pages whose every interval outside of blocks and tables is in a sentence of page_findings, once no run of theirs is awaited.
WHOLLY_HELD = ("README.md", "docs/split_backward.md")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def named_runs() -> set[str]:
    blocks = {run_of(match["order"]) for page in pages() for match in BLOCK.finditer(page.read_text(encoding="utf-8"))}
    return blocks | {run for sentence in SENTENCES for run in sentence.runs}


@pytest.mark.parametrize("name", [make_pages.name_of(page) for page in pages() if "<!-- measured:" in page.read_text(encoding="utf-8")])
def test_blocks_follow_from_the_records(name):
    assert write_blocks(text_of(name)) == text_of(name), "python scripts/make_pages.py writes this page anew"


@pytest.mark.parametrize("number", range(len(SENTENCES)))
def test_sentences_follow_from_the_records(number):
    sentence = SENTENCES[number]
    assert len(pattern_of(sentence.text).findall(text_of(sentence.page))) == 1, sentence.text
    if all(map(is_kept, sentence.runs)):
        words = re.escape(words_of(sentence)).replace(r"\ ", r"\s+")
        assert re.search(words, text_of(sentence.page)), f"python scripts/make_pages.py writes: {words_of(sentence)}"
        assert sentence.holds(), f"the records do not allow these words any more: {sentence.page}: {sentence.text}"


def test_figures_show_the_records(tmp_path):
    assert page_figures.outdated(tmp_path) == [], "python scripts/make_pages.py draws these anew"


def test_what_is_awaited_is_listed():
    assert {run for run in named_runs() if not is_kept(run)} == AWAITED


def test_what_is_kept_is_used():
    assert set(measured_runs.kept_runs()) <= named_runs()


def test_tables_follow_from_records_or_are_listed():
    counts = {}
    for page in pages():
        tables = re.findall(r"^\|[-| :]+\|$", without_blocks(page.read_text(encoding="utf-8")), re.MULTILINE)
        if tables:
            counts[make_pages.name_of(page)] = len(tables)
    assert counts == {name: count for name, (count, _) in OTHER_TABLES.items()}


def test_figures_follow_from_records_or_are_listed():
    runs = {run.replace("/", "_") for run in named_runs()} | {"adabatch_cifar10"}
    drawn = {name for name in page_figures.shown_figures() if any(name.startswith(run) for run in runs)}
    assert page_figures.shown_figures() - (drawn - set(OTHER_FIGURES)) == set(OTHER_FIGURES)


@pytest.mark.parametrize("name", WHOLLY_HELD)
def test_no_interval_stands_alone(name):
    prose = re.sub(r"^\|.*\|$", "", without_blocks(text_of(name)), flags=re.MULTILINE)
    assert unheld_intervals(prose, [sentence for sentence in SENTENCES if sentence.page == name]) == []


def test_runs_say_where_they_come_from():
    for name in measured_runs.kept_runs():
        assert {"commit", "jax", "jaxlib", "numpy", "device", "num_cores"} <= set(measured_runs.read(name).provenance), name


def test_records_are_small():
    assert sum(file.stat().st_size for file in measured_runs.MEASURED.rglob("*") if file.is_file()) < 5e6


def test_examples_in_the_scripts():
    for module in (page_blocks, page_sentences):
        outcome = doctest.testmod(module)
        assert outcome.attempted and not outcome.failed, module.__name__


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A run of a small study, kept in another folder."""
    from experiments.nose_game import Config

    monkeypatch.setattr(measured_runs, "MEASURED", tmp_path / "measured")
    measured_runs.read.cache_clear()
    measured_runs.report_of.cache_clear()
    fields = {"num_helpers": 12, "batch_sizes": Config.batch_sizes, "num_steps": 30, "seeds": 2, "jaxbatch": "0.1.0"}
    run = open_run(tmp_path / "results", "nose_game", fields)
    for seed in (0, 1):
        run.append({"kind": "game", "seed": seed, "length": 4.0 + seed, "asked": None})
    yield measured_runs.keep(run.path, "small")
    measured_runs.read.cache_clear()
    measured_runs.report_of.cache_clear()


def test_a_kept_run_is_read_as_it_was(kept):
    assert kept.name == "small"
    assert sorted(path.name for path in kept.iterdir()) == ["config.json", "records.jsonl.gz"]
    measured_runs.unpack(kept, kept.parent)
    lines = [json.loads(line) for line in (kept.parent / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["length"] for line in lines] == [4.0, 5.0]
    before = (kept / "records.jsonl.gz").read_bytes()
    measured_runs.compress(kept.parent / "records.jsonl", kept)
    assert (kept / "records.jsonl.gz").read_bytes() == before  # no time of day in it


def test_wrong_runs_are_refused(kept, tmp_path):
    with pytest.raises(ValueError, match="no run folder"):
        measured_runs.keep(tmp_path, "nothing")
    with pytest.raises(ValueError, match="no run 'nose_game/other' is kept: there are nose_game/small"):
        measured_runs.read("nose_game/other")
    about = json.loads((kept / "config.json").read_text(encoding="utf-8"))
    about["config"]["helpers"] = 3
    (kept / "config.json").write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(ValueError, match="the study has no helpers"):
        measured_runs.read("nose_game/small")


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


def test_an_order_that_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="'picture' must begin with setting, table, without or verdict"):
        content_of("split_backward/digits | picture")
    assert write_blocks(text := "<!-- measured: no/run | setting -->\nold\n<!-- end -->") == text  # awaited


@pytest.mark.parametrize("number", ["1.18 [1.08, 1.30]", "12,500", "-3.1", "nan", "none", "0.2 [-inf, inf]", "1.5 [1, 2] (2 of 4 left out)"])
def test_a_wrong_number_in_a_sentence_is_replaced(number):
    page = f"Before. The split needs {number} times the\nexamples, and 3 others. After 1.18 [1.08, 1.30]."
    sentence = Sentence("page", "The split needs {ratio:.1f} times the examples, and {others} others.", lambda: {"ratio": 2.04, "others": 4})
    assert bring_up_to_date(page, [sentence]) == "Before. The split needs 2.0 times the\nexamples, and 4 others. After 1.18 [1.08, 1.30]."
    assert unheld_intervals(page, [sentence]) == ["1.18 [1.08, 1.30]"]
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
