"""The cross-check's table, failures, comparison, figure and closing sentence, from its records alone."""

import math
import pathlib
from collections.abc import Sequence

from rich.console import Console

from experiments.cross_check.cases.case import ROUNDING
from experiments.cross_check.cases.files import Pair
from jaxbatch.results import plots
from jaxbatch.results.records import Record
from jaxbatch.results.report import print_table


def word(records: Sequence[Record]) -> str:
    """The text of a cell of the table: the worst of its records.

    ``ok`` with the largest error as a share of its bound; ``bound > 1`` if rounding may change everything, so that only
    numbers that are not finite fail; ``tf32`` if the platform's default multiplication explains the error; else ``WRONG``.
    """
    if any(not record["passed"] and not record["tf32"] for record in records):
        return "WRONG"
    if any(record["tf32"] for record in records):
        return "tf32"
    if all(record["bound"] >= 1 for record in records):
        return "bound > 1"
    return f"ok {max(share(record) for record in records):.2f}"


def share(record: Record) -> float:
    """Error ÷ bound; 0 where both are 0."""
    if record["error"] is None:
        return math.inf
    return 0.0 if record["error"] == 0 else record["error"] / record["bound"] if record["bound"] else math.inf


_COLORS = {"ok": "green", "bound": "yellow", "tf32": "yellow", "WRONG": "bold red"}


def print_table_of(console: Console, records: Sequence[Record], machines: dict) -> None:
    """A row for each computation, a column for each backend and precision."""
    columns = list(dict.fromkeys((record["backend"], record["precision"]) for record in records))
    columns.sort(key=lambda pair: (list(machines).index(pair[0]), list(ROUNDING).index(pair[1])))
    rows = list(dict.fromkeys(record["computation"] for record in records))
    lines = []
    for row in rows:
        mine = [record for record in records if record["computation"] == row]
        bounds = [record["bound"] for record in mine if record["precision"] == "float32"]
        widest = "–" if not bounds else "exact" if max(bounds) == 0 else f"{max(bounds):.0e}"
        cells = []
        for backend, precision in columns:
            matching = [record for record in mine if (record["backend"], record["precision"]) == (backend, precision)]
            text = word(matching) if matching else "–"
            color = _COLORS.get(text.split()[0], "dim")
            cells.append(f"[{color}]{text}[/{color}]")
        lines.append([row, str(len({(r["size"], r["form"]) for r in mine})), widest, *cells])
    heads = ["computation", "runs", "bound", *(f"{backend}\n{precision}" for backend, precision in columns)]
    print_table(console, "Largest error as a share of its bound (column bound: the largest bound in float32)", heads, lines)


def print_failures(console: Console, records: Sequence[Record], machines: dict) -> bool:
    """Prints a line for each disagreement; returns True if there is none."""
    bad = [record for record in records if not record["passed"] and not record["tf32"]]
    for record in bad:
        machine = machines[record["backend"]]
        what = f"{record['computation']}, {record['size']}, {record['form']}, {record['precision']}"
        where = f"on {record['backend']} ({machine['device']}, jax {machine['jax']}, jaxlib {machine['jaxlib']})"
        error = "not a number" if record["error"] is None else f"{record['error']:.2g}"
        explanation = record["failure"] or f"error {error}, bound {record['bound']:.2g}; first element beyond the bound: {record['where']}"
        console.print(f"WRONG: {what} {where}: {explanation}", style="bold red", soft_wrap=True, markup=False)
    return not bad


def print_comparison(console: Console, pairs: Sequence[Pair]) -> bool:
    """Prints for each pair of backends how many are bit-equal, within the bounds or apart; returns True if none is apart."""
    for here, there in dict.fromkeys((pair.here, pair.there) for pair in pairs):
        mine = [pair for pair in pairs if (pair.here, pair.there) == (here, there)]
        counts = {kind: sum(pair.relation == kind for pair in mine) for kind in ("bit-equal", "within", "apart")}
        numbers = f"{counts['bit-equal']} are equal to the bit, {counts['within']} within the bounds, {counts['apart']} beyond them"
        console.print(f"{here} here against {there} in the file, {len(mine)} computations: {numbers}.", soft_wrap=True)
    disagreeing = [pair for pair in pairs if pair.relation == "apart"]
    for pair in disagreeing:
        what = f"{pair.computation}, {pair.size}, {pair.form}, {pair.precision}, {pair.here} against {pair.there}"
        console.print(f"DIFFERENT: {what}: the difference is {pair.difference:.2g}, the bound {pair.allowed:.2g}", style="bold red", soft_wrap=True)
    return not disagreeing


def closing(records: Sequence[Record], machines: dict) -> str:
    """The closing sentence."""
    bad = [record for record in records if not record["passed"] and not record["tf32"]]
    where = " and ".join(f"{backend} ({machine['device']}, jaxlib {machine['jaxlib']})" for backend, machine in machines.items())
    if bad:
        names = ", ".join(dict.fromkeys(record["computation"] for record in bad))
        return f"{len(bad)} of {len(records)} computations on {where} are wrong: {names}. Do not trust this machine's numbers."
    # Only records with a bound below 1: a larger bound says nothing about the error.
    nearest = max((record for record in records if record["bound"] < 1), key=share)
    rough = sum(record["tf32"] for record in records)
    tf32 = f"; {rough} with the default precision of matrix products are rounded to TF32" if rough else ""
    return (
        f"All {len(records)} computations on {where} agree with the truth{tf32}; the one nearest to its bound is "
        f"{nearest['computation']} in {nearest['precision']}, with an error of {share(nearest):.2f} of the bound."
    )


_FLOOR = 2.0**-60  # where exact results are drawn, since a logarithmic axis has no 0


def draw_figure(records: Sequence[Record], folder: pathlib.Path) -> pathlib.Path:
    """Draws error by size, one panel per computation, and below those with one size; marks are errors, lines are bounds."""
    records = [record for record in records if record["error"] is not None]
    names = list(dict.fromkeys(record["computation"] for record in records))
    varied = [name for name in names if len({r["number"] for r in records if r["computation"] == name}) > 1]
    single = [name for name in names if name not in varied]
    columns = min(5, max(1, len(varied)))
    lines = -(-len(varied) // columns)
    heights = [2.6] * lines + [0.9 + 0.24 * len(single)]
    figure, panels = plots.subplots(lines + 1, columns, figsize=(max(8, 3.4 * columns), sum(heights)), squeeze=False, height_ratios=heights)
    series = list(dict.fromkeys((record["backend"], record["precision"]) for record in records))
    colors = dict(zip(series, plots.COLORS * 3, strict=False))
    for axes, name in zip(panels.flat, varied, strict=False):
        for pair in series:
            mine = [r for r in records if (r["computation"], r["backend"], r["precision"]) == (name, *pair)]
            mine.sort(key=lambda record: record["number"])
            _points(axes, [r["number"] for r in mine], mine, colors[pair], f"{pair[0]} {pair[1]}")
        axes.set(xscale="log", yscale="log", title=name, xlabel="length of the longest sum")
    for axes in list(panels.flat)[len(varied) :]:
        axes.remove()
    if single:
        axes = figure.add_subplot(panels[0, 0].get_gridspec()[lines, :])
        for pair in series:
            mine = [r for r in records if r["computation"] in single and (r["backend"], r["precision"]) == pair]
            rows = [single.index(record["computation"]) for record in mine]
            axes.plot([max(record["error"], _FLOOR) for record in mine], rows, "o", ms=4, color=colors[pair], label=f"{pair[0]} {pair[1]}")
            axes.plot([max(record["bound"], _FLOOR) for record in mine], rows, "|", ms=9, color=colors[pair])
        axes.set_yticks(range(len(single)), single)
        axes.set(xscale="log", xlabel="relative error; lines and bars are bounds; far left: no error at all")
        axes.invert_yaxis()
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(4, len(handles)))
    return plots.save(figure, folder)


def _points(axes, numbers: Sequence[int], records: Sequence[Record], color: str, label: str) -> None:
    if records:
        axes.plot(numbers, [max(record["error"], _FLOOR) for record in records], "o", ms=4, color=color, label=label)
        widest = {number: max(r["bound"] for r in records if r["number"] == number) for number in numbers}
        axes.plot(list(widest), [max(bound, _FLOOR) for bound in widest.values()], "-", lw=0.8, color=color)
