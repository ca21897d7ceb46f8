"""The figures of the pages, drawn from the kept runs by the studies' own code."""

import pathlib
import re
import shutil
import tempfile

from PIL import Image

from experiments.adabatch import report as adabatch_report
from experiments.adabatch_figures import __main__ as adabatch_figures
from jaxbatch.results.plots import FINGERPRINT
from jaxbatch.results.records import RunFolder
from scripts import measured_runs
from scripts.page_blocks import pages

DOCS = measured_runs.ROOT / "docs"
# The networks of AdaBatch that are drawn side by side, once all of these runs are kept.
ADABATCH = {"cifar10": ("cifar10_vgg19_bn", "cifar10_resnet20", "cifar10_alexnet")}


def shown_figures() -> set[str]:
    """The names of the PNG files that the pages show."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages())
    return set(re.findall(r"([\w-]+\.png)\)", text))


def draw_figures(folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws all figures that the pages show and that follow from kept runs."""
    shown, drawn = shown_figures(), []
    for name in measured_runs.kept_runs():
        if any(figure.startswith(name.replace("/", "_")) for figure in shown):
            drawn += measured_runs.draw(name, folder)
    for dataset in ADABATCH:
        drawn += draw_adabatch(dataset, folder)
    return [path for path in drawn if path.name in shown]


def draw_adabatch(dataset: str, folder: pathlib.Path) -> list[pathlib.Path]:
    """All networks of the AdaBatch study side by side; nothing while one of them is not kept.

    The times of their passes are not drawn: those of the documentation were measured on an idle machine.
    """
    names, drawn = [f"adabatch/{name}" for name in ADABATCH[dataset]], []
    if not set(names) <= set(measured_runs.kept_runs()):
        return []
    with tempfile.TemporaryDirectory() as results:
        for name in names:
            run, path = measured_runs.read(name), pathlib.Path(results) / name
            path.mkdir(parents=True)
            adabatch_report.save_arrays(run.config, RunFolder(path, run.records, run.provenance))
        runs = adabatch_figures.load_runs(adabatch_figures.Config(dataset=dataset, output_dir=results))
        for key in ("loss", "test_error"):
            path = adabatch_figures.draw(runs, key, pathlib.Path(results))
            drawn.append(pathlib.Path(shutil.copy(path, folder / f"adabatch_{path.name}")))
    return drawn


def fingerprint_of(path: pathlib.Path) -> str | None:
    """What a PNG file says that it shows; None where it says nothing, or does not exist."""
    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.info.get(FINGERPRINT)


def outdated(folder: pathlib.Path) -> list[pathlib.Path]:
    """The figures, drawn anew into a folder, that show something else than those of the documentation."""
    return [path for path in draw_figures(folder) if fingerprint_of(path) != fingerprint_of(DOCS / path.name)]
