"""The numbers of README and docs follow from the records in docs/measured; what has no records is listed here, with the reason."""

import re

import pytest

from scripts import make_pages, measured_runs, page_figures
from scripts.page_blocks import BLOCK, is_kept, pages, run_of, without_blocks, write_blocks
from scripts.page_findings import SENTENCES
from scripts.page_sentences import is_allowed, pattern_of, unheld_intervals, words_of
from tests.conftest import ROOT

# Page: tables outside of blocks, and why they do not follow from records of runs.
OTHER_TABLES = {
    "README.md": (1, "the contents"),
    "docs/adabatch.md": (4, "the arms; the runs of which no records are left; speed-ups on an idle machine; bounds from data sheets"),
    "docs/any_script.md": (1, "flags"),
    "docs/contrastive.md": (6, "runs that were not repeated"),
    "docs/critical_batch_size.md": (2, "the three ways; MNIST, which was not repeated"),
    "docs/cross_check.md": (1, "what is checked, with its bounds"),
    "docs/engine.md": (2, "times by scripts/bench.py"),
    "docs/gpu.md": (5, "times and memory on a GPU that is not here; the stages of a day at one"),
    "docs/intervals.md": (1, "coverage by scripts/coverage.py"),
    "docs/language_model.md": (3, "runs that were not repeated"),
    "docs/large_batch.md": (4, "the arms; MNIST at 20,000 and CIFAR-10 twice, which were not repeated (their intervals are Student's)"),
    "docs/memory.md": (7, "bytes by compilers, from docs/measured/*_memory.jsonl and from targets that are not here"),
    "docs/mnist_study.md": (5, "claims; smoothness, speed, and powers of two, which were not repeated"),
    "docs/negative_results.md": (1, "a list with links"),
    "docs/noise.md": (2, "times by scripts/bench.py; intervals against chance by tests"),
    "docs/optimizers.md": (1, "by scripts/optimizer_table.py"),
    "docs/own_model.md": (2, "no measurements"),
    "docs/published_rules.md": (2, "formulas of papers, and where they were read"),
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
        assert is_allowed(sentence), f"the records do not allow these words any more: {sentence.page}: {sentence.text}"


def test_figures_show_the_records(tmp_path):
    assert page_figures.outdated(tmp_path) == [], "python scripts/make_pages.py draws these anew"


def test_what_is_awaited_is_listed():
    awaited = (measured_runs.MEASURED / "awaited.txt").read_text(encoding="utf-8").split()
    assert sorted(run for run in named_runs() if not is_kept(run)) == awaited


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
