"""Which tests are long: those that took more than 1.5 seconds when all were last timed, and all of a file that waits for a fixture.

python -m pytest -n 2                                what is not long, for work in progress: about ten minutes on two cores
python -m pytest -n 2 -m long                        the rest, which CI runs too
python -m pytest -n 2 -m "not slow" --note-long      times both and writes long_tests.txt anew
"""

import pathlib

import pytest

LIMIT = 1.5  # seconds
LIST = pathlib.Path(__file__).with_suffix(".txt")

_seconds: dict[tuple[str, str], float] = {}  # by test and phase


def pytest_addoption(parser):
    parser.addoption("--note-long", action="store_true", help="time the tests and write tests/long_tests.txt anew")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items):
    listed = set(LIST.read_text(encoding="utf-8").splitlines())
    for item in items:
        if listed & {item.nodeid, file_of(item.nodeid)} and item.get_closest_marker("slow") is None:
            item.add_marker("long")


def pytest_runtest_logreport(report):
    _seconds[report.nodeid, report.when] = report.duration


def pytest_sessionfinish(session):
    if session.config.option.note_long and not hasattr(session.config, "workerinput"):
        LIST.write_text("".join(f"{name}\n" for name in long_ones(_seconds)), encoding="utf-8")


def long_ones(seconds):
    """The files and tests that belong on the list, in order.

    Example:
        >>> long_ones({("a.py::one", "call"): 2.0, ("a.py::two", "call"): 0.1, ("b.py::one", "setup"): 2.0, ("b.py::one", "call"): 2.0})
        ['a.py::one', 'b.py']
    """
    over = {key for key, value in seconds.items() if value > LIMIT}
    files = {file_of(name) for name, phase in over if phase == "setup"}
    return sorted(files | {name for name, phase in over if phase == "call" and file_of(name) not in files})


def file_of(name: str) -> str:
    """The file of a test."""
    return name.split("::")[0]
