"""The structure that CONTRIBUTING tells of: imports point one way, modules fit in one's head."""

import ast
import subprocess
import sys

from tests.conftest import ROOT

LONGEST_MODULE, LONGEST_FUNCTION = 250, 60  # lines; a function's without its docstring


EMPTY_NAMES = {"found", "told", "apart", "way", "place", "places"}  # they do not say what a value is


def modules():
    return sorted(path for folder in ("jaxbatch", "experiments", "scripts") for path in (ROOT / folder).rglob("*.py"))


def test_imports_point_one_way():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "3 kept, 0 broken" in done.stdout, done.stdout + done.stderr


def listed_modules() -> list[str]:
    """The modules of jaxbatch in the order of CONTRIBUTING's list."""
    text, folder, names = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), "", []
    for line in text.split("jaxbatch/\n", 1)[1].split("\nexperiments/", 1)[0].splitlines():
        name, deep = line.split()[0], line.startswith(" " * 8)
        if name.endswith("/"):
            folder = name[:-1] + "."
        else:
            names.append(f"jaxbatch.{folder if deep else ''}{name.removesuffix('.py')}")
    return names


def test_a_module_imports_only_what_stands_above_it():
    names, above = listed_modules(), []
    for name in names:
        tree = ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))
        imported = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)} & set(names)
        assert imported <= set(above), f"{name} imports {sorted(imported - set(above))}, which stands below it in CONTRIBUTING's list"
        above.append(name)
    assert len(names) > 80


def test_modules_are_short():
    paths = [path for folder in ("jaxbatch", "experiments", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert len(lengths) > 150 and {path: length for path, length in lengths.items() if length > LONGEST_MODULE} == {}


def test_functions_are_short():
    long = {}
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
                length = node.end_lineno - body[0].lineno + 1
                if length > LONGEST_FUNCTION:
                    long[f"{path.name}: {node.name}"] = length
    assert long == {}


def test_names_say_what_a_value_is():
    empty = set()
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = next((getattr(node, field) for field in ("id", "arg", "name", "attr") if hasattr(node, field)), None)
            if name in EMPTY_NAMES and not isinstance(node, ast.keyword):  # a keyword may be the field of a record
                empty.add(f"{path.name}: {name}")
    assert empty == set()


def test_code_is_formatted_and_clean():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
