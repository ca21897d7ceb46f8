"""The structure that CONTRIBUTING tells of: imports point one way, modules fit in one's head."""

import ast
import functools
import graphlib
import pathlib
import re
import subprocess
import sys

from tests.conftest import ROOT

LONGEST_MODULE, LONGEST_FUNCTION = 250, 60  # lines; a function's without its docstring
MOST_ARROWS = 40  # between the folders of experiments/


EMPTY_NAMES = {"found", "told", "apart", "way", "place", "places"}  # they do not say what a value is


def modules():
    return sorted(path for folder in ("jaxbatch", "experiments", "scripts") for path in (ROOT / folder).rglob("*.py"))


def test_imports_point_one_way():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "3 kept, 0 broken" in done.stdout, done.stdout + done.stderr


def path_of(module: str) -> pathlib.Path | None:
    """The file of a module or of a package; None if there is none."""
    base = ROOT / module.replace(".", "/")
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)


@functools.cache
def imported_by(path: pathlib.Path) -> frozenset[str]:
    """The modules of this repository that a file imports, wherever in it; for a name of a package, the module that makes the name."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names if path_of(name.name)}
        elif isinstance(node, ast.ImportFrom) and node.module and path_of(node.module):
            imported |= {origin(node.module, name.name) for name in node.names}
    return frozenset(imported)


def origin(module: str, name: str) -> str:
    """Where a name comes from: the module itself, one of a package, or what the package's ``__init__`` imports it from."""
    if path_of(f"{module}.{name}"):
        return f"{module}.{name}"
    for node in ast.parse(path_of(module).read_text(encoding="utf-8")).body if path_of(module).name == "__init__.py" else ():
        if isinstance(node, ast.ImportFrom) and node.module and path_of(node.module):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return origin(node.module, alias.name)
    return module


def listed_modules() -> list[str]:
    """The modules of jaxbatch in the order of CONTRIBUTING's list: a line for a room, then lines with the names of its modules."""
    text, folder, names = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), "", []
    for line in text.split("\njaxbatch/", 1)[1].split("\nexperiments/", 1)[0].splitlines()[1:]:
        if line.startswith(" " * 8):
            names += [f"jaxbatch.{folder}.{name}".removesuffix(".__init__") for name in re.findall(r"\w+", line)]
        else:
            first = line.split()[0]
            folder = first.removesuffix("/")
            names += [] if first.endswith("/") else [f"jaxbatch.{first.removesuffix('.py')}"]
    return names


def test_a_module_imports_only_what_stands_above_it():
    names, above = listed_modules(), set()
    files = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "jaxbatch").rglob("*.py") if path.name != "__init__.py"]
    assert sorted({*names, "jaxbatch.data"}) == sorted([*files, "jaxbatch.data"]) and len(names) == len(set(names))
    for name in names:
        # A package counts, too: `data` has code of its own, and what another one imports it from is not to be hidden by it.
        late = {module for module in imported_by(path_of(name)) if module.startswith("jaxbatch") and module not in above}
        assert not late, f"{name} imports {sorted(late)}, which stands below it in CONTRIBUTING's list"
        above.add(name)


def test_a_name_is_traced_to_the_module_that_makes_it():
    """What is imported from a package is imported from one of its modules."""
    assert origin("jaxbatch.layers", "conv") == "jaxbatch.layers.convolution" and origin("jaxbatch", "Goal") == "jaxbatch.training.goals"
    assert origin("jaxbatch.layers", "choose") == "jaxbatch.layers.choose" and origin("jaxbatch.data", "Dataset") == "jaxbatch.data"


def test_studies_have_no_cycle_and_few_arrows():
    files = set((ROOT / "experiments").rglob("*.py"))
    tuple(graphlib.TopologicalSorter({path: {path_of(module) for module in imported_by(path)} & files - {path} for path in files}).static_order())
    folder_of = lambda path: str(path.parent.relative_to(ROOT))
    arrows = {(folder_of(path), folder_of(path_of(module))) for path in files for module in imported_by(path) if path_of(module) in files}
    arrows = {(start, end) for start, end in arrows if start != end}
    assert 20 < len(arrows) <= MOST_ARROWS, sorted(arrows)


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
