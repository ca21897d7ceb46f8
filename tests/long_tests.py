"""Which tests are long and which are slow: those that took more than 1.5 and 3 seconds of processor time when all were last timed.

python -m pytest -n 2                                what is neither, for work in progress: about ten minutes on two cores
python -m pytest -n 2 -m long                        what is long, which CI runs too
python -m pytest -n 2 -m slow                        what is slow, by these lists or by its own marker, before an issue is closed
python -m pytest -n 2 -m "not slow" --note-long      times what is not slow, and writes both lists anew; slow ones stay slow

Processor time, that of started processes included, hardly depends on what else the machine does. It is that of a whole test with its
fixtures, so who makes a shared fixture first pays for it. A test with a marker ``slow`` of its own needs no line.
"""

import pathlib
import resource
import time

import pytest

LONG, SLOW = 1.5, 3.0  # seconds of processor time
LISTS = {"long": pathlib.Path(__file__).with_suffix(".txt"), "slow": pathlib.Path(__file__).with_name("slow_tests.txt")}

_NAME, _BEGUN = "processor seconds", pytest.StashKey[float]()
_seconds: dict[str, float] = {}  # by test


def pytest_addoption(parser):
    parser.addoption("--note-long", action="store_true", help="time the tests and write tests/long_tests.txt and slow_tests.txt anew")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items):
    listed = {marker: set(path.read_text(encoding="utf-8").splitlines()) for marker, path in LISTS.items()}
    for item in items:
        marker = next((marker for marker in ("slow", "long") if item.nodeid in listed[marker]), None)
        if marker is not None and item.get_closest_marker("slow") is None:
            item.add_marker(marker)


def _processor_seconds():
    """Of this process and of the processes that it has started and waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_setup(item):
    item.stash[_BEGUN] = _processor_seconds()
    yield


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_teardown(item):
    yield
    item.user_properties.append((_NAME, _processor_seconds() - item.stash[_BEGUN]))  # the report takes it along from a worker


def pytest_runtest_logreport(report):
    measured = dict(report.user_properties).get(_NAME)  # None for doctests outside this folder, whose setup and teardown are not seen here
    _seconds[report.nodeid] = measured if measured is not None else _seconds.get(report.nodeid, 0.0) + report.duration


def pytest_sessionfinish(session):
    if session.config.option.note_long and not hasattr(session.config, "workerinput"):
        slow = {name for name in LISTS["slow"].read_text(encoding="utf-8").splitlines() if (LISTS["slow"].parents[1] / name.split("::")[0]).exists()}
        for marker, names in noted(_seconds, slow).items():
            LISTS[marker].write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def noted(seconds, slow):
    """The tests of each list in order, where ``slow`` are those on its list so far, which were not timed.

    Example:
        >>> noted({"a.py::one": 9.0, "a.py::two": 2.0, "b.py::one": 0.1}, {"c.py::one"})
        {'long': ['a.py::two'], 'slow': ['a.py::one', 'c.py::one']}
    """
    long = [name for name, value in seconds.items() if LONG < value <= SLOW]
    return {"long": sorted(long), "slow": sorted(slow - seconds.keys() | {name for name, value in seconds.items() if value > SLOW})}
