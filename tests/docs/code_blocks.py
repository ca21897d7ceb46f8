"""The Python of a page, block by block, so that tests run what the page shows."""

import re

from tests.conftest import ROOT


def code_blocks(page: str) -> dict[str, str]:
    """The blocks of Python on a page of docs/, by their section and their number in it."""
    blocks = {}
    for section in re.split(r"\n## ", (ROOT / "docs" / page).read_text(encoding="utf-8"))[1:]:
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", section, re.DOTALL)):
            blocks[f"{section.splitlines()[0]} {number}"] = block
    return blocks


def run_block(block: str, name: str, **names) -> dict:
    """What a block has defined once it has run, given what it takes from a block before it."""
    exec(compile(block, name, "exec"), names)
    return names
