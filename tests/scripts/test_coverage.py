"""Every kind of interval holds a known truth as often as it says, in the table of docs/intervals.md and again here; no other kind is shown."""

import ast
import re

import pytest

from scripts.coverage import CASES, Case, coverage
from tests.conftest import ROOT

LEAST = 93.0  # percent, of nominally 95, from 3 measurements on
LEAST_OF = {  # known to be a little too narrow; the page says so
    "ratio with denominators near zero": 92.0,  # of denominators that are skew and signed, which no scale makes normal
    "trace of the Hessian": 91.0,  # where few eigenvalues make most of it
}
SEVERAL = [case for number, case in enumerate(CASES) if case.name not in {other.name for other in CASES[:number]}]


def table() -> dict[tuple[str, str], dict[int, float]]:
    """The page's table: (interval, data) to coverage by n."""
    rows = [line.strip("|").split("|") for line in (ROOT / "docs" / "intervals.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row] for row in rows if row[3].strip() == "95"]
    return {(row[0], row[2]): {int(n): float(share) for n, share in (cell.split(": ") for cell in row[4:])} for row in cells}


def label(case: Case, family: str) -> str:
    name = case.families[family == "log-normal"]
    return f"{name}, {case.spread:g}" if name == family else name


def test_the_page_shows_every_kind_and_each_covers():
    shown = table()
    assert set(shown) == {(case.name, label(case, family)) for case in CASES for family in ("normal", "log-normal")}
    low = {key: by_count for key, by_count in shown.items() if any(share < LEAST_OF.get(key[0], LEAST) for n, share in by_count.items() if n > 2)}
    assert not low, low
    assert all({3, 5, 10} <= set(by_count) for by_count in shown.values())


@pytest.mark.parametrize("family", ["normal", "log-normal"])
@pytest.mark.parametrize("case", SEVERAL, ids=lambda case: case.name)
def test_few_measurements_cover(case, family):
    """A percentile bootstrap of 3 holds the truth in 79% of cases, which fails."""
    assert coverage(case, family, 3, 120, seed=1) >= 0.88


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_page_is_what_the_script_measures(number):
    case, shown = CASES[number], table()
    for family in ("normal", "log-normal"):
        for n in (count for count in case.counts if count < 30):
            assert round(100 * coverage(case, family, n, 1000), 1) == pytest.approx(shown[case.name, label(case, family)][n], abs=0.3)


def test_reports_make_intervals_by_these_functions_alone():
    """An interval that a study makes by hand would stand in no row of the table."""
    by_hand = re.compile(r"\b(bootstrap|percentile|quantile|sem|t\.ppf|Interval)\(")
    allowed = {
        ("convergence/report.py", "quantile("),  # stretches of a metric
        ("gradient_smoothness/report.py", "percentile("),  # limits of an axis
        ("batch_shape/report.py", "percentile("),  # limits of an axis
        ("advise/records.py", "Interval("),  # reads what was written
        ("advise/verify.py", "Interval("),  # without ends
        ("scripts/advice_promises.py", "Interval("),  # reads what was written; without ends
        ("scripts/kept_numbers.py", "Interval("),  # without ends
        ("scripts/score_advice.py", "Interval("),  # without ends
        ("scripts/within_building.py", "quantile("),  # of the advised sizes, as advise_within does
        ("scripts/within_curve.py", "Interval("),  # without ends
        ("scripts/within_exponents.py", "quantile("),  # of the place of a minimum, whose values are drawn anew
        ("scripts/within_curve.py", "quantile("),  # of a mean that is read on a curve, both drawn anew
        ("scripts/score_against.py", "quantile("),  # of regrets over cases and seeds; no interval
        ("scripts/within_table.py", "quantile("),  # of judged regrets; no interval
    }
    paths = [path for folder in ("experiments", "scripts") for path in sorted((ROOT / folder).rglob("*.py")) if path.name != "coverage.py"]
    seen = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (match := by_hand.search(ast.unparse(node.func) + "(")):
                seen.add((f"{path.parent.name}/{path.name}", match[0]))
    assert seen <= allowed, seen - allowed
    assert len(paths) > 80
