"""Tables, figure and verdict of the batch-shape study, from its records alone."""

import pathlib
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from experiments.harness.study import describe_setting
from jaxbatch.intervals import Interval, interval
from jaxbatch.results import plots
from jaxbatch.results.records import Record
from jaxbatch.results.report import print_table

KINDS = {"power": "power of two", "eight": "multiple of 8", "round": "even"}


def window(centre: int) -> dict[int, str]:
    """A power of two and its neighbours, as a map from size to kind; the others are compared with the odd ones.

    Example:
        >>> window(512)
        {512: 'power', 504: 'eight', 520: 'eight', 479: 'odd', 511: 'odd', 513: 'odd', 545: 'odd', 500: 'round'}
    """
    near = centre // 16 + 1
    sizes = {centre: "power", centre - 8: "eight", centre + 8: "eight"}
    sizes |= dict.fromkeys((centre - near, centre - 1, centre + 1, centre + near), "odd")
    return sizes | {centre - 12: "round"}


def _rounds(config, records: Sequence[Record]) -> dict[tuple[str, str], np.ndarray]:
    """Maps (model, type) to the times of whole rounds, ``(rounds, sizes)`` in the order of :func:`_sizes`."""
    sizes, tables = _sizes(config), {}
    times = {(r["model"], r["dtype"], r["round"], r["batch_size"]): r["ms"] for r in records if r["kind"] == "time"}
    for model in config.models:
        for dtype in config.dtypes:
            rows = [[times.get((model, dtype, n, size), np.nan) for size in sizes] for n in range(config.rounds)]
            tables[model, dtype] = np.array(rows)
    return tables


def _sizes(config) -> list[int]:
    return sorted(set().union(*(window(centre) for centre in config.centres)))


def _on_the_line(config, table: np.ndarray, centre: int) -> tuple[list[int], np.ndarray]:
    """The sizes around a centre, and their time ÷ the time on the line through the odd ones, for each round."""
    sizes, columns = list(window(centre)), {size: n for n, size in enumerate(_sizes(config))}
    odd = [size for size in sizes if window(centre)[size] == "odd"]
    slopes, levels = np.polyfit(odd, table[:, [columns[size] for size in odd]].T, 1)
    expected = levels[:, None] + slopes[:, None] * np.array(sizes)
    return sizes, table[:, [columns[size] for size in sizes]] / expected


def effect(config, records: Sequence[Record], model: str, dtype: str, kind: str, centre: int | None = None) -> Interval:
    """Time of the sizes of a kind ÷ the time expected from their odd neighbours: median over rounds of the mean over sizes."""
    table = _rounds(config, records)[model, dtype]
    parts = []
    for each in config.centres if centre is None else [centre]:
        sizes, ratios = _on_the_line(config, table, each)
        parts.append(ratios[:, [n for n, size in enumerate(sizes) if window(each)[size] == kind]])
    return interval(np.concatenate(parts, 1).mean(1), np.median, scale="log")


def odd_scatter(config, records: Sequence[Record], model: str, dtype: str) -> float:
    """Root mean square distance of odd sizes from their own line. An effect of the shape must be compared with this."""
    table = _rounds(config, records)[model, dtype]
    squares = []
    for centre in config.centres:
        sizes, ratios = _on_the_line(config, table, centre)
        odd = [n for n, size in enumerate(sizes) if window(centre)[size] == "odd"]
        away = np.nanmedian(ratios[:, odd], 0) - 1
        squares.append((away**2).sum() / (len(odd) - 2))  # the fitted line uses two degrees of freedom
    return float(np.sqrt(np.mean(squares)))


def _label(model: str, dtype: str) -> str:
    return f"{ {'simple_cnn': 'SimpleCNN', 'mlp': 'MLP'}[model] }, {dtype}"


def bytes_per_example(config, records: Sequence[Record], model: str, dtype: str) -> tuple[float, float]:
    """A step's memory as a line through all sizes: the fixed bytes, and the bytes per example, neither below 0."""
    from scipy.optimize import nnls

    rows = [r for r in records if r["kind"] == "memory" and (r["model"], r["dtype"]) == (model, dtype)]
    sizes = np.array([r["batch_size"] for r in rows], float)
    level, slope = nnls(np.stack([np.ones(len(sizes)), sizes], 1), np.array([r["bytes"] for r in rows], float))[0]
    return float(level), float(slope)


def print_tables(console: Console, config, records: Sequence[Record], provenance: Record) -> None:
    """The effect of the shape by kind and by power of two; memory by batch size."""
    describe_setting(console, config, provenance, f"{config.rounds} rounds in random order")
    pairs = [(model, dtype) for model in config.models for dtype in config.dtypes]
    rows = [
        [_label(*pair), *(f"{effect(config, records, *pair, kind):.3f}" for kind in KINDS), f"{odd_scatter(config, records, *pair):.3f}"]
        for pair in pairs
    ]
    title = "Time of a step ÷ the time expected from its odd neighbours (below 1: the shape makes it faster)"
    print_table(console, title, ["", *KINDS.values(), "scatter of odd sizes"], rows)
    rows = [[_label(*pair), *(f"{effect(config, records, *pair, 'power', centre):.3f}" for centre in config.centres)] for pair in pairs]
    print_table(console, "The powers of two one by one", ["", *map(str, config.centres)], rows)
    rows = [[_label(*pair), *(f"{effect(config, records, *pair, 'round', centre):.3f}" for centre in config.centres)] for pair in pairs]
    print_table(console, "Even neighbours one by one", ["", *(str(centre - 12) for centre in config.centres)], rows)
    sizes, tables = _sizes(config), _rounds(config, records)
    kinds = {size: kind for centre in config.centres for size, kind in window(centre).items()}
    rows = []
    for column, size in enumerate(sizes):
        rates = [interval(1e3 * size / tables[pair][:, column], np.median, scale="log") for pair in pairs]
        rows.append([f"{size} ({ {**KINDS, 'odd': 'odd'}[kinds[size]] })", *(f"{rate:,.0f}" for rate in rates)])
    print_table(console, "Throughput, examples a second", ["B", *(_label(*pair) for pair in pairs)], rows)
    rows = []
    for pair in pairs:
        memory = {r["batch_size"]: r["bytes"] for r in records if r["kind"] == "memory" and (r["model"], r["dtype"]) == pair}
        level, slope = bytes_per_example(config, records, *pair)
        rows.append([_label(*pair), *(f"{memory[c] / 1e6:.1f}" for c in config.centres), f"{level / 1e6:.1f} MB + {slope / 1e3:.2f} kB × B"])
    print_table(console, "Memory of a step from the compiled program, MB", ["", *map(str, config.centres), "line"], rows)


def verdict(config, records: Sequence[Record]) -> list[str]:
    """The sentences that the intervals allow, and no others."""
    sentences = []
    for model in config.models:
        for dtype in config.dtypes:
            clauses = []
            for kind, name in list(KINDS.items())[:2]:
                ratio = effect(config, records, model, dtype, kind)
                size = 100 * (ratio.value - 1)
                clauses.append(
                    f"a {name} takes {abs(size):.1f}% {'less' if size < 0 else 'more'} time than its odd neighbours lead to expect ({ratio:.3f})"
                    if ratio.excludes(1)
                    else f"no effect of a {name} shows ({ratio:.3f})"
                )
            scatter = 100 * odd_scatter(config, records, model, dtype)
            sentences.append(f"{_label(model, dtype)}: {'; '.join(clauses)}. Odd sizes scatter by {scatter:.1f}% about their own line.")
    return sentences


def draw_figure(config, records: Sequence[Record], folder: pathlib.Path) -> pathlib.Path:
    """Effects by size, one panel each for model and type, and memory by batch size."""
    pairs = [(model, dtype) for model in config.models for dtype in config.dtypes]
    columns = -(-(len(pairs) + 1) // 2)
    figure, panels = plots.subplots(2, columns, figsize=(4.6 * columns, 7.6), squeeze=False)
    for unused in panels.flat[len(pairs) + 1 :]:
        unused.set_visible(False)
    *panels, memory = panels.flat[: len(pairs) + 1]
    tables = _rounds(config, records)
    ratios = []
    for axes, pair in zip(panels, pairs, strict=True):
        labelled = set()
        for number, centre in enumerate(config.centres):
            sizes, table = _on_the_line(config, tables[pair], centre)
            ordered = sorted(range(len(sizes)), key=lambda n: sizes[n])
            for step, n in enumerate(ordered):
                kind = window(centre)[sizes[n]]
                ratio = interval(table[:, n], np.median, scale="log")
                color = {"power": plots.COLORS[1], "eight": plots.COLORS[0], "round": plots.COLORS[2], "odd": "#999999"}[kind]
                spread = [[ratio.value - ratio.low], [ratio.high - ratio.value]] if ratio.n > 1 else None
                label = {**KINDS, "odd": "odd"}[kind]
                axes.errorbar(
                    number * 10 + step,
                    ratio.value,
                    spread,
                    fmt={"power": "o", "eight": "s", "round": "D", "odd": "."}[kind],
                    color=color,
                    ms=7,
                    capsize=2,
                    label=None if label in labelled else label,
                )
                labelled.add(label)
                ratios.append(ratio.value)
        axes.axhline(1, color="black", lw=1)
        axes.set_xticks([10 * n + 3.5 for n in range(len(config.centres))], [f"around\n{centre}" for centre in config.centres])
        axes.set(title=_label(*pair), xlabel="batch size")
        axes.grid(axis="x", visible=False)
    low, high = np.percentile(ratios, [2, 98]) if ratios else (0.9, 1.1)
    for axes in panels:
        axes.set_ylim(min(0.9, low - 0.05), max(1.1, high + 0.05))
        axes.set_ylabel("time ÷ line through odd neighbours")
    panels[0].legend(fontsize=9, ncols=2)
    for pair, color, marker in zip(pairs, plots.COLORS, "osD^"):
        rows = sorted((r["batch_size"], r["bytes"] / 1e6) for r in records if r["kind"] == "memory" and (r["model"], r["dtype"]) == pair)
        memory.plot(*zip(*rows), marker=marker, ms=4, color=color, label=_label(*pair), lw=1.2)
    memory.set(title="Memory of a step", xlabel="batch size", ylabel="MB", ylim=(0, None))
    memory.legend(fontsize=9)
    figure.suptitle(f"{config.dataset}, median of {config.rounds} rounds with 95% intervals")
    return plots.save(figure, folder)
