"""Every report shows records whose measurements were not finite: JSON has no NaN, so they come back as null."""

import contextlib
import io

import pytest
from rich.console import Console

from tests.experiments import test_resume
from tests.experiments.test_resume import SHORT, small  # noqa: F401 (a fixture)

# What a study sets or times itself is finite.
SET = ("learning_rate", "rate", "epoch", "epochs", "progress", "factor", "growth", "seconds", "margin", "ms")


def measured_fields(records):
    """Kind and name of what the records hold as floating-point numbers, or as null."""
    pairs = ((record["kind"], name, value) for record in records for name, value in record.items())
    is_set = lambda name: name in SET or name.endswith(("_ms", "seconds")) or name.startswith("seconds_")
    return sorted({(kind, name) for kind, name, value in pairs if isinstance(value, float) and not is_set(name)})


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_report_shows_what_was_not_finite(name, tmp_path, monkeypatch):
    study, shown = SHORT[name], []
    monkeypatch.setattr(study, "show_results", lambda _, config, run, report, *figure: shown.append((config, run, report)), raising=False)
    test_resume.call(study, tmp_path)
    failed = []
    for config, run, report in shown:
        for kind, field in measured_fields(run.records):
            for only_first in (True, False):
                of_kind = [number for number, record in enumerate(run.records) if record["kind"] == kind and field in record]
                lost = of_kind[:1] if only_first else of_kind
                records = [record | {field: None} if number in lost else record for number, record in enumerate(run.records)]
                try:
                    with contextlib.redirect_stdout(io.StringIO()):
                        report.print_tables(Console(), config, records, run.provenance)
                        report.verdict(config, records)
                except (TypeError, ValueError, KeyError, IndexError, ZeroDivisionError) as error:
                    failed.append((report.__name__, kind, field, only_first, repr(error)))
    assert not failed, "\n".join(map(str, failed))
