"""The study: its flags, what it measures and in which order. Its question stands in the docstring of the package."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Console

from experiments.adabatch_figures import __doc__ as question
from experiments.harness.arms import PARTS, STYLES, draw_throughput, speed_up
from experiments.harness.command_line import one_line_errors, parse
from jaxbatch.intervals import interval
from jaxbatch.paths import local_path
from jaxbatch.results import plots
from jaxbatch.results.report import print_table

NETWORKS = ("vgg19_bn", "resnet20", "alexnet", "simple_cnn")  # in the order of the paper's tables


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags."""

    dataset: str = "cifar10"
    """Data set of the runs."""
    output_dir: str = "results"
    """Where the study's run folders are; the figures go beside them."""


class Run(NamedTuple):
    """What one run folder's ``arrays.npz`` holds."""

    path: pathlib.Path
    about: dict
    arrays: dict[str, np.ndarray]


def load_runs(config: Config) -> list[Run]:
    """The newest finished run of each network on the data set.

    Raises:
        FileNotFoundError: there is no such run; the message says how to make one.
    """
    folder, runs_by_model = local_path(config.output_dir, "--output-dir") / "adabatch", {}
    for path in sorted(folder.glob("*/arrays.npz"), key=lambda path: path.stat().st_mtime):
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays.pop("about")))
        if about["dataset"] == config.dataset:
            runs_by_model[about["model"]] = Run(path.parent, about, arrays)
    if not runs_by_model:
        raise FileNotFoundError(
            f"no finished run on {config.dataset} under {folder}. Make one, such as python -m experiments.adabatch --dataset {config.dataset}"
        )
    return [runs_by_model[name] for name in NETWORKS if name in runs_by_model]


def print_tables(console: Console, runs: Sequence[Run]) -> None:
    """Last test error by network and arm; seconds and speed-ups of the network's passes."""
    rows, costs = [], []
    for run in runs:
        for arm, name in run.about["arms"].items():
            error = 100 * (1 - run.arrays[f"{arm}_test_accuracy"])
            rows.append([run.about["model"], name, f"{run.about['rates'][arm]:g}", f"{interval(error[:, -1]):.2f}"])
            if arm == "tuned":  # it has the same steps as (a)
                continue
            spent = [run.arrays[f"{arm}_{part}_seconds"] for part in PARTS]
            theirs = [run.arrays[f"small_{part}_seconds"] for part in PARTS]
            ups = [speed_up(*pair) for pair in zip(spent, theirs, strict=True)] + [speed_up(sum(spent), sum(theirs))]
            ratios = ["1"] * 3 if arm == "small" else [f"{up:.2f}" for up in ups]
            costs.append([run.about["model"], name, *(f"{np.median(part):.1f}" for part in spent), *ratios])
    print_table(console, "Test error after the last epoch, %", ["network", "arm", "rate", "test error"], rows)
    print_table(console, "Seconds of the passes, and speed-up over (a)", ["network", "arm", *PARTS, "× forward", "× backward", "× both"], costs)


def draw(runs: Sequence[Run], key: str, folder: pathlib.Path) -> pathlib.Path:
    """One panel a network: training ``loss`` or ``test_error`` in percent by epoch, or ``throughput`` by batch size."""
    figure, panels = plots.subplots(1, len(runs), figsize=(4.6 * len(runs) + 0.6, 4.4), squeeze=False)
    for run, axes in zip(runs, panels[0], strict=True):
        rate = "" if key == "throughput" else f", rate {run.about['rates']['small']:g}"
        axes.set(title=run.about["model"] + rate)
        if key == "throughput":
            draw_throughput(axes, {count: _cost(run, count) for count in run.about["devices"]})
        else:
            _draw_epochs(axes, run, key)
    seeds = ", ".join(sorted({f"{run.about['seeds']} seeds" for run in runs}))
    subtitle = "passes of the network alone" if key == "throughput" else f"{seeds}; dotted: changes of the batch"
    figure.suptitle(f"{runs[0].about['dataset']}, {subtitle}")
    return plots.save(figure, folder, f"{runs[0].about['dataset']}_{key}")


def _draw_epochs(axes, run: Run, key: str) -> None:
    about = run.about
    epochs = np.arange(1, about["epochs"] + 1).tolist()
    for (arm, name), color, dash in zip(about["arms"].items(), plots.COLORS, STYLES, strict=False):
        table = run.arrays[f"{arm}_loss"] if key == "loss" else 100 * (1 - run.arrays[f"{arm}_test_accuracy"])
        plots.band(axes, epochs, [interval(column) for column in table.T], color=color, ls=dash, label=name)
    for change in range(about["every"], about["epochs"], about["every"]) if isinstance(about["every"], int) else ():
        axes.axvline(change + 0.5, color="grey", lw=0.6, ls=":")
    axes.set(xlabel="epoch", ylabel="training loss" if key == "loss" else "test error, %")
    axes.legend(fontsize=8)


def _cost(run: Run, count: int) -> dict[int, np.ndarray]:
    sizes, times = run.arrays[f"cost_{count}_batch_sizes"], [run.arrays[f"cost_{count}_{part}_ms"] for part in PARTS]
    return {int(size): np.array([part[n] for part in times]) for n, size in enumerate(sizes)}


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    config, console = parse(Config, question, args), Console(highlight=False)
    with one_line_errors():
        runs = load_runs(config)
        console.print(f"From {', '.join(str(run.path) for run in runs)}", soft_wrap=True)
        print_tables(console, runs)
        drawn = [draw(runs, key, local_path(config.output_dir, "--output-dir") / "adabatch") for key in ("loss", "test_error", "throughput")]
    console.print(f"Figures: {', '.join(map(str, drawn))}", soft_wrap=True)


if __name__ == "__main__":
    main()
