"""The README tells the truth: its example runs, its tree is the tree."""

import re
import subprocess

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_tree_has_a_line_for_every_file():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    names = {file for file in files if file.endswith(".py") and not file.endswith("__init__.py")}
    missing = [name for name in sorted(names) if f"{name.rsplit('/', 1)[-1]} " not in README]
    assert not missing


def test_figures_exist():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path
