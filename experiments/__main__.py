"""``python -m experiments``: the studies, the question each one answers, and how to run it."""

import ast
import pathlib

from rich.console import Console


def studies() -> dict[str, tuple[str, list[str]]]:
    """Maps each study's name to its question (the first line of its folder's docstring) and its commands with times. Imports no study."""
    by_name = {}
    for path in sorted(pathlib.Path(__file__).parent.glob("*/__init__.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        commands = [line.strip() for line in text.splitlines() if line.strip().startswith("python -m experiments.")]
        if commands:
            by_name[path.parent.name] = (text.splitlines()[0], commands)
    return by_name


def main() -> None:
    """Prints the list."""
    console = Console(highlight=False)
    for name, (question, commands) in studies().items():
        console.print(f"[bold]{name}[/bold]: {question}", soft_wrap=True)
        for command in commands:
            console.print(f"    {command}", soft_wrap=True)


if __name__ == "__main__":
    main()
