"""README and CONTRIBUTING tell the truth: the examples run, the tree is the tree."""

import pathlib
import re
import subprocess

import pytest

import jaxbatch as jb
from experiments.__main__ import studies
from scripts.page_blocks import without_blocks
from tests.conftest import ROOT

LONGEST_LINE = 160  # characters, of prose
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "docs/own_model.md", "docs/language_model.md", "docs/coupled_losses.md", "docs/published_rules.md"])
def test_examples_run(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})


def test_readme_is_read_in_minutes():
    assert len(README.split()) <= 950


def test_the_reference_has_every_public_name():
    listed = re.findall(r"^::: jaxbatch\..*?(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(jb.__all__)


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), (page.name, target)


def test_the_studies_of_ones_own_task_are_listed():
    page = (ROOT / "docs" / "own_model.md").read_text(encoding="utf-8").split("- It works with", 1)[1].split("\n- ", 1)[0]
    with_task = {name.rsplit(".", 1)[-1] for name, (_, commands) in studies().items() if any("--task" in command for command in commands)}
    assert with_task <= set(re.findall(r"`(\w+)`", page)), with_task


def test_every_page_can_be_found():
    navigation, start = ((ROOT / name).read_text(encoding="utf-8") for name in ("mkdocs.yml", "docs/index.md"))
    for page in (path.name for path in (ROOT / "docs").glob("*.md")):
        assert page in navigation and (page in start or page == "index.md"), page


def test_every_term_is_used_and_leads_to_a_page_that_uses_it():
    pages = {path.name: path.read_text(encoding="utf-8").lower() for path in (ROOT / "docs").glob("*.md")}
    terms = re.findall(r"^## (.+?)\n\n(.+?)(?=\n## |\Z)", pages.pop("terms.md"), re.MULTILINE | re.DOTALL)
    assert len(terms) >= 18 and len({term for term, _ in terms}) == len(terms)
    used = "\n".join(pages.values())
    for term, meaning in terms:
        there = [target for target in re.findall(r"\]\((\w+\.md)\)", meaning) if re.search(rf"\b{term}s?\b", pages[target])]
        assert there, f"{term}: no page that its meaning leads to uses it"
    linked = set(re.findall(r"terms\.md#([\w-]+)\)", used))
    assert linked <= {term.replace(" ", "-") for term, _ in terms} and len(linked) >= 12


def prose_lines(text: str) -> list[str]:
    """The lines of a page that people wrote, without tables, code, headings and what is made from records; of a link only its words."""
    text = re.sub(r"^( *)```.*?^ *```", "", without_blocks(text), flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("|", "#", "![", "<!--"))]
    return [re.sub(r"\]\([^)]*\)", "]", line) for line in lines]


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_lines_of_prose_are_of_one_length(page):
    long = [line for line in prose_lines((ROOT / page).read_text(encoding="utf-8")) if len(line) > LONGEST_LINE]
    assert not long, f"{page}: break these lines at {LONGEST_LINE} characters: {long}"


def test_tree_has_every_folder_and_every_odd_file():
    """A test in a folder of tests, and a file of a study that bears one of the usual names, need no line of their own."""
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    tree = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```text\njaxbatch/\n", 1)[1].split("\n```", 1)[0]
    paths = [pathlib.PurePath(name) for name in files if name.endswith(".py") and not name.endswith("__init__.py")]
    folders = {folder.name for path in paths for folder in path.parents if folder.name not in ("", "jaxbatch")}
    missing = [name for name in sorted(folders) if f"{name}/" not in tree]
    assert not missing, f"give each of these folders a line in CONTRIBUTING's tree: {missing}"
    stems = {path.stem for path in paths if not (path.parts[0] == "tests" and path.stem.startswith("test_"))}
    missing = [stem for stem in sorted(stems) if not re.search(rf"\b{stem}\b", tree)]
    assert not missing, f"name these files in CONTRIBUTING's tree, in the line of their folder: {missing}"


def test_how_long_a_study_takes_is_told_in_one_place():
    # In the study's docstring, which `python -m experiments` prints; two places come apart.
    told = re.compile(r"[\w.]+(?: an?)? (?:minutes?|hours?|min)\b")
    allowed = {
        "fifteen minutes",  # of the tests
        "half a minute", "to a minute",  # --quick of any study
    }  # fmt: skip
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*_study.md")), ROOT / "docs" / "adabatch.md"):
        found = set(told.findall(path.read_text(encoding="utf-8")))
        assert found <= allowed, (path.name, found - allowed)
    for name, (_, commands) in studies().items():
        lengths = {re.sub(r" {2,}.*", "", command) for command in commands}
        assert len(lengths) == len(commands), name  # no command twice, with two times
    assert any("minute" in command for _, commands in studies().values() for command in commands)
