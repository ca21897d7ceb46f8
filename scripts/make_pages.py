"""Tables, figures and numbers of README and docs from the records in docs/measured.

    python scripts/make_pages.py                                    brings everything up to date
    python scripts/make_pages.py add results/large_batch/0123456789 --name digits      keeps a run, then does so
    python scripts/make_pages.py add-score score                    keeps the files of scripts/score_advice.py
    python scripts/make_pages.py add-score within --name within     those of scripts/score_within.py
    python scripts/make_pages.py list                               the runs that are kept, with their sizes

A figure is drawn anew only if what it shows has changed.
"""

import argparse
import pathlib
import shutil
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from experiments.harness.environment import settle

if __name__ == "__main__":
    settle()

from experiments.harness.command_line import one_line_errors
from scripts import measured_runs, measured_score, page_figures
from scripts.page_blocks import is_kept, pages, write_blocks
from scripts.page_findings import SENTENCES
from scripts.page_sentences import Sentence, bring_up_to_date, changes, is_allowed


def name_of(page: pathlib.Path) -> str:
    """A page as the sentences name it."""
    return page.relative_to(measured_runs.ROOT).as_posix()


def sentences_of(page: str) -> list[Sentence]:
    """The sentences of a page whose runs are kept."""
    return [sentence for sentence in SENTENCES if sentence.page == page and all(map(is_kept, sentence.runs))]


def make_pages() -> list[str]:
    """Writes whatever does not follow from the records, and returns the names of the changed files, with the sentences that changed."""
    changed = []
    for path in pages():
        name = name_of(path)
        before = path.read_text(encoding="utf-8")
        text = bring_up_to_date(write_blocks(before), sentences_of(name))
        if text != before:
            path.write_text(text, encoding="utf-8")
            changed.append("\n".join([name, *changes(before, text, sentences_of(name))]))
    with tempfile.TemporaryDirectory() as folder:
        for drawn in page_figures.outdated(pathlib.Path(folder)):
            shutil.copy(drawn, page_figures.DOCS)
            changed.append(f"docs/{drawn.name}")
    return changed


def broken_sentences() -> list[str]:
    """The sentences whose words the records do not allow any more: people have to write them anew."""
    return [f"{sentence.page}: {sentence.text}" for path in pages() for sentence in sentences_of(name_of(path)) if not is_allowed(sentence)]


def list_runs() -> None:
    """Prints every run with its device, commit and size."""
    for name in measured_runs.kept_runs():
        run = measured_runs.read(name)
        size = sum(file.stat().st_size for file in (measured_runs.MEASURED / name).iterdir())
        print(f"{name}: {len(run.records)} records, {size / 1024:.0f} KiB, {run.provenance['device']}, commit {run.provenance['commit']}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage")
    add = stages.add_parser("add", help="keep a run folder of a study, or replace one of the same name")
    add.add_argument("folder", type=pathlib.Path)
    add.add_argument("--name", required=True, help="such as digits; the run is then <study>/digits")
    add_score = stages.add_parser("add-score", help="keep the files of scripts/score_advice.py, or of scripts/score_within.py")
    add_score.add_argument("folder", type=pathlib.Path)
    add_score.add_argument("--name", choices=list(measured_score.SCRIPTS), default="score")
    stages.add_parser("list", help="the runs that are kept")
    options = parser.parse_args()
    if options.stage == "list":
        return list_runs()
    with one_line_errors():
        if options.stage == "add":
            print(f"Kept in {measured_runs.keep(options.folder, options.name)}")
        elif options.stage == "add-score":
            print(f"Kept in {measured_score.keep_score(options.folder, options.name)}")
        print("\n".join(f"Changed: {change}" for change in make_pages()) or "Nothing has changed.")
        for sentence in broken_sentences():
            print(f"The records do not allow this any more: {sentence}")


if __name__ == "__main__":
    sys.exit(main())
